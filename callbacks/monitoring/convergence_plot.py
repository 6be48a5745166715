"""ConvergencePlot: draw gap, distance, gradient norm and noise floor of each member of a sweep.

    panel       one metric of every setting, over optimizer steps, samples or seconds
    measured    mean of the last half of the recorded gaps, over all replicas of a setting
    predicted   closed form of the module (`predicted_gap`), drawn as a dashed line

Axes: k recorded points, m members, r replicas of a setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ravine.errors import UsageError
from ravine.lightning_compat import should_update_logs

from .member_paths import (
    METRIC_LABELS,
    MetricName,
    RecordedPaths,
    count_samples,
    evaluate_metric,
    member_lrs,
    member_points,
)

AxisName = Literal["steps", "samples", "seconds"]
AXIS_LABELS = {"steps": "optimizer step", "samples": "samples", "seconds": "seconds"}
MAX_LOGGED_SETTINGS = 8  # beyond, the curves of a sweep are drawn and not logged
MAX_SPARSE_POINTS = 1000  # curves of more points have thinner lines
LOGGED_METRICS = ("objective", "gap", "distance", "gradient_norm")


@dataclass(frozen=True)
class Panel:
    """One panel of a ConvergencePlot.

    Args:
        metric: name of the drawn quantity.
        axis: unit of the horizontal axis.
        log_x: use a logarithmic horizontal axis.
        log_y: use a logarithmic vertical axis.
        y_min: lower end of the vertical axis.
        y_max: upper end of the vertical axis.
        settings: numbers of the settings that are drawn, from 0; all by default.
        title: title of the panel.
    """

    metric: MetricName = "objective"
    axis: AxisName = "steps"
    log_x: bool = False
    log_y: bool = True
    y_min: float | None = None
    y_max: float | None = None
    settings: list[int] | None = None
    title: str = ""


class ConvergencePlot(RecordedPaths):
    """Draws `convergence.png` in the run's folder, and prints the last values of each member.

    Example: `ConvergencePlot([Panel("gap"), Panel("distance")])`.

    Args:
        panels: the panels, from left to right; by default one of the objective.
        labels: name of each setting; by default its learning rate.
        show_floor: draw the predicted noise floor beside the gap, and print the measured one.
        num_replicas: neighbouring members with the same settings, whose metrics are averaged.
        every_n_steps: optimizer steps between two recorded points.
        title: title of the figure; by default the run's folder.
    """

    def __init__(
        self,
        panels: Sequence[Panel] | None = None,
        labels: Sequence[str] | None = None,
        show_floor: bool = False,
        num_replicas: int = 1,
        every_n_steps: int = 1,
        title: str = "",
    ) -> None:
        """Start with empty paths."""
        super().__init__(labels, num_replicas, every_n_steps)
        self.panels = [Panel()] if panels is None else list(panels)
        if not self.panels:
            raise UsageError(
                "ConvergencePlot: panels is empty",
                ["one panel or more"],
                hint="use panels=[Panel('objective')]",
                flag=f"'--trainer.callbacks.{type(self).__name__}.panels=[{{metric: objective}}]'",
            )
        self.show_floor, self.title = show_floor, title
        # after the run: by setting, the measured and the predicted noise floor
        self.floors: dict[str, tuple[float, float]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module has the metrics."""
        super().on_train_start(trainer, pl_module)
        for panel in self.panels:
            self.check_metric(pl_module, panel.metric)
            if panel.axis == "samples":
                count_samples(self, pl_module)
        if self.show_floor:
            self.check_metric(pl_module, "gap")
            self._predict_gaps(pl_module, member_lrs(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log the metrics of the panels for each setting, as the mean over its replicas."""
        if not should_update_logs(trainer) or not self.lrs:
            return
        labels = self.setting_labels(pl_module)
        if len(labels) > MAX_LOGGED_SETTINGS:
            return
        points = member_points(pl_module)[None]  # (1 m d)
        for metric in dict.fromkeys(panel.metric for panel in self.panels):
            if metric in LOGGED_METRICS:
                values = self._over_replicas(evaluate_metric(pl_module, metric, points))[0]
                for label, value in zip(labels, values, strict=True):
                    name = f"{metric}/{label}" if len(labels) > 1 else f"train/{metric}"
                    pl_module.log(name, value)

    def save_plot(self, folder: Path, module: Any) -> None:
        """Draw the panels, and print a table of the settings."""
        self.floors = self._compute_floors(module) if self.show_floor else {}
        self._print_table(module)
        self.draw(module, folder / "convergence.png", self.title or folder.as_posix())

    def draw(self, module: Any, path: Path, title: str) -> None:
        """Draw the panels to a PNG file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2 * len(self.panels) + 0.4, 4.2), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for index, panel in enumerate(self.panels, 1):
            axes = figure.add_subplot(1, len(self.panels), index)
            self._draw_panel(axes, panel, module)
        FigureCanvasAgg(figure).print_png(path)

    def _draw_panel(self, axes: Any, panel: Panel, module: Any) -> None:
        values = self._over_replicas(self.compute_metric(module, panel.metric))  # (k settings)
        labels = self.setting_labels(module)
        lengths = self.num_points(module)[:: self.num_replicas]
        for setting, label in enumerate(labels):
            if panel.settings is not None and setting not in panel.settings:
                continue
            x = self._axis_values(panel.axis, module, setting)[: lengths[setting]]
            y = values[: lengths[setting], setting]
            if panel.log_x:  # step 0 has no place on a logarithmic axis
                x, y = x[1:], y[1:]
            width = 1.3 if len(x) <= MAX_SPARSE_POINTS else 0.8
            (line,) = axes.plot(x.tolist(), y.tolist(), lw=width, label=label)
            if panel.metric == "gap" and label in self.floors:
                axes.axhline(self.floors[label][1], ls="--", lw=1, color=line.get_color())
        axes.set_xlabel(AXIS_LABELS[panel.axis])
        axes.set_ylabel(METRIC_LABELS[panel.metric])
        axes.set_title(panel.title, fontsize=10)
        if panel.log_x:
            axes.set_xscale("log")
        if panel.log_y:
            axes.set_yscale("log")
        axes.set_ylim(panel.y_min, panel.y_max)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)

    def _axis_values(self, axis: str, module: Any, setting: int) -> Tensor:
        """Return the horizontal positions (k) of a setting's points."""
        if axis == "seconds":
            return torch.tensor(self.seconds)
        steps = torch.tensor(self.steps)
        if axis == "steps":
            return steps
        return steps * count_samples(self, module)[setting * self.num_replicas]

    def _over_replicas(self, values: Tensor) -> Tensor:
        """Average values (k m) over the replicas of each setting: (k settings)."""
        return values.unflatten(1, (-1, self.num_replicas)).mean(2)

    def _compute_floors(self, module: Any) -> dict[str, tuple[float, float]]:
        """Return the measured and the predicted gap of each setting."""
        gaps = self._over_replicas(self.compute_metric(module, "gap"))
        measured = gaps[len(gaps) // 2 :].mean(0)  # (settings)
        predicted = self._predict_gaps(module, self.lrs[-1])[:: self.num_replicas]
        pairs = zip(measured.tolist(), predicted.tolist(), strict=True)
        return dict(zip(self.setting_labels(module), pairs, strict=True))

    def _predict_gaps(self, module: Any, lrs: Sequence[float]) -> Tensor:
        """Return the predicted noise floor of each member (m) at these constant rates (m).

        Raises:
            UsageError: the module has no closed form.
        """
        predict = getattr(module, "predicted_gap", None)
        rates = torch.tensor(lrs, dtype=torch.float64)
        predicted = predict(rates) if predict is not None else None
        if predicted is None:
            raise UsageError(
                f"ConvergencePlot: no closed form of the noise floor is known for this "
                f"{type(module).__name__}",
                ["show_floor=False"],
                hint="use show_floor=False",
                flag=f"--trainer.callbacks.{type(self).__name__}.show_floor=false",
            )
        return predicted

    def _print_table(self, module: Any) -> None:
        metrics = [m for m in dict.fromkeys(panel.metric for panel in self.panels)]
        metrics = [m for m in metrics if m not in ("step_ratio", "learning_rate")]
        table = Table("setting", "steps", *metrics)
        if self.floors:
            table.add_column("measured floor")
            table.add_column("predicted floor")
        columns = {m: self._over_replicas(self.compute_metric(module, m)) for m in metrics}
        lengths = self.num_points(module)[:: self.num_replicas]
        for setting, label in enumerate(self.setting_labels(module)):
            last = lengths[setting] - 1
            row = [f"{float(columns[m][last, setting]):.9g}" for m in metrics]
            row += [f"{floor:.4g}" for floor in self.floors.get(label, ())]
            table.add_row(label, str(self.steps[last]), *row)
        Console().print(table)
