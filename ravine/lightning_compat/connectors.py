"""The parts of a trainer that log, restore checkpoints and handle signals."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor, LearningRateMonitor
from lightning.pytorch.utilities.model_helpers import is_overridden

from .versions import private, private_import, replace_method, restore_method, set_private

if TYPE_CHECKING:
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
else:
    _CheckpointConnector = private_import(
        "lightning.pytorch.trainer.connectors.checkpoint_connector", "_CheckpointConnector"
    )


# Hooks in which LearningRateMonitor and DeviceStatsMonitor write rows.
HOOKS_WITH_ROWS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)


def should_update_logs(trainer: L.Trainer) -> bool:
    """Return whether values that are logged in this step will be written.

    Reason: a callback computes a value for the log in these steps only. The rule counts the steps
    of several optimizers, and `trainer.log_every_n_steps` is only a part of it.

    Upstream: pytorch/trainer/connectors/logger_connector/logger_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(private(trainer, "_logger_connector"), "should_update_logs")


def log_train_step(trainer: L.Trainer) -> None:
    """Pass the metrics of a training step to the loggers, if they are written in this step.

    Reason: a callback that ends the run in `on_train_batch_end` comes before the trainer does this,
    so that the curves would lack the last step.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    connector = private(trainer, "_logger_connector")
    if connector.should_update_logs:
        connector.on_batch_end()  # computes the metrics of the step
        connector.update_train_step_metrics()


def is_log_step(trainer: L.Trainer) -> bool:
    """Return whether the running optimizer step is one of every `log_every_n_steps`.

    It is the same on all ranks, so that a collective may depend on it. `should_update_logs` is
    also true once a rank stops the run.

    Reason: the rule of the logger counts the steps of several optimizers as one.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    any_trainer: Any = trainer
    interval = any_trainer.log_every_n_steps
    # the counter changes at the end of a step, after its hooks
    return bool(interval) and (_num_logged_steps(trainer) + 1) % interval == 0


def _num_logged_steps(trainer: L.Trainer) -> int:
    """Return Lightning's number of the running optimizer step, which starts at 0."""
    return private(trainer.fit_loop.epoch_loop, "_batches_that_stepped")


def number_logs_by_step(trainer: L.Trainer) -> None:
    """Number what the trainer's loggers get by the optimizer steps that are done, from 1.

    Reason: Lightning writes 49 for the values of the 50th step. Checkpoints, the progress bar and
    `trainer.global_step` count 50 there. Values with a step of their own keep it.

    Upstream: pytorch/trainer/connectors/logger_connector/logger_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    connector: Any = private(trainer, "_logger_connector")
    original_method = private(connector, "log_metrics")
    connector.step_values = {}  # of `log_step_values`, until the row of the step is written

    def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
        if step is not None:
            return original_method(metrics, step)
        loop = trainer.fit_loop.epoch_loop
        counter = private(loop, "_batches_that_stepped")
        values, connector.step_values = connector.step_values, {}
        # Lightning takes the number of the row from this counter
        set_private(loop, "_batches_that_stepped", logged_step(trainer))
        try:
            original_method({**metrics, **values}, step)
        finally:
            set_private(loop, "_batches_that_stepped", counter)

    # sets the attribute of this object; the class stays as it is
    replace_method(connector, "log_metrics", log_metrics)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateMonitor | DeviceStatsMonitor):
            _number_rows_of(callback)


def _numbers_logs(trainer: L.Trainer) -> bool:
    """Return whether `number_logs_by_step` was called for a trainer."""
    return "log_metrics" in vars(private(trainer, "_logger_connector"))


def logged_step(trainer: L.Trainer) -> int:
    """Return the number under which the trainer's loggers get the values of this moment.

    It is that of the last complete optimizer step, or of the checkpoint that is evaluated. A stock
    Trainer numbers the steps from 0.

    Reason: as for `number_logs_by_step`.

    Upstream: pytorch/trainer/connectors/logger_connector/logger_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    if not _numbers_logs(trainer):
        return _num_logged_steps(trainer)
    if trainer.state.fn != "fit":
        restored_step = getattr(checkpoint_connector(trainer), "restored_step", None)
        return trainer.global_step if restored_step is None else restored_step
    module: Any = trainer.lightning_module
    # manual optimization may step its optimizers without Lightning, which then counts no step
    if not module.automatic_optimization and not trainer.global_step:
        return _num_logged_steps(trainer) + 1
    return trainer.global_step


