"""Policy-gradient estimators: advantages from rewards (REINFORCE, RLOO, GRPO, rejection) and loss.

    gradient = mean over samples of  w_i · ∇ log p(y_i),        log p(y) = Σ_t log p(y_t | y_<t)

    method      advantage w of reward r                     objective of the expected gradient
    none        r                                           E r (REINFORCE, Williams 1992)
    mean        r - mean                                    (B-1)/B · E r: smaller steps for small B
    rloo        r - mean of the other samples               E r, exactly (Kool et al. 2019)
    grpo        (r - mean) / std, 0 if std is 0             of a binary r: (2/π) arcsin √P, times π
    rejection   B/k for the k samples with r = 1, else 0    of a binary r: 1 + log P

P is the probability of r = 1; the last two hold as B grows. For any B the gradient is ∇P times

    grpo        E √(q(1-q)) / (P(1-P)),  q ~ Binomial(B, P) / B
    rejection   (1 - (1-P)^B) / P

tests/lightning_modules/rl/test_advantages.py verifies all of this by enumeration. B is the
micro-batch over all ranks (with gradient accumulation, one part of a step), or one prompt's group.
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
    1e-6  # relative to the largest |r|: a smaller range is rounding of fp32 sums and counts as zero
)
ABSOLUTE_TIE_TOLERANCE = (
    1e-12  # a smaller range is rounding of fp64 sums whose terms cancel: 0.1 + 0.2 - 0.3
)


@dataclass(frozen=True)
class AdvantageEstimator:
    """Estimator settings: how rewards become advantages and a loss.

        estimator = AdvantageEstimator("rloo", baseline_scope="group")
        w = estimator.advantages(rewards, group_size=4)                    # (b)
        loss = estimator.loss(logprobs, mask, w, max_new_tokens=256, num_tokens=mask.sum())

    Args:
        method: formula of the advantage; see above.
        baseline_scope: samples of the baseline: the micro-batch on all ranks (the step's batch if
            gradients are not accumulated), or the group of one prompt.
        std_correction: std of the population (divide by B) or of the sample (by B - 1); grpo only.
        loss_normalization: sequence sums over tokens and is exact. constant divides the sum by the
            maximum length and is exact, too. tokens divides by all tokens of the batch, so the step
            depends on the other samples' lengths: rejected if gradients are accumulated.
        clip: clip each token's ratio to the sampler's probability to 1 ± clip (PPO). There is one
            step for each rollout, so only rounding moves the ratio from 1. From 1 on the lower
            bound has no effect.
        clip_high: separate upper bound: the range is 1 - clip to 1 + clip_high (DAPO: 0.28).
    """

    method: AdvantageMethod = "mean"
    baseline_scope: Literal["batch", "group"] = "batch"
    std_correction: Literal["population", "sample"] = "population"
    loss_normalization: Literal["sequence", "constant", "tokens"] = "sequence"
    clip: float | None = None
    clip_high: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a clip bound out of range, and for clip_high without clip.

        A token's probability ratio is clipped to the range 1 - clip to 1 + clip_high; the default
        of clip_high is clip.
        """
        for name, bound in (("clip", self.clip), ("clip_high", self.clip_high)):
            if bound is not None and not 0 < bound < math.inf:
                raise UsageError(
                    f"AdvantageEstimator: {name}={bound} is out of range",
                    ["a finite number above 0"],
                    f"use {name}=0.2",
                    flag=f"--model.estimator.{name}=0.2",
                )
        if self.clip_high is not None and self.clip is None:
            raise UsageError(
                f"AdvantageEstimator: clip_high={self.clip_high} needs clip, the lower bound",
                hint="use clip=0.2",
                flag="--model.estimator.clip=0.2",
            )

    def check_group_sizes(self, num_samples: int, group_size: int, accumulate: int = 1) -> None:
        """Raise UsageError for a baseline over one sample, and for tokens with accumulation.

        Args:
            num_samples: samples of a micro-batch over all ranks.
            group_size: samples of a prompt.
            accumulate: micro-batches of a step.
        """
        if self.loss_normalization == "tokens" and accumulate > 1:
            raise UsageError(
                "AdvantageEstimator: loss_normalization='tokens' cannot be used with "
                f"{accumulate} micro-batches in a step, because each divides by its own number of "
                "tokens",
                ["sequence", "constant"],
                "use loss_normalization='constant', or Trainer(accumulate_grad_batches=1)",
                flag=(
                    "--model.estimator.loss_normalization=constant, or "
                    "--trainer.accumulate_grad_batches=1"
                ),
            )
        # samples that one baseline is computed from; a single one would be its own baseline
        size = num_samples if self.baseline_scope == "batch" else group_size
        if self.method != "none" and size < 2:
            hint, flag = "PromptDataModule(batch_size=64)", "--data.batch_size=64"
            if self.baseline_scope == "group":
                hint, flag = "baseline_scope='batch'", "--model.estimator.baseline_scope=batch"
            raise UsageError(
                f"AdvantageEstimator: method={self.method!r} compares the samples of a "
                f"{self.baseline_scope}, which has only one sample",
                ["2 samples or more"],
                f"use group_size=4, or {hint}",
                flag=f"--model.group_size=4, or {flag}",
            )

    def advantages(self, rewards: Tensor, group_size: int = 1) -> Tensor:
        """Compute the advantages (b) of rewards (b); a NaN is ignored and gets 0.

        Rewards with a difference within rounding (`RELATIVE_TIE_TOLERANCE`,
        `ABSOLUTE_TIE_TOLERANCE`) count as equal.

        Args:
            rewards: rewards (b); the samples of a prompt are adjacent.
            group_size: samples of a prompt, for the scope "group".
        """
        size = len(rewards) if self.baseline_scope == "batch" else group_size
        # integers have no NaN, and no mean
        rewards = rewards if rewards.is_floating_point() else rewards.double()
        r = rearrange(rewards, "(g s) -> g s", s=size)  # a baseline for each of g rows
        is_scored = ~r.isnan()
        count = is_scored.sum(1, keepdim=True)  # (g 1)
        r = r.where(is_scored, 0.0)
        if self.method == "rejection":
            r = self._require_binary(r)  # raises unless every reward is 0 or 1
            # an accepted sample has the weight count / num_accepted, the others 0
            num_accepted = r.sum(1, keepdim=True)
            return rearrange(r * count / num_accepted.clamp(min=1), "g s -> (g s)")
        w = r if self.method == "none" else self._centered(r, is_scored, count)
        return rearrange(w.where(is_scored, 0.0), "g s -> (g s)")

    def for_kl(self) -> "AdvantageEstimator":
        """Estimator used for the KL term; the nonlinear estimators fall back to RLOO.

        grpo would divide the KL term by the std of the rewards. For equal rewards it would divide
        by the KL term's own std, which is rounding error in the first step. rejection accepts only
        0 and 1.
        """
        return self if self.method in ("none", "mean", "rloo") else replace(self, method="rloo")

    def _centered(self, r: Tensor, is_scored: Tensor, count: Tensor) -> Tensor:
        """Compute the advantages (g s) of the methods mean, rloo and grpo.

        Args:
            r: rewards (g s), 0 where there is none.
            is_scored: whether a sample has a reward (g s).
            count: number of samples with a reward (g 1).
        """
        # clamp: a row without any reward has count 0
        mean = r.sum(1, keepdim=True) / count.clamp(min=1)
        min_reward = r.where(is_scored, math.inf).amin(1, keepdim=True)
        max_reward = r.where(is_scored, -math.inf).amax(1, keepdim=True)
        # equal rewards have advantage 0; their rounded mean differs from them, and a std of 1e-17
        # would scale the difference to advantages of 1
        rounding = (RELATIVE_TIE_TOLERANCE * r.abs().amax(1, keepdim=True)).clamp(
            min=ABSOLUTE_TIE_TOLERANCE
        )
        w = (r - mean).where(is_scored & (max_reward - min_reward > rounding), 0.0)
        if self.method == "rloo":
            return w * count / (count - 1).clamp(min=1)  # equals r - mean of the other samples
        if self.method == "grpo":
            degrees_of_freedom = count - 1 if self.std_correction == "sample" else count
            std = (w.square().sum(1, keepdim=True) / degrees_of_freedom.clamp(min=1)).sqrt()
            return w / std.where(std > 0, 1.0)
        return w

    def _require_binary(self, r: Tensor) -> Tensor:
        binary = r.round()  # 0.7 + 0.2 + 0.1 is 0.9999999999999999
        is_binary = ((r - binary).abs() <= RELATIVE_TIE_TOLERANCE) & ((binary == 0) | (binary == 1))
        if not is_binary.all():
            invalid_reward = r[~is_binary][0].item()
            raise UsageError(
                "AdvantageEstimator: method='rejection' needs rewards of 0 or 1, but a reward is "
                f"{invalid_reward:.4g}",
                ["0", "1"],
                "use a single Threshold(weight=1) as the reward, or method='rloo'",
                flag="--model.estimator.method=rloo",
            )
        return binary

    def token_objectives(
        self, logprobs: Tensor, advantages: Tensor, sampler_logprobs: Tensor | None = None
    ) -> Tensor:
        """Objective of each token (b n), to be summed over the mask and maximized.

        Without clip: w log p. With clip: min(q w, clamp(q, 1 - clip, 1 + clip_high) w). q is the
        ratio of the policy's probability to the sampler's.

        Args:
            logprobs: of the sampled tokens (b n), with gradient.
            advantages: of the samples (b).
            sampler_logprobs: the sampler's logprobs (b n); needed with clip.
        """
        w = advantages[:, None]  # (b 1)
        if self.clip is None:
            return w * logprobs
        if sampler_logprobs is None:
            raise UsageError(
                f"AdvantageEstimator: clip={self.clip} needs the logprobs of the sampler",
                hint="pass sampler_logprobs",
            )
        high = self.clip if self.clip_high is None else self.clip_high
        ratio = (logprobs - sampler_logprobs).exp()
        # the smaller one: no reward for moving the ratio beyond its bounds
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
        """Compute the policy-gradient loss; only its gradient has a meaning, not its value.

        It is minus the sum of the tokens' objectives, normalized by `loss_normalization`.

        Args:
            logprobs: of the sampled tokens (b n), with gradient.
            mask: sampled tokens (b n), including the stop tokens.
            advantages: of the samples (b).
            max_new_tokens: maximum number of tokens of a sample.
            num_tokens: tokens of this rank's part of the batch; with several ranks, their mean.
            sampler_logprobs: the sampler's logprobs (b n), for `clip`.
        """
        objectives = self.token_objectives(logprobs, advantages, sampler_logprobs)
        total = objectives.where(mask, 0.0).sum()
        if self.loss_normalization == "tokens":
            return -total / num_tokens
        # "sequence" sums over the tokens of a sample and takes the mean over samples
        length = max_new_tokens if self.loss_normalization == "constant" else 1
        return -total / len(advantages) / length
