"""Optimizers that move each number by what that number's gradient was: sharding cannot matter.

A subclass names the tensors it remembers and writes its formula once, over lists of tensors: each
line of it is one call for all parameters of a group.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import (
    Tensor,
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.optim import Optimizer

from ..shards import local


class Elementwise(Optimizer):
    """Base of SignSGD, AdaGrad and Lion.

    class Sgd(Elementwise):
        def __init__(self, params, lr=0.1): super().__init__(params, {"lr": lr})
        def move(self, group, weights, gradients):
            torch._foreach_add_(weights, gradients, alpha=-group["lr"])
    """

    remembered: ClassVar[tuple[str, ...]] = ()  # names of state tensors; they start at zero

    def move(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Change weights and states in place; `group` holds lr and the like."""
        raise NotImplementedError(f"{type(self).__name__} needs a move()")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decay the weights if that is asked for, then move them; no gradient, no movement."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            for p in moving:
                refuse_sparse(self, p)
                for name in self.remembered:
                    if name not in self.state[p]:
                        self.state[p][name] = torch.zeros_like(p)
            weights = [_real(p) for p in moving]
            if decay := group.get("weight_decay"):
                _foreach_mul_(weights, 1 - group["lr"] * decay)
            states = ([_real(self.state[p][name]) for p in moving] for name in self.remembered)
            self.move(group, weights, [_real(p.grad) for p in moving], *states)
        return loss


def refuse_sparse(optimizer: Optimizer, parameter: Tensor) -> None:
    """ValueError for a sparse gradient: that of `nn.Embedding(sparse=True)`."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise ValueError(
            f"{type(optimizer).__name__} takes no sparse gradients, and a weight of shape "
            f"{tuple(parameter.shape)} has one; allowed: torch.optim.SparseAdam, SGD and Adagrad; "
            "make the embedding with sparse=False, or give it to one of these by a rule"
        )


def _real(tensor: Tensor) -> Tensor:
    """This rank's numbers, sharing memory; of complex ones both parts, each a number by itself."""
    part = local(tensor)
    return torch.view_as_real(part) if part.is_complex() else part
