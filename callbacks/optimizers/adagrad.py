"""AdaGrad: per-coordinate learning rates from the sum of squared gradients (lecture 8).

    v <- v + g^2
    w <- w - lr g / (sqrt(v) + eps)      the form of torch
    w <- w - lr g / sqrt(v + eps)        the form of CS336, with eps_in_root

The first step changes every weight by lr. v never decays, so the steps shrink like 1 / sqrt(k).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import (
    Tensor,
    _foreach_add,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_addcdiv_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_addcmul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sqrt,  # pyright: ignore[reportPrivateImportUsage]
)

from .elementwise import ElementwiseOptimizer
from .lr_schedules import LRSchedule
from .plan import OptimizerPlan

__all__ = ["AdaGrad", "AdaGradOptimizer"]


class AdaGradOptimizer(ElementwiseOptimizer):
    """AdaGrad: divide each gradient by the root of the sum of its squares so far.

    Example: `AdaGradOptimizer(model.parameters(), lr=0.1)`.

    Args:
        params: any tensors.
        lr: the size of the first step of each weight.
        eps: keeps the quotient finite where all gradients so far are zero.
        eps_in_root: add eps under the root (CS336, lecture 2: eps=1e-5). Steps are then smaller
            for gradients below sqrt(eps).
    """

    state_names = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        eps_in_root: bool = False,
    ) -> None:
        """Set the defaults of every parameter group."""
        super().__init__(params, {"lr": lr, "eps": eps, "eps_in_root": eps_in_root})

    def update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Update in place: v <- v + g^2, then w <- w - lr g / (sqrt(v) + eps).

        The base class calls it for each group. With `eps_in_root` the divisor is sqrt(v + eps).

        Args:
            group: the parameter group with its settings.
            weights: w, one tensor for each parameter with a gradient.
            gradients: g, with the shapes of `weights`.
            states: a single list: v, the sums of squared gradients.
        """
        (sums,) = states
        # torch's `_foreach` functions apply one operation to all tensors of a list
        _foreach_addcmul_(sums, gradients, gradients)
        if group.get("eps_in_root"):
            roots = _foreach_sqrt(_foreach_add(sums, group["eps"]))
        else:
            roots = _foreach_sqrt(sums)
            _foreach_add_(roots, group["eps"])
        lr = group["lr"]
        # a tensor is multiplied first: addcdiv takes only a 1-D tensor on the CPU as scalars
        if isinstance(lr, Tensor):
            _foreach_addcdiv_(weights, _foreach_mul(gradients, -lr), roots)
        else:
            _foreach_addcdiv_(weights, gradients, roots, -lr)


class AdaGrad(OptimizerPlan):
    """Train all parameters with AdaGrad: `--trainer.callbacks+=AdaGrad`.

    Args:
        lr: the size of the first step of each weight.
        schedule: the learning-rate schedule.
        eps: keeps the quotient finite where all gradients so far are zero.
        eps_in_root: add eps under the root; `AdaGrad(eps=1e-5, eps_in_root=True)` is CS336's form.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        schedule: LRSchedule | None = None,
        eps: float = 1e-10,
        eps_in_root: bool = False,
    ) -> None:
        """Create a plan whose only rule takes all parameters."""
        options = {"lr": lr, "eps": eps, "eps_in_root": eps_in_root}
        super().__init__(partial(AdaGradOptimizer, **options), schedule=schedule)
