"""MomentumSchedule: change the momentum of an optimizer during the run.

    momentum at step k = start + (stop - start) min(1, k / num_steps)

The published recipe of Muon raises its momentum from 0.85 to 0.95 in 300 steps. The momentum is the
setting `momentum` of a param group, or the first of its `betas`.
"""

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from ravine.errors import UsageError


class MomentumSchedule(Callback):
    """Move the momentum of every param group linearly from `start` to `stop`.

    Example: `MomentumSchedule(0.85, 0.95, num_steps=300)`.

    Args:
        start: momentum of the first optimizer step.
        stop: momentum from step `num_steps` on.
        num_steps: number of optimizer steps of the change.
    """

    acts_on_training = True  # a resume without this callback changes the training

    def __init__(self, start: float = 0.85, stop: float = 0.95, num_steps: int = 300) -> None:
        """Check and store the arguments."""
        for name, value in (("start", start), ("stop", stop)):
            if not 0 < value < 1:
                raise UsageError(
                    f"MomentumSchedule: {name}={value} is not a momentum",
                    ["above 0, below 1"],
                    hint=f"use {name}=0.9",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}=0.9",
                )
        if num_steps < 1:
            raise UsageError(
                f"MomentumSchedule: num_steps={num_steps} is too small",
                ["1 or more"],
                hint="use num_steps=300",
                flag=f"--trainer.callbacks.{type(self).__name__}.num_steps=300",
            )
        self.start, self.stop, self.num_steps = start, stop, num_steps

    def momentum(self, step: int) -> float:
        """Return the momentum of optimizer step `step`, counted from 0."""
        return self.start + (self.stop - self.start) * min(1.0, step / self.num_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse optimizers without momentum."""
        for optimizer in trainer.optimizers:
            if not any(_has_momentum(group) for group in optimizer.param_groups):
                members = getattr(optimizer, "optimizers", [optimizer])
                names = ", ".join(type(member).__name__ for member in members)
                raise UsageError(
                    f"MomentumSchedule: no param group of {names} has momentum",
                    ["SGD with momentum above 0", "Muon", "optimizers with betas"],
                    hint="remove MomentumSchedule() from Trainer(callbacks=...)",
                )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Set the momentum of this step."""
        momentum = self.momentum(trainer.global_step)
        for group in optimizer.param_groups:
            if group.get("momentum"):  # 0 stays: such a group keeps no momentum
                group["momentum"] = momentum
            elif "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])


def _has_momentum(group: dict) -> bool:
    return bool(group.get("momentum")) or "betas" in group
