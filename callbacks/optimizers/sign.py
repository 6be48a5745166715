"""SignSGD and Signum: every weight moves by lr, whatever the size of its gradient (lecture 8).

    m <- m + (1 - mu) (g - m)          with mu = 0, m is the gradient: SignSGD; else Signum
    w <- (1 - lr decay) w - lr sign(m)

lr is the movement of each weight per step, so a constant one never comes closer than lr.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sign,  # pyright: ignore[reportPrivateImportUsage]
)

from .elementwise import Elementwise
from .lr_schedules import Schedule
from .plan import OptimizerPlan
from .rules import DecayFilter

__all__ = ["SignSGD", "SignSGDOptimizer"]


class SignSGDOptimizer(Elementwise):
    """Steps of one size in every coordinate.

    Example: `SignSGDOptimizer(model.parameters(), lr=1e-3, momentum=0.95)`.

    Args:
        params: any tensors.
        lr: what each weight moves by.
        momentum: mu; 0 is SignSGD, more is Signum.
        weight_decay: lambda in w <- (1 - lr lambda) w.
    """

    remembered = ("momentum_buffer",)  # also without momentum: mu may be switched on by a resume

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults of every group."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def move(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """The formula above."""
        (momenta,) = states
        _foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        _foreach_add_(weights, _foreach_sign(momenta), alpha=-group["lr"])


class SignSGD(OptimizerPlan):
    """Everything to SignSGD, or Signum: `--trainer.callbacks+=SignSGD`.

    Args:
        lr: what each weight moves by.
        momentum: 0 is SignSGD, more is Signum.
        weight_decay: of the tensors that `decay` names.
        decay: which those are.
        schedule: what multiplies lr.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: DecayFilter = "matrices",
        schedule: Schedule | None = None,
    ) -> None:
        """Write the plan."""
        factory = partial(SignSGDOptimizer, lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(factory, decay, schedule)
