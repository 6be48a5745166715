"""ProgressBar: show loss, learning rates, gradient norm, throughput, elapsed and total time.

On a terminal it is a rich progress bar. Elsewhere (a file, a cluster's log) it is one plain line
every log interval. A value is read from the device only when it is shown, because each read makes
the host wait.
"""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ravine.errors import UsageError
from ravine.lightning_compat import is_log_step
from ravine.strategies.data_parallel import DataParallelInfo

from ..base import OptimizerStepCallback
from ..optimizers.learning_rates import learning_rates
from ..stability.gradient_clipping import GRADIENT_NORM
from ..stock_callbacks.gradient_accumulation import (
    count_optimizer_steps,
    find_accumulation_scheduler,
)

MAX_NUMBERS = 4  # metrics on a line of the terminal
MIN_REDRAW_S = 0.3  # seconds between two drawings of the bar; a drawing takes two milliseconds


def get_log_interval(trainer: Any) -> int:
    """Return the number of optimizer steps between two log lines."""
    return trainer.log_every_n_steps or 50


def count_units(module: L.LightningModule, batch: Any) -> int:
    """Return the units in a batch: by the module's `count_units`, or the rows of a tensor."""
    count: Any = getattr(module, "count_units", None)
    return count_rows(batch) if count is None else count(batch)


