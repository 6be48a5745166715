"""An optimizer: NewOptimizer.

lightning fit --config shakespeare/quick_adamw --trainer.callbacks+=OptimizerPlan \
    --trainer.callbacks.optimizer=new_optimizer.NewOptimizer --trainer.callbacks.optimizer.lr=1e-3

The formula, to be replaced by yours:

    m <- momentum m + (1 - momentum) g
    w <- (1 - lr weight_decay) w - lr sign(m)
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class NewOptimizer(torch.optim.Optimizer):
    """Change each weight by lr, against the sign of its averaged gradient.

    Args:
        params: any tensors.
        lr: the change of each weight in one step.
        momentum: decay factor of the averaged gradient.
        weight_decay: fraction of each weight, times lr, that is subtracted in one step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults of every parameter group."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Apply the formula to each parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]  # saved in checkpoints
                if "average" not in state:
                    state["average"] = torch.zeros_like(p)
                # average = momentum * average + (1 - momentum) * gradient
                state["average"].lerp_(p.grad, 1 - group["momentum"])
                # decoupled weight decay: it shrinks the weight, and does not enter the average
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(state["average"].sign(), alpha=group["lr"])
        return loss
