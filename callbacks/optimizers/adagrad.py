"""AdaGrad: a step that shrinks in each coordinate with what it has seen there (lecture 8).

    v <- v + g^2
    w <- w - lr g / (sqrt(v) + eps)

The first step is lr in every coordinate; v never forgets, so steps fall like 1 / sqrt(k).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_addcdiv_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_addcmul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sqrt,  # pyright: ignore[reportPrivateImportUsage]
)

from .elementwise import Elementwise
from .plan import OptimizerPlan
from .schedules import Schedule


class AdaGradOptimizer(Elementwise):
    """Steps scaled by the sum of all squared gradients.

    Example: `AdaGradOptimizer(model.parameters(), lr=0.1)`.

    Args:
        params: any tensors.
        lr: the size of the first step of each weight.
        eps: keeps the quotient finite where every gradient was zero.
    """

    remembered = ("sum",)

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10) -> None:
        """Set the defaults of every group."""
        super().__init__(params, {"lr": lr, "eps": eps})

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
        roots = _foreach_sqrt(sums)
        _foreach_add_(roots, group["eps"])
        _foreach_addcdiv_(weights, gradients, roots, -group["lr"])


class AdaGrad(OptimizerPlan):
    """Everything to AdaGrad: `--trainer.callbacks+=AdaGrad`.

    Args:
        lr: the size of the first step of each weight.
        schedule: what multiplies lr.
    """

    def __init__(self, lr: float = 1e-2, schedule: Schedule | None = None) -> None:
        """Write the plan."""
        super().__init__(partial(AdaGradOptimizer, lr=lr), schedule=schedule)
