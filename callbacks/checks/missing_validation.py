"""Find before the first step whether a fit will run no validation, and the reason."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from ravine.errors import UsageError, format_arguments, format_flags

from ..stock_callbacks.gradient_accumulation import find_accumulation_scheduler


def find_missing_validation(trainer: Any, module: L.LightningModule) -> UsageError | None:
    """Return a notice if the fit that starts now will run no validation, else None.

    The notice is an error that is printed, not raised. There is none if the user has set
    `limit_val_batches=0`, or if the length of the run is not known.
    """
    data = getattr(trainer, "datamodule", None)
    # Ravine's datamodules set `skips_validation`, and limit_val_batches=0, if they have no data
    if not trainer.limit_val_batches and not getattr(data, "skips_validation", False):
        return None
    name = type(module).__name__
    if not is_overridden("validation_step", module):
        return UsageError(
            f"no validation runs: {name} has no validation_step",
            hint=f"define validation_step in {name}",
        )
    if not trainer.enable_validation:
        if data is None:
            return UsageError(
                "no validation runs: fit has no validation data",
                hint="pass val_dataloaders to fit",
            )
        # Ravine's datamodules know the argument that gives them validation data
        arguments = getattr(data, "validation_arguments", {})
        return UsageError(
            f"no validation runs: {type(data).__name__} has no validation data",
            hint=f"use {format_arguments(arguments)}" if arguments else "",
            flag=format_flags("--data.", arguments),
        )
    first, total = find_first_validation(trainer), count_planned_batches(trainer)
    if first is None or total is None or first <= total or getattr(trainer, "fast_dev_run", 0):
        return None
    done = trainer.fit_loop.total_batch_idx + 1  # batches before this fit, of a resumed run
    return interval_notice(
        f"no validation runs: the run ends after batch {total}, before the first validation",
        trainer,
        total - done,
    )


def interval_notice(problem: str, trainer: Any, num_batches: int) -> UsageError:
    """Return a notice with a `val_check_interval` that validates within `num_batches` batches."""
    settings, flags = f"val_check_interval={trainer.val_check_interval}", ""
    interval = max(1, num_batches // 2)
    hint = f"use val_check_interval={interval}"
    if (epochs := trainer.check_val_every_n_epoch) is not None:
        settings += f", check_val_every_n_epoch={epochs}"
        hint += ", check_val_every_n_epoch=None"
        flags = " --trainer.check_val_every_n_epoch=null"
    return UsageError(
        f"{problem} ({settings})", hint=hint, flag=f"--trainer.val_check_interval={interval}{flags}"
    )


def count_planned_batches(trainer: Any) -> int | None:
    """Return the number of micro-batches at the end of a fit, or an upper bound of it.

    None if only time or a signal ends the run, and if the number cannot be known.
    """
    ends = []
    if trainer.max_steps >= 0:
        # the steps of manual optimization, and a changing accumulation, have no fixed length
        if not trainer.lightning_module.automatic_optimization:
            return None
        if find_accumulation_scheduler(trainer) is not None:
            return None
        ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs >= 0 and batches != float("inf"):
        ends.append(epochs * int(batches))
    return min(ends, default=None)


def find_first_validation(trainer: Any) -> int | None:
    """Return the number of the micro-batch that the next validation follows; None if not known.

    Micro-batches are counted from 1, over all epochs.
    """
    interval, batches = trainer.val_check_batch, trainer.num_training_batches
    if interval is None:  # validations follow the clock
        return None
    if interval == float("inf"):  # a validation at the end of an epoch of unknown length
        interval = batches
    if interval == float("inf") or interval < 1:
        return None
    done = trainer.fit_loop.total_batch_idx + 1
    every = trainer.check_val_every_n_epoch
    if every is None:
        return (done // int(interval) + 1) * int(interval)
    epoch = trainer.current_epoch
    # the first of the next epochs with a validation after the batches that are done
    for next_epoch in range(epoch, epoch + 2 * every + 1):
        if (next_epoch + 1) % every:
            continue
        if batches == float("inf"):
            return None if next_epoch else (done // int(interval) + 1) * int(interval)
        start = next_epoch * int(batches)  # batches of the epochs before
        within = max(0, done - start)
        candidate = (within // int(interval) + 1) * int(interval)
        if candidate <= batches:
            return start + candidate
    return None
