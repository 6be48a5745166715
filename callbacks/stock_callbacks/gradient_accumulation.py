"""Support GradientAccumulationScheduler with data whose `batch_size` is that of a whole step.

    factor 1    step = 1 micro-batch of batch_size samples       an epoch has n micro-batches
    factor 4    step = 4 micro-batches of batch_size / 4         an epoch has 4 n micro-batches

Lightning counts the micro-batches of an epoch once, when the loader is created. Here they are
counted at the start of every epoch, for loaders with a method `set_accumulate`. Other loaders keep
their batches, and an optimizer step takes more of them, as in Lightning.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ravine.lightning_compat import combined_loader, combined_mode, data_fetcher

from ..base import find_callbacks


def find_accumulation_scheduler(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    """Return the trainer's GradientAccumulationScheduler, if it has one."""
    return next(iter(find_callbacks(trainer, GradientAccumulationScheduler)), None)


def check_accumulation_factors(trainer: L.Trainer) -> None:
    """Raise ValueError if a loader cannot split its batch by a factor of any epoch."""
    scheduler = find_accumulation_scheduler(trainer)
    if scheduler is None:
        return
    for loader in find_splittable_loaders(trainer):
        for factor in scheduler.scheduling.values():
            loader.set_accumulate(factor)


def apply_accumulation_factor(trainer: L.Trainer) -> None:
    """Set the accumulation factor of the current epoch, and its number of micro-batches.

    Called at the start of each epoch; does nothing without a GradientAccumulationScheduler. The
    loaders that split a batch (`set_accumulate`) then have another length, so that the limits which
    Lightning has computed from it are computed again.
    """
    scheduler = find_accumulation_scheduler(trainer)
    if scheduler is None:
        return
    fit = trainer.fit_loop
    factor = scheduler.get_accumulate_grad_batches(trainer.current_epoch)
    trainer.accumulate_grad_batches = factor
    # loaders with a method `set_accumulate`; Lightning's loader over all training loaders
    splittable_loaders, combined = find_splittable_loaders(trainer), combined_loader(trainer)
    if not splittable_loaders or combined is None:
        return
    for loader in splittable_loaders:
        loader.set_accumulate(factor)
    previous_max_batches = fit.max_batches
    # number of batches of each loader, with Lightning's `limit_train_batches` applied
    combined.limits = [
        apply_batch_limit(trainer, len(train_loader)) for train_loader in combined.flattened
    ]
    fit.max_batches = count_epoch_batches(trainer, factor)
    interval = trainer.val_check_interval
    if isinstance(interval, float) and trainer.val_check_batch is not None:  # fraction of an epoch
        trainer.val_check_batch = max(1, int(fit.max_batches * interval))
    fetcher = data_fetcher(trainer)
    if fit.max_batches != previous_max_batches and fetcher is not None:
        iter(fetcher)  # restart it: it counts batches at the start of an epoch


def find_splittable_loaders(trainer: L.Trainer) -> list[Any]:
    """Return the training loaders that split one batch into the micro-batches of a step."""
    combined = combined_loader(trainer)
    loaders = combined.flattened if combined is not None else []
    return [loader for loader in loaders if callable(getattr(loader, "set_accumulate", None))]


def count_epoch_batches(trainer: L.Trainer, factor: int) -> float:
    """Return the number of micro-batches of an epoch with this factor."""
    combined = combined_loader(trainer)
    if combined is None or not find_splittable_loaders(trainer):
        return trainer.num_training_batches
    counts = [
        apply_batch_limit(
            trainer,
            loader.steps_per_epoch * factor if hasattr(loader, "set_accumulate") else len(loader),
        )
        for loader in combined.flattened
    ]
    return min(counts) if combined_mode(combined) == "min_size" else max(counts)


def apply_batch_limit(trainer: L.Trainer, batches: int) -> int:
    """Apply `limit_train_batches`, a number or a fraction, to a number of batches."""
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def count_optimizer_steps(trainer: L.Trainer) -> float:
    """Return the optimizer steps of the whole run; Lightning's estimate if no factor changes."""
    scheduler = find_accumulation_scheduler(trainer)
    if scheduler is None or trainer.max_epochs in (None, -1):
        return L.Trainer.estimated_stepping_batches.fget(trainer)  # type: ignore[attr-defined]
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    steps = 0.0
    for epoch in range(max(trainer.max_epochs or 1, 1)):
        factor = scheduler.get_accumulate_grad_batches(epoch)
        batches = count_epoch_batches(trainer, factor)
        if batches == float("inf"):
            return trainer.max_steps
        steps += -(-int(batches) // factor)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
