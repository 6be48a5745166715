"""Policy-gradient estimators: by which weight each sample's log-probability is pushed up.

    gradient = mean over samples of  w_i · ∇ log p(y_i),        log p(y) = Σ_t log p(y_t | y_<t)

    kind        weight w of reward r                        what the expected gradient ascends
    none        r                                           E r (REINFORCE, Williams 1992)
    mean        r - mean                                    (B-1)/B · E r: the step shrinks with B
    rloo        r - mean of the others                      E r, exactly (Kool et al. 2019)
    grpo        (r - mean) / deviation, 0 if that is 0      of a binary r: (2/π) arcsin √P, times π
    rejection   B/k for the k samples with r = 1, else 0    of a binary r: 1 + log P

P is the probability of r = 1; the last two hold as B grows, and for any B the gradient is ∇P times

    grpo        E √(q(1-q)) / (P(1-P)),  q ~ Binomial(B, P) / B
    rejection   (1 - (1-P)^B) / P

tests/lightning_modules/rl/test_advantages.py shows all of this by enumeration. B is the micro-batch
over all ranks (of a step that accumulates, one part), or one prompt's group.
Axes: b samples, n new tokens.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ravine.errors import UsageError

AdvantageMethod = Literal["none", "mean", "rloo", "grpo", "rejection"]

RELATIVE_TIE_TOLERANCE = (
    1e-6  # of the largest |r|: a smaller spread is the rounding of fp32 sums, and counts as none
)
ABSOLUTE_TIE_TOLERANCE = (
    1e-12  # a smaller spread is the rounding of fp64 sums whose terms cancel: 0.1 + 0.2 - 0.3
)


@dataclass(frozen=True)
class Estimator:
    """How rewards become a loss.

    estimator = Estimator("rloo", scope="group")
    w = estimator.advantages(rewards, group_size=4)                    # (b)
    loss = estimator.loss(log_probabilities, mask, w, length=256, tokens=mask.sum())

    Args:
        kind: the weight; see above.
        scope: whom a sample is compared with: the micro-batch on all ranks (the step's batch where
            gradients are not accumulated), or its prompt's group.
        deviation: of the population (divide by B), or the sample's (by B - 1): grpo alone.
        normalize: sequence sums over tokens and is exact; constant divides that by the greatest
            length, and is as exact; tokens divides by all tokens of the batch, so that the step
            depends on how long the others are: refused where gradients are accumulated.
        clip: keep each token's ratio to the sampler's probability within 1 ± clip (PPO). There is
            one step for each rollout, so only rounding moves the ratio from 1. From 1 on the lower
            bound never acts.
        clip_high: another distance for the upper bound: 1 - clip to 1 + clip_high (DAPO: 0.28).
    """

    kind: AdvantageMethod = "mean"
    scope: Literal["batch", "group"] = "batch"
    deviation: Literal["population", "sample"] = "population"
    normalize: Literal["sequence", "constant", "tokens"] = "sequence"
    clip: float | None = None
    clip_high: float | None = None

    def __post_init__(self) -> None:
        """Refuse a clip that lets nothing through, or everything."""
        for name, bound in (("clip", self.clip), ("clip_high", self.clip_high)):
            if bound is not None and not 0 < bound < math.inf:
                raise UsageError(
                    f"{name} is {bound}; allowed: a finite number above 0; "
                    f"type --model.estimator.{name}=0.2"
                )
        if self.clip_high is not None and self.clip is None:
            raise UsageError(
                f"clip_high is {self.clip_high}, and clip, the lower bound, is not given; "
                "type --model.estimator.clip=0.2"
            )

    def check_group_sizes(self, num_samples: int, group_size: int, accumulate: int = 1) -> None:
        """Refuse a baseline over one sample, which is the sample, and tokens of a part of a step.

        Args:
            num_samples: of a micro-batch over all ranks.
            group_size: samples of a prompt.
            accumulate: micro-batches of a step.
        """
        if self.normalize == "tokens" and accumulate > 1:
            raise UsageError(
                f"normalize is tokens, and a step has {accumulate} micro-batches, of which each "
                "would divide by its own tokens; allowed: sequence, constant; "
                "type --model.estimator.normalize=constant, or --trainer.accumulate_grad_batches=1"
            )
        size = num_samples if self.scope == "batch" else group_size
        if self.kind != "none" and size < 2:
            suggestions = "--data.batch_size=64", "--model.estimator.scope=batch"
            hint = "--model.group_size=4, or " + suggestions[self.scope == "group"]
            raise UsageError(
                f"{self.kind} compares the samples of a {self.scope}, and here that is one; "
                f"allowed: 2 or more; type {hint}"
            )

    def advantages(self, rewards: Tensor, group_size: int = 1) -> Tensor:
        """Weights (b) of rewards (b), groups side by side; NaN counts nowhere and weighs 0.

        Rewards that differ by less than rounding can explain (`RELATIVE_TIE_TOLERANCE`,
        `ABSOLUTE_TIE_TOLERANCE`) count as equal.
        """
        size = len(rewards) if self.scope == "batch" else group_size
        rewards = rewards if rewards.is_floating_point() else rewards.double()
        r = rearrange(rewards, "(g s) -> g s", s=size)
        is_scored = ~r.isnan()
        count = is_scored.sum(1, keepdim=True)  # (g 1)
        r = r.where(is_scored, 0.0)
        if self.kind == "rejection":
            r = self._require_binary(r)
            return rearrange(r * count / r.sum(1, keepdim=True).clamp(min=1), "g s -> (g s)")
        w = r if self.kind == "none" else self._centered(r, is_scored, count)
        return rearrange(w.where(is_scored, 0.0), "g s -> (g s)")

    def for_kl(self) -> "Estimator":
        """By which a divergence in the reward is weighed: itself, unless it bends rewards.

        grpo would divide a divergence by the deviation of the rewards: where they are equal, by its
        own, which in the first step is rounding. rejection knows 0 and 1.
        """
        return self if self.kind in ("none", "mean", "rloo") else replace(self, kind="rloo")

    def _centered(self, r: Tensor, is_scored: Tensor, count: Tensor) -> Tensor:
        mean = r.sum(1, keepdim=True) / count.clamp(min=1)
        min_reward = r.where(is_scored, math.inf).amin(1, keepdim=True)
        max_reward = r.where(is_scored, -math.inf).amax(1, keepdim=True)
        # equal rewards teach nothing; their rounded mean would differ, and a deviation of 1e-17
        # would blow that up to weights of one
        rounding = (RELATIVE_TIE_TOLERANCE * r.abs().amax(1, keepdim=True)).clamp(
            min=ABSOLUTE_TIE_TOLERANCE
        )
        w = (r - mean).where(is_scored & (max_reward - min_reward > rounding), 0.0)
        if self.kind == "rloo":
            return w * count / (count - 1).clamp(min=1)  # r - mean of the others
        if self.kind == "grpo":
            degrees_of_freedom = count - 1 if self.deviation == "sample" else count
            std = (w.square().sum(1, keepdim=True) / degrees_of_freedom.clamp(min=1)).sqrt()
            return w / std.where(std > 0, 1.0)
        return w

    def _require_binary(self, r: Tensor) -> Tensor:
        binary = r.round()  # 0.7 + 0.2 + 0.1 is 0.9999999999999999
        is_binary = ((r - binary).abs() <= RELATIVE_TIE_TOLERANCE) & ((binary == 0) | (binary == 1))
        if not is_binary.all():
            invalid_reward = r[~is_binary][0].item()
            raise UsageError(
                f"rejection keeps samples of reward 1 and drops those of 0, and a reward is "
                f"{invalid_reward:.4g}; make the reward binary (Binary with weight 1, and nothing "
                "else), "
                "or type --model.estimator.kind=rloo"
            )
        return binary

    def token_objectives(
        self, logprobs: Tensor, advantages: Tensor, sampler_logprobs: Tensor | None = None
    ) -> Tensor:
        """The objective of each token (b n), to be summed where the mask is set, and ascended.

        Without clip w log p; with clip min(q w, clamp(q, 1 - clip, 1 + clip_high) w), q the ratio
        of the policy's probability to the sampler's.

        Args:
            logprobs: of the tokens drawn (b n), with gradient.
            advantages: of the samples (b).
            sampler_logprobs: the sampler's log-probabilities (b n); needed with clip.
        """
        w = advantages[:, None]  # (b 1)
        if self.clip is None:
            return w * logprobs
        if sampler_logprobs is None:
            raise UsageError("a clipped ratio needs the sampler's log-probabilities: give sampled")
        high = self.clip if self.clip_high is None else self.clip_high
        ratio = (logprobs - sampler_logprobs).exp()
        return torch.minimum(ratio * w, ratio.clamp(1 - self.clip, 1 + high) * w)

    def loss(
        self,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        max_new_tokens: int,
        num_tokens: Tensor | float,
        sampler_logprobs: Tensor | None = None,
    ) -> Tensor:
        """What to descend; its value means nothing, its gradient is minus the one above.

        Args:
            logprobs: of the tokens drawn (b n), with gradient.
            mask: tokens that were drawn (b n), the stop among them.
            advantages: of the samples (b).
            max_new_tokens: most tokens a sample may have.
            num_tokens: tokens of this share of the batch; of several equal shares, their mean.
            sampler_logprobs: the sampler's log-probabilities (b n), for `clip`.
        """
        objectives = self.token_objectives(logprobs, advantages, sampler_logprobs)
        total = objectives.where(mask, 0.0).sum()
        if self.normalize == "tokens":
            return -total / num_tokens
        return -total / len(advantages) / (max_new_tokens if self.normalize == "constant" else 1)
