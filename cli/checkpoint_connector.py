"""Checkpoint connector: restores the training state on resume, with shape checks and changed rates.

Weights of other shapes are rejected before any weight is set. A learning rate given on the command
line replaces that of the checkpoint.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from ravine.callbacks.base import find_callbacks
from ravine.callbacks.checkpointing.exact_resume import ExactResume
from ravine.callbacks.checkpointing.run_comparison import (
    compare_data,
    describe_change,
    fingerprint_files,
)
from ravine.callbacks.optimizers.optimizer_errors import find_user_frame
from ravine.errors import RunError, UsageError
from ravine.lightning_compat import CheckpointConnector
from ravine.strategies import MeshStrategy
from ravine.strategies.checkpoint import sharded_index, state_dict
from ravine.strategies.checkpoint.atomic_io import CheckpointError, collective_loading
from ravine.strategies.checkpoint.validation import find_malformed_resume_record

from .checkpoint_metadata import load_metadata
from .error_report import exit_status

COPIED_SECTIONS = ("state_dict", "ema")  # sections whose tensors are copied when they are restored


class RavineCheckpointConnector(CheckpointConnector):
    """Lightning's checkpoint connector, with a check of all weight shapes before any weight is set.

    Args:
        trainer: the trainer whose checkpoints are restored.

    Attributes:
        changed_keys: config keys whose values differ between the command and the checkpoint.
        configured_rates: the configured learning rates, by optimizer and parameter group.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        """Store the trainer; `replace_checkpoint_connector` then replaces Lightning's connector."""
        super().__init__(trainer)
        self.changed_keys: list[str] = []
        self.configured_rates: list[list[float]] = []  # by optimizer and param group

    def before_restore(self, checkpoint_path: Any) -> None:
        """Save the configured learning rates, and raise an error for weights of other shapes."""
        self.configured_rates = learning_rates(
            self.trainer
        )  # before a sharding strategy restores its optimizers
        if not checkpoint_path:
            return
        path = Path(checkpoint_path)
        # a sharded checkpoint is a folder; the ranks divide its checksums when they load it
        checkpoint = None if path.is_dir() else load_metadata(path)
        if checkpoint is not None:
            # before the shapes, because other data may have another vocabulary
            compare_with_saved_data(self.trainer, checkpoint)
        check_weight_shapes(self.trainer, path, self.changed_keys, checkpoint)

    def restore_callbacks(self) -> None:
        """Restore the callback states, without Lightning's warning in an evaluation."""
        with warnings.catch_warnings():
            if self.trainer.state.fn != "fit":
                warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
            with explain_restore_errors("callbacks"):
                super().restore_callbacks()

    def restore_training_state(self) -> None:
        """Restore optimizers and loops; changed learning rates replace those of the checkpoint."""
        configured = self.configured_rates or learning_rates(self.trainer)
        super().restore_training_state()
        if any(key.rpartition(".")[2] == "lr" for key in self.changed_keys):
            set_learning_rates(self.trainer, configured)

    def resume_start(self, *args: Any, **kwargs: Any) -> None:
        """Load the checkpoint, and migrate one of an older Lightning to the current format."""
        with (
            explain_restore_errors("pytorch-lightning_version"),
            collective_loading(COPIED_SECTIONS),
        ):
            super().resume_start(*args, **kwargs)

    def restore_model(self) -> None:
        """Restore the weights."""
        with explain_restore_errors("state_dict"):
            super().restore_model()

    def restore_datamodule(self) -> None:
        """Restore the state of the datamodule."""
        with explain_restore_errors("of the data"):
            super().restore_datamodule()

    def restore_optimizers(self) -> None:
        """Restore the optimizer states."""
        with explain_restore_errors("optimizer_states"):
            super().restore_optimizers()

    def restore_lr_schedulers(self) -> None:
        """Restore the states of the learning-rate schedulers."""
        with explain_restore_errors("lr_schedulers"):
            super().restore_lr_schedulers()

    def restore_loops(self) -> None:
        """Restore the epoch and batch counters."""
        with explain_restore_errors("loops"):
            super().restore_loops()

    def dump_checkpoint(self, weights_only: bool = False) -> dict[str, Any]:
        """Build the checkpoint after an update of the metrics, which the fast loop may skip."""
        _ = self.trainer.callback_metrics
        return super().dump_checkpoint(weights_only)


