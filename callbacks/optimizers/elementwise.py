"""Optimizers that move each number by what that number's gradient was: sharding cannot matter.

A subclass names its state, tensors shaped like the parameter and single numbers such as a count of
steps. It writes its formula once, over lists of tensors: each line of it is one call for all
parameters of a group.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import (
    Tensor,
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.strategies.shards import to_local


class Elementwise(Optimizer):
    """Base of optimizers that change each number by the gradients of that number alone.

    class Averaged(Elementwise):
        remembered = ("average",)
        scalars = {"step": 0.0}

        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

        def move(self, group, weights, gradients, averages, steps):
            torch._foreach_add_(steps, 1)
            torch._foreach_lerp_(averages, gradients, 0.1)
            rates = [group["lr"] / (1 - 0.9 ** step.item()) for step in steps]
            torch._foreach_sub_(weights, torch._foreach_mul(averages, rates))
    """

    # names of state tensors of the parameter's shape and dtype; they start at zero
    remembered: ClassVar[tuple[str, ...]] = ()
    # Names of single numbers of each parameter, with their first values. Each is a float64 tensor
    # without axes, on the CPU: reading it does not wait for a device. A number must depend on no
    # weight or gradient, since each rank has its own copy of it.
    scalars: ClassVar[Mapping[str, float]] = {}

    def move(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Change weights and states in place; `group` holds lr and the like.

        Args:
            group: the settings of these parameters.
            weights: the values of each parameter that has a gradient, or of this rank's shard.
            gradients: of the same shapes.
            states: one list for each name of `remembered`, then one for each of `scalars`.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a move()")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decay the weights if that is asked for, then move them; no gradient, no movement."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params_with_grad = [p for p in group["params"] if p.grad is not None]
            if not params_with_grad:
                continue
            for p in params_with_grad:
                check_not_sparse(self, p)
                for name in self.remembered:
                    if name not in self.state[p]:
                        self.state[p][name] = torch.zeros_like(p)
                for name, initial_value in self.scalars.items():
                    if name not in self.state[p]:
                        self.state[p][name] = torch.tensor(initial_value, dtype=torch.float64)
            weights = [_as_real(p) for p in params_with_grad]
            if decay := group.get("weight_decay"):
                _foreach_mul_(weights, 1 - group["lr"] * decay)
            states = [
                [_as_real(self.state[p][name]) for p in params_with_grad]
                for name in self.remembered
            ]
            states += [[self.state[p][name] for p in params_with_grad] for name in self.scalars]
            self.move(group, weights, [_as_real(p.grad) for p in params_with_grad], *states)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the numbers of `scalars` as float64 on the CPU.

        torch rounds every state but "step" to the parameter's dtype, and moves it to its device.
        """
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i, {})
            for name in self.scalars.keys() & saved.keys():
                value = torch.as_tensor(saved[name], dtype=torch.float64, device="cpu")
                self.state[p][name] = value.clone()


def check_not_sparse(optimizer: Optimizer, parameter: Tensor) -> None:
    """ValueError for a sparse gradient: that of `nn.Embedding(sparse=True)`."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise UsageError(
            f"{type(optimizer).__name__} takes no sparse gradients, and a weight of shape "
            f"{tuple(parameter.shape)} has one; allowed: torch.optim.SparseAdam, SGD and Adagrad; "
            "make the embedding with sparse=False, or give it to one of these by a rule"
        )


def _as_real(tensor: Tensor) -> Tensor:
    """This rank's numbers, sharing memory; of complex ones both parts, each a number by itself."""
    local_tensor = to_local(tensor)
    return torch.view_as_real(local_tensor) if local_tensor.is_complex() else local_tensor
