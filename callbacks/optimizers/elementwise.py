"""Base class of elementwise optimizers, whose update of a number uses only its own gradients.

Sharded and unsharded parameters therefore get the same update. A subclass names its state: tensors
of the parameter's shape, and single numbers such as a step count. It writes the update once over
lists of tensors, so that each line is one foreach call for all parameters of a group.
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
from ravine.strategies.dtensor import to_local


class ElementwiseOptimizer(Optimizer):
    """Base of optimizers that update each number from the gradients of that number alone.

    A subclass names its state and writes its formula in `update`:

        class Averaged(ElementwiseOptimizer):
            state_names = ("average",)
            scalars = {"step": 0.0}

            def __init__(self, params, lr=0.1):
                super().__init__(params, {"lr": lr})

            def update(self, group, weights, gradients, averages, steps):
                torch._foreach_add_(steps, 1)
                torch._foreach_lerp_(averages, gradients, 0.1)
                rates = [group["lr"] / (1 - 0.9 ** step.item()) for step in steps]
                torch._foreach_sub_(weights, torch._foreach_mul(averages, rates))
    """

    # Names of state tensors with the parameter's shape and dtype; they start at zero.
    state_names: ClassVar[tuple[str, ...]] = ()
    # Names of single numbers of each parameter, with their initial values. Each is a 0-D float64
    # tensor on the CPU, so that reading it does not wait for a device. A number must not depend on
    # weights or gradients, because each rank has its own copy.
    scalars: ClassVar[Mapping[str, float]] = {}

    def update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        *states: list[Tensor],
    ) -> None:
        """Update weights and states in place.

        Args:
            group: the parameter group with its settings, such as lr.
            weights: the values of each parameter that has a gradient, or this rank's shard of them.
            gradients: the gradients, with the shapes of `weights`.
            states: one list for each name in `state_names`, then one for each name in `scalars`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define the method update")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply weight decay, then `update`, to all parameters that have a gradient.

        Missing state is created first: tensors of zeros for `state_names`, and a number on the CPU
        for each of `scalars`. A closure computes the loss, which is returned.
        """
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
                for name in self.state_names:
                    if name not in self.state[p]:
                        self.state[p][name] = torch.zeros_like(p)
                for name, initial_value in self.scalars.items():
                    if name not in self.state[p]:
                        self.state[p][name] = torch.tensor(initial_value, dtype=torch.float64)
            # this rank's shards, with complex numbers as pairs of real ones; they share the memory
            weights = [_as_real(p) for p in params_with_grad]
            if decay := group.get("weight_decay"):  # decoupled: w <- (1 - lr decay) w
                _foreach_mul_(weights, 1 - group["lr"] * decay)
            gradients = [_as_real(p.grad) for p in params_with_grad]
            states = [
                [_as_real(self.state[p][name]) for p in params_with_grad]
                for name in self.state_names
            ]
            states += [[self.state[p][name] for p in params_with_grad] for name in self.scalars]
            self.update(group, weights, gradients, *states)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the numbers of `scalars` as float64 on the CPU.

        torch casts every state except "step" to the parameter's dtype and moves it to its device.
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
    """Raise UsageError for a sparse gradient, as `nn.Embedding(sparse=True)` produces it."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise UsageError(
            f"{type(optimizer).__name__} does not support sparse gradients, and a weight of shape "
            f"{tuple(parameter.shape)} has one",
            ["torch.optim.SparseAdam", "SGD", "Adagrad"],
            hint="create the embedding with sparse=False, or add a ParamRule with one of these "
            "optimizers",
        )


def _as_real(tensor: Tensor) -> Tensor:
    """Return a real view of this rank's values; a complex number becomes two real numbers."""
    local_tensor = to_local(tensor)
    return torch.view_as_real(local_tensor) if local_tensor.is_complex() else local_tensor
