"""Policy gradients against exact expectations: every text and every batch is enumerated.

A net over three tokens, of which one ends a text, at most three tokens long, can write 15 texts.
An expectation over batches of B texts is a sum over 15^B of them: nothing here is random, and all
is in float64. At the end the mistakes of published code are planted, to see them noticed.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ravine.lightning_modules.generation.generate_text import (
    gather_logprobs,
    generate,
    pad_sequences_for_scoring,
)
from ravine.lightning_modules.generation.sampling import DecodingConfig
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.rl import kl as kl_module
from ravine.lightning_modules.rl import rollout as rollout_module
from ravine.lightning_modules.rl.advantages import AdvantageEstimator
from ravine.lightning_modules.rl.kl import KL, estimate_kl
from ravine.lightning_modules.rl.rollout import (
    Rollout,
    compute_ref_logprobs,
    compute_rollout_logprobs,
    policy_loss,
)

V, L, END = 3, 3, 2
COOL = DecodingConfig(0.8)
EXACT = 1e-10  # relative


def texts() -> list[tuple[int, ...]]:
    """All that can be written."""
    sequences: list[tuple[int, ...]] = [()]
    done = []
    while sequences:
        for token in range(V):
            text = (*sequences[0], token)
            (done if token == END or len(text) == L else sequences).append(text)
        sequences.pop(0)
    return sorted(done)


TEXTS = texts()
N = len(TEXTS)
TOKENS, MASK = torch.zeros(N, L, dtype=torch.int64), torch.zeros(N, L, dtype=torch.bool)
for row, written in enumerate(TEXTS):
    TOKENS[row, : len(written)] = torch.tensor(written)
    MASK[row, : len(written)] = True
LENGTHS = MASK.sum(1)
REWARDS = torch.linspace(-1, 2, N, dtype=torch.float64).sin() * 1.7
RIGHT = torch.tensor([float(text[0] == 1 and len(text) > 1) for text in TEXTS]).double()


def lively(seed: int) -> Transformer:
    torch.manual_seed(seed)
    net = Transformer(
        V + 2, 8, num_layers=1, d_model=8, num_heads=2, zero_init_residual=False
    ).double()
    return net


class Three(torch.nn.Module):
    """The net above, which cannot write the two tokens that stand for prompts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = lively(seed)

    def forward(self, tokens: Tensor, *cache) -> Tensor:
        return self.net(tokens, *cache)[..., :V]

    @property
    def blocks(self):
        return self.net.blocks


NET, REFERENCE = Three(0), Three(1)
PARAMETERS = list(NET.parameters())


def rollout(prompt: int = V, weights: Tensor | None = None) -> Rollout:
    """All texts after a prompt, as if they had been drawn."""
    text, places = pad_sequences_for_scoring([torch.tensor([prompt])] * N, TOKENS)
    weights = torch.ones(N, dtype=torch.float64) if weights is None else weights
    fake = Rollout(text, places, TOKENS, MASK, TOKENS.double(), weights, MASK.sum().double())
    reference, _ = compute_ref_logprobs(REFERENCE, text, places, TOKENS, MASK, COOL)
    with torch.no_grad():
        sampled = compute_rollout_logprobs(NET, fake, COOL)
    return fake._replace(ref_logprobs=reference, sampler_logprobs=sampled)


def logprobs(prompt: int = V, sampling: DecodingConfig = COOL) -> Tensor:
    """Of each text (N), with gradient."""
    return compute_rollout_logprobs(NET, rollout(prompt), sampling).sum(1)


def can_be_written(text: tuple[int, ...], among: int) -> bool:
    """Whether each token is one of the `among` most probable after those before it."""
    before = [torch.tensor([[V, *text[:place]]]) for place in range(len(text))]
    return all(
        token in NET(tokens)[0, -1].topk(among).indices.tolist()
        for token, tokens in zip(text, before, strict=True)
    )


