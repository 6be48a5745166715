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

Kind = Literal["none", "mean", "rloo", "grpo", "rejection"]

TIED = 1e-6  # of the largest |r|: a smaller spread is the rounding of fp32 sums, and counts as none
TINY = 1e-12  # a smaller spread is the rounding of fp64 sums whose terms cancel: 0.1 + 0.2 - 0.3


@dataclass(frozen=True)
class Estimator:
    """How rewards become a loss.

    estimator = Estimator("rloo", scope="group")
    w = estimator.weights(rewards, group_size=4)                       # (b)
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

    kind: Kind = "mean"
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

    def check(self, samples: int, group_size: int, accumulate: int = 1) -> None:
        """Refuse a baseline over one sample, which is the sample, and tokens of a part of a step.

        Args:
            samples: of a micro-batch over all ranks.
            group_size: samples of a prompt.
            accumulate: micro-batches of a step.
        """
        if self.normalize == "tokens" and accumulate > 1:
            raise UsageError(
                f"normalize is tokens, and a step has {accumulate} micro-batches, of which each "
                "would divide by its own tokens; allowed: sequence, constant; "
                "type --model.estimator.normalize=constant, or --trainer.accumulate_grad_batches=1"
            )
        size = samples if self.scope == "batch" else group_size
        if self.kind != "none" and size < 2:
            others = "--data.batch_size=64", "--model.estimator.scope=batch"
            fix = "--model.group_size=4, or " + others[self.scope == "group"]
            raise UsageError(
                f"{self.kind} compares the samples of a {self.scope}, and here that is one; "
                f"allowed: 2 or more; type {fix}"
            )

    def weights(self, rewards: Tensor, group_size: int = 1) -> Tensor:
        """Weights (b) of rewards (b), groups side by side; NaN counts nowhere and weighs 0.

        Rewards that differ by less than rounding can explain (`TIED`, `TINY`) count as equal.
        """
        size = len(rewards) if self.scope == "batch" else group_size
        rewards = rewards if rewards.is_floating_point() else rewards.double()
        r = rearrange(rewards, "(g s) -> g s", s=size)
        scored = ~r.isnan()
        count = scored.sum(1, keepdim=True)  # (g 1)
        r = r.where(scored, 0.0)
        if self.kind == "rejection":
            r = self._binary(r)
            return rearrange(r * count / r.sum(1, keepdim=True).clamp(min=1), "g s -> (g s)")
        w = r if self.kind == "none" else self._compared(r, scored, count)
        return rearrange(w.where(scored, 0.0), "g s -> (g s)")

    def linear(self) -> "Estimator":
        """By which a divergence in the reward is weighed: itself, unless it bends rewards.

        grpo would divide a divergence by the deviation of the rewards: where they are equal, by its
        own, which in the first step is rounding. rejection knows 0 and 1.
        """
        return self if self.kind in ("none", "mean", "rloo") else replace(self, kind="rloo")

    def _compared(self, r: Tensor, scored: Tensor, count: Tensor) -> Tensor:
        mean = r.sum(1, keepdim=True) / count.clamp(min=1)
        least = r.where(scored, math.inf).amin(1, keepdim=True)
        most = r.where(scored, -math.inf).amax(1, keepdim=True)
        # equal rewards teach nothing; their rounded mean would differ, and a deviation of 1e-17
        # would blow that up to weights of one
        rounding = (TIED * r.abs().amax(1, keepdim=True)).clamp(min=TINY)
        w = (r - mean).where(scored & (most - least > rounding), 0.0)
        if self.kind == "rloo":
            return w * count / (count - 1).clamp(min=1)  # r - mean of the others
        if self.kind == "grpo":
            freedom = count - 1 if self.deviation == "sample" else count
            deviation = (w.square().sum(1, keepdim=True) / freedom.clamp(min=1)).sqrt()
            return w / deviation.where(deviation > 0, 1.0)
        return w

    def _binary(self, r: Tensor) -> Tensor:
        binary = r.round()  # 0.7 + 0.2 + 0.1 is 0.9999999999999999
        fits = ((r - binary).abs() <= TIED) & ((binary == 0) | (binary == 1))
        if not fits.all():
            wrong = r[~fits][0].item()
            raise UsageError(
                f"rejection keeps samples of reward 1 and drops those of 0, and a reward is "
                f"{wrong:.4g}; make the reward binary (Binary with weight 1, and nothing else), "
                "or type --model.estimator.kind=rloo"
            )
        return binary

    def terms(
        self, log_probabilities: Tensor, weights: Tensor, sampled: Tensor | None = None
    ) -> Tensor:
        """The objective of each token (b n), to be summed where the mask is set, and ascended.

        Without clip w log p; with clip min(q w, clamp(q, 1 - clip, 1 + clip_high) w), q the ratio
        of the policy's probability to the sampler's.

        Args:
            log_probabilities: of the tokens drawn (b n), with gradient.
            weights: of the samples (b).
            sampled: the sampler's log-probabilities (b n); needed with clip.
        """
        w = weights[:, None]  # (b 1)
        if self.clip is None:
            return w * log_probabilities
        if sampled is None:
            raise UsageError("a clipped ratio needs the sampler's log-probabilities: give sampled")
        high = self.clip if self.clip_high is None else self.clip_high
        ratio = (log_probabilities - sampled).exp()
        return torch.minimum(ratio * w, ratio.clamp(1 - self.clip, 1 + high) * w)

    def loss(
        self,
        log_probabilities: Tensor,
        mask: Tensor,
        weights: Tensor,
        length: int,
        tokens: Tensor | float,
        sampled: Tensor | None = None,
    ) -> Tensor:
        """What to descend; its value means nothing, its gradient is minus the one above.

        Args:
            log_probabilities: of the tokens drawn (b n), with gradient.
            mask: tokens that were drawn (b n), the stop among them.
            weights: of the samples (b).
            length: most tokens a sample may have.
            tokens: tokens of this share of the batch; of several equal shares, their mean.
            sampled: the sampler's log-probabilities (b n), for `clip`.
        """
        terms = self.terms(log_probabilities, weights, sampled)
        total = terms.where(mask, 0.0).sum()
        if self.normalize == "tokens":
            return -total / tokens
        return -total / len(weights) / (length if self.normalize == "constant" else 1)