def count_rows(batch: Any) -> int:
    """Return the rows of the first tensor in a batch with an axis; 0 without one."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor) and first.ndim:  # the usual case; the search below takes 15 us
        return first.shape[0]
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)


def format_duration(seconds: float) -> str:
    """Format seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def count_total_steps(trainer: L.Trainer) -> int | None:
    """Return the optimizer steps of the whole run; None if only time or a signal ends it."""
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches != float("inf"):
        if find_accumulation_scheduler(trainer) is not None:
            ends.append(int(count_optimizer_steps(trainer)))
        else:
            ends.append(epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(ends, default=None)


def format_rates(rates: Iterable[float]) -> str:
    """Format the different learning rates of all rules: `0.02/0.005`, or their range."""
    texts = list(dict.fromkeys(f"{rate:.2g}" for rate in rates))
    if len(texts) > 2:
        texts = [f"{min(texts, key=float)}-{max(texts, key=float)}"]
    return "/".join(texts)


class Reading(NamedTuple):
    """Optimizer step and time at which values were read, from which the throughput follows."""

    step: int
    time_s: float  # of time.perf_counter()


class ProgressBar(OptimizerStepCallback, LightningProgressBar):
    """Shows the progress of a run; values are read every `refresh_rate` optimizer steps.

    Example: `Trainer(callbacks=[ProgressBar(refresh_rate=50)])`.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        """Set the number of optimizer steps between two updates of the bar."""
        super().__init__()
        if refresh_rate < 1:
            raise UsageError(
                f"ProgressBar: refresh_rate={refresh_rate} is too small",
                ["1 or more"],
                hint="use refresh_rate=10",
                flag=f"--trainer.callbacks.{type(self).__name__}.refresh_rate=10",
            )
        self.refresh_rate = refresh_rate
        self.enabled = True  # False on ranks other than 0
        self.bar: Progress | None = None  # of rich; None without a terminal
        self.task_id = TaskID(0)  # of the only task of the bar
        self.total_steps: int | None = None  # None if the length of the run is unknown
        self.last_reading = Reading(step=0, time_s=0.0)  # at the last update, for the speed
        self.learning_rates: dict[str, float] = {}  # by rule, in a step that is shown

    def disable(self) -> None:
        """Disable output (called on non-zero ranks)."""
        self.enabled = False

    def enable(self) -> None:
        """Enable output."""
        self.enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether this rank prints; `LightningModule.print` reads it."""
        return self.enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line, above the bar if there is one; `LightningModule.print` calls this."""
        if self.enabled and self.bar is not None:
            self.bar.console.print(*args, markup=False, highlight=False, soft_wrap=True, **kwargs)
        elif self.enabled:
            print(*args, **kwargs, flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the timer and the bar."""
        super().on_train_start(trainer, pl_module)
        self.start_reading = self.last_reading = Reading(self.step, time.perf_counter())
        self._start_bar("training", count_total_steps(trainer))
        self.learning_rates = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the learning rates of a step that is shown; a scheduler sets the next ones."""
        if self.enabled and self._is_shown(trainer, self.step + 1):
            self.learning_rates = learning_rates(trainer)

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Show the metrics after an optimizer step, if an update is due.

        The base class calls it after each optimizer step; `self.step` is the number of steps. The
        bar is updated every `refresh_rate` steps. Without a bar, a line is printed every log
        interval. The last step is always shown.
        """
        if not self.enabled or not self._is_shown(trainer, self.step):
            return
        if self.bar is None:
            text = self._format_metrics(trainer, pl_module, outputs, batch)
            self.print(self._step_label(), text)
        elif (
            self.step == self.total_steps
            or time.perf_counter() - self.last_reading.time_s > MIN_REDRAW_S
        ):
            text = self._format_metrics(trainer, pl_module, outputs, batch)
            self.bar.update(self.task_id, completed=self.step, words=text, refresh=True)

    def _is_shown(self, trainer: L.Trainer, step: int) -> bool:
        """Return whether an optimizer step is the last one, or one of every interval."""
        interval = get_log_interval(trainer) if self.bar is None else self.refresh_rate
        return step % interval == 0 or step == self.total_steps

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the metrics of a validation within a fit; stop the bar of any other."""
        if trainer.state.fn != "fit":
            self._stop_bar()
        elif self.enabled and not trainer.sanity_checking:
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:3] == "val"}
            words = [f" {name} {x:.4g}" for name, x in values.items()]
            label = self._step_label()
            for start in range(0, len(words), MAX_NUMBERS):
                self.print(label, *words[start : start + MAX_NUMBERS])
                label = " " * len(label)
            # the throughput excludes validation
            self.last_reading = Reading(self.step, time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the bar, and leave its last state on the screen."""
        self._stop_bar()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop the bar and restore the terminal."""
        self._stop_bar()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a bar that counts the batches of an evaluation; a validation in a fit has none."""
        if trainer.state.fn != "fit":
            stage = trainer.state.fn.value  # type: ignore
            batches = sum(getattr(trainer, f"num_{stage.replace('validate', 'val')}_batches"))
            self.last_reading = Reading(step=0, time_s=time.perf_counter())
            self._start_bar(stage, int(batches) if batches < float("inf") else None)

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Advance the bar, and redraw it at most every MIN_REDRAW_S seconds."""
        if self.bar is not None and trainer.state.fn != "fit":
            now = time.perf_counter()
            should_redraw = now - self.last_reading.time_s > MIN_REDRAW_S
            if should_redraw:
                self.last_reading = Reading(step=0, time_s=now)
            self.bar.update(self.task_id, advance=1, refresh=should_redraw)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the bar, and leave it on the screen."""
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
            # drawn in the training loop: a drawing thread would take the GIL from the loop
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
        """Format loss or `progress_metrics`, rates, norm, throughput, elapsed and total time.

        In a bar the gradient norm is that of the last log step. Two `progress_metrics` leave no
        place for it.

        Args:
            outputs: result of the training step on the last micro-batch of the optimizer step.
            batch: that micro-batch.
        """
        now = time.perf_counter()
        num_micro_batches = trainer.accumulate_grad_batches  # of an optimizer step
        metrics = trainer.callback_metrics
        shown_names = [n for n in getattr(module, "progress_metrics", ()) if n in metrics]
        shown_names = shown_names[: MAX_NUMBERS - 2]  # beside learning rate and throughput
        fields = [f"{name.split('/')[-1]} {float(metrics[name]):.4g}" for name in shown_names]
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not fields:
            # Lightning has divided the loss by the number of micro-batches
            fields.append(f"loss {loss.item() * num_micro_batches:.4g}")
        # of a step whose number was not foreseen, as with several optimizers, the rates after it
        rates = self.learning_rates or learning_rates(trainer)
        self.learning_rates = {}
        if rates:  # a module may train without an optimizer
            fields.append(f"lr {format_rates(rates.values())}")
        norm = metrics.get(GRADIENT_NORM)
        # a line has the norm of its own step only
        is_current = self.bar is not None or is_log_step(trainer)
        if norm is not None and is_current and len(fields) < MAX_NUMBERS - 1:
            fields.append(f"grad_norm {float(norm):.3g}")
        # number of ranks that train on different data
        dp_size = DataParallelInfo.from_trainer(trainer).dp_size
        # units are those of the module's attribute `unit`: tokens or samples
        units_per_step = count_units(module, batch) * num_micro_batches * dp_size
        recent_steps, recent_s = self.step - self.last_reading.step, now - self.last_reading.time_s
        units_per_s = units_per_step * recent_steps / max(recent_s, 1e-9)
        fields.append(f"{units_per_s:,.0f} {getattr(module, 'unit', 'samples')}/s")
        elapsed_s, total_text = now - self.start_reading.time_s, ""
        if self.total_steps is not None:
            num_steps = max(self.step - self.start_reading.step, 1)
            # the steps that remain take as long as those of this run so far, on average
            total_s = elapsed_s * (1 + (self.total_steps - self.step) / num_steps)
            total_text = f" of {format_duration(total_s)}"
        fields.append(f"{format_duration(elapsed_s)}{total_text}")
        self.last_reading = Reading(self.step, now)
        return "  ".join(fields)
