"""KL penalty to a reference policy: the estimators k1, k2 and k3, and the objective of each.

    Δ_t = log p(y_t | y_<t) - log ref(y_t | y_<t),  both at the sampling temperature

    k1 in the reward   r - (β/m) Σ_t Δ_t, no gradient through Δ; m is the maximum length, a
                       constant. Exact policy gradient of r - (β/m) KL(p ‖ ref). With the sample's
                       own length in place of m it is not the gradient of any objective. With grpo
                       and rejection, which are nonlinear in the rewards, the advantages of Δ are
                       those of rloo, which are exact.
    k2 in the loss     (β/m) Σ_t Δ_t² / 2: lowers KL(p ‖ ref) of each next token at the sampled
                       prefixes; ignores the effect of a token on later prefixes.
    k3 in the loss     (β/m) Σ_t (e^-Δ_t - 1 + Δ_t): as k2, for the forward KL(ref ‖ p).
    k1 in the loss     its expected gradient is zero: rejected.

As metrics (always logged) k1 and k3 both estimate KL(p ‖ ref); k3 is never negative. Source:
J. Schulman, "Approximating KL divergence" (2020). Axes: b samples, n new tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ravine.errors import UsageError


@dataclass(frozen=True)
class KL:
    """Settings of the KL penalty: coefficient, estimator and placement.

        kl = KL(beta=0.1)
        penalty = kl.kl_penalty(logprobs, ref_logprobs, mask, max_new_tokens=256)
        rewards = rewards - kl.beta * penalty

    Args:
        beta: KL coefficient: reward lost for each nat per token; 0 disables the penalty.
        estimator: k1, k2 or k3.
        placement: k1 belongs in the reward, k2 and k3 in the loss.
    """

    beta: float = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k1"
    placement: Literal["reward", "loss"] = "reward"

    def __post_init__(self) -> None:
        """Raise UsageError if the gradient would be zero, or would not be that of a divergence.

        The KL divergence is estimated by k1 = d, k2 = d²/2 or k3 = exp(-d) - 1 + d. Here d is
        log p - log q, of policy p and reference q.
        """
        if not self.beta >= 0:
            raise UsageError(
                f"KL: beta={self.beta} is out of range",
                ["0 or more"],
                "use beta=0.1",
                flag="--model.kl.beta=0.1",
            )
        if self.estimator == "k1" and self.placement == "loss":
            raise UsageError(
                "KL: estimator='k1' cannot be used with placement='loss', where its expected "
                "gradient is exactly zero",
                ["k1 with placement='reward'", "k2 or k3 with placement='loss'"],
                "use placement='reward', or estimator='k2'",
                flag="--model.kl.placement=reward, or --model.kl.estimator=k2",
            )
        if self.estimator != "k1" and self.placement == "reward":
            raise UsageError(
                f"KL: estimator={self.estimator!r} cannot be used with placement='reward', where "
                "its gradient is that of no divergence",
                ["k1 with placement='reward'", "k2 or k3 with placement='loss'"],
                "use estimator='k1', or placement='loss'",
                flag="--model.kl.estimator=k1, or --model.kl.placement=loss",
            )

    def kl_penalty(
        self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, max_new_tokens: int
    ) -> Tensor:
        """KL penalty (b) without beta, to subtract from the rewards or to add to the loss."""
        return (
            estimate_kl(self.estimator, logprobs, ref_logprobs).where(mask, 0.0).sum(1)
            / max_new_tokens
        )


def estimate_kl(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL estimate k1, k2 or k3 of each token (b n), from logprobs (b n)."""
    delta = logprobs - ref_logprobs
    if estimator == "k1":
        return delta
    return delta.square() / 2 if estimator == "k2" else torch.expm1(-delta) + delta
