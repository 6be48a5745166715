"""Progress of a run: loss, learning rate, tokens or samples a second, time left.

A rich bar on a terminal; elsewhere (a file, a cluster's log) one plain line every log interval.
A value is read from the device only when it is shown: a read each step would make the host wait.
"""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as Base
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ravine.errors import UsageError
from ravine.strategies.share import DataParallelInfo

from ..stock_callbacks.gradient_accumulation import (
    count_optimizer_steps,
    find_accumulation_scheduler,
)

PAUSE = 0.3  # seconds between two drawings of the bar; one takes two milliseconds


def get_log_interval(trainer: Any) -> int:
    """Optimizer steps between two log lines."""
    return trainer.log_every_n_steps or 50


def count_units(module: L.LightningModule, batch: Any) -> int:
    """Units in a batch: what the module counts, else the rows of its first tensor."""
    count: Any = getattr(module, "count", None)
    if count is not None:
        return count(batch)
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)


def format_duration(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count_total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run, or None if only time or a signal will end it."""
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches != float("inf"):
        if find_accumulation_scheduler(trainer) is not None:
            ends.append(int(count_optimizer_steps(trainer)))
        else:
            ends.append(epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(ends, default=None)


class ProgressBar(Base):
    """Shows where a run stands; `refresh_rate` optimizer steps pass between two readings.

    Trainer(callbacks=[ProgressBar(refresh=50)])
    """

    def __init__(self, refresh: int = 10) -> None:
        """Say nothing yet."""
        super().__init__()
        if refresh < 1:
            raise UsageError(f"refresh is {refresh}; allowed are 1, 2, 3, ...: type refresh: 10")
        self.refresh_rate = refresh
        self.enabled = True
        self.bar: Progress | None = None
        self.task_id = TaskID(0)
        self.total_steps: int | None = None
        self.step = 0  # optimizer steps of the run so far
        self.last_reading = (0, 0.0)  # step and time of the last reading

    def disable(self) -> None:
        """Say nothing: Lightning asks this of the ranks other than the first."""
        self.enabled = False

    def enable(self) -> None:
        """Speak again."""
        self.enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether this rank speaks; `LightningModule.print` asks."""
        return self.enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line, above the bar if there is one; `LightningModule.print` ends here."""
        if self.enabled and self.bar is not None:
            self.bar.console.print(*args, markup=False, highlight=False, soft_wrap=True, **kwargs)
        elif self.enabled:
            print(*args, **kwargs, flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.step = trainer.global_step
        self.start_reading = self.last_reading = (self.step, time.perf_counter())
        self._start_bar("training", count_total_steps(trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Every so many optimizer steps: read the loss and show it."""
        if not self.enabled or trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.bar is None:
            if self.step == self.total_steps or self.step % get_log_interval(trainer) == 0:
                self.print(
                    self._step_label(), self._format_metrics(trainer, pl_module, outputs, batch)
                )
        elif self.step == self.total_steps or (
            self.step % self.refresh_rate == 0
            and time.perf_counter() - self.last_reading[1] > PAUSE
        ):
            text = self._format_metrics(trainer, pl_module, outputs, batch)
            self.bar.update(self.task_id, completed=self.step, words=text, refresh=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what a validation within the training has found."""
        if trainer.state.fn != "fit":
            self._stop_bar()
        elif self.enabled and not trainer.sanity_checking:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:3] == "val"}
            if values:
                self.print(self._step_label(), *(f" {name} {x:.4g}" for name, x in values.items()))
            self.last_reading = (
                self.step,
                time.perf_counter(),
            )  # the pace is that of training alone

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state of the bar on the screen."""
        self._stop_bar()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop_bar()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show an evaluation by its batches; one within the training has no bar of its own."""
        if trainer.state.fn != "fit":
            stage = trainer.state.fn.value  # type: ignore
            batches = sum(getattr(trainer, f"num_{stage.replace('validate', 'val')}_batches"))
            self.last_reading = (0, time.perf_counter())
            self._start_bar(stage, int(batches) if batches < float("inf") else None)

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Draw now and then."""
        if self.bar is not None and trainer.state.fn != "fit":
            now = time.perf_counter()
            should_redraw = now - self.last_reading[1] > PAUSE
            self.last_reading = (0, now) if should_redraw else self.last_reading
            self.bar.update(self.task_id, advance=1, refresh=should_redraw)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar on the screen."""
        self._stop_bar()

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def _start_bar(self, title: str, total: int | None) -> None:
        self.total_steps = total
        console = Console()
        if self.enabled and console.is_terminal:
            columns = ["{task.description}", BarColumn(20), "{task.completed}/{task.total}"]
            line = [TextColumn(c) if isinstance(c, str) else c for c in columns]
            # drawn from the loop: a thread that draws would take the interpreter from it
            self.bar = Progress(
                *line, TextColumn("{task.fields[words]}"), console=console, auto_refresh=False
            )
            self.task_id = self.bar.add_task(title, total=total, completed=self.step, words="")
            self.bar.start()

    def _stop_bar(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.stop()
            self.bar = None

    def _step_label(self) -> str:
        return f"step {self.step}" + (f"/{self.total_steps}" if self.total_steps else "")

    def _format_metrics(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> str:
        """Loss or headline, learning rate, throughput since the last reading, time left."""
        fields, now = [], time.perf_counter()
        accumulate = trainer.accumulate_grad_batches
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        metrics, headline = trainer.callback_metrics, getattr(module, "headline", ())
        fields += [f"{n.split('/')[-1]} {float(metrics[n]):.4g}" for n in headline if n in metrics]
        if isinstance(loss, Tensor) and not fields:  # divided by the number of accumulated batches
            fields.append(f"loss {loss.item() * accumulate:.4g}")
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        if groups and "lr" in groups[0]:  # a module may train without an optimizer
            fields.append(f"lr {float(groups[0]['lr']):.2g}")
        units_per_step = (
            count_units(module, batch) * accumulate * DataParallelInfo.of(trainer).dp_size
        )
        steps_per_s = (self.step - self.last_reading[0]) / max(now - self.last_reading[1], 1e-9)
        fields.append(f"{units_per_step * steps_per_s:,.0f} {getattr(module, 'unit', 'samples')}/s")
        if self.total_steps is not None:
            s_per_step = (now - self.start_reading[1]) / max(self.step - self.start_reading[0], 1)
            fields.append(f"{format_duration((self.total_steps - self.step) * s_per_step)} left")
        self.last_reading = (self.step, now)
        return "  ".join(fields)