@contextmanager
def explain_restore_errors(section: str) -> Iterator[None]:
    """Convert an error while a checkpoint section is restored to one line that names the section.

    An error raised in a user's file keeps its traceback.

    Args:
        section: the key of the checkpoint that is being restored, such as optimizer_states.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # With RAVINE_TRACEBACK=1 `exit_status` is None for a UsageError too.
        is_explained = isinstance(error, UsageError | RunError) or exit_status(error) is not None
        # `exit_status` is None for an error that must keep its traceback. `find_user_frame` finds
        # the place in a user's file, or None.
        if is_explained or find_user_frame(error) is not None:
            raise
        error_text = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"the section {section!r} of the checkpoint cannot be restored"
            f" ({type(error).__name__}: {error_text})",
            hint="use the model, data and callbacks of that run, or another checkpoint",
            flag="--ckpt_path=ANOTHER",
        ) from error


def compare_with_saved_data(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Compare the datamodule's data with those of a checkpoint's run, before anything is loaded.

    A fit with other data is refused, unless its ExactResume accepts them. An evaluation prints a
    line.

    Args:
        trainer: the trainer, whose datamodule is set up.
        checkpoint: the content of the checkpoint.

    Raises:
        UsageError: the data of a fit have changed.
    """
    saved = checkpoint.get("exact_resume", {})
    # a malformed record is reported by ExactResume
    if find_malformed_resume_record(saved):
        return
    if trainer.state.fn == "fit":
        for callback in find_callbacks(trainer, ExactResume):
            if "data" not in callback.accept:  # ExactResume itself names what it accepts
                compare_data(trainer, saved, accept=())
        return
    current, before = fingerprint_files(trainer), saved.get("data", {})
    changed = [key for key in before if key in current and before[key] != current[key]]
    for key in changed[:1]:
        text = describe_change(trainer, saved, key)
        rank_zero_only(print)(f"the data are not those of the training: {text}")


def check_weight_shapes(
    trainer: L.Trainer,
    path: Path,
    changed_keys: list[str],
    checkpoint: dict[str, Any] | None = None,
) -> None:
    """Raise an error if weight names or shapes of a checkpoint differ from those of the model.

    Args:
        trainer: the trainer, whose module and strategy are set up.
        path: the checkpoint, a file or the folder of a sharded one.
        changed_keys: config keys that differ from the checkpoint's, for the suggested command.
        checkpoint: the content of a file, with tensors that have only shape and type; None for a
            folder.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    is_mesh = isinstance(strategy, MeshStrategy)
    if path.is_dir() and (is_mesh or sharded_index.find_structural_damage(path)):
        return  # the loader of sharded checkpoints reports the error
    # with MeshStrategy a module may hold only shards of its weights
    module_shapes = (
        strategy.weight_shapes() if is_mesh else state_dict.tensor_shapes(module.state_dict())
    )
    if checkpoint is None:
        # from the index of the folder, without a read of the values
        checkpoint_shapes = state_dict.stored_tensor_shapes(path)
    else:
        weights = checkpoint["state_dict"]
        # raises an error for integer or complex values of real weights, or vice versa
        state_dict.check_dtype_kinds(module, module.state_dict(), weights)
        checkpoint_shapes = state_dict.tensor_shapes(weights)
    if mismatches := state_dict.shape_mismatches(
        module_shapes, checkpoint_shapes, module.strict_loading
    ):
        flags = [f"--{key}" for key in changed_keys if key.startswith("model.")]
        flag = "--ckpt_path=ANOTHER"
        if flags:
            flag = f"the same command without {' and '.join(flags)}"
        raise UsageError(
            f"the weights in {path} do not fit this {type(module).__name__}: {mismatches}",
            hint="build the model of the checkpoint, or use a checkpoint of this model",
            flag=flag,
        )


def learning_rates(trainer: L.Trainer) -> list[list[float]]:
    """Return the peak learning rates, by optimizer and parameter group."""
    groups = [optimizer.param_groups for optimizer in trainer.optimizers]
    return [
        [float(g.get("initial_lr", g.get("lr", 0))) for g in param_groups]
        for param_groups in groups
    ]


def set_learning_rates(trainer: L.Trainer, configured: list[list[float]]) -> None:
    """Replace the restored peak learning rates by the configured ones; schedules continue.

    Args:
        trainer: the trainer, after its optimizers and schedulers are restored.
        configured: the peak learning rate of each param group, for each optimizer.
    """
    for optimizer, peaks in zip(trainer.optimizers, configured, strict=True):
        for number, (group, peak) in enumerate(zip(optimizer.param_groups, peaks, strict=True)):
            # a scheduler stores the peak as `initial_lr`
            restored = float(group.get("initial_lr", group.get("lr", 0)))
            if restored == peak:
                continue
            group["lr"] *= peak / restored if restored else 1  # keeps the schedule's factor
            if "initial_lr" in group:
                group["initial_lr"] = peak
            # a scheduler computes each rate from its own copy of the peaks
            for scheduler_config in trainer.lr_scheduler_configs:
                scheduler: Any = scheduler_config.scheduler
                if scheduler.optimizer is optimizer and hasattr(scheduler, "base_lrs"):
                    scheduler.base_lrs[number] = peak
            rank_zero_only(print)(f"learning rate {restored:g} of the checkpoint becomes {peak:g}")
