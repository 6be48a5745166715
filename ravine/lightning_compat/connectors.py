"""The parts of a trainer that log, restore checkpoints and handle signals."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L

from .versions import private, private_import, replace_method, restore_method, set_private

if TYPE_CHECKING:
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
else:
    _CheckpointConnector = private_import(
        "lightning.pytorch.trainer.connectors.checkpoint_connector", "_CheckpointConnector"
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
    """

    selected_path: Any = None

    def _select_ckpt_path(self, *args: Any, **kwargs: Any) -> Any:
        self.selected_path = private(super(), "_select_ckpt_path")(*args, **kwargs)
        return self.selected_path

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, *args: Any) -> None:
        self.before_restore(checkpoint_path)
        private(super(), "_restore_modules_and_callbacks")(checkpoint_path, *args)

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
