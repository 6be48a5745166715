"""AdaGrad: a step that shrinks in each coordinate with what it has seen there (lecture 8).

    v <- v + g^2
    w <- w - lr g / (sqrt(v) + eps)      torch's; or with eps_in_root, CS336's,
    w <- w - lr g / sqrt(v + eps)

The first step is lr in every coordinate; v never forgets, so steps fall like 1 / sqrt(k).
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

from .elementwise import Elementwise
from .lr_schedules import Schedule
from .plan import OptimizerPlan

__all__ = ["AdaGrad", "AdaGradOptimizer"]


class AdaGradOptimizer(Elementwise):
    """Steps scaled by the sum of all squared gradients.

    Example: `AdaGradOptimizer(model.parameters(), lr=0.1)`.

    Args:
        params: any tensors.
        lr: the size of the first step of each weight.
        eps: keeps the quotient finite where every gradient was zero.
        eps_in_root: add eps under the root (CS336, lecture 2: eps=1e-5). Gradients below sqrt(eps)
            then take smaller steps.
    """

    remembered = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        eps_in_root: bool = False,
    ) -> None:
        """Set the defaults of every group."""
        super().__init__(params, {"lr": lr, "eps": eps, "eps_in_root": eps_in_root})

    def move(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """The formula above."""
        (sums,) = states
        _foreach_addcmul_(sums, gradients, gradients)
        if group.get("eps_in_root"):
            roots = _foreach_sqrt(_foreach_add(sums, group["eps"]))
        else:
            roots = _foreach_sqrt(sums)
            _foreach_add_(roots, group["eps"])
        lr = group["lr"]
        if isinstance(lr, Tensor):  # which addcdiv takes of one dimension only, and on a CPU
            _foreach_addcdiv_(weights, _foreach_mul(gradients, -lr), roots)
        else:
            _foreach_addcdiv_(weights, gradients, roots, -lr)


class AdaGrad(OptimizerPlan):
    """Everything to AdaGrad: `--trainer.callbacks+=AdaGrad`.

    Args:
        lr: the size of the first step of each weight.
        schedule: what multiplies lr.
        eps: keeps the quotient finite where every gradient was zero.
        eps_in_root: add eps under the root: `AdaGrad(eps=1e-5, eps_in_root=True)` is CS336's.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        schedule: Schedule | None = None,
        eps: float = 1e-10,
        eps_in_root: bool = False,
    ) -> None:
        """Write the plan."""
        options = {"lr": lr, "eps": eps, "eps_in_root": eps_in_root}
        super().__init__(partial(AdaGradOptimizer, **options), schedule=schedule)
