"""Update-to-weight ratio: log the size of each optimizer step relative to the weights.

    rms   = |dw| / sqrt(number of weights)       RMS change of a weight in one optimizer step
    ratio = |dw| / |w|                           about 1e-3 in a healthy run (lecture 8)

At a ratio of 1e-5 the learning rate is too small to train. At 1e-1 it is so large that a step
overwrites the learned weights.
"""

import math
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from ravine.lightning_compat import should_update_logs

from ..stability.gradient_clipping import global_norm
from .composite import CompositeOptimizer


class UpdateMonitor(Callback):
    """Log `update/rms/<rule>`, `update/ratio/<rule>` and `lr/<rule>` at each log step.

    It works with any optimizer. Without a plan, the param groups take the place of rules, and the
    labels of a second optimizer start with `1 `. The weights are copied only in steps that are
    logged. Command line: `--trainer.callbacks+=UpdateMonitor`.
    """

    takes_partial_gradients = True  # under ZeRO-1 a rank has only the gradients that it owns

    def __init__(self) -> None:
        """Create the callback; `trainer.log_every_n_steps` sets the interval."""
        self._previous_weights: dict[str, list[Tensor]] = {}

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """Return the names of the metrics that the callback logs."""
        labels = [
            rule[0]
            for optimizer in trainer.optimizers
            for rule in group_params_by_rule(trainer, optimizer)
        ]
        return {
            f"{metric}/{label}"
            for metric in ("update/rms", "update/ratio", "lr")
            for label in labels
        }

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Copy the weights before a step that is logged."""
        if should_update_logs(trainer):
            self._previous_weights |= {
                label: [p.detach().clone() for p in parameters]
                for label, parameters, _ in group_params_by_rule(trainer, optimizer)
            }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log the change of the weights since `on_before_optimizer_step` has copied them.

        Values are logged as device tensors, which needs no synchronization.
        """
        if not self._previous_weights:
            return
        pipeline = getattr(trainer.strategy, "pipeline", None)
        # parameters that another pipeline stage counts
        excluded = set() if pipeline is None else set(pipeline.duplicated_params())
        # label, parameters and learning rate of each rule of a plan, or of each param group
        rules = [
            rule
            for optimizer in trainer.optimizers
            for rule in group_params_by_rule(trainer, optimizer)
        ]
        for label, parameters, lr in rules:
            if label not in self._previous_weights:  # its optimizer made no step in this batch
                continue
            pairs = zip(parameters, self._previous_weights[label], strict=True)
            pairs = [(p.detach(), old) for p, old in pairs if p not in excluded]
            change_norm = global_norm([new - old for new, old in pairs], pipeline)
            weight_norm = global_norm([old for _, old in pairs], pipeline)
            num_weights = sum(p.numel() for p, _ in pairs)
            count = torch.tensor(float(num_weights), device=weight_norm.device)
            if pipeline is not None:  # `global_norm` has summed the norms over its ranks
                dist.all_reduce(count, group=pipeline.group)
            tiny = torch.finfo().tiny  # avoids a division by 0
            pl_module.log(f"update/rms/{label}", change_norm / count.sqrt())
            pl_module.log(f"update/ratio/{label}", change_norm / weight_norm.clamp(min=tiny))
            pl_module.log(f"lr/{label}", float(lr))
        self._previous_weights = {}


def group_params_by_rule(
    trainer: L.Trainer, optimizer: Optimizer
) -> list[tuple[str, list[Tensor], float]]:
    """Return label, parameters and learning rate of each rule of a plan's optimizer.

    For any other optimizer, of each param group. A label has the prefix `1 ` for the trainer's
    second optimizer.
    """
    index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
    prefix = f"{index} " if index > 0 else ""
    if isinstance(optimizer, CompositeOptimizer):  # that of a plan
        groups_by_label = {
            label: groups for label, (_, groups) in optimizer.groups_by_label().items()
        }
    else:
        groups_by_label = {f"group {i}": [group] for i, group in enumerate(optimizer.param_groups)}
    return [
        (
            prefix + label,
            [p for group in groups for p in group["params"]],
            groups[0].get("lr", math.nan),
        )
        for label, groups in groups_by_label.items()
    ]
