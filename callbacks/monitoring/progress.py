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
from ravine.strategies.share import Share

from ..stock_callbacks.gradient_accumulation import optimizer_steps, scheduler_of

PAUSE = 0.3  # seconds between two drawings of the bar; one takes two milliseconds


def log_interval(trainer: Any) -> int:
    """Optimizer steps between two log lines."""
    return trainer.log_every_n_steps or 50


def units_in(module: L.LightningModule, batch: Any) -> int:
    """Units in a batch: what the module counts, else the rows of its first tensor."""
    count: Any = getattr(module, "count", None)
    if count is not None:
        return count(batch)
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run, or None if only time or a signal will end it."""
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs > 0 and batches != float("inf"):
        if scheduler_of(trainer) is not None:
            ends.append(int(optimizer_steps(trainer)))
        else:
            ends.append(epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return min(ends, default=None)


class ProgressBar(Base):
    """Shows where a run stands; `refresh` optimizer steps pass between two readings.

    Trainer(callbacks=[ProgressBar(refresh=50)])
    """

    def __init__(self, refresh: int = 10) -> None:
        """Say nothing yet."""
        super().__init__()
        if refresh < 1:
            raise UsageError(f"refresh is {refresh}; allowed are 1, 2, 3, ...: type refresh: 10")
        self.refresh = refresh
        self.enabled = True
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.total: int | None = None
        self.step = 0  # optimizer steps of the run so far
        self.read = (0, 0.0)  # step and time of the last reading

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
        self.began = self.read = (self.step, time.perf_counter())
        self._open("training", total_steps(trainer))

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
            if self.step == self.total or self.step % log_interval(trainer) == 0:
                self.print(self._place(), self._reading(trainer, pl_module, outputs, batch))
        elif self.step == self.total or (
            self.step % self.refresh == 0 and time.perf_counter() - self.read[1] > PAUSE
        ):
            words = self._reading(trainer, pl_module, outputs, batch)
            self.bar.update(self.task, completed=self.step, words=words, refresh=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what a validation within the training has found."""
        if trainer.state.fn != "fit":
            self._close()
        elif self.enabled and not trainer.sanity_checking:
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k[:3] == "val"}
            if found:
                self.print(self._place(), *(f" {name} {x:.4g}" for name, x in found.items()))
            self.read = (self.step, time.perf_counter())  # the pace is that of training alone

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state of the bar on the screen."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._close()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show an evaluation by its batches; one within the training has no bar of its own."""
        if trainer.state.fn != "fit":
            kind = trainer.state.fn.value  # type: ignore
            batches = sum(getattr(trainer, f"num_{kind.replace('validate', 'val')}_batches"))
            self.read = (0, time.perf_counter())
            self._open(kind, int(batches) if batches < float("inf") else None)

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Draw now and then."""
        if self.bar is not None and trainer.state.fn != "fit":
            now = time.perf_counter()
            draws = now - self.read[1] > PAUSE
            self.read = (0, now) if draws else self.read
            self.bar.update(self.task, advance=1, refresh=draws)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar on the screen."""
        self._close()

    on_validation_start = on_predict_start = on_test_start
    on_validation_batch_end = on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def _open(self, title: str, total: int | None) -> None:
        self.total = total
        console = Console()
        if self.enabled and console.is_terminal:
            columns = ["{task.description}", BarColumn(20), "{task.completed}/{task.total}"]
            line = [TextColumn(c) if isinstance(c, str) else c for c in columns]
            # drawn from the loop: a thread that draws would take the interpreter from it
            self.bar = Progress(
                *line, TextColumn("{task.fields[words]}"), console=console, auto_refresh=False
            )
            self.task = self.bar.add_task(title, total=total, completed=self.step, words="")
            self.bar.start()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.stop()
            self.bar = None

    def _place(self) -> str:
        return f"step {self.step}" + (f"/{self.total}" if self.total else "")

    def _reading(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> str:
        """Loss or headline, learning rate, throughput since the last reading, time left."""
        words, now = [], time.perf_counter()
        accumulate = trainer.accumulate_grad_batches
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        metrics, headline = trainer.callback_metrics, getattr(module, "headline", ())
        words += [f"{n.split('/')[-1]} {float(metrics[n]):.4g}" for n in headline if n in metrics]
        if isinstance(loss, Tensor) and not words:  # divided by the number of accumulated batches
            words.append(f"loss {loss.item() * accumulate:.4g}")
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        if groups and "lr" in groups[0]:  # a module may train without an optimizer
            words.append(f"lr {float(groups[0]['lr']):.2g}")
        a_step = units_in(module, batch) * accumulate * Share.of(trainer).size
        pace = (self.step - self.read[0]) / max(now - self.read[1], 1e-9)
        words.append(f"{a_step * pace:,.0f} {getattr(module, 'unit', 'samples')}/s")
        if self.total is not None:
            a_pace = (now - self.began[1]) / max(self.step - self.began[0], 1)
            words.append(f"{clock((self.total - self.step) * a_pace)} left")
        self.read = (self.step, now)
        return "  ".join(words)
