"""Lion: step along the sign of a mix of momentum and gradient (Chen et al., 2023).

    w <- (1 - lr decay) w - lr sign(b1 m + (1 - b1) g)
    m <- b2 m + (1 - b2) g

A program search found this update rule. A step changes every weight by lr, about five times the
step of AdamW at the same lr. So use a fifth of AdamW's lr and five times its weight decay.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sign_,  # pyright: ignore[reportPrivateImportUsage]
)

from .elementwise import ElementwiseOptimizer
from .lr_schedules import LRSchedule
from .parameter_rules import DecayFilter
from .plan import OptimizerPlan

__all__ = ["Lion", "LionOptimizer"]


class LionOptimizer(ElementwiseOptimizer):
    """Lion: every weight changes by lr, in the direction of an interpolated momentum.

    Example: `LionOptimizer(model.parameters(), lr=1e-4, weight_decay=0.1)`.

    Args:
        params: any tensors.
        lr: the change of each weight in one step.
        betas: b1 for the update direction, b2 for the momentum.
        weight_decay: lambda in w <- (1 - lr lambda) w.
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults of every parameter group."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Apply the update formula at the top of this file, in place."""
        (momenta,) = states
        beta1, beta2 = group["betas"]
        directions = _foreach_lerp(gradients, momenta, beta1)
        _foreach_sign_(directions)
        _foreach_add_(weights, directions, alpha=-group["lr"])
        _foreach_lerp_(momenta, gradients, 1 - beta2)


class Lion(OptimizerPlan):
    """Train all parameters with Lion: `--trainer.callbacks+=Lion`.

    Args:
        lr: the change of each weight in one step.
        betas: b1 for the update direction, b2 for the momentum.
        weight_decay: weight decay of the tensors that `decay` selects.
        decay: which tensors get weight decay.
        schedule: the learning-rate schedule.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        decay: DecayFilter = "matrices",
        schedule: LRSchedule | None = None,
    ) -> None:
        """Create a plan whose only rule takes all parameters."""
        factory = partial(LionOptimizer, lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(factory, decay, schedule)