def gradient(scalar: Tensor) -> Tensor:
    parts = torch.autograd.grad(scalar, PARAMETERS, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                      for p, g in zip(PARAMETERS, parts, strict=True)])  # fmt: skip


def off(found: Tensor, exact: Tensor) -> float:
    """Relative error."""
    return ((found - exact).norm() / exact.norm()).item()


P = logprobs().exp().detach()
OBJECTIVE = gradient((logprobs().exp() * REWARDS).sum())  # of E r


def ascent(
    estimator: AdvantageEstimator,
    weights: Tensor,
    prompt: int = V,
    sampling: DecodingConfig = COOL,
    kl: KL = KL(),  # noqa: B008
    change: Callable[[Rollout], Rollout] = lambda fake: fake,
) -> Tensor:
    """Minus the gradient of the loss, which is linear in the weights (N): their expectation's."""
    fake = change(rollout(prompt, weights * N))  # the loss divides by N
    scores = compute_rollout_logprobs(NET, fake, sampling)
    return -gradient(policy_loss(fake, scores, estimator, kl, L))


def expected(estimator: AdvantageEstimator, rewards: Tensor, size: int, p: Tensor = P) -> Tensor:
    """Expected weights of each text (N) in the mean over a batch of `size` drawn from p."""
    batches = torch.cartesian_prod(*[torch.arange(N)] * size).reshape(-1, size)
    likely = p[batches].prod(1, keepdim=True)
    weighed = AdvantageEstimator(estimator.method, "group", estimator.std_correction)
    w = weighed.advantages(rewards[batches].flatten(), size).reshape(-1, size) * likely / size
    return torch.zeros(N, dtype=torch.float64).index_add_(0, batches.flatten(), w.flatten())


def estimated(kind: str, size: int, rewards: Tensor = REWARDS, **how) -> Tensor:
    """The expected gradient step of an estimator on batches of `size`."""
    estimator = AdvantageEstimator(kind, **how)  # type: ignore[arg-type]
    return ascent(estimator, expected(estimator, rewards, size))


def test_the_probabilities_of_all_texts_add_up_to_one() -> None:
    assert N == 15
    assert P.sum().item() == pytest.approx(1, abs=1e-12)
    assert P.min() > 0.003  # every text matters


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reinforce_without_a_baseline_is_unbiased(size: int) -> None:
    assert off(estimated("none", size), OBJECTIVE) < EXACT


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_unbiased(size: int) -> None:
    assert off(estimated("rloo", size), OBJECTIVE) < EXACT


@pytest.mark.parametrize("size", [2, 3])
def test_the_batch_mean_as_baseline_scales_the_step_by_b_minus_1_over_b(size: int) -> None:
    assert off(estimated("mean", size), OBJECTIVE * (size - 1) / size) < EXACT


@pytest.mark.parametrize(("kind", "scale"), [("rloo", 1.0), ("mean", 0.5), ("none", 1.0)])
def test_a_baseline_across_two_different_prompts_is_unbiased(kind: str, scale: float) -> None:
    """The lecture's setting: each sample has a prompt of its own, and is compared with all."""
    other = logprobs(V + 1).exp().detach()
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N))  # (N² 2)
    rewards = torch.stack((REWARDS[pairs[:, 0]], REWARDS.flip(0)[pairs[:, 1]]), 1)
    likely = P[pairs[:, 0]] * other[pairs[:, 1]]
    w = torch.stack([AdvantageEstimator(kind, "batch").advantages(pair) for pair in rewards])  # type: ignore
    w = w * likely[:, None] / 2
    found, exact = torch.zeros_like(OBJECTIVE), torch.zeros_like(OBJECTIVE)
    for place, prompt in enumerate((V, V + 1)):
        sums = torch.zeros(N, dtype=torch.float64).index_add_(0, pairs[:, place], w[:, place])
        found += ascent(AdvantageEstimator(kind), sums, prompt)  # type: ignore[arg-type]
        r = REWARDS if place == 0 else REWARDS.flip(0)
        exact += gradient((logprobs(prompt).exp() * r).sum()) / 2
    assert off(found, exact * scale) < EXACT


