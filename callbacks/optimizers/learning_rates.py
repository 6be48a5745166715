"""Learning rates by rule: the labels under which callbacks log what belongs to a rule of a plan."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from .composite import CompositeOptimizer, ParamGroup


def groups_by_rule(trainer: L.Trainer, optimizer: Optimizer) -> dict[str, list[ParamGroup]]:
    """Return the param groups of each rule of a plan's optimizer, by the label of the rule.

    For any other optimizer each param group has a label of its own: `group 0`. A label has the
    prefix `1 ` for the trainer's second optimizer.
    """
    index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
    prefix = f"{index} " if index > 0 else ""
    if isinstance(optimizer, CompositeOptimizer):  # that of a plan
        by_label = {label: groups for label, (_, groups) in optimizer.groups_by_label().items()}
    else:
        by_label = {f"group {i}": [group] for i, group in enumerate(optimizer.param_groups)}
    return {prefix + label: groups for label, groups in by_label.items()}


def learning_rates(trainer: L.Trainer) -> dict[str, float]:
    """Return the current learning rate of each rule; rules without a number as rate are left out.

    A rate that is a tensor on a device makes the host wait for the device.
    """
    rates: dict[str, float] = {}
    for optimizer in trainer.optimizers:
        for label, groups in groups_by_rule(trainer, optimizer).items():
            rate: Any = groups[0].get("lr")
            if isinstance(rate, int | float) or (isinstance(rate, Tensor) and rate.numel() == 1):
                rates[label] = float(rate)
    return rates
