"""Disable the searches of BatchSizeFinder and LearningRateFinder in a resumed run.

A search within a resume would load its own file instead of the checkpoint, and the run would start
from the beginning. A checkpoint contains the learning rates that were found. The batch size that
was found is saved in the checkpoint and set again before the data are loaded.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.parsing import lightning_setattr

from ravine.lightning_compat import batch_size_attribute, replace_method, restore_method

from ..base import find_callbacks

BATCH_SIZE_KEY = "found_batch_size"
SEARCH_METHODS = {LearningRateFinder: "lr_find", BatchSizeFinder: "scale_batch_size"}


def enable_searches(trainer: Any) -> None:
    """Restore the search methods of all callbacks."""
    for callback_type, method in SEARCH_METHODS.items():
        for callback in find_callbacks(trainer, callback_type):
            restore_method(callback, method)


def disable_searches(trainer: Any) -> None:
    """Disable the searches of all callbacks in a resumed run."""
    for callback_type, method in SEARCH_METHODS.items():
        for callback in find_callbacks(trainer, callback_type):
            replace_method(callback, method, lambda *args: None)
            rank_zero_only(print)(
                f"{type(callback).__name__} does not search: the resumed run keeps the values "
                "of its checkpoint"
            )


def save_batch_size(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Save the batch size that a search found, under the name of its attribute."""
    for callback in find_callbacks(trainer, BatchSizeFinder):
        if callback.optimal_batch_size is not None:
            checkpoint[BATCH_SIZE_KEY] = {
                batch_size_attribute(callback): callback.optimal_batch_size
            }


def restore_batch_size(trainer: Any, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Set the saved batch size on a module whose trainer has a BatchSizeFinder."""
    for callback in find_callbacks(trainer, BatchSizeFinder):
        for name, value in checkpoint.get(BATCH_SIZE_KEY, {}).items():
            lightning_setattr(module, name, value)
            callback.optimal_batch_size = value