def test_several_groups_are_each_compared_within_themselves() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0])
    assert AdvantageEstimator("rloo", "group").advantages(rewards, 2).tolist() == [-2, 2, -4, 4]
    assert AdvantageEstimator("rloo", "batch").advantages(rewards, 2).tolist() == pytest.approx(
        [-8, -16 / 3, 4, 28 / 3]
    )


@pytest.mark.parametrize("kind", ["none", "rloo"])
def test_a_constant_as_divisor_changes_the_length_of_the_step_alone(kind: str) -> None:
    found = estimated(kind, 2, loss_normalization="constant")
    assert off(found, OBJECTIVE / L) < EXACT


def test_all_tokens_as_divisor_is_the_same_for_one_batch_of_known_length() -> None:
    tokens = ascent(AdvantageEstimator("none", loss_normalization="tokens"), P * REWARDS)
    assert off(tokens, OBJECTIVE * N / MASK.sum()) < EXACT


def test_a_ratio_of_one_is_not_clipped() -> None:
    found = estimated("rloo", 2, clip=0.2)
    assert off(found, OBJECTIVE) < EXACT


@pytest.mark.parametrize("sign", [1, -1])
def test_a_ratio_is_clipped_only_if_that_lowers_the_objective(sign: int) -> None:
    now = torch.tensor([[0.5], [-0.5], [0.1]], requires_grad=True)  # log-ratios, sampled at 0
    mask, weights = torch.ones(3, 1, dtype=torch.bool), sign * torch.ones(3)
    estimator = AdvantageEstimator("none", clip=0.2)
    estimator.loss(now, mask, weights, 1, 3, sampler_logprobs=torch.zeros(3, 1)).backward()
    moved = (now.grad != 0).flatten().tolist()  # type: ignore[union-attr]
    assert moved == ([False, True, True] if sign > 0 else [True, False, True])


