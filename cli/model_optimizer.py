"""The optimizer of a run without OptimizerPlan: a line that names it, and the method it is from."""

from typing import Any

import lightning as L

from ravine.callbacks.base import find_callbacks
from ravine.callbacks.optimizers.plan import OptimizerPlan


def model_optimizer_message(trainer: L.Trainer, module: L.LightningModule) -> str | None:
    """Return the optimizers that the module builds, with their rates; None if a plan builds them.

    Args:
        trainer: a trainer whose training has started.
        module: the module that is trained.
    """
    if find_callbacks(trainer, OptimizerPlan):
        return None
    optimizers: list[Any] = trainer.optimizers
    texts = []
    for optimizer in optimizers:
        lrs = dict.fromkeys(group.get("lr") for group in optimizer.param_groups)
        lr_text = ", ".join(f"{float(lr):g}" for lr in lrs if lr is not None)
        texts.append(f"{type(optimizer).__name__}{f' with lr {lr_text}' if lr_text else ''}")
    method = type(module).configure_optimizers.__qualname__
    return f"optimizer: {' and '.join(texts) or 'none'}, from {method}"
