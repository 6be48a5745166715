"""Callbacks that work at validations refuse a fit that has none: nothing would ever be seen."""

import lightning as L

from ravine.errors import UsageError


def require_validation(trainer: L.Trainer, callback_name: str, stage: str) -> None:
    """ValueError if this is a fit without validation: no data, no step, or a limit of 0."""
    if stage == "fit" and not trainer.enable_validation:
        raise UsageError(
            f"{callback_name} works at each validation, and this fit has none; allowed: a "
            "datamodule with "
            "val_dataloader, a module with validation_step and limit_val_batches above 0; type "
            "--trainer.limit_val_batches=1.0, for images --data.val_fraction=0.05, or take "
            f"{callback_name} out of trainer.callbacks"
        )
