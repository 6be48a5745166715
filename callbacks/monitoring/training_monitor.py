"""TrainingMonitor: log learning rates, gradient norm and throughput with the metrics of a step.

    lr/<rule>                      learning rate of the step, of each rule of the optimizer plan
    train/grad_norm                norm of all gradients before clipping: sqrt(sum of g²)
    throughput/<unit>_per_second   tokens or samples of all ranks, since the last log step

A step that is not logged costs two comparisons and the count of a batch's units.
"""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from ravine.lightning_compat import is_log_step, log_step_values
from ravine.strategies.data_parallel import DataParallelInfo

from ..base import OptimizerStepCallback, find_callbacks
from ..optimizers.learning_rates import learning_rates
from ..stability.gradient_clipping import (
    GRADIENT_NORM,
    GradientClipping,
    optimizer_gradient_norm,
)
from .progress import count_rows
from .throughput import Throughput, synchronize


class TrainingMonitor(OptimizerStepCallback):
    """Logs `lr/<rule>`, `train/grad_norm` and `throughput/<unit>_per_second` every log interval.

    Ravine's Trainer adds it if it has a logger. With several optimizers the norms are
    `train/grad_norm/0`, `train/grad_norm/1`. GradientClipping logs the norm itself, and Throughput
    the throughput. Lightning's FSDPStrategy has flat gradients, whose norm is not logged.

    Example: `lightning.Trainer(callbacks=[TrainingMonitor()])`.
    """

    takes_partial_gradients = True  # with ZeRO-1 a rank has only the gradients that it owns

    def __init__(self) -> None:
        """Create the callback; `trainer.log_every_n_steps` sets the interval."""
        self._values: dict[str, float | Tensor] = {}  # of the running step, until they are logged
        # of the trainer: whether other callbacks log the norm and the throughput
        self._has_clipping = self._has_throughput = False
        self._count_units: Callable[[Any], int] = count_rows
        self._start_window(0.0)

    def _start_window(self, now: float) -> None:
        self._window_start, self._paused_s = now, 0.0  # paused: seconds of validations
        self._num_units = 0  # since the start of the window, on this rank

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """Return the names of the metrics that `trainer.callback_metrics` gets."""
        rates = {f"lr/{label}" for label in learning_rates(trainer)}
        num_optimizers = len(trainer.optimizers)
        return rates | {_norm_name(index, num_optimizers) for index in range(num_optimizers)}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the timer."""
        super().on_train_start(trainer, pl_module)
        # found once: a module looks up a missing attribute in several tables
        self._count_units = getattr(pl_module, "count_units", None) or count_rows
        self._has_clipping = bool(find_callbacks(trainer, GradientClipping))
        self._has_throughput = bool(find_callbacks(trainer, Throughput))
        self._values = {}
        synchronize(trainer.strategy.root_device)
        self._start_window(time.perf_counter())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the learning rates and the norm before a step that is logged.

        The norm stays a tensor on its device. With sharded gradients all ranks take part in it.
        """
        if not is_log_step(trainer):
            return
        if not self._values:  # before the first of several optimizers
            self._values = {f"lr/{label}": lr for label, lr in learning_rates(trainer).items()}
        if self._has_clipping:
            return
        norm = optimizer_gradient_norm(trainer, optimizer)
        if norm is not None:
            index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
            self._values[_norm_name(index, len(trainer.optimizers))] = norm

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the units of the batch."""
        self._num_units += self._count_units(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Log the values of the step, and start the next window, if the step is logged."""
        if not is_log_step(trainer):
            return
        values, self._values = self._values, {}
        log_step_values(trainer, values)
        if not self._has_throughput:
            # the loggers wait for the device now anyway
            synchronize(trainer.strategy.root_device)
            now = time.perf_counter()
            seconds = max(now - self._window_start - self._paused_s, 1e-9)
            # number of ranks that train on different data
            dp_size = DataParallelInfo.from_trainer(trainer).dp_size
            name = f"throughput/{getattr(pl_module, 'unit', 'samples')}_per_second"
            # not collected: a checkpoint holds the collected metrics, and no times
            throughput = {name: self._num_units * dp_size / seconds}
            log_step_values(trainer, throughput, is_collected=False)
            self._start_window(now)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pause the timer."""
        synchronize(trainer.strategy.root_device)
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resume the timer."""
        self._paused_s += time.perf_counter() - self._validation_start


def _norm_name(index: int, num_optimizers: int) -> str:
    return GRADIENT_NORM if num_optimizers == 1 else f"{GRADIENT_NORM}/{index}"
