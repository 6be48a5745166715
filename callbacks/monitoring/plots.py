"""LossPlot and MetricPlot: plot the curves of a run at its end.

LossPlot     loss.png      training and validation loss in one panel
MetricPlot   curves.png    one panel for each logged metric
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from ravine.errors import UsageError, sort_by_similarity

from ..base import OptimizerStepCallback
from ..checks.run_checks import add_run_checks
from .media_logging import get_run_dir
from .progress import count_total_steps, get_log_interval

Curve = list[tuple[int, float | Tensor]]
MAX_POINTS = 2000  # maximum of points in a curve; beyond that every second one is dropped
NUM_COLUMNS = 3  # panels in a row
DPI = 150  # pixels by inch: the labels can be read at half the size
NOT_PLOTTED = ("time/", "lr")  # prefixes of metrics that are plotted on request only


class RecordedCurves(OptimizerStepCallback, ABC):
    """Curves of a run that are saved in checkpoints and plotted at the end of the run."""

    def __init__(self) -> None:
        """Start with empty curves."""
        self.curves: dict[str, Curve] = {}
        self.run_dir: Path | None = None

    @abstractmethod
    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Draw the curves to a file in the run's folder."""

    def add_point(self, name: str, value: Tensor) -> bool:
        """Add a value at the current step; return whether a too long curve was thinned."""
        curve = self.curves.setdefault(name, [])
        curve.append((self.step, value.detach().clone()))
        is_thinned = len(curve) > MAX_POINTS
        if is_thinned:
            del curve[1::2]
        return is_thinned

    @property
    def state_key(self) -> str:
        """Return the class name, under which checkpoints store the curves."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return the curves as plain numbers."""
        return {name: [(s, float(v)) for s, v in curve] for name, curve in self.curves.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves of a checkpoint."""
        self.curves = {name: [tuple(p) for p in curve] for name, curve in state_dict.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the run's folder, for which all ranks must call `get_run_dir`."""
        super().on_train_start(trainer, pl_module)
        self.run_dir = get_run_dir(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves on rank 0."""
        if trainer.is_global_zero and self.run_dir and any(self.curves.values()):
            self.save_plot(self.run_dir, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw the curves if a signal stops the run; they are not drawn after an error."""
        if isinstance(exception, SystemExit | KeyboardInterrupt):
            self.on_train_end(trainer, pl_module)


class LossPlot(RecordedCurves):
    """Draws the loss curves in `loss.png` in the run's folder; a resumed run draws whole curves.

    Example: `Trainer(callbacks=[LossPlot()])`.
    """

    def __init__(self) -> None:
        """Start with empty curves."""
        super().__init__()
        self.curves = {"train": [], "val": []}
        self.interval = 1  # number of optimizer steps that are averaged in a point
        self.initial_interval = 1  # the interval before a long curve was thinned
        self.losses: list[Tensor] = []  # since the last point
        self._saved_state: dict[str, Any] = {}  # of a checkpoint

    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Draw both curves in one panel; draw nothing for a module with `progress_metrics`."""
        if getattr(module, "progress_metrics", ()):
            return
        unit = getattr(module, "unit", "samples").removesuffix("s")
        nats = " in nats" if unit == "token" else ""
        save_loss_plot(
            self.state_dict(), folder / "loss.png", f"loss{nats} (mean per {unit})", self.interval
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the interval of points: the log interval, or less in a short run."""
        super().on_train_start(trainer, pl_module)
        total = count_total_steps(trainer)
        self.interval = min(get_log_interval(trainer), max(1, (total or 10_000) // 200))
        self.initial_interval, self.losses = self.interval, []
        if self._saved_state:  # a resumed run
            self.interval *= self._saved_state["thinned"]
            self.losses = list(self._saved_state["losses"].to(pl_module.device))
            self._saved_state = {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the losses since the last point."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        checkpoint["loss_plot"] = {
            "thinned": self.interval // self.initial_interval,
            "losses": losses,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the losses since the last point, which `on_train_start` restores."""
        self._saved_state = checkpoint.get("loss_plot", {})

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the losses on their device, which needs no synchronization."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach() if loss.requires_grad else loss)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Add the mean of the losses since the last point, if a point is due."""
        if self.step % self.interval or not self.losses:
            return
        mean = torch.stack(self.losses).mean() * trainer.accumulate_grad_batches
        self.losses.clear()
        if self.add_point("train", mean):
            self.interval *= 2

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation loss: the first metric with a name such as `val/loss`, `val_loss`."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            name = next((n for n in metrics if n.startswith("val") and n.endswith("loss")), None)
            if name is not None:
                self.add_point("val", metrics[name])


class MetricPlot(RecordedCurves):
    """Plots logged metrics in `curves.png` in the run's folder; a resumed run plots whole curves.

    Example: `Trainer(callbacks=[MetricPlot(["train/reward", "train/kl", "val/reward"])])`.

    Args:
        metrics: names as the module logs them. Names that begin with val/ or val_ are read at
            validations, all others every log interval. By default all, without seconds and learning
            rates. The module's `plotted_metrics` are added, such as those of its rewards.
    """

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        """Start with empty curves."""
        super().__init__()
        self.metrics = metrics
        self.is_new_run = True  # False if the fit resumes a run
        self.has_checked_names = False  # whether the names were compared with the logged metrics

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add RunChecks, which looks for the metrics before the first step."""
        add_run_checks(trainer, pl_module, stage)

    def needed_metrics(self) -> tuple[str, list[set[str]]]:
        """Return the given metrics, at least one of which must be logged."""
        return "metrics", [set(self.metrics)] if self.metrics else []

    def save_plot(self, folder: Path, module: L.LightningModule) -> None:
        """Draw one panel per metric."""
        save_metric_plot(self.state_dict(), folder / "curves.png")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the run's folder; metrics are also read at the first step."""
        super().on_train_start(trainer, pl_module)
        self.is_new_run = not self.curves  # a resumed run has the curves of its checkpoint
        self.has_checked_names = False

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Add a point of each training metric every log interval, and at step 1 of a new run.

        The base class calls this after each optimizer step; `self.step` is the number of steps.
        `on_validation_end` adds the points of `val/` metrics.
        """
        is_log_step = self.step % get_log_interval(trainer) == 0
        is_first_step = not self.has_checked_names  # of this fit, which may resume a run
        if is_first_step:
            # raises an error if the requested metrics are not logged
            self._check_metrics_logged(trainer.callback_metrics, pl_module)
            self.has_checked_names = True
        # a resumed run has the points of its checkpoint, so that its first step adds none
        if not is_log_step and not (is_first_step and self.is_new_run):
            return
        metrics = trainer.callback_metrics
        for name in self._select_metrics(metrics, pl_module):
            if not is_validation_metric(name):
                self.add_point(name, metrics[name])  # on its device: no synchronization

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the requested metrics of a validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            for name in self._select_metrics(metrics, pl_module):
                if is_validation_metric(name):
                    self.add_point(name, metrics[name])

    def _select_metrics(self, metrics: dict[str, Any], module: L.LightningModule) -> list[str]:
        """Return the logged metrics to plot: the given ones and those of the module."""
        if self.metrics is None:
            return [n for n in metrics if not n.startswith(NOT_PLOTTED)]
        wanted = dict.fromkeys([*self.metrics, *getattr(module, "plotted_metrics", ())])
        return [name for name in wanted if name in metrics]

    def _check_metrics_logged(self, metrics: dict[str, Any], module: L.LightningModule) -> None:
        """Raise UsageError if none of the requested training metrics is in `metrics`.

        If only some are missing, print their names. `metrics` has the logged values by name.
        """
        requested = [name for name in self.metrics or () if not is_validation_metric(name)]
        missing = [name for name in requested if name not in metrics]
        if missing and missing == requested:
            logged = sorted(metrics)
            near = sort_by_similarity(missing[0], logged)[0] if logged else ""
            raise UsageError(
                f"MetricPlot: {type(module).__name__} logs none of {', '.join(missing)}",
                logged or ["none: the module logs no metric"],
                hint=f"use metrics=[{near!r}]"
                if near
                else "remove MetricPlot() from Trainer(callbacks=...)",
                flag=f"--trainer.callbacks.{type(self).__name__}.metrics=[{near}]" if near else "",
            )
        if missing:
            module.print(f"MetricPlot: {type(module).__name__} does not log {', '.join(missing)}")


def is_validation_metric(name: str) -> bool:
    """Whether a metric is logged by validations: "val/loss", "val_loss"."""
    return name.startswith(("val/", "val_"))


def set_plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """Use a log scale for a range of more than 3:1 of positive values; label ticks as 0.5, 1, 2."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    ratio = max(positive) / min(positive) if positive else 1
    if ratio > 3:
        axes.set_yscale("log")
        mantissas = (1, 1.5, 2, 3, 4, 6) if ratio < 20 else (1, 2, 5) if ratio < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=mantissas))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def save_loss_plot(curves: dict[str, Any], path: Path, label: str, interval: int) -> None:
    """Draw the training and validation loss over the optimizer steps to a PNG file.

    Args:
        curves: lists of (step, loss) under the keys `train` and `val`.
        path: the PNG file.
        label: label of the loss axis.
        interval: number of optimizer steps that are averaged in a point of the training curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no window or global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=DPI)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=label, title=path.parent.as_posix())
    # a logarithmic axis if the losses differ by more than a factor of 3
    set_plain_ticks(axes, [value for curve in curves.values() for _, value in curve])
    if curves["train"]:
        steps, losses = zip(*curves["train"], strict=True)
        averaging = f"mean of {interval} steps" if interval > 1 else "each step"
        axes.plot(steps, losses, lw=1, alpha=0.8, label=f"training ({averaging})")
    if curves["val"]:
        steps, losses = zip(*curves["val"], strict=True)
        best_step, best_loss = min(curves["val"], key=lambda point: point[1])
        best_label = f"validation (best {best_loss:.4g} at step {best_step})"
        axes.plot(steps, losses, "o-", ms=4, label=best_label)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    FigureCanvasAgg(figure).print_png(path)


def save_metric_plot(curves: dict[str, Any], path: Path) -> None:
    """Draw one panel per metric, over the optimizer steps, to a PNG file.

    Args:
        curves: a list of (step, value) for each metric.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no window or global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_rows = -(-len(curves) // NUM_COLUMNS)  # rounded up
    figure = Figure(figsize=(4 * NUM_COLUMNS, 2.4 * num_rows), layout="constrained", dpi=DPI)
    figure.suptitle(path.parent.as_posix(), fontsize=11)
    figure.supxlabel("optimizer step", fontsize=10)
    for index, (name, curve) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(num_rows, NUM_COLUMNS, index, title=name)
        steps, values = zip(*curve, strict=True)
        # validations are few, so that their points get a marker
        axes.plot(steps, values, "o-" if is_validation_metric(name) else "-", ms=3, lw=1.2)
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
        axes.tick_params(labelsize=9)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))  # steps are integers
    FigureCanvasAgg(figure).print_png(path)
