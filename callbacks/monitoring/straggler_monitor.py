"""StragglerMonitor: log which rank is the slowest, and what part of the time ranks wait for it.

    t_r    seconds of rank r before it joins the collectives of its steps, since the last log step
    throughput/wait_for_slowest_rank = (max t - mean t) / seconds since the last log step
    throughput/slowest_rank          = argmax t

With data parallelism and ZeRO-1, t is the time from the end of a step to the last backward pass of
the next: callbacks, loader and forward passes. Other strategies communicate in the forward pass, so
t is the time between micro-batches only: callbacks and loader.
"""

import time
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ravine.lightning_compat import is_log_step, log_step_values

from ..base import OptimizerStepCallback
from .throughput import synchronize


class StragglerMonitor(OptimizerStepCallback):
    """Logs the slowest rank and the share of time that ranks wait for it, every log interval.

    Ravine's Trainer adds it if there are several ranks and a logger. A log step has one additional
    collective, of a number per rank.
    """

    takes_partial_gradients = True  # it reads no gradients

    def __init__(self) -> None:
        """Create the callback; `trainer.log_every_n_steps` sets the interval."""
        self._includes_forward = True  # whether no forward pass communicates
        self._own_s = 0.0  # of this rank since the start of the window
        self._window_start = self._own_start = self._backward_start = 0.0
        self._paused_s = self._validation_start = 0.0  # of validations

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one StragglerMonitor."""
        return "StragglerMonitor"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the window."""
        super().on_train_start(trainer, pl_module)
        self._includes_forward = isinstance(trainer.strategy, DDPStrategy)
        self._start_window(time.perf_counter())

    def _start_window(self, now: float) -> None:
        self._window_start = self._own_start = now
        self._own_s = self._paused_s = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the last micro-batch, if forward passes communicate."""
        if not self._includes_forward:
            self._own_s += time.perf_counter() - self._own_start

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any
    ) -> None:
        """Note the time; of the passes of a step only the last communicates."""
        self._backward_start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the end of the micro-batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._includes_forward:
            self._own_start = time.perf_counter()

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Add the time of the step, and compare the ranks if the step is logged."""
        if self._includes_forward:
            self._own_s += max(0.0, self._backward_start - self._own_start)
            self._own_start = time.perf_counter()
        if trainer.world_size == 1 or not is_log_step(trainer):
            return
        device = trainer.strategy.root_device
        synchronize(device)
        now = time.perf_counter()
        seconds = now - self._window_start - self._paused_s
        log_step_values(trainer, compare_ranks(self._own_s, seconds, device), is_collected=False)
        self._start_window(time.perf_counter())

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pause the timer."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resume the timer."""
        self._own_start = time.perf_counter()
        self._paused_s += self._own_start - self._validation_start


def compare_ranks(own_s: float, window_s: float, device: torch.device) -> dict[str, float]:
    """Return the metrics of a window; called on all ranks.

    Args:
        own_s: seconds of this rank before its collectives.
        window_s: seconds of the window.
        device: device of the default process group.
    """
    local = torch.tensor([own_s], device=device, dtype=torch.float32)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    return summarize_ranks([float(value) for value in torch.cat(gathered)], window_s)


def summarize_ranks(own_s: list[float], window_s: float) -> dict[str, float]:
    """Return the slowest rank, and the share of the window that ranks wait for it on average.

    Args:
        own_s: for each rank, its seconds before the collectives.
        window_s: seconds of the window.
    """
    slowest = max(own_s)
    wait_s = slowest - sum(own_s) / len(own_s)
    return {
        "throughput/wait_for_slowest_rank": wait_s / max(window_s, 1e-9),
        "throughput/slowest_rank": float(own_s.index(slowest)),
    }
