"""Private parts of Lightning's own callbacks."""

from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint

from .versions import private, set_private

_Base: Any = object  # a mixin: a subclass of Callback would be offered on the command line
if TYPE_CHECKING:
    _Base = ModelCheckpoint


class ModelCheckpointAccess(_Base):
    """Public names for the parts of ModelCheckpoint that decide when and where it saves.

    class Checkpoint(ModelCheckpointAccess, ModelCheckpoint): ...

    Reason: ModelCheckpoint saves at fixed hooks. A subclass that saves at other moments needs its
    counters, its choice of the best files and its removal of old ones.

    Upstream: pytorch/callbacks/model_checkpoint.py
    Seen on: 2.5.6 to 2.6.6
    """

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.write_checkpoint(trainer, filepath)

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        return self.should_remove(trainer, previous, current)

    def write_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Write a file; called for each file among the best. A subclass overrides it."""
        private(super(), "_save_checkpoint")(trainer, filepath)

    def should_remove(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Return whether a file may be removed after a newer one was written."""
        return private(super(), "_should_remove_checkpoint")(trainer, previous, current)

    def remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Remove a file."""
        private(self, "_remove_checkpoint")(trainer, filepath)

    @property
    def every_n_steps(self) -> int:
        """Optimizer steps between two files; 0: only after validations."""
        return private(self, "_every_n_train_steps")

    @property
    def last_saved_step(self) -> int:
        """The optimizer step of the last file that was written."""
        return private(self, "_last_global_step_saved")

    def note_saved(self, step: int, filepath: str) -> None:
        """Note the step and the path of a file that was written."""
        set_private(self, "_last_global_step_saved", step)
        set_private(self, "_last_checkpoint_saved", filepath)

    def candidates(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the metrics of this moment, with `epoch` and `step`."""
        return private(self, "_monitor_candidates")(trainer)

    def save_among_best(self, current: Any, trainer: L.Trainer, metrics: dict[str, Any]) -> None:
        """Write a file that is among the best, and remove the one that it replaces."""
        private(self, "_update_best_and_save")(current, trainer, metrics)


def averaging_callbacks() -> tuple[type, ...]:
    """Return the callbacks of the installed Lightning that average weights.

    Reason: WeightAveraging was added in Lightning 2.6. Public API alone.

    Upstream: pytorch/callbacks/__init__.py
    Seen on: 2.5.6 to 2.6.6
    """
    names = ("WeightAveraging", "StochasticWeightAveraging")
    return tuple(getattr(callbacks, name) for name in names if hasattr(callbacks, name))


def last_saved(callback: Any) -> tuple[int | None, str]:
    """Return the step and the path of the last file of a checkpoint callback.

    Reason: `best_model_path` and `last_model_path` do not contain the step. For a callback of
    another package, which has neither attribute, the step is None.

    Upstream: pytorch/callbacks/model_checkpoint.py
    Seen on: 2.5.6 to 2.6.6
    """
    step = getattr(callback, "_last_global_step_saved", None)
    return step, getattr(callback, "_last_checkpoint_saved", "")


def sets_learning_rate(finder: Any) -> bool:
    """Return whether a LearningRateFinder sets the rate that it finds.

    Reason: the argument `update_attr` is kept under a private name only.

    Upstream: pytorch/callbacks/lr_finder.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(finder, "_update_attr")


def stops_after_search(finder: Any) -> bool:
    """Return whether a LearningRateFinder ends the fit after its search, as for a Tuner.

    Reason: the search of a Tuner is a separate fit, whose end must not discard the found rate.

    Upstream: pytorch/callbacks/lr_finder.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(finder, "_early_exit")


def batch_size_attribute(finder: Any) -> str:
    """Return the name of the attribute that a BatchSizeFinder sets.

    Reason: the argument `batch_arg_name` is kept under a private name only.

    Upstream: pytorch/callbacks/batch_size_finder.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(finder, "_batch_arg_name")
