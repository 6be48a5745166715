"""Check for callbacks that run in validation: raise an error if the fit has no validation."""

import lightning as L

from ravine.errors import UsageError


def require_validation(trainer: L.Trainer, callback_name: str, stage: str) -> None:
    """Raise UsageError for a fit without validation data, validation step or validation batches."""
    if stage == "fit" and not trainer.enable_validation:
        raise UsageError(
            f"{callback_name} works at each validation, and this fit has none; allowed: a "
            "datamodule with "
            "val_dataloader, a module with validation_step and limit_val_batches above 0; type "
            "--trainer.limit_val_batches=1.0, for images --data.val_fraction=0.05, or take "
            f"{callback_name} out of trainer.callbacks"
        )
