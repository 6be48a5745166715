"""KL: stay near a reference, and what each way of asking for it truly optimises.

    Δ_t = log p(y_t | y_<t) - log ref(y_t | y_<t),  both at the sampling temperature

    k1 in the reward   r - (β/m) Σ_t Δ_t, no gradient through Δ, m the greatest length, a constant:
                       the policy gradient of r - (β/m) KL(p ‖ ref), exactly. With the sample's own
                       length in the place of m it would be the gradient of nothing. grpo and
                       rejection bend rewards; beside them Δ is weighed by rloo, as exactly.
    k2 in the loss     (β/m) Σ_t Δ_t² / 2: lowers KL(p ‖ ref) of each next token where samples
                       lead, and does not see that an early token leads to other places.
    k3 in the loss     (β/m) Σ_t (e^-Δ_t - 1 + Δ_t): likewise, of the forward KL(ref ‖ p).
    k1 in the loss     its expected gradient is zero: refused.

As measures (logged always) k1 and k3 both estimate KL(p ‖ ref); k3 is never negative. After
J. Schulman, "Approximating KL divergence" (2020). Axes: b samples, n new tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ravine.errors import UsageError


@dataclass(frozen=True)
class KL:
    """How strongly, by which estimate, and where.

    kl = KL(beta=0.1)
    rewards = rewards - kl.beta * kl.penalty(log_p, log_ref, mask, length=256)

    Args:
        beta: reward lost for each nat a token; 0 is none.
        estimator: k1, k2 or k3.
        where: k1 belongs in the reward, k2 and k3 in the loss.
    """

    beta: float = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k1"
    where: Literal["reward", "loss"] = "reward"

    def __post_init__(self) -> None:
        """Refuse what would optimise nothing, or something else than it says."""
        if not self.beta >= 0:
            raise UsageError(f"beta is {self.beta}; allowed: 0 or more; type --model.kl.beta=0.1")
        if self.estimator == "k1" and self.where == "loss":
            raise UsageError(
                "k1 in the loss has an expected gradient of exactly zero; allowed in the loss: "
                "k2, k3; type --model.kl.where=reward, or --model.kl.estimator=k2"
            )
        if self.estimator != "k1" and self.where == "reward":
            raise UsageError(
                f"{self.estimator} in the reward has the gradient of no divergence; allowed in the "
                f"reward: k1; type --model.kl.estimator=k1, or --model.kl.where=loss"
            )

    def kl_penalty(
        self, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, max_new_tokens: int
    ) -> Tensor:
        """Of each sample (b), to be taken from its reward or put into the loss, without beta."""
        return (
            estimate_kl(self.estimator, logprobs, ref_logprobs).where(mask, 0.0).sum(1)
            / max_new_tokens
        )


def estimate_kl(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1, k2 or k3 of each token (b n), from log-probabilities (b n)."""
    delta = logprobs - ref_logprobs
    if estimator == "k1":
        return delta
    return delta.square() / 2 if estimator == "k2" else torch.expm1(-delta) + delta
