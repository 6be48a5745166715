"""SignSGD and Signum: step along the sign of the gradient or of the momentum (lecture 8).

    m <- m + (1 - mu) (g - m)          SignSGD: mu = 0, so m is the gradient; Signum: mu > 0
    w <- (1 - lr decay) w - lr sign(m)

lr is the change of each weight in one step. With a constant lr the weights do not converge: they
stay about lr away from the minimum.
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

from .elementwise import ElementwiseOptimizer
from .lr_schedules import LRSchedule
from .parameter_rules import DecayFilter
from .plan import OptimizerPlan

__all__ = ["SignSGD", "SignSGDOptimizer"]


class SignSGDOptimizer(ElementwiseOptimizer):
    """SignSGD or Signum: every weight changes by lr, whatever the size of its gradient.

    Example: `SignSGDOptimizer(model.parameters(), lr=1e-3, momentum=0.95)`.

    Args:
        params: any tensors.
        lr: the change of each weight in one step.
        momentum: mu; 0 is SignSGD, above 0 is Signum.
        weight_decay: lambda in w <- (1 - lr lambda) w.
    """

    state_names = ("momentum_buffer",)  # also for mu = 0: a resume may raise mu

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults of every parameter group."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Apply the update formula at the top of this file, in place."""
        (momenta,) = states
        _foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        _foreach_add_(weights, _foreach_sign(momenta), alpha=-group["lr"])


class SignSGD(OptimizerPlan):
    """Train all parameters with SignSGD or Signum: `--trainer.callbacks+=SignSGD`.

    Args:
        lr: the change of each weight in one step.
        momentum: 0 is SignSGD, above 0 is Signum.
        weight_decay: weight decay of the tensors that `decay` selects.
        decay: which tensors get weight decay.
        schedule: the learning-rate schedule.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay: DecayFilter = "matrices",
        schedule: LRSchedule | None = None,
    ) -> None:
        """Create a plan whose only rule takes all parameters."""
        factory = partial(SignSGDOptimizer, lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(factory, decay, schedule)