def log_step_values(
    trainer: L.Trainer, values: Mapping[str, Any], is_collected: bool = True
) -> None:
    """Give values of an optimizer step to the trainer's loggers, in the row of that step.

    Called in `on_train_batch_end` of a step whose values are written.

    Reason: `LightningModule.log` takes 0.3 ms for each value, because it keeps a metric object.
    These values need no mean over steps or ranks.

    Args:
        trainer: the trainer; a stock one writes a row of its own for the values.
        values: numbers, or tensors of shape (), by name.
        is_collected: whether `trainer.callback_metrics` gets them too, and so each checkpoint.

    Upstream: pytorch/trainer/connectors/logger_connector/logger_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    if is_collected:
        collected_metrics(trainer).update({k: torch.as_tensor(v) for k, v in values.items()})
    if _numbers_logs(trainer):
        private(trainer, "_logger_connector").step_values.update(values)
        return
    plain_values = {name: float(value) for name, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(plain_values, step=logged_step(trainer))


class _NumberedLogger:
    """A logger that writes every row under one number."""

    def __init__(self, logger: Any, step: int) -> None:
        self.logger, self.step = logger, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.logger, name)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.logger.log_metrics(metrics, step=self.step)


def _number_rows_of(callback: Any) -> None:
    """Number the rows of a callback that passes Lightning's counter to the loggers itself."""

    def number_rows(hook: Callable[..., None], is_in_step: bool) -> Callable[..., None]:
        def call_hook(trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            module, loggers = trainer.lightning_module, trainer.loggers
            # Lightning counts the running step at its end
            is_counted = is_in_step and module.automatic_optimization
            step = _num_logged_steps(trainer) + 1 if is_counted else logged_step(trainer)
            trainer.loggers = [_NumberedLogger(logger, step) for logger in loggers]  # type: ignore
            try:
                hook(trainer, *args, **kwargs)
            finally:
                trainer.loggers = loggers

        return call_hook

    for name in HOOKS_WITH_ROWS:
        if is_overridden(name, callback, Callback):
            hook = getattr(callback, name)
            # sets the attribute of this object; the class stays as it is
            replace_method(callback, name, number_rows(hook, name.startswith("on_train")))


def collected_metrics(trainer: L.Trainer) -> dict[str, Any]:
    """Return the last collected metrics by name, as callbacks read them; it may be changed.

    Reason: `trainer.callback_metrics` first collects the newest values, which would end the running
    mean of an epoch. After a resume the checkpoint's values are put here for the schedulers.

    Upstream: pytorch/trainer/connectors/logger_connector/logger_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(private(trainer, "_logger_connector"), "_callback_metrics")


class CheckpointConnector(_CheckpointConnector):
    """Lightning's checkpoint connector, with a public name for the first step of a restore.

    Reason: weights of other shapes must be refused before any weight is loaded. No callback is
    called between reading the file and loading the weights. The run directory depends on the
    checkpoint, and `trainer.ckpt_path` is set after the directory is created.

    Upstream: pytorch/trainer/connectors/checkpoint_connector.py
    Seen on: 2.5.6 to 2.6.6

    Attributes:
        selected_path: the checkpoint that the last call of fit, validate, test or predict loads.
        restored_step: its number of optimizer steps; None without a checkpoint.
    """

    selected_path: Any = None
    restored_step: int | None = None

    def _select_ckpt_path(self, *args: Any, **kwargs: Any) -> Any:
        self.selected_path = private(super(), "_select_ckpt_path")(*args, **kwargs)
        return self.selected_path

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, *args: Any) -> None:
        self.before_restore(checkpoint_path)
        private(super(), "_restore_modules_and_callbacks")(checkpoint_path, *args)
        step = private(self, "_loaded_checkpoint").get("global_step")
        self.restored_step = step if isinstance(step, int) else None

    def before_restore(self, checkpoint_path: Any) -> None:
        """Do nothing; called before the module and the callbacks are restored."""


def checkpoint_connector(trainer: L.Trainer) -> Any:
    """Return the trainer's checkpoint connector.

    Reason: the command line passes it the values that differ from the checkpoint's.

    Upstream: pytorch/trainer/trainer.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(trainer, "_checkpoint_connector")


def replace_checkpoint_connector(trainer: L.Trainer, connector: CheckpointConnector) -> None:
    """Replace the connector by which the trainer reads checkpoints; called before a run.

    Reason: the trainer creates its connector itself and does not accept one as an argument.

    Upstream: pytorch/trainer/trainer.py
    Seen on: 2.5.6 to 2.6.6
    """
    set_private(trainer, "_checkpoint_connector", connector)


def after_registering_signals(trainer: L.Trainer, function: Callable[[], None]) -> None:
    """Call a function after the trainer has registered its own signal handlers.

    Reason: the trainer registers them after `setup` and before the first hook of the run, and
    replaces those of a callback.

    Upstream: pytorch/trainer/connectors/signal_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    # `private` reads a private attribute, and raises an error if this version lacks it
    connector = private(trainer, "_signal_connector")
    original_method = private(type(connector), "register_signal_handlers")

    def register_and_call() -> None:
        original_method(connector)
        function()

    # sets the attribute of this object; the class stays as it is
    replace_method(connector, "register_signal_handlers", register_and_call)


def restore_signal_registration(trainer: L.Trainer) -> None:
    """Undo `after_registering_signals`.

    Reason: the connector exists longer than the fit.

    Upstream: pytorch/trainer/connectors/signal_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    restore_method(private(trainer, "_signal_connector"), "register_signal_handlers")


def original_handlers(trainer: L.Trainer) -> dict[Any, Any]:
    """Return the signal handlers, by signal, that the trainer sets again after the run.

    Reason: it has stored the handlers of the callback as the original ones.

    Upstream: pytorch/trainer/connectors/signal_connector.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(private(trainer, "_signal_connector"), "_original_handlers")
