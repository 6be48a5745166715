"""Newton's method for problems of a few parameters (lecture 8): divide by the curvature.

    w <- w - lr (H + damping I)^-1 g

Column i of H is (g(w + h e_i) - g(w - h e_i)) / 2h: two gradients a parameter, all from the same
batch. On a quadratic with damping 0 and lr 1 one step ends the search; on u^4 each one leaves 2/3.
On several ranks each gathers the whole gradient and solves for itself: there are few numbers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..shards import local, part_of, whole
from .plan import OptimizerPlan
from .schedules import Schedule

LIMIT = 256  # parameters: 512 gradients a step


class NewtonOptimizer(Optimizer):
    """Damped Newton; `step` needs the closure that computes the loss and its gradients.

    Parameters may be spread over ranks; `NewtonOptimizer(model.parameters()).step(closure)`.

    Args:
        params: at most 256 numbers in all; float64 makes the curvature exact to eight digits.
        lr: share of the Newton step that is taken.
        damping: added to every curvature; with much of it this is gradient descent.
    """

    gathers = True  # what plans and ZeRO-1 ask: every rank takes the whole step, and keeps no state

    def __init__(self, params: Iterable[Any], lr: float = 1.0, damping: float = 0.0) -> None:
        """Count the parameters."""
        super().__init__(params, {"lr": lr, "damping": damping})
        size = sum(p.numel() for p in self._all())
        if size > LIMIT or len(self.param_groups) > 1:
            raise ValueError(
                f"Newton takes one group of at most {LIMIT} numbers, since a step costs two "
                f"gradients for each; this is {size} in {len(self.param_groups)}; take LBFGS"
            )

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; the closure is called 2 n + 1 times."""
        parameters, group = self._all(), self.param_groups[0]
        start = _joined(parameters)
        losses: list[Any] = []

        def gradient(at: Tensor) -> Tensor:
            _put(at, parameters)
            self.zero_grad()
            with torch.enable_grad():
                losses.append(closure())
            return _joined([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])

        # the cube root of the precision balances rounding against the third derivative
        width = torch.finfo(start.dtype).eps ** (1 / 3) * start.abs().clamp(min=1)
        offsets = torch.diag(width)
        columns = [
            (gradient(start + offset) - gradient(start - offset)) / (2 * h)
            for offset, h in zip(offsets, width, strict=True)
        ]
        hessian = torch.stack(columns)
        hessian = (hessian + hessian.T) / 2 + group["damping"] * torch.eye(len(start)).to(start)
        slope = gradient(start)
        solution, trouble = torch.linalg.solve_ex(hessian, slope)
        if trouble:
            raise ValueError(
                f"Newton: the curvature is zero in some direction, and damping is "
                f"{group['damping']}; set e.g. damping=1e-3"
            )
        _put(start - group["lr"] * solution, parameters)
        return losses[-1]


def _joined(tensors: list[Tensor]) -> Tensor:
    """All numbers (n) of tensors that may be spread; every rank calls it."""
    return torch.cat([whole(tensor).reshape(-1) for tensor in tensors])


def _put(numbers: Tensor, parameters: list[Tensor]) -> None:
    """Give each rank its part of numbers (n)."""
    for p, part in zip(parameters, numbers.split([p.numel() for p in parameters]), strict=True):
        local(p).copy_(part_of(part.view(p.shape), p))


class Newton(OptimizerPlan):
    """Everything to Newton's method: `--trainer.callbacks+=Newton`.

    Args:
        lr: share of the Newton step that is taken.
        damping: added to every curvature.
        schedule: what multiplies lr.
    """

    def __init__(
        self, lr: float = 1.0, damping: float = 1e-3, schedule: Schedule | None = None
    ) -> None:
        """Write the plan."""
        super().__init__(partial(NewtonOptimizer, lr=lr, damping=damping), schedule=schedule)
