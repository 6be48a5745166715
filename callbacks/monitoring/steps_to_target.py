"""StepsToTarget: optimizer steps to a target value against the learning rate (lecture 1).

A sweep over learning rates shows three regions: too small, where the steps fall as 1 / lr; good;
and too large, where no member reaches the target.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from .member_paths import METRIC_LABELS, MetricName, RecordedPaths


class StepsToTarget(RecordedPaths):
    """Draws `steps_to_target.png` in the run's folder: the first step at which a metric is small.

    Example: `StepsToTarget(target=1e-5)` with `OptimizerSweep(SGD, lrs=[0.1, 0.5])`.

    Args:
        target: value of the metric to reach.
        metric: the metric.
        title: title of the figure; by default the run's folder.
    """

    def __init__(
        self, target: float = 1e-5, metric: MetricName = "objective", title: str = ""
    ) -> None:
        """Start with empty paths."""
        super().__init__(labels=None, num_replicas=1, every_n_steps=1)
        self.target, self.metric, self.title = target, metric, title
        # after the run: for each member the learning rate and the step; None: not reached
        self.results: list[tuple[float, int | None]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module has the metric."""
        super().on_train_start(trainer, pl_module)
        self.check_metric(pl_module, self.metric)

    def find_steps(self, module: Any) -> list[int | None]:
        """Return the first step of each member at which the metric is at most the target."""
        reached = self.compute_metric(module, self.metric) <= self.target  # (k m)
        return [
            self.steps[int(column.int().argmax())] if bool(column.any()) else None
            for column in reached.T
        ]

    def save_plot(self, folder: Path, module: Any) -> None:
        """Draw the steps over the learning rates, and print them."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure

        self.results = list(zip(self.lrs[0], self.find_steps(module), strict=True))
        counts: Sequence[str] = ["never" if k is None else str(k) for _, k in self.results]
        Console().print(
            f"steps to {self.metric} {self.target:g}: {', '.join(counts)}", soft_wrap=True
        )
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot(
            xlabel="learning rate",
            ylabel=f"optimizer steps to {METRIC_LABELS[self.metric]} {self.target:g}",
            title=self.title or folder.as_posix(),
        )
        reached = [(lr, k) for lr, k in self.results if k is not None]
        missed = [lr for lr, k in self.results if k is None]
        if reached:
            axes.plot(*zip(*reached, strict=True), "o-", ms=4, lw=1, label="reached")
        if missed:  # above all others
            height = 2 * max((k for _, k in reached), default=1)
            axes.plot(missed, [height] * len(missed), "x", color="#c55a11", label="not reached")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3, which="both")
        if self.results:
            axes.legend(fontsize=9)
        FigureCanvasAgg(figure).print_png(folder / "steps_to_target.png")
