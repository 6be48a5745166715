"""StepsToTarget: optimizer steps to a target value, over learning rates or batch sizes.

A sweep over learning rates shows three regions: too small, where the steps fall as 1 / lr; good;
and too large, where no member reaches the target (lecture 1). A sweep over batch sizes, each with
its best rate, shows two: the steps fall as 1 / B, and then stay the same (lecture 10).

Axes: k recorded points, m members.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from rich.console import Console

from ravine.errors import UsageError

from .member_paths import MetricName, RecordedPaths, count_samples

SettingName = Literal["learning_rate", "batch_size"]


class StepsToTarget(RecordedPaths):
    """Draws `steps_to_target.png` in the run's folder: the first step at which a metric is small.

    Example: `StepsToTarget(target=1e-5)` with `OptimizerSweep(SGD, lrs=[0.1, 0.5])`.

    Args:
        target: value of the metric to reach.
        metric: the metric.
        title: title of the figure; by default the run's folder.
        axis: the horizontal axis: learning_rate or batch_size.
        num_replicas: neighbouring members with the same settings, whose metric is averaged.
    """

    def __init__(
        self,
        target: float = 1e-5,
        metric: MetricName = "objective",
        title: str = "",
        axis: SettingName = "learning_rate",
        num_replicas: int = 1,
    ) -> None:
        """Start with empty paths."""
        super().__init__(labels=None, num_replicas=num_replicas, every_n_steps=1)
        if axis not in get_args(SettingName):
            raise UsageError(
                f"StepsToTarget: there is no axis {axis!r}",
                list(get_args(SettingName)),
                hint="use axis='learning_rate'",
                flag="--trainer.callbacks.StepsToTarget.axis=learning_rate",
            )
        self.target, self.metric, self.title, self.axis = target, metric, title, axis
        # after the run: for each setting its position on the axis and the step; None: not reached
        self.results: list[tuple[float, int | None]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module has the metric and the axis."""
        super().on_train_start(trainer, pl_module)
        self.check_metric(pl_module, self.metric)
        if self.axis == "batch_size":
            count_samples(self, pl_module)

    def find_steps(self, module: Any) -> list[int | None]:
        """Return the first step of each setting at which the mean metric is at most the target."""
        values = self.compute_metric(module, self.metric)  # (k m)
        reached = values.unflatten(1, (-1, self.num_replicas)).mean(2) <= self.target
        return [
            self.steps[int(column.int().argmax())] if bool(column.any()) else None
            for column in reached.T
        ]

    def save_plot(self, folder: Path, module: Any) -> None:
        """Draw the steps over the settings, and print them."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure

        over_batches = self.axis == "batch_size"
        positions = count_samples(self, module).tolist() if over_batches else self.lrs[0]
        positions = positions[:: self.num_replicas]  # of each setting
        self.results = list(zip(positions, self.find_steps(module), strict=True))
        counts: Sequence[str] = ["never" if k is None else str(k) for _, k in self.results]
        Console().print(
            f"steps to {self.metric} {self.target:g}: {', '.join(counts)}", soft_wrap=True
        )
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot(
            xlabel="batch size (samples)" if over_batches else "learning rate",
            ylabel=f"optimizer steps to {self.metric.replace('_', ' ')} ≤ {self.target:g}",
            title=self.title or folder.as_posix(),
        )
        reached = [(position, k) for position, k in self.results if k is not None]
        missed = [position for position, k in self.results if k is None]
        if reached:
            axes.plot(*zip(*reached, strict=True), "o-", ms=4, lw=1, label="reached")
        if missed:  # above all others
            height = 2 * max((k for _, k in reached), default=1)
            axes.plot(missed, [height] * len(missed), "x", color="#c55a11", label="not reached")
        if over_batches and reached:  # with perfect scaling all points have the same product
            size, steps = reached[0]
            line = [steps * size / position for position in positions]
            axes.plot(positions, line, "--", color="0.5", lw=1, label="equal numbers of samples")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylim(bottom=min(k for _, k in reached) / 2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3, which="both")
        if self.results:
            axes.legend(fontsize=9)
        FigureCanvasAgg(figure).print_png(folder / "steps_to_target.png")
