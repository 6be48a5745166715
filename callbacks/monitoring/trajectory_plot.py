"""TrajectoryPlot: draw the paths of optimizers over the contours of a function of two variables.

The contour levels are a geometric series above the smallest value in the window, so that a flat
ravine shows as many lines as a steep one.

Axes: k recorded points, m members, y rows and x columns of the grid of the contours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ravine.errors import UsageError

from .member_paths import RecordedPaths

GRID_SIZE = 200  # rows and columns of the grid of a contour
NUM_LEVELS = 18
MARGIN = 0.15  # around the paths, as a fraction of their range
MAX_MARKERS = 60  # a path of more points is a line without markers


class TrajectoryPlot(RecordedPaths):
    """Draws `trajectory.png` in the run's folder: paths of two variables over contours.

    Example: `TrajectoryPlot(["gradient descent", "momentum"])`.

    Args:
        labels: name of each member; by default its learning rate.
        window: ends of the axes, [x_min, x_max, y_min, y_max]; by default around the paths.
        zoom: ends of the axes of a second panel.
        every_n_steps: optimizer steps between two recorded points.
        title: title of the figure; by default the run's folder.
    """

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        window: Sequence[float] | None = None,
        zoom: Sequence[float] | None = None,
        every_n_steps: int = 1,
        title: str = "",
    ) -> None:
        """Start with empty paths."""
        super().__init__(labels, 1, every_n_steps)
        for name, ends in (("window", window), ("zoom", zoom)):
            if ends is not None and not (
                len(ends) == 4 and ends[0] < ends[1] and ends[2] < ends[3]
            ):
                raise UsageError(
                    f"TrajectoryPlot: {name}={list(ends)} is not a window",
                    ["[x_min, x_max, y_min, y_max]"],
                    hint=f"use {name}=[-1, 4, -1, 4]",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}=[-1,4,-1,4]",
                )
        self.window, self.zoom, self.title = window, zoom, title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse members that do not have two variables."""
        super().on_train_start(trainer, pl_module)
        num_variables = pl_module.member_points().shape[1]  # type: ignore[operator]
        if num_variables != 2:
            raise UsageError(
                f"TrajectoryPlot draws functions of 2 variables, and {type(pl_module).__name__} "
                f"has {num_variables}",
                ["2 variables"],
                hint="use ConvergencePlot, or Objective with a start of 2 numbers",
                flag="--model.start=[3,2]",
            )

    def save_plot(self, folder: Path, module: Any) -> None:
        """Draw the paths, and the zoomed panel if there is one."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure

        windows = [self.window or self._window_of_paths(module)]
        windows += [self.zoom] if self.zoom is not None else []
        figure = Figure(figsize=(5.6 * len(windows) + 0.4, 5.0), layout="constrained")
        figure.suptitle(self.title or folder.as_posix(), fontsize=11)
        for index, window in enumerate(windows, 1):
            axes = figure.add_subplot(1, len(windows), index, xlabel="x", ylabel="y")
            self._draw_contours(axes, module, window)
            self._draw_paths(axes, module)
            axes.set_xlim(window[0], window[1])
            axes.set_ylim(window[2], window[3])
            if index == 1:
                axes.legend(fontsize=9)
            else:
                axes.set_title("zoom", fontsize=10)
        FigureCanvasAgg(figure).print_png(folder / "trajectory.png")

    def _window_of_paths(self, module: Any) -> list[float]:
        """Return a window around all finite points and the known minimizers."""
        points = self.stacked_points().flatten(0, 1)  # (k*m 2)
        minimizers = module.known_minimizers()
        if minimizers is not None:
            points = torch.cat((points, minimizers.to(points).flatten(0, 1)))
        points = points[points.isfinite().all(1)]
        low, high = points.amin(0), points.amax(0)
        margin = MARGIN * (high - low).clamp(min=1e-3)
        x_min, y_min = (low - margin).tolist()
        x_max, y_max = (high + margin).tolist()
        return [x_min, x_max, y_min, y_max]

    @torch.no_grad()
    def _draw_contours(self, axes: Any, module: Any, window: Sequence[float]) -> None:
        num_members, dtype = self.points[0].shape[0], self.points[0].dtype
        x = torch.linspace(window[0], window[1], GRID_SIZE, dtype=dtype)
        y = torch.linspace(window[2], window[3], GRID_SIZE, dtype=dtype)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (y x 2)
        points = grid.view(-1, 1, 2).expand(-1, num_members, -1)
        # all members have the same function
        values = module.evaluate_points(points)[:, 0].view(GRID_SIZE, GRID_SIZE)
        levels = _contour_levels(values)
        axes.contour(x.tolist(), y.tolist(), values.numpy(), levels, colors="0.75", linewidths=0.7)
        minimizers = module.known_minimizers()
        if minimizers is not None:
            axes.plot(*minimizers[0].T.tolist(), "k*", ms=10, label="minimum")

    def _draw_paths(self, axes: Any, module: Any) -> None:
        points, lengths = self.stacked_points(), self.num_points(module)
        for member, label in enumerate(self.setting_labels(module)):
            path = points[: lengths[member], member]  # (k 2)
            marker = "o-" if len(path) <= MAX_MARKERS else "-"
            axes.plot(*path.T.tolist(), marker, ms=3, lw=1.3, label=label)
        start = points[0, 0].tolist()
        axes.plot([start[0]], [start[1]], "ks", ms=5, label="start")


def _contour_levels(values: Tensor) -> list[float]:
    """Return levels of a contour plot of values (y x): geometric above the smallest value."""
    low, high = float(values.min()), float(values.max())
    heights = torch.logspace(-4, 0, NUM_LEVELS, dtype=torch.float64) * (high - low)
    return [low + height for height in heights.tolist()]
