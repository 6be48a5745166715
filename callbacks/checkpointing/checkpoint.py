"""Checkpoint: the newest state of a run and its best one, in whole files without a NaN."""

import warnings
from typing import Any, Literal
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from ravine.errors import UsageError, sort_by_similarity
from ravine.lightning_compat import ModelCheckpointAccess, should_accumulate, validation_follows
from ravine.strategies.checkpoint.saving import (
    defer_saving_hooks,
    restore_saving_hooks,
    save_on_all_ranks,
    weights_are_finite,
)

from ..checks.run_checks import add_run_checks
from ..stability.nan_guard import NonFiniteError

DEFAULT_MONITOR = "val/loss"


class Checkpoint(ModelCheckpointAccess, ModelCheckpoint):
    """Save `step=000600.ckpt` after each validation, and at the end; keep the newest and the best.

    Without a validation it saves at the end of each epoch. A file always stands between two
    optimizer steps, after the validation where there is one, so that it holds its outcome. It is
    written after all hooks of the step, the module's own `on_train_batch_end` included.
    `best_model_path` is the newest while nothing was measured. Example:
    `Checkpoint(monitor="val/accuracy", mode="max", every_n_train_steps=500)`.

    Args:
        dirpath: folder of the files; `checkpoints` in the run's folder if not given.
        monitor: metric that tells the best; `val/loss` may be missing, another one may not.
        mode: whether the least or the greatest is the best.
        every_n_train_steps: save at every n-th optimizer step too.
        save_top_k: how many of the best to keep, beside the newest; -1 keeps every file.
    """

    CHECKPOINT_NAME_LAST = "step="  # what `ckpt_path="last"` looks for, taking the newest

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = DEFAULT_MONITOR,
        mode: Literal["min", "max"] = "min",
        every_n_train_steps: int | None = None,
        save_top_k: int = 1,
    ) -> None:
        """The rest of ModelCheckpoint's arguments follow from these."""
        super().__init__(
            dirpath=dirpath,
            filename="step={step:06d}",
            monitor=monitor,
            mode=mode,
            every_n_train_steps=every_n_train_steps,
            save_top_k=save_top_k,
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a step saved again replaces its file
        )
        self._save_deferred = False  # a validation ended within an optimizer step
        self._written_paths: set[str] = set()  # paths; a checkpoint may name any other file

    @property
    def monitor_is_optional(self) -> bool:
        """Whether a run may log no metric of that name."""
        return self.monitor == DEFAULT_MONITOR

    @property
    def state_key(self) -> str:
        """Two may live side by side if they look at different metrics."""
        return f"Checkpoint[{self.monitor}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder; that it holds files already is no news to one who resumes there."""
        add_run_checks(trainer, pl_module, stage)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
            super().setup(trainer, pl_module, stage)
        defer_saving_hooks(trainer, pl_module, self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module's hooks back."""
        super().teardown(trainer, pl_module, stage)
        restore_saving_hooks(pl_module, self)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Save a step that is due, unless its validation follows at once and saves it then."""
        if should_accumulate(trainer) or self._is_saved(trainer):
            return
        n = self.every_n_steps
        if not self._save_deferred and (n < 1 or trainer.global_step % n):
            return
        if not validation_follows(trainer):
            self._save_and_prune(trainer, has_metric=self._save_deferred)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was just measured; within an optimizer step, as soon as that is done."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics and self.monitor != DEFAULT_MONITOR:
            names = sorted(trainer.callback_metrics)
            nearest = sort_by_similarity(str(self.monitor), names)[:3]
            raise UsageError(
                f"Checkpoint: no metric {self.monitor!r} was logged by the end of the validation; "
                f"there are {', '.join(nearest) or 'none'}; set monitor to one of them"
            )
        if should_accumulate(trainer):
            self._save_deferred = True
        else:
            self._save_and_prune(trainer, has_metric=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save an epoch that is not validated."""
        if not (trainer.enable_validation or self.every_n_steps or self._is_saved(trainer)):
            self._save_and_prune(trainer, has_metric=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step; a run that ends with a NaN in its weights has failed."""
        if not self._is_saved(trainer) and not self._save_and_prune(trainer, has_metric=False):
            raise NonFiniteError(
                f"the weights went to infinity by step {trainer.global_step}, the end of the run; "
                f"newest whole checkpoint: {self.last_model_path or 'none'}; lower the learning "
                "rate, or see where it begins: --trainer.callbacks+=NaNGuard"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best so far, wherever it is; only files of this run are removed."""
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})

    def _is_saved(self, trainer: L.Trainer) -> bool:
        return self.last_saved_step == trainer.global_step

    def _save_and_prune(self, trainer: L.Trainer, has_metric: bool) -> bool:
        """Write the file, then remove the one before it unless it is among the best.

        Returns False if a weight is not finite, and writes nothing.
        """
        self._save_deferred = False
        if getattr(trainer, "fast_dev_run", False):
            return True
        if not weights_are_finite(trainer):
            return False
        candidates = self.candidates(trainer)
        current = candidates.get(str(self.monitor)) if has_metric else None
        path = self.format_checkpoint_name(candidates)
        previous, self.last_model_path = self.last_model_path, path
        if self.save_top_k and self.check_monitor_top_k(trainer, current) and current is not None:
            self.save_among_best(current, trainer, candidates)
        else:
            self.best_model_path = self.best_model_path if self.best_k_models else path
            self.write_checkpoint(trainer, path)
        stale = previous and previous not in self.best_k_models and self.save_top_k != -1
        if stale and self.should_remove(trainer, previous, path):
            self.remove_checkpoint(trainer, previous)
        return True

    def write_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Write a whole file, and tell the loggers."""
        self._written_paths.add(filepath)
        save_on_all_ranks(trainer, filepath)
        self.note_saved(trainer.global_step, filepath)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))  # pyright: ignore[reportArgumentType]

    def should_remove(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Whether a file is of this run and not the newest."""
        removable = previous in self._written_paths and previous != self.last_model_path
        return removable and super().should_remove(trainer, previous, current)
