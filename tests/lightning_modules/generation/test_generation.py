"""Generation: with or without a cache, alone or in a batch, a text is the same."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ravine.errors import UsageError
from ravine.lightning_modules.generation.generate_text import (
    gather_logprobs,
    generate,
    generate_stream,
    sequence_logprobs,
)
from ravine.lightning_modules.generation.sampling import DecodingConfig, row_uniforms
from ravine.lightning_modules.nn import Transformer

V, T = 23, 32
RULES = {
    "greedy": DecodingConfig(0.0),
    "sampled": DecodingConfig(1.0),
    "cool, every rule": DecodingConfig(0.8, top_k=9, top_p=0.9, min_p=0.02),
}
every_rule = pytest.mark.parametrize("sampling", RULES.values(), ids=RULES)


def lively(**shape: Any) -> Transformer:
    """A net whose predictions differ from token to token."""
    torch.manual_seed(0)
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "zero_init_residual": False} | shape
    net = Transformer(V, T, **shape).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 2
    return net


def prompts(count: int, longest: int = T) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randint(V, (1 + i % longest,), generator=g) for i in range(count)]


SHAPES = [
    {},
    {
        "positional_encoding": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": "all",
        "tie_embeddings": True,
    },
    {"positional_encoding": "sinusoidal", "attention_variant": "mean", "dropout": 0.5},
    {
        "positional_encoding": "none",
        "attention_variant": "qk",
        "residual": False,
        "activation": "none",
        "num_heads": 1,
    },
    {"attention_variant": "identity"},
    {"attention_variant": "embedding"},
    {"attention_variant": "shared_qk", "out_proj": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_rule
def test_a_kv_cache_does_not_change_the_samples(
    sampling: DecodingConfig, shape: dict[str, Any]
) -> None:
    """100 prompts of 1 to 32 tokens, 16 at a time, sliding windows, and two ways to stop."""
    net, prompt_list = lively(**shape), prompts(100 if not shape else 32)
    ends = 0
    for first in range(0, len(prompt_list), 16):
        part = prompt_list[first : first + 16]
        how: dict[str, Any] = {
            "row_keys": range(first, first + len(part)),
            "stops": [[3], [22, 22, 22]],
        }
        with_cache = generate(net, part, 24, T, sampling, **how)
        without = generate(net, part, 24, T, sampling, use_cache=False, **how)
        assert with_cache.tokens.equal(without.tokens)
        assert with_cache.mask.equal(without.mask)
        torch.testing.assert_close(with_cache[1], without[1], rtol=0, atol=1e-5)
        ends += int((~with_cache.mask).any(1).sum())
    assert ends or shape  # the first net does stop


@every_rule
def test_logprobs_equal_those_of_one_teacher_forced_pass(sampling: DecodingConfig) -> None:
    net, prompt_list = lively(), prompts(16, longest=T - 11)
    written = generate(net, prompt_list, 12, T, sampling, stops=[[22]])
    forced = sequence_logprobs(net, prompt_list, written, sampling)
    torch.testing.assert_close(written.logprobs, forced, rtol=0, atol=1e-5)
    forced.sum().backward()
    assert net.embed.weight.grad is not None
    assert 0 < written.mask.sum() < written.mask.numel()  # a stop inside, and texts without


def test_a_text_does_not_depend_on_the_texts_beside_it() -> None:
    net, prompt_list = lively(), prompts(5)
    together = generate(net, prompt_list, 20, T, seed=7)
    alone = generate(net, prompt_list[3:4], 20, T, seed=7, row_keys=[3])
    assert together.tokens[3:4].equal(alone.tokens)
    assert not together.tokens.equal(generate(net, prompt_list, 20, T, seed=8).tokens)


def test_equal_prompts_are_processed_once_and_continued_independently() -> None:
    net, prompt_list = lively(), prompts(5, longest=5)
    rows = [prompt_list[i] for i in (3, 1, 3, 3, 4, 1)]
    read: list[tuple[int, ...]] = []
    hook = net.embed.register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape)))
    written = generate(net, rows, 40, T, DecodingConfig(1.0), stops=[[3]])
    hook.remove()
    assert read[0] == (3, 5)  # three different prompts, the longest of five tokens
    assert read[1] == (6, 1)
    assert written.tokens.equal(generate(net, rows, 40, T, stops=[[3]], use_cache=False).tokens)
    assert not written.tokens[0].equal(written.tokens[2])


def test_no_token_follows_a_stop_string() -> None:
    net, prompt_list = lively(), prompts(40, longest=5)
    written = generate(net, prompt_list, 20, T, stops=[[3], [5, 4]])
    ended = 0
    for tokens, scores, mask in zip(*written, strict=True):
        kept = tokens[mask].tolist()
        assert not tokens[~mask].any()
        assert not scores[~mask].any()
        pairs = list(pairwise(kept))
        assert 3 not in kept[:-1]
        assert (5, 4) not in pairs[:-1]
        stopped = kept[-1] == 3 or pairs[-1:] == [(5, 4)]
        assert stopped or len(kept) == 20
        ended += stopped
    assert 0 < ended < 40


def test_a_stop_string_is_searched_in_new_text_only() -> None:
    net = lively()
    prompt_list = [torch.tensor([1, 5])]  # the stop 5 4 may not begin in the prompt
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.weight[4] = 1.0  # with positive features the token 4 is certain to be drawn
        net.norm.forward = torch.ones_like  # type: ignore[method-assign]
    written = generate(net, prompt_list, 3, T, DecodingConfig(0.0), stops=[[5, 4]])
    assert written.tokens.tolist() == [[4, 4, 4]]
    assert written.mask.all()


class Looks(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero")
        return func(*args, **kwargs or {})


def test_the_host_checks_for_the_end_every_32_tokens() -> None:
    net = Transformer(V, 200, num_layers=1, d_model=8, num_heads=1)
    prompt_list = prompts(3, longest=4)

    def looks(new: int) -> int:
        with Looks() as mode:
            generate(net, prompt_list, new, 200, DecodingConfig(top_k=5, top_p=0.9), stops=[[V]])
        return mode.count

    assert looks(32) == looks(2)  # one look each, at the end
    assert looks(96) - looks(64) == looks(64) - looks(32) > 0


def test_generation_ends_when_all_texts_have_ended() -> None:
    net, calls = lively(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    written = generate(net, prompts(2), 1000, T, stops=[[token] for token in range(V)])
    assert written.tokens.shape == (2, 1000)
    assert written.mask.sum(1).tolist() == [1, 1]
    assert len(calls) < 80  # two rows, 32 steps, a few windows


def test_a_full_context_drops_its_older_half() -> None:
    """The rule in a loop: what the net sees grows to t tokens, then starts again from t/2."""
    net = lively()
    text = prompts(T)[-1].tolist()
    start, expected = 0, []
    for _ in range(60):
        if len(text) - start > T:
            start = len(text) - T // 2
        with torch.no_grad():
            expected.append(net(torch.tensor([text[start:]]))[0, -1].argmax().item())
        text.append(expected[-1])
    written = generate(net, prompts(T)[-1:], 60, T, DecodingConfig(0.0))
    assert written.tokens[0].tolist() == expected


def test_streamed_pieces_add_up_to_the_text() -> None:
    net, prompt_list = lively(), prompts(3)
    pieces = list(generate_stream(net, prompt_list, 10, T, sync_every=3))
    assert [piece.tokens.shape[1] for piece in pieces] == [3, 3, 3, 1]
    whole = generate(net, prompt_list, 10, T)
    assert torch.cat([piece.tokens for piece in pieces], 1).equal(whole.tokens)


def test_dropout_is_off_during_generation_and_restored_after_it() -> None:
    net = lively(dropout=0.5).train()
    net.blocks["1"].eval()
    modes = [module.training for module in net.modules()]
    assert generate(net, prompts(2), 8, T).tokens.equal(generate(net, prompts(2), 8, T).tokens)
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [0.4, 0.3]),
        ({"top_p": 0.7}, [0.4, 0.3]),
        ({"top_p": 0.71}, [0.4, 0.3, 0.15]),
        ({"top_p": 0.01}, [0.4]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15]),
        ({"top_k": 4, "top_p": 0.7, "min_p": 0.2}, [0.4, 0.3]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
    ],
)
def test_each_filter_keeps_the_tokens_of_its_definition(
    rules: dict[str, Any], kept: list[float]
) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()[order] + 7
    expected = torch.tensor(kept + [0.0] * (5 - len(kept)))[order]
    found = DecodingConfig(**rules).compute_logprobs(logits).exp()
    torch.testing.assert_close(found, expected / expected.sum())


def test_a_sampled_token_excluded_by_rounding_still_has_a_logprob() -> None:
    """Drawn as the second of two, it comes third in the pass that scores it, by the last bit."""
    probs = torch.tensor([1.0, 0.5, 0.5 - 1e-7, -3.0])
    scored = torch.tensor([1.0, 0.5 - 1e-7, 0.5, -3.0], requires_grad=True)
    token = torch.tensor(1)
    for rule in (
        DecodingConfig(top_k=2),
        DecodingConfig(top_p=0.6),
        DecodingConfig(0.5, top_k=2, top_p=0.8),
    ):
        was = rule.compute_logprobs(probs)[token]
        assert was.isfinite()
        assert rule.compute_logprobs(scored)[token] == -math.inf
        kept = rule.compute_logprobs(scored, never_mask=token)
        likely = (scored.detach()[:3] / rule.temperature).log_softmax(-1)  # with the one drawn
        torch.testing.assert_close(kept[:3].detach(), likely)
        one = torch.ones(1, 1, dtype=torch.long)
        in_training = gather_logprobs(scored[None, None], one, one.bool(), rule)
        assert in_training.item() == kept[token].item()
        (slope,) = torch.autograd.grad(kept[token], scored)
        assert slope.isfinite().all()
        inside = rule.compute_logprobs(probs, never_mask=token)
        assert inside.equal(rule.compute_logprobs(probs))  # one that never left changes nothing
    floor = DecodingConfig(min_p=math.exp(-0.5))
    assert floor.compute_logprobs(torch.tensor([1.0, 0.4]), never_mask=token).isfinite().all()


def test_tokens_are_sampled_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    count = 40_000
    probs = DecodingConfig().sample(
        probabilities.log().expand(count, 5), row_uniforms(0, range(4), count // 4).flatten()
    )
    frequency = torch.bincount(probs, minlength=5) / count
    assert (frequency[probabilities == 0] == 0).all()
    error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequency - probabilities).abs() <= 4 * error).all()


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    scores = torch.tensor([[0.0, 0.6, 0.4, 0.0]]).log().expand(2, 4)
    u = torch.tensor([2.0**-53, 1.0], dtype=torch.float64)
    assert DecodingConfig().sample(scores, u).tolist() == [1, 2]


def test_a_seed_gives_every_text_its_own_numbers() -> None:
    u = row_uniforms(0, range(100), 50)
    assert u.unique().numel() == u.numel()
    assert ((u > 0) & (u <= 1)).all()
    assert u[7].equal(row_uniforms(0, [7], 50)[0])
    assert u[7, :20].equal(row_uniforms(0, [7], 20)[0])
    assert not u[7].equal(row_uniforms(1, [7], 50)[0])
    keys = Counter(tuple(row) for row in row_uniforms(0, [(1, 2), (2, 1), 12], 2).tolist())
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is too small"),
        (
            {"context_overflow": "error", "max_new_tokens": 20},
            "a prompt of 20 tokens and 20 new tokens exceed the context of",
        ),
        ({"prompts": [torch.tensor([], dtype=torch.long)]}, "a prompt is empty"),
        (
            {"sampling": DecodingConfig(top_k=24)},
            "top_k=24 exceeds the vocabulary of 23 tokens; allowed: 1 to 23; use top_k=23",
        ),
    ],
)
def test_invalid_generation_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    how = {"prompts": prompts(20)[-1:], "max_new_tokens": 5, "context_length": T} | given
    with pytest.raises(ValueError, match=message):
        generate(lively(), **how)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", math.nan), ("top_k", 0), ("top_p", 0), ("min_p", 1)],
)
def test_invalid_sampling_filters_are_refused(name: str, value: float) -> None:
    message = f"DecodingConfig: {name}={value} is out of range; allowed: .*; use {name}="
    with pytest.raises(UsageError, match=message) as error:
        DecodingConfig(**{name: value})
    assert error.value.flag.startswith(f"--{name}=")


def test_nan_logits_end_generation_with_the_number_of_the_text() -> None:
    net = lively()
    with torch.no_grad():
        net.embed.weight[7] = math.nan
    prompt_list = [torch.tensor([1]), torch.tensor([7])]
    with pytest.raises(RuntimeError, match="NaN for text 1"):
        generate(net, prompt_list, 5, T, stops=[])


def test_a_context_of_one_token_works() -> None:
    net = lively(attention_variant="identity")
    a = generate(net, prompts(4), 10, 1)
    assert a.tokens.equal(generate(net, prompts(4), 10, 1, use_cache=False).tokens)


def test_a_captured_step_generates_the_same_text_with_one_graph_per_bucket() -> None:
    net = Transformer(V, 200, num_layers=2, d_model=16, num_heads=2, zero_init_residual=False)
    prompt_list, captures = prompts(3, longest=4), []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        captures.append(work)  # as a CUDA graph: recorded, not done
        return work

    plain = generate(net, prompt_list, 180, 200)
    replayed = generate(net, prompt_list, 180, 200, capture=record)
    assert replayed.tokens.equal(plain.tokens)
    assert len(captures) == 3  # of 64, 128 and 192 slots
