"""Checkpoint: keep the newest and the best checkpoint; atomic writes, no NaN in the weights."""

import shlex
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

from ..base import find_callbacks
from ..checks.run_checks import RunChecks, add_run_checks
from ..stability.nan_guard import NonFiniteError

DEFAULT_MONITOR = "val/loss"
# Words in the name of a metric of which the largest value is the best.
LARGER_IS_BETTER = ("acc", "auc", "auroc", "f1", "precision", "recall", "reward", "score", "psnr")


class Checkpoint(ModelCheckpointAccess, ModelCheckpoint):
    """Save `step=000600.ckpt` after each validation and at the end; keep the newest and the best.

    Without validation it saves at the end of each epoch. A file is always written between two
    optimizer steps. If a validation follows the step, the file is written after it and includes
    its metrics. It is written after all hooks of the step, including the module's
    `on_train_batch_end`. `best_model_path` is the newest file until the metric has been logged.
    Example: `Checkpoint(monitor="val/accuracy", mode="max", every_n_train_steps=500)`.

    Args:
        dirpath: folder of the files; by default `checkpoints` in the run's folder.
        monitor: metric that selects the best file. Any other than `val/loss` must be logged.
            Without `val/loss` the newest file is the best, and a line names the logged metrics.
        mode: whether the smallest or the largest value is the best.
        every_n_train_steps: also save at every n-th optimizer step.
        save_top_k: number of best files to keep, besides the newest; -1 keeps every file.
    """

    CHECKPOINT_NAME_LAST = "step="  # prefix that `ckpt_path="last"` looks for

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = DEFAULT_MONITOR,
        mode: Literal["min", "max"] = "min",
        every_n_train_steps: int | None = None,
        save_top_k: int = 1,
    ) -> None:
        """Set all arguments of Lightning's ModelCheckpoint from these.

        Args:
            dirpath: folder of the files; None for `checkpoints` in the run's folder.
            monitor: metric that selects the best file.
            mode: whether the smallest or the largest value is the best.
            every_n_train_steps: also save at every n-th optimizer step.
            save_top_k: number of best files to keep, besides the newest; -1 keeps every file.
        """
        super().__init__(
            dirpath=dirpath,
            filename="step={step:06d}",  # Lightning fills in the optimizer step
            monitor=monitor,
            mode=mode,
            every_n_train_steps=every_n_train_steps,
            save_top_k=save_top_k,
            auto_insert_metric_name=False,
            enable_version_counter=False,  # a step saved again replaces its file
        )
        # whether a validation ended within an optimizer step, at whose end the file is saved
        self._save_deferred = False
        self._written_paths: set[str] = set()  # files of this run; no other file is removed
        self._has_printed_notice = False  # of a default metric that is not logged

    @property
    def monitor_is_optional(self) -> bool:
        """Whether the monitored metric may be missing from the logs."""
        return self.monitor == DEFAULT_MONITOR

    @property
    def state_key(self) -> str:
        """Return a key with the metric: instances with different metrics may coexist."""
        return f"Checkpoint[{self.monitor}]"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder; suppress Lightning's warning of a non-empty one, usual on a resume."""
        add_run_checks(trainer, pl_module, stage)
        self._has_printed_notice = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
            super().setup(trainer, pl_module, stage)
        defer_saving_hooks(trainer, pl_module, self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the module's hooks."""
        super().teardown(trainer, pl_module, stage)
        restore_saving_hooks(pl_module, self)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Save at a step that is due, unless a validation follows, after which it is saved."""
        if should_accumulate(trainer) or self._is_saved(trainer):
            return
        n = self.every_n_steps
        if not self._save_deferred and (n < 1 or trainer.global_step % n):
            return
        if not validation_follows(trainer):
            self._save_and_prune(trainer, has_metric=self._save_deferred)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save with the new metrics; within an optimizer step, postpone the save to its end."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._check_monitor_logged(trainer, "the validation")
        # `should_accumulate`: whether this micro-batch ends without an optimizer step
        if should_accumulate(trainer):  # the next micro-batch belongs to the same step
            self._save_deferred = True
        else:
            self._save_and_prune(trainer, has_metric=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of an epoch if there is no validation and no interval of steps."""
        if not trainer.enable_validation:
            self._check_monitor_logged(trainer, "the epoch")
        if not (trainer.enable_validation or self.every_n_steps or self._is_saved(trainer)):
            self._save_and_prune(trainer, has_metric=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step; raise NonFiniteError if a weight is not finite."""
        if not self._is_saved(trainer) and not self._save_and_prune(trainer, has_metric=False):
            raise NonFiniteError(
                f"a weight is not finite at step {trainer.global_step}, the end of the run; "
                f"newest checkpoint with finite weights: {self.last_model_path or 'none'}",
                hint="use a lower learning rate, or add NaNGuard() to Trainer(callbacks=...) to "
                "find the first tensor",
                flag="--trainer.callbacks+=NaNGuard",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best files so far, in any folder; only files of this run are removed."""
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})

    def _check_monitor_logged(self, trainer: L.Trainer, end: str) -> None:
        """Raise UsageError if the monitored metric was not logged by the end of `end`.

        The default metric, val/loss, may be missing. Then a line is printed once in a fit.
        """
        if self.monitor in trainer.callback_metrics:
            return
        if self.monitor == DEFAULT_MONITOR and self._has_printed_notice:
            return
        logged = sort_by_similarity(str(self.monitor), trainer.callback_metrics)[:3]
        hint, flag = f"log {self.monitor!r}", ""
        if logged:
            name = type(self).__name__
            hint = f"use monitor={logged[0]!r}"
            flag = f"--trainer.callbacks.{name}.monitor={shlex.quote(logged[0])}"
            if any(word in logged[0].lower() for word in LARGER_IS_BETTER):
                hint, flag = f"{hint}, mode='max'", f"{flag} --trainer.callbacks.{name}.mode=max"
        problem = f"Checkpoint: monitor={self.monitor!r} is not logged by the end of {end}"
        if self.monitor != DEFAULT_MONITOR:
            raise UsageError(problem, logged or ["none"], hint=hint, flag=flag, label="logged")
        self._has_printed_notice = True
        # RunChecks formats notices: the command line adds what to type
        checks = next(iter(find_callbacks(trainer, RunChecks)), None)
        notice = UsageError(
            f"{problem}, so the newest checkpoint is the best (logged: "
            f"{', '.join(logged) or 'nothing'})",
            hint=hint,
            flag=flag,
        )
        trainer.print(checks.format_notice(notice) if checks else str(notice))

    def _is_saved(self, trainer: L.Trainer) -> bool:
        return self.last_saved_step == trainer.global_step

    def _save_and_prune(self, trainer: L.Trainer, has_metric: bool) -> bool:
        """Write the file, then remove the previous one unless it is among the best.

        Args:
            trainer: its optimizer step names the file.
            has_metric: whether the monitored metric is of these weights and may rank the file.

        Returns:
            False if a weight is not finite; then no file is written.
        """
        self._save_deferred = False
        if getattr(trainer, "fast_dev_run", False):
            return True
        if not weights_are_finite(trainer):  # on any rank; it has printed a warning
            return False
        metrics = self.candidates(trainer)  # logged values, epoch and step
        score = metrics.get(str(self.monitor)) if has_metric else None
        path = self.format_checkpoint_name(metrics)
        previous_path, self.last_model_path = self.last_model_path, path
        if self.save_top_k and self.check_monitor_top_k(trainer, score) and score is not None:
            # also removes the file that is no longer among the best
            self.save_among_best(score, trainer, metrics)
        else:
            if not self.best_k_models:  # no metric so far: the newest file is the best
                self.best_model_path = path
            self.write_checkpoint(trainer, path)
        keeps_every_file = self.save_top_k == -1
        if (
            previous_path
            and previous_path not in self.best_k_models
            and not keeps_every_file
            # False for a file of another run, or the file that was just written
            and self.should_remove(trainer, previous_path, path)
        ):
            self.remove_checkpoint(trainer, previous_path)
        return True

    def write_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Write a complete file, and notify the loggers."""
        self._written_paths.add(filepath)
        save_on_all_ranks(trainer, filepath)
        self.note_saved(trainer.global_step, filepath)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))  # pyright: ignore[reportArgumentType]

    def should_remove(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Whether a file was written by this run and is not the newest."""
        removable = previous in self._written_paths and previous != self.last_model_path
        return removable and super().should_remove(trainer, previous, current)