@pytest.mark.parametrize(("clip", "high"), [(0.2, None), (0.2, 0.28), (10.0, None), (2.0, 0.1)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clipped_terms_are_their_formula_and_the_loss_their_sum(clip, high, sign) -> None:
    logprobs = torch.linspace(-3, 3, 8, dtype=torch.float64).view(2, 4).requires_grad_()
    sampled, w = torch.zeros(2, 4), torch.tensor([sign, 2 * sign], dtype=torch.float64)
    estimator = AdvantageEstimator("none", clip=clip, clip_high=high)
    terms = estimator.token_objectives(logprobs, w, sampled)
    top = 1 + (clip if high is None else high)
    for b, n in itertools.product(range(2), range(4)):
        ratio, each = math.exp(logprobs[b, n].item()), w[b].item()
        expected = min(ratio * each, min(max(ratio, 1 - clip), top) * each)
        assert terms[b, n].item() == pytest.approx(expected)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    loss = estimator.loss(logprobs, mask, w, 4, 4, sampled)
    torch.testing.assert_close(loss, -terms[mask].sum() / 2)
    plain = AdvantageEstimator("none").token_objectives(logprobs, w)
    torch.testing.assert_close(plain, w[:, None] * logprobs)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"clip": 0.0},
            r"clip=0\.0 is out of range; allowed: a finite number above 0; use clip=0.2",
        ),
        ({"clip": -0.2}, "clip=-0.2 is out of range; allowed"),
        ({"clip": math.inf}, "clip=inf is out of range; allowed"),
        ({"clip": math.nan}, "clip=nan is out of range; allowed"),
        ({"clip": 0.2, "clip_high": 0.0}, "clip_high=0.0 is out of range; allowed"),
        ({"clip_high": 0.28}, "clip_high=0.28 needs clip, the lower bound; use clip="),
    ],
)
def test_a_clip_that_bounds_nothing_is_refused(how, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdvantageEstimator("grpo", **how)


BINARY = P @ RIGHT  # the probability of a right text
RISE = gradient((logprobs().exp() * RIGHT).sum())


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_ascends_the_arcsine_with_the_closed_factor(size: int) -> None:
    found = estimated("grpo", size, RIGHT)
    assert off(found, RISE * grpo_factor(BINARY.item(), size)) < EXACT


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rejection_ascends_the_logarithm_with_the_closed_factor(size: int) -> None:
    found = estimated("rejection", size, RIGHT)
    assert off(found, RISE * (1 - (1 - BINARY) ** size) / BINARY) < EXACT


def grpo_factor(p: float, size: int) -> float:
    """E √(q(1-q)) / (p(1-p)) with q binomial."""
    ways = [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
    stds = [math.sqrt(k / size * (1 - k / size)) for k in range(size + 1)]
    return sum(w * s for w, s in zip(ways, stds, strict=True)) / (p * (1 - p))


def test_the_factors_tend_to_the_derivatives_of_their_phi() -> None:
    p = BINARY.item()
    slope = 1 / math.sqrt(p * (1 - p))  # π times that of (2/π) arcsin √t
    ratios = [grpo_factor(p, size) / slope for size in (4, 64, 1000)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1, abs=0.005)
    assert grpo_factor(p, 2) == pytest.approx(1)  # GRPO of two is REINFORCE


def test_the_sample_deviation_is_larger_by_the_root_of_b_over_b_minus_1() -> None:
    population = estimated("grpo", 3, RIGHT)
    sample = estimated("grpo", 3, RIGHT, std_correction="sample")
    assert off(sample * math.sqrt(3 / 2), population) < EXACT


def test_equal_rewards_give_zero_advantages_and_no_nan() -> None:
    for value in (0.1, 0.0, -3.7e5, 1e-300):
        equal = torch.full((7,), value, dtype=torch.float64)
        for kind in ("mean", "rloo", "grpo"):
            assert not AdvantageEstimator(kind).advantages(equal).any()
    assert not AdvantageEstimator("rejection").advantages(torch.zeros(4)).any()


ROUNDED = {  # rewards that arithmetic alone makes different
    "sums in another order": torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64),
    "two and two": torch.tensor([0.1 + 0.2, 0.3, 0.1 + 0.2, 0.3], dtype=torch.float64),
    "sums in float32": torch.tensor([1.29999995, 1.30000007, 1.29999995, 1.29999995]),
    "terms that cancel": torch.tensor([0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0], dtype=torch.float64),
    "large": torch.tensor([1e9, 1e9 + 1e-6, 1e9, 1e9], dtype=torch.float64),
    "negative": -torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64),
    "one without a reward": torch.tensor([0.1 + 0.2, 0.3, math.nan, 0.3], dtype=torch.float64),
}


