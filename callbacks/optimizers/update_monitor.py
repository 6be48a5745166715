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
from .learning_rates import groups_by_rule


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
        self._learning_rates: dict[str, float] = {}

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """Return the names of the metrics that the callback logs."""
        labels = [
            label
            for optimizer in trainer.optimizers
            for label in groups_by_rule(trainer, optimizer)
        ]
        return {
            f"{metric}/{label}"
            for metric in ("update/rms", "update/ratio", "lr")
            for label in labels
        }

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Copy the weights before a step that is logged, and read its learning rates."""
        if not should_update_logs(trainer):
            return
        for label, groups in groups_by_rule(trainer, optimizer).items():
            parameters = [p for group in groups for p in group["params"]]
            self._previous_weights[label] = [p.detach().clone() for p in parameters]
            # a scheduler changes the rate at the end of the step
            self._learning_rates[label] = float(groups[0].get("lr", math.nan))

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
        # the param groups of each rule of a plan, or single groups, by label
        rules = [
            rule
            for optimizer in trainer.optimizers
            for rule in groups_by_rule(trainer, optimizer).items()
        ]
        for label, groups in rules:
            if label not in self._previous_weights:  # its optimizer made no step in this batch
                continue
            parameters = [p for group in groups for p in group["params"]]
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
            pl_module.log(f"lr/{label}", self._learning_rates[label])
        self._previous_weights = {}
