"""UpdateSizes: how far each rule's weights move, against how large they are.

    rms   = |dw| / sqrt(number of weights)       what one weight moves by, per optimizer step
    ratio = |dw| / |w|                           about 1e-3 in a healthy run (lecture 8)

A ratio of 1e-5 is a learning rate that trains nothing; one of 1e-1 forgets what was learned.
"""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from ..gradient_clipping import global_norm
from .composite import Composite


class UpdateSizes(Callback):
    """Log `update/rms/<rule>`, `update/ratio/<rule>` and `lr/<rule>` at each log line.

    Works with any optimizer; one that no plan made has its parameter groups for rules. It copies
    the weights in the steps that are logged, and in no others: `--trainer.callbacks+=UpdateSizes`.
    """

    def __init__(self) -> None:
        """How often is for `--trainer.log_every_n_steps`."""
        self._before: dict[str, list[Tensor]] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep the weights of a step that will be logged."""
        if trainer._logger_connector.should_update_logs:
            self._before = {
                label: [p.detach().clone() for p in parameters]
                for label, parameters, _ in by_rule(optimizer)
            }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Compare with the weights now; nothing leaves the device before it is written."""
        if not self._before:
            return
        for label, parameters, lr in by_rule(trainer.optimizers[0]):
            before = self._before[label]
            moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
            step, size = global_norm(moved), global_norm(before)
            count = sum(p.numel() for p in parameters)
            pl_module.log(f"update/rms/{label}", step / math.sqrt(count))
            pl_module.log(f"update/ratio/{label}", step / size.clamp(min=torch.finfo().tiny))
            pl_module.log(f"lr/{label}", float(lr))
        self._before = {}


def by_rule(optimizer: Optimizer) -> list[tuple[str, list[Tensor], float]]:
    """Label, parameters and learning rate of each rule."""
    if isinstance(optimizer, Composite):
        groups = [(label, own) for label, (_, own) in optimizer.by_label().items()]
    else:
        groups = [(f"group {i}", [group]) for i, group in enumerate(optimizer.param_groups)]
    return [
        (label, [p for group in own for p in group["params"]], own[0].get("lr", math.nan))
        for label, own in groups
    ]