@pytest.mark.parametrize("rewards", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("deviation", ["population", "sample"])
def test_rewards_that_differ_by_rounding_give_zero_advantages(rewards, scope, deviation) -> None:
    for kind in ("mean", "rloo", "grpo"):
        estimator = AdvantageEstimator(kind, baseline_scope=scope, std_correction=deviation)
        assert not estimator.advantages(rewards, 4).any()
    beside = torch.cat((rewards, torch.tensor([1.0, 0.0, 1.0, 0.0]).to(rewards)))
    w = AdvantageEstimator("grpo", baseline_scope="group").advantages(beside, 4)
    assert not w[:4].any()
    assert w[4:].tolist() == [1, -1, 1, -1]


def test_a_small_difference_above_rounding_gives_full_advantages() -> None:
    for scale in (1.0, 1e-6, 1e6):
        r = scale * torch.tensor([1.0, 1.0001, 1.0, 1.0001], dtype=torch.float64)
        w = AdvantageEstimator("grpo", baseline_scope="group").advantages(r, 4)
        torch.testing.assert_close(w, torch.tensor([-1, 1, -1, 1.0], dtype=torch.float64))


def test_integer_rewards_give_the_advantages_of_equal_floats() -> None:
    r = torch.tensor([1, 0, 0, 3])
    for kind in ("none", "mean", "rloo", "grpo"):
        assert (
            AdvantageEstimator(kind)
            .advantages(r)
            .equal(AdvantageEstimator(kind).advantages(r.double()))
        )


def test_rejection_accepts_a_one_with_a_rounding_error() -> None:
    r = torch.tensor([0.7 + 0.2 + 0.1, 0.0, 0.1 + 0.2 - 0.3, 1 + 2e-16], dtype=torch.float64)
    assert AdvantageEstimator("rejection").advantages(r).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize("kind", ["none", "mean", "rloo", "grpo", "rejection"])
def test_a_sample_without_a_reward_is_ignored_everywhere(kind: str) -> None:
    with_gaps = torch.tensor([1.0, math.nan, 0.0, 0.0, math.nan, 1.0, 1.0])
    estimator = AdvantageEstimator(kind)  # type: ignore[arg-type]
    w, scored = estimator.advantages(with_gaps), ~with_gaps.isnan()
    assert not w[~scored].any()
    torch.testing.assert_close(w[scored], estimator.advantages(with_gaps[scored]))


def test_rejection_refuses_rewards_that_are_not_binary() -> None:
    with pytest.raises(
        ValueError, match=r"a reward is 0\.5; allowed: 0, 1; .*Threshold.*method='rloo'"
    ):
        AdvantageEstimator("rejection").advantages(torch.tensor([1.0, 0.5]))


# KL: Δ = log p - log ref at the sampling temperature


def divergence() -> Tensor:
    """KL(p ‖ ref) of whole texts, with gradient."""
    actual, fake = logprobs(), rollout()
    assert fake.ref_logprobs is not None
    return (actual.exp() * (actual - fake.ref_logprobs.sum(1))).sum()


def next_token_divergence(forward: bool) -> Tensor:
    """Σ over prefixes, with the policy's probability held fixed, of the next token's KL."""
    total = torch.zeros((), dtype=torch.float64)
    prefixes = {text[:i] for text in TEXTS for i in range(len(text))}
    for prefix in prefixes:
        reach = sum(P[i] for i, text in enumerate(TEXTS) if text[: len(prefix)] == prefix)
        seen = torch.tensor([[V, *prefix]])
        actual = COOL.compute_logprobs(NET(seen)[0, -1])
        ref_logprobs_t = COOL.compute_logprobs(REFERENCE(seen)[0, -1]).detach()
        a, b = (ref_logprobs_t, actual) if forward else (actual, ref_logprobs_t)
        total = total + reach * (a.exp() * (a - b)).sum()
    return total


def test_k1_in_the_reward_is_the_gradient_of_the_reverse_divergence() -> None:
    fake, kl = rollout(), KL(0.3)
    assert fake.ref_logprobs is not None
    penalty = kl.beta * kl.kl_penalty(fake.sampler_logprobs, fake.ref_logprobs, MASK, L)
    found = ascent(AdvantageEstimator("none"), P * -penalty)
    assert off(found, -gradient(divergence()) * kl.beta / L) < EXACT


@pytest.mark.parametrize("kind", ["none", "mean", "rloo", "grpo", "rejection"])
def test_k1_beside_an_estimator_adds_its_gradient_to_the_estimators(kind: str) -> None:
    """Whatever the estimator makes of rewards; the batch mean shortens this by (B-1)/B, too."""
    fake, kl, estimator = rollout(), KL(0.3), AdvantageEstimator(kind)  # type: ignore[arg-type]
    assert fake.ref_logprobs is not None
    penalty = kl.beta * kl.kl_penalty(fake.sampler_logprobs, fake.ref_logprobs, MASK, L)
    weights = expected(estimator, RIGHT, 2) - expected(estimator.for_kl(), penalty, 2)
    exact = estimated(kind, 2, RIGHT)
    exact -= gradient(divergence()) * kl.beta / L * (0.5 if kind == "mean" else 1)
    assert off(ascent(estimator, weights), exact) < EXACT


@pytest.mark.parametrize(("name", "forward"), [("k2", False), ("k3", True)])
def test_k2_and_k3_in_the_loss_lower_the_next_tokens_divergence(name: str, forward: bool) -> None:
    fake, kl = rollout(), KL(0.3, name, "loss")  # type: ignore[arg-type]
    scores = compute_rollout_logprobs(NET, fake, COOL)
    assert fake.ref_logprobs is not None
    found = gradient((P * kl.kl_penalty(scores, fake.ref_logprobs, MASK, L)).sum())
    exact = gradient(next_token_divergence(forward)) / L
    assert off(found, exact) < EXACT
    assert not fake.ref_logprobs.requires_grad  # though the reference could learn
    assert off(found, gradient(divergence()) / L) > 0.05  # not the divergence of whole texts
    whole = policy_loss(fake._replace(advantages=0 * P), scores, AdvantageEstimator("none"), kl, L)
    assert whole.item() == pytest.approx(
        0.3 * kl.kl_penalty(scores, fake.ref_logprobs, MASK, L).mean().item()
    )


def test_k1_in_the_loss_has_no_gradient_at_all_and_is_refused() -> None:
    fake = rollout()
    assert fake.ref_logprobs is not None
    scores = compute_rollout_logprobs(NET, fake, COOL)
    delta = estimate_kl("k1", scores, fake.ref_logprobs).where(MASK, 0.0).sum(1)
    assert gradient((P * delta).sum()).norm() < 1e-12 * gradient(divergence()).norm()
    with pytest.raises(ValueError, match=r"exactly zero; .*k2 or k3 .*; use placement='reward'"):
        KL(0.1, "k1", "loss")
    with pytest.raises(ValueError, match="estimator='k2' cannot be used with placement='reward'"):
        KL(0.1, "k2", "reward")


def test_k1_and_k3_both_measure_the_divergence() -> None:
    fake = rollout()
    assert fake.ref_logprobs is not None
    # k3 of a token is unbiased for that token's divergence, so its sum is for the text's
    for name in ("k1", "k3"):
        sums = estimate_kl(name, fake.sampler_logprobs, fake.ref_logprobs).where(MASK, 0.0).sum(1)
        assert (P @ sums).item() == pytest.approx(divergence().item(), rel=1e-10)
    assert (estimate_kl("k3", fake.sampler_logprobs, fake.ref_logprobs)[MASK] >= 0).all()


# What is drawn


def test_the_sampler_draws_each_text_with_its_probability() -> None:
    """Chi-square over the 15 texts: a fixed seed, and a bound that one seed in 10^4 would pass."""
    count = 16_384
    prompts = [torch.tensor([V])] * count
    generated = generate(NET, prompts, L, 8, COOL, stops=[[END]], seed=3)  # type: ignore[arg-type]
    numbers = {text: i for i, text in enumerate(TEXTS)}
    found = torch.zeros(N)
    for tokens, mask in zip(generated.tokens, generated.mask, strict=True):
        found[numbers[tuple(tokens[mask].tolist())]] += 1
    chi = ((found - count * P) ** 2 / (count * P)).sum().item()
    assert 2.5 < chi < 42.6  # quantiles of 14 degrees of freedom: 0.0003 and 0.9999
    other = logprobs(sampling=DecodingConfig(1.0)).exp().detach()
    assert ((found - count * other) ** 2 / (count * other)).sum() > 60  # of another temperature


def test_only_tokens_before_the_end_count() -> None:
    """Tokens after the end may be anything: bitwise the same loss."""
    garbage = TOKENS.masked_fill(~MASK, 1)
    text, places = pad_sequences_for_scoring([torch.tensor([V])] * N, garbage)
    changed = rollout(V, REWARDS)._replace(input_ids=text, logit_positions=places, tokens=garbage)
    losses = [
        policy_loss(
            fake, compute_rollout_logprobs(NET, fake, COOL), AdvantageEstimator("none"), KL(), L
        )
        for fake in (rollout(V, REWARDS), changed)
    ]
    assert losses[0].item() == losses[1].item()
    scores = rollout().sampler_logprobs
    how = REWARDS, L, MASK.sum()
    for estimator in (AdvantageEstimator(), AdvantageEstimator(loss_normalization="tokens")):
        bare = estimator.loss(scores.masked_fill(~MASK, 7.0), MASK, *how)
        assert bare.item() == estimator.loss(scores, MASK, *how).item()


def test_drift_is_the_root_mean_square_over_the_sampled_tokens() -> None:
    fake = rollout()
    away = torch.where(torch.arange(L) == 1, 0.3, 0.0).where(MASK, 9.0)  # of the second token
    share = (LENGTHS > 1).sum() / LENGTHS.sum()
    found = rollout_module.logprob_gap(fake.sampler_logprobs + away, fake)
    assert found.item() == pytest.approx(0.3 * share.sqrt().item())


def test_top_k_is_scored_as_it_is_drawn() -> None:
    """With two of three tokens, fewer texts are possible, and their probabilities add up to one."""
    two = DecodingConfig(0.8, top_k=2)
    possible = torch.tensor([can_be_written(text, among=2) for text in TEXTS])
    assert 0 < possible.sum() < N
    p = logprobs(sampling=two).exp()[possible]
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    exact = gradient((p * REWARDS[possible]).sum())

    def keep(fake: Rollout) -> Rollout:
        rows = {
            k: v for k, v in fake._asdict().items() if k not in ("tokens_per_rank", "shared_prefix")
        }
        return Rollout(
            **{k: v[possible] for k, v in rows.items()}, tokens_per_rank=fake.tokens_per_rank
        )

    weights = torch.zeros(N, dtype=torch.float64)
    weights[possible] = p.detach() * REWARDS[possible] * possible.sum() / N
    assert off(ascent(AdvantageEstimator("none"), weights, V, two, change=keep), exact) < EXACT


# The traps of published code, planted in ours: what must notice each


def unmasked(logits: Tensor, tokens: Tensor, mask: Tensor, sampling: DecodingConfig) -> Tensor:
    return sampling.compute_logprobs(logits).gather(-1, tokens[..., None])[..., 0]


def at_temperature_one(
    logits: Tensor, tokens: Tensor, mask: Tensor, sampling: DecodingConfig
) -> Tensor:
    return gather_logprobs(logits, tokens, mask, replace(sampling, temperature=1.0))


def of_the_full_softmax(
    logits: Tensor, tokens: Tensor, mask: Tensor, sampling: DecodingConfig
) -> Tensor:
    return gather_logprobs(logits, tokens, mask, replace(sampling, top_k=None))


def without_the_end(
    logits: Tensor, tokens: Tensor, mask: Tensor, sampling: DecodingConfig
) -> Tensor:
    return gather_logprobs(logits, tokens, mask & (tokens != END), sampling)


Loss = Callable[..., Tensor]
LOSS: Loss = AdvantageEstimator.loss


def with_padding(self, scores, mask, *rest, **more) -> Tensor:
    return LOSS(self, scores, torch.ones_like(mask), *rest, **more)


def by_own_length(self, scores, mask, *rest, **more) -> Tensor:
    return LOSS(self, scores / mask.sum(1, keepdim=True), mask, *rest, **more)


def by_tokens(self, scores, mask, weights, length, tokens, *rest) -> Tensor:
    return LOSS(self, scores, mask, weights, length, tokens, *rest) * len(weights) / tokens


def the_mean_for_the_others(self, r, scored, count) -> Tensor:
    return COMPARED(replace(self, method="mean"), r, scored, count)


def always_of_a_sample(self, r, scored, count) -> Tensor:
    return COMPARED(replace(self, std_correction="sample"), r, scored, count)


def a_deviation_of_zero(self, r, scored, count) -> Tensor:
    w = r - r.mean(1, keepdim=True)
    return w / (r.std(1, keepdim=True, correction=0) + 1e-20)


def of_its_own_length(self, logprobs, ref_logprobs, mask, length) -> Tensor:
    return PENALTY(self, logprobs, ref_logprobs, mask, 1) / mask.sum(1)


def swapped(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return estimate_kl({"k1": "k1", "k2": "k3", "k3": "k2"}[name], logprobs, ref_logprobs)


COMPARED, PENALTY = AdvantageEstimator._centered, KL.kl_penalty
CHOSEN = (rollout_module, "gather_logprobs")
TRAPS: dict[str, tuple[list[tuple[object, str, object]], Callable[[], None]]] = {
    "1 scored at another temperature than drawn": (
        [(*CHOSEN, at_temperature_one)],
        lambda: test_reinforce_without_a_baseline_is_unbiased(2),
    ),
    "2 drawn from the top k, scored by the full softmax": (
        [(*CHOSEN, of_the_full_softmax)],
        lambda: test_top_k_is_scored_as_it_is_drawn(),
    ),
    "3 the end is not learned": (
        [(*CHOSEN, without_the_end)],
        lambda: test_reinforce_without_a_baseline_is_unbiased(2),
    ),
    "4 padding is learned": (
        [(*CHOSEN, unmasked), (AdvantageEstimator, "loss", with_padding)],
        lambda: test_only_tokens_before_the_end_count(),
    ),
    "5 divided by each text's own length": (
        [(AdvantageEstimator, "loss", by_own_length)],
        lambda: test_reinforce_without_a_baseline_is_unbiased(2),
    ),
    "6 divided by the tokens of the batch": (
        [(AdvantageEstimator, "loss", by_tokens)],
        lambda: test_rloo_is_unbiased(2),
    ),
    "7 the mean in the place of the others' mean": (
        [(AdvantageEstimator, "_centered", the_mean_for_the_others)],
        lambda: test_rloo_is_unbiased(2),
    ),
    "8 the deviation of a sample": (
        [(AdvantageEstimator, "_centered", always_of_a_sample)],
        lambda: test_grpo_ascends_the_arcsine_with_the_closed_factor(2),
    ),
    "8 a deviation of zero": (
        [(AdvantageEstimator, "_centered", a_deviation_of_zero)],
        lambda: test_equal_rewards_give_zero_advantages_and_no_nan(),
    ),
    "9 k1 in the loss": (
        [(KL, "__post_init__", lambda self: None)],
        lambda: test_k1_in_the_loss_has_no_gradient_at_all_and_is_refused(),
    ),
    "10 k3 in the place of k2": (
        [(kl_module, "estimate_kl", swapped)],
        lambda: test_k2_and_k3_in_the_loss_lower_the_next_tokens_divergence("k2", False),
    ),
    "11 k2 in the place of k3": (
        [(kl_module, "estimate_kl", swapped)],
        lambda: test_k2_and_k3_in_the_loss_lower_the_next_tokens_divergence("k3", True),
    ),
    "12 k1 divided by the text's own length": (
        [(KL, "kl_penalty", of_its_own_length)],
        lambda: test_k1_in_the_reward_is_the_gradient_of_the_reverse_divergence(),
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_planted_mistake_is_detected(trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistakes, notice = TRAPS[trap]
    notice()  # nothing to complain about yet
    for owner, name, mistake in mistakes:
        monkeypatch.setattr(owner, name, mistake)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        notice()
