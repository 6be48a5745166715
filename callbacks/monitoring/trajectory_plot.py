"""TrajectoryPlot: draw the paths of optimizers over the contours of the objective.

    axes              two variables of a module that evaluates points, such as Objective
    main_directions   the plane of the first two principal components of the path of the weights
    checkpoints       the plane through three checkpoints

In a plane of weights (`loss_plane.py`) the contours are those of the validation loss, and the path
is its projection. The contour levels are a geometric series above the smallest value in the window,
so that a flat ravine shows as many lines as a steep one.

Axes: k recorded points, m members, d variables, n weights, y rows and x columns of the contours.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from ravine.errors import UsageError

from .loss_plane import (
    WeightPlane,
    compute_losses,
    flatten_weights,
    plane_of_path,
    plane_of_points,
    read_weights,
    trainable_names,
)
from .member_paths import RecordedPaths, evaluates_points
from .progress import count_total_steps

PlaneName = Literal["axes", "main_directions"]
FUNCTION_GRID = 200  # rows and columns of the grid of a function's contours
LOSS_GRID = 25  # of the contours of a validation loss: 625 validations
NUM_LEVELS = 18
MARGIN = 0.15  # around the paths, as a fraction of their range
MAX_MARKERS = 60  # a path of more points is a line without markers
NUM_POINTS = 100  # of a path of weights, by default
MAX_NUMBERS = 2**28  # of all recorded points of a path of weights: 1 GB in float32
FRAMES_PER_SECOND = 10


class TrajectoryPlot(RecordedPaths):
    """Draws `trajectory.png` in the run's folder: paths over the contours of the objective.

    A function of two variables is drawn over its variables. For any other module the plane is that
    of the main directions of its path, or of three checkpoints; the contours are its validation
    loss at the end of the run. Training is bitwise the same as without the plot.

    Example: `TrajectoryPlot(["gradient descent", "momentum"])`, `TrajectoryPlot(gif_frames=30)`.

    Args:
        labels: name of each member; by default its learning rate.
        window: ends of the axes, [x_min, x_max, y_min, y_max]; by default around the paths.
        zoom: ends of the axes of a second panel.
        every_n_steps: optimizer steps between two recorded points; by default 1 for a function, and
            a hundredth of the run for other modules.
        title: title of the figure; by default the run's folder.
        plane: axes or main_directions; by default axes for a module that evaluates points.
        checkpoints: three checkpoints of the module, whose plane is drawn.
        grid_size: rows and columns of the grid of the contours; by default 200 for a function, and
            25 for a validation loss.
        metric: name of the logged validation loss; by default one such as val/loss or val_loss.
        num_val_batches: validation batches of each value; by default all.
        gif_frames: frames of the animation `trajectory.gif`; 0 for none.
    """

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        window: Sequence[float] | None = None,
        zoom: Sequence[float] | None = None,
        every_n_steps: int | None = None,
        title: str = "",
        plane: PlaneName | None = None,
        checkpoints: Sequence[str] | None = None,
        grid_size: int | None = None,
        metric: str | None = None,
        num_val_batches: int | None = None,
        gif_frames: int = 0,
    ) -> None:
        """Start with empty paths."""
        super().__init__(labels, 1, 1 if every_n_steps is None else every_n_steps)
        self._check_arguments(window, zoom, plane, checkpoints)
        sizes = {"grid_size": (grid_size, 2), "num_val_batches": (num_val_batches, 1)}
        for name, (value, least) in {**sizes, "gif_frames": (gif_frames, 0)}.items():
            if value is not None and value < least:
                raise UsageError(
                    f"TrajectoryPlot: {name}={value} is too small",
                    [f"{least} or more"],
                    hint=f"use {name}={max(least, 20)}",
                    flag=f"--trainer.callbacks.TrajectoryPlot.{name}={max(least, 20)}",
                )
        self.window, self.zoom, self.title = window, zoom, title
        self.plane_name, self.checkpoints = plane, checkpoints
        self.grid_size, self.metric, self.num_val_batches = grid_size, metric, num_val_batches
        self.gif_frames, self._has_interval = gif_frames, every_n_steps is not None
        self.uses_weights = False  # whether points are weights (1 n) of any module
        self.plane: WeightPlane | None = None  # None: the axes are the two variables
        self.corners: Tensor | None = None  # coordinates of the checkpoints (3 2)
        self.weight_names: list[str] = []  # parameters whose values are a point of the path
        # after the run: the validation loss at the checkpoints
        self.checkpoint_losses: list[float] = []
        self._axis_labels = ("x", "y")

    def _check_arguments(
        self,
        window: Sequence[float] | None,
        zoom: Sequence[float] | None,
        plane: str | None,
        checkpoints: Sequence[str] | None,
    ) -> None:
        for name, ends in (("window", window), ("zoom", zoom)):
            if ends is not None and not (
                len(ends) == 4 and ends[0] < ends[1] and ends[2] < ends[3]
            ):
                raise UsageError(
                    f"TrajectoryPlot: {name}={list(ends)} is not a window",
                    ["[x_min, x_max, y_min, y_max]"],
                    hint=f"use {name}=[-1, 4, -1, 4]",
                    flag=f"--trainer.callbacks.TrajectoryPlot.{name}=[-1,4,-1,4]",
                )
        if plane not in (None, *get_args(PlaneName)):
            raise UsageError(
                f"TrajectoryPlot: there is no plane {plane!r}",
                list(get_args(PlaneName)),
                hint="use plane='main_directions'",
                flag="--trainer.callbacks.TrajectoryPlot.plane=main_directions",
            )
        if checkpoints is not None and plane is not None:
            raise UsageError(
                f"TrajectoryPlot: the plane of checkpoints is that of {len(checkpoints)} files, "
                f"and plane is {plane}",
                ["plane or checkpoints"],
                hint="remove plane",
                flag="--trainer.callbacks.TrajectoryPlot.plane=null",
            )
        if checkpoints is not None and len(checkpoints) != 3:
            raise UsageError(
                f"TrajectoryPlot: a plane has three checkpoints, and checkpoints has "
                f"{len(checkpoints)}",
                ["three paths"],
                hint="use checkpoints=['a.ckpt', 'b.ckpt', 'c.ckpt'], or plane='main_directions'",
                flag="--trainer.callbacks.TrajectoryPlot.checkpoints=[A.ckpt,B.ckpt,C.ckpt]",
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the kind of the plane; refuse axes for a module that does not evaluate points."""
        if stage != "fit":
            return
        self.uses_weights = self.checkpoints is not None or not evaluates_points(pl_module)
        if self.plane_name == "axes":
            super().setup(trainer, pl_module, stage)
        if self.uses_weights and trainer.world_size > 1:
            raise UsageError(
                f"TrajectoryPlot evaluates the loss of {type(pl_module).__name__} in one process, "
                f"and this run has {trainer.world_size}",
                ["1 process"],
                hint="use Trainer(devices=1)",
                flag="--trainer.devices=1",
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be drawn, and read the checkpoints."""
        super().on_train_start(trainer, pl_module)
        if self.uses_weights:
            self._prepare_weights(trainer, pl_module)
            return
        num_variables = pl_module.member_points().shape[1]  # type: ignore[operator]
        if num_variables != 2 and self.plane_name != "main_directions":
            raise UsageError(
                f"TrajectoryPlot draws functions of 2 variables, and {type(pl_module).__name__} "
                f"has {num_variables}",
                ["2 variables", "plane='main_directions' for 3 or more"],
                hint="use Objective with a start of 2 numbers"
                + (", or plane='main_directions'" if num_variables > 2 else ""),
                flag="--trainer.callbacks.TrajectoryPlot.plane=main_directions"
                if num_variables > 2
                else "--model.start=[3,2]",
            )

    def _prepare_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Check the validation loss, find the plane of checkpoints and the interval of points."""
        if not trainer.enable_validation:
            raise UsageError(
                f"TrajectoryPlot draws the validation loss, and {type(module).__name__} has no "
                "validation data in this run",
                ["a module with validation_step, and a validation loader"],
                hint="remove TrajectoryPlot() from Trainer(callbacks=...)",
            )
        self.weight_names = trainable_names(module)
        weights = flatten_weights(module, self.weight_names)
        compute_losses(trainer, module, self.weight_names, [weights], self.metric, num_batches=1)
        if self.checkpoints is not None:
            corners = torch.stack(
                [read_weights(module, self.weight_names, path) for path in self.checkpoints]
            )
            self.plane = plane_of_points(corners)
            if self.plane.is_flat:
                raise UsageError(
                    f"TrajectoryPlot: the weights of {', '.join(self.checkpoints)} lie on a line",
                    ["three checkpoints with different directions"],
                    hint="use other checkpoints, or plane='main_directions'",
                    flag="--trainer.callbacks.TrajectoryPlot.checkpoints=null",
                )
            self.corners = self.plane.coordinates(corners)
        total = count_total_steps(trainer)
        if not self._has_interval:
            self.every_n_steps = max(1, math.ceil((total or 0) / NUM_POINTS))
        num_numbers = len(weights) * (total or 0) / self.every_n_steps
        if self.plane is None and num_numbers > MAX_NUMBERS:
            interval = math.ceil(len(weights) * (total or 0) / MAX_NUMBERS)
            raise UsageError(
                f"TrajectoryPlot: {total // self.every_n_steps if total else 0} points of "
                f"{len(weights)} weights do not fit into 1 GB",
                [f"every_n_steps of {interval} or more"],
                hint=f"use every_n_steps={interval}, or checkpoints",
                flag=f"--trainer.callbacks.TrajectoryPlot.every_n_steps={interval}",
            )

    def read_points(self, module: Any) -> Tensor:
        """Return the current points (m d): of the members, the weights, or their coordinates."""
        if not self.uses_weights:
            return super().read_points(module)
        weights = flatten_weights(module, self.weight_names)
        if self.corners is not None:  # two numbers of a point are enough
            assert self.plane is not None
            return self.plane.coordinates(weights[None])
        return weights[None]

    def save_plot(self, folder: Path, module: Any) -> None:
        """Draw the paths, the zoomed panel and the animation if there are any."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure

        paths = self._find_paths(module)  # (k m 2)
        if paths is None:
            Console().print(
                "TrajectoryPlot: no picture, because the path of the weights has fewer than two "
                "directions",
                soft_wrap=True,
            )
            return
        windows = [self.window or self._window_of_paths(paths, module)]
        windows += [self.zoom] if self.zoom is not None else []
        figure = Figure(figsize=(5.6 * len(windows) + 0.4, 5.0), layout="constrained")
        figure.suptitle(self.title or folder.as_posix(), fontsize=11)
        lengths = self.num_points(module)
        lines: list[tuple[Any, Tensor]] = []  # a line of each panel and its path (k 2)
        for index, window in enumerate(windows, 1):
            x_label, y_label = self._axis_labels
            axes = figure.add_subplot(1, len(windows), index, xlabel=x_label, ylabel=y_label)
            self._draw_contours(axes, module, window)
            lines += self._draw_paths(axes, module, paths, lengths)
            axes.set_xlim(window[0], window[1])
            axes.set_ylim(window[2], window[3])
            if index == 1:
                axes.legend(fontsize=9)
            else:
                axes.set_title("zoom", fontsize=10)
        FigureCanvasAgg(figure).print_png(folder / "trajectory.png")
        if self.gif_frames:
            self._save_animation(figure, lines, folder / "trajectory.gif")
        self._print_checkpoint_losses(module)

    def _find_paths(self, module: Any) -> Tensor | None:
        """Return the paths in the plane (k m 2), and set the plane of the main directions.

        None if a path has no plane.
        """
        points = self.stacked_points()  # (k m d)
        if self.corners is not None:
            self._axis_labels = ("distance in the plane", "distance in the plane")
            return points  # coordinates
        if not self.uses_weights and self.plane_name != "main_directions":
            return points
        if self.uses_weights:
            main_plane = plane_of_path(points[:, 0])
        else:
            main_plane = plane_of_path(points.transpose(0, 1).flatten(0, 1))  # of all members
        if main_plane is None:
            return None
        self.plane, shares = main_plane
        first, second = (f"{100 * share:.3g} % of the variance" for share in shares)
        self._axis_labels = (f"first main direction, {first}", f"second, {second}")
        flat = self.plane.coordinates(points.flatten(0, 1))
        return flat.unflatten(0, points.shape[:2])

    def _window_of_paths(self, paths: Tensor, module: Any) -> list[float]:
        """Return a window around all finite points, and the known minimizers or checkpoints."""
        points = paths.flatten(0, 1)  # (k*m 2)
        minimizers = self._known_minimizers(module)  # (p 2)
        for more in (minimizers, self.corners):
            if more is not None:
                points = torch.cat((points, more.to(points)))
        points = points[points.isfinite().all(1)]
        low, high = points.amin(0), points.amax(0)
        margin = MARGIN * (high - low).clamp(min=1e-3)
        x_min, y_min = (low - margin).tolist()
        x_max, y_max = (high + margin).tolist()
        return [x_min, x_max, y_min, y_max]

    def _known_minimizers(self, module: Any) -> Tensor | None:
        """Return the minimizers (p 2) of the first member, if the axes are its variables."""
        minimizers = None if self.uses_weights or self.plane else module.known_minimizers()
        return None if minimizers is None else minimizers[0]

    @torch.no_grad()
    def _evaluate_grid(self, module: Any, x: Tensor, y: Tensor) -> Tensor:
        """Return the objective (y x) on the grid of x and y."""
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (y*x 2)
        if self.uses_weights:
            plane = self.plane
            assert plane is not None
            points = (plane.weights(a, b) for a, b in grid.tolist())
            losses = compute_losses(
                module.trainer, module, self.weight_names, points, self.metric, self.num_val_batches
            )
            values = torch.tensor(losses, dtype=torch.float64)
        else:
            if self.plane is not None:
                grid = torch.stack([self.plane.weights(a, b) for a, b in grid.tolist()])
            num_members, dtype = self.points[0].shape[0], self.points[0].dtype
            points = grid[:, None].expand(-1, num_members, -1).to(dtype)
            values = module.evaluate_points(points)[:, 0]  # all members have the same function
        return values.view(len(y), len(x))

    def _draw_contours(self, axes: Any, module: Any, window: Sequence[float]) -> None:
        size = self.grid_size or (LOSS_GRID if self.uses_weights else FUNCTION_GRID)
        x = torch.linspace(window[0], window[1], size, dtype=torch.float64)
        y = torch.linspace(window[2], window[3], size, dtype=torch.float64)
        values = self._evaluate_grid(module, x, y)
        values[~values.isfinite()] = torch.nan  # matplotlib leaves it out
        minimizers = self._known_minimizers(module)
        if minimizers is not None:
            axes.plot(*minimizers.T.tolist(), "k*", ms=10, label="minimum")
        levels = _contour_levels(values)
        if not levels:
            return
        contours = axes.contour(
            x.tolist(), y.tolist(), values.numpy(), levels, colors="0.75", linewidths=0.7
        )
        if self.uses_weights:  # the values of a loss are of interest, and those of a function known
            axes.clabel(contours, levels[::3], fontsize=7, fmt="%.3g")

    def _draw_paths(
        self, axes: Any, module: Any, paths: Tensor, lengths: list[int]
    ) -> list[tuple[Any, Tensor]]:
        lines = []
        for member, label in enumerate(self.setting_labels(module)):
            path = paths[: lengths[member], member]  # (k 2)
            marker = "o-" if len(path) <= MAX_MARKERS else "-"
            (line,) = axes.plot(*path.T.tolist(), marker, ms=3, lw=1.3, label=label)
            lines.append((line, path))
        start = paths[0, 0].tolist()
        axes.plot([start[0]], [start[1]], "ks", ms=5, label="start")
        if self.corners is not None:
            axes.plot(*self.corners.T.tolist(), "k^", ms=7, label="checkpoints")
            for name, corner in zip(self.checkpoints or (), self.corners.tolist(), strict=True):
                axes.annotate(Path(name).stem, corner, fontsize=8)
        return lines

    def _save_animation(self, figure: Any, lines: list[tuple[Any, Tensor]], path: Path) -> None:
        """Write a GIF, whose frames show growing parts of the paths.

        A frame has one more point at least: at most as many frames as points.
        """
        from matplotlib.animation import PillowWriter

        longest = max(len(points) for _, points in lines)
        num_frames = min(self.gif_frames, longest)
        counts = [1 + (longest - 1) * i // max(num_frames - 1, 1) for i in range(num_frames)]
        title = figure.get_suptitle()
        writer = PillowWriter(fps=FRAMES_PER_SECOND)
        writer.setup(figure, str(path), dpi=80)
        for count in counts:
            for line, points in lines:
                line.set_data(*points[:count].T.tolist())
            figure.suptitle(f"{title}: step {self.steps[count - 1]}", fontsize=11)
            writer.grab_frame()
        writer.finish()

    def _print_checkpoint_losses(self, module: Any) -> None:
        """Compute and print the validation loss at the checkpoints, as points of the plane."""
        if self.corners is None or self.plane is None:
            return
        points = [self.plane.weights(a, b) for a, b in self.corners.tolist()]
        self.checkpoint_losses = compute_losses(
            module.trainer, module, self.weight_names, points, self.metric, self.num_val_batches
        )
        pairs = zip(self.checkpoints or (), self.checkpoint_losses, strict=True)
        texts = [f"{Path(name).name} {loss:.6g}" for name, loss in pairs]
        Console().print(f"validation loss of the checkpoints: {', '.join(texts)}", soft_wrap=True)


def _contour_levels(values: Tensor) -> list[float]:
    """Return levels of a contour plot of values (y x): geometric above the smallest value.

    There are none if all values are equal or not finite.
    """
    finite = values[values.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    if high <= low:
        return []
    heights = torch.logspace(-4, 0, NUM_LEVELS, dtype=torch.float64) * (high - low)
    return [low + height for height in heights.tolist()]
