"""Lion: the sign of a momentum that looks ahead (Chen et al., 2023), found by a program search.

    w <- (1 - lr decay) w - lr sign(b1 m + (1 - b1) g)
    m <- b2 m + (1 - b2) g

A step moves every weight by lr, about five times AdamW's step at one lr: take a fifth of its lr,
and five times its decay.
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

from .elementwise import Elementwise
from .lr_schedules import Schedule
from .plan import OptimizerPlan
from .rules import DecayFilter

__all__ = ["Lion", "LionOptimizer"]


class LionOptimizer(Elementwise):
    """Steps of one size in every coordinate, along a momentum seen two ways.

    Example: `LionOptimizer(model.parameters(), lr=1e-4, weight_decay=0.1)`.

    Args:
        params: any tensors.
        lr: what each weight moves by.
        betas: b1 of the direction, b2 of the memory.
        weight_decay: lambda in w <- (1 - lr lambda) w.
    """

    remembered = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults of every group."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def move(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """The formula above."""
        (momenta,) = states
        beta1, beta2 = group["betas"]
        directions = _foreach_lerp(gradients, momenta, beta1)
        _foreach_sign_(directions)
        _foreach_add_(weights, directions, alpha=-group["lr"])
        _foreach_lerp_(momenta, gradients, 1 - beta2)


class Lion(OptimizerPlan):
    """Everything to Lion: `--trainer.callbacks+=Lion`.

    Args:
        lr: what each weight moves by.
        betas: of the direction and of the memory.
        weight_decay: of the tensors that `decay` names.
        decay: which those are.
        schedule: what multiplies lr.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        decay: DecayFilter = "matrices",
        schedule: Schedule | None = None,
    ) -> None:
        """Write the plan."""
        factory = partial(LionOptimizer, lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__(factory, decay, schedule)
