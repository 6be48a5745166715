"""Summary: print training loss, validation metrics and number of parameters at the end of a run."""

from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from ravine.lightning_compat import logged_step
from ravine.strategies.pipeline_parallel import full_module

LOSS_WINDOW = 100  # steps over which the training loss is averaged: the loss of one step is noisy


class Summary(L.Callback):
    """Prints training loss, every validation metric and the number of parameters after a fit.

    The module's `param_formula()`, if it exists, is printed with the number of parameters. A
    checkpoint holds the last losses, of several ranks those of the first.
    """

    def __init__(self) -> None:
        """Start without losses."""
        self.losses: deque[Tensor] = deque(maxlen=LOSS_WINDOW)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the loss, on its device."""
        loss = outputs if isinstance(outputs, Tensor) else (outputs or {}).get("loss")
        if loss is not None:
            self.losses.append(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the last steps, as scalars on the CPU."""
        return {"losses": [loss.cpu() for loss in self.losses]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses, so that a resumed run prints the mean of an uninterrupted one."""
        self.losses.extend(state_dict["losses"])

    def summary_lines(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        """Return the lines to print, by name; also log the mean training loss.

        `self.losses` has the losses of the last steps of this rank.
        """
        lines = {}
        if self.losses:
            losses = torch.stack([loss.to(pl_module.device) for loss in self.losses])
            mean = trainer.strategy.reduce(losses.mean(), reduce_op="mean")
            lines[f"train/loss, last {len(self.losses)} steps"] = f"{float(mean):.4f}"
            for logger in trainer.loggers:
                logger.log_metrics({"train/loss_last_100": float(mean)}, logged_step(trainer))
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                lines[name] = f"{float(value):.4f}"
        # text of a module's method: the number of parameters as a sum over the parts of the net
        formula = getattr(pl_module, "param_formula", lambda: "")()
        with full_module(trainer):  # includes the layers of other pipeline ranks
            count = sum(parameter.numel() for parameter in pl_module.parameters())
        lines["parameters"] = f"{count:,} = {formula}" if formula else f"{count:,}"
        return lines

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the lines."""
        lines = self.summary_lines(trainer, pl_module)
        wide = max(map(len, lines))
        pl_module.print("\n".join(f"{name:{wide}}  {value}" for name, value in lines.items()))
