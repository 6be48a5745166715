"""RecordedPaths: record the points of each member of a sweep, for plots at the end of a run.

A point is recorded before the update of its step. So point k is the point after k optimizer steps,
also if a batch has several steps or an optimizer evaluates the loss several times in a step.
Objective, gap and gradient are computed from the points after the run, for all points at once.

Axes: k recorded points, m members, d variables.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ravine.errors import UsageError

from .media_logging import get_run_dir

MetricName = Literal[
    "objective", "gap", "distance", "gradient_norm", "step_ratio", "learning_rate", "weight"
]
METHODS = (
    "member_points",
    "evaluate_points",
    "compute_gradients",
    "known_minimizers",
    "known_minimum",
)
METRIC_LABELS = {
    "objective": "objective",
    "gap": "gap to the minimum",
    "distance": "distance to the minimizer",
    "gradient_norm": "norm of the full gradient",
    "step_ratio": "step / gradient (norms)",
    "learning_rate": "learning rate",
    "weight": "weight",
}


class RecordedPaths(Callback, ABC):
    """Points of the members of a sweep during a run; a resumed run keeps those of its checkpoint.

    Args:
        labels: name of each member, or of each setting if there are replicas.
        num_replicas: number of neighbouring members with the same settings.
        every_n_steps: optimizer steps between two recorded points.
    """

    def __init__(self, labels: Sequence[str] | None, num_replicas: int, every_n_steps: int) -> None:
        """Start with empty paths."""
        for name, value in (("num_replicas", num_replicas), ("every_n_steps", every_n_steps)):
            if value < 1:
                raise UsageError(
                    f"{type(self).__name__}: {name}={value} is too small",
                    ["1 or more"],
                    hint=f"use {name}=1",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}=1",
                )
        self.labels, self.num_replicas = labels, num_replicas
        self.every_n_steps = every_n_steps
        self.run_dir: Path | None = None
        self.steps: list[int] = []
        self.points: list[Tensor] = []  # of each recorded step (m d)
        self.lrs: list[list[float]] = []  # learning rates of each recorded step (m)
        self.seconds: list[float] = []  # since the start of the run
        self._start_time = 0.0
        self._next_step = 0  # the next step to record
        self._has_end_point = False  # the last point is that of the end, not of the interval

    @abstractmethod
    def save_plot(self, folder: Path, module: Any) -> None:
        """Draw the paths to a file in the run's folder."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module whose points cannot be evaluated."""
        if stage == "fit" and not evaluates_points(pl_module):
            name = type(self).__name__
            raise UsageError(
                f"{name} draws the points of a few variables, and {type(pl_module).__name__} does "
                "not evaluate points",
                ["Objective", "Regression", f"a module with {', '.join(METHODS)}"],
                hint=f"remove {name}() from Trainer(callbacks=...)",
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the run's folder, and start the clock."""
        self.run_dir = get_run_dir(trainer)
        self._start_time = time.perf_counter() - (self.seconds[-1] if self.seconds else 0.0)
        num_members = len(list_member_params(pl_module))
        expected = num_members // self.num_replicas
        if num_members % self.num_replicas:
            raise UsageError(
                f"{type(self).__name__}: num_replicas={self.num_replicas} does not divide the "
                f"{num_members} members",
                [n for n in range(1, num_members + 1) if num_members % n == 0],
                hint="use num_replicas=1",
                flag=f"--trainer.callbacks.{type(self).__name__}.num_replicas=1",
            )
        if self.labels is not None and len(self.labels) != expected:
            raise UsageError(
                f"{type(self).__name__}: labels has {len(self.labels)} names, and the number of "
                f"settings is {expected}",
                ["one name for each setting"],
                hint="remove labels",
                flag=f"--trainer.callbacks.{type(self).__name__}.labels=null",
            )

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Record the points before their update, at the first gradient of a step."""
        if trainer.global_step >= self._next_step:
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the last points, and draw the plot on rank 0."""
        has_moved = not self.points or not torch.equal(self.points[-1], self.read_points(pl_module))
        if has_moved and (not self.steps or trainer.global_step > self.steps[-1]):
            self._record(trainer, pl_module)
            self._has_end_point = True
        if trainer.is_global_zero and self.run_dir and self.steps:
            self.save_plot(self.run_dir, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw the plot if a signal stops the run; it is not drawn after an error."""
        if isinstance(exception, SystemExit | KeyboardInterrupt):
            self.on_train_end(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """Return the class name, under which checkpoints store the paths."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return the paths as tensors and numbers, without the point of the end of the run.

        A run resumed from the checkpoint would keep it beside those of the interval.
        """
        end = len(self.steps) - self._has_end_point
        return {
            "steps": self.steps[:end],
            "points": torch.stack(self.points[:end]) if end else torch.empty(0),
            "lrs": [list(row) for row in self.lrs[:end]],
            "seconds": self.seconds[:end],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the paths of a checkpoint."""
        self.steps, self.seconds = list(state_dict["steps"]), list(state_dict["seconds"])
        self.points, self.lrs = list(state_dict["points"]), list(state_dict["lrs"])
        self._has_end_point = False
        self._next_step = self._step_after(self.steps[-1]) if self.steps else 0

    def read_points(self, module: Any) -> Tensor:
        """Return a copy of the current points (m d)."""
        return member_points(module)

    def _record(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        self.steps.append(step)
        self.points.append(self.read_points(module))
        self.lrs.append(member_lrs(trainer, module))
        self.seconds.append(time.perf_counter() - self._start_time)
        self._next_step = self._step_after(step)

    def _step_after(self, step: int) -> int:
        """Return the next step to record after a recorded one."""
        return step - step % self.every_n_steps + self.every_n_steps

    def stacked_points(self) -> Tensor:
        """Return the recorded points (k m d)."""
        return torch.stack(self.points)

    def num_points(self, module: Any) -> list[int]:
        """Return how many recorded points each member has, up to the one where it stopped."""
        stop_steps = getattr(module, "stop_steps", None) or [None] * self.points[0].shape[0]
        return [
            len(self.steps) if stop is None else sum(step <= stop for step in self.steps)
            for stop in stop_steps
        ]

    def setting_labels(self, module: Any) -> list[str]:
        """Return the name of each setting: those of the arguments, or the learning rates."""
        if self.labels is not None:
            return list(self.labels)
        rates = [f"lr {lr:g}" for lr in self.lrs[0][:: self.num_replicas]]
        if len(set(rates)) == len(rates):
            return rates
        return [f"member {index}" for index in range(len(rates))]

    def check_metric(self, module: Any, metric: str) -> None:
        """Raise UsageError for a metric that the module or the interval does not allow."""
        name, task = type(self).__name__, type(module).__name__
        if metric in ("gap", "distance") and module.known_minimizers() is None:
            raise UsageError(
                f"{name}: the {metric} needs the minimizer, which is unknown here, or does not "
                "exist",
                ["objective", "gradient_norm"],
                hint="use the metric 'objective'"
                + (", or Objective(minimizer=[...])" if task == "Objective" else ""),
            )
        if metric == "step_ratio" and self.every_n_steps > 1:
            raise UsageError(
                f"{name}: the ratio of step to gradient needs every step, and every_n_steps is "
                f"{self.every_n_steps}",
                ["every_n_steps=1"],
                hint="use every_n_steps=1",
                flag=f"--trainer.callbacks.{type(self).__name__}.every_n_steps=1",
            )
        if metric == "weight" and (num_variables := module.member_points().shape[1]) != 1:
            raise UsageError(
                f"{name}: the metric weight is for one variable, and {task} has {num_variables}",
                ["objective", "gap", "distance"],
                hint="use the metric 'objective'",
            )

    @torch.no_grad()
    def compute_metric(self, module: Any, metric: str) -> Tensor:
        """Return a metric (k m) of the recorded points.

        The ratio of step to gradient is NaN at the last point, whose step is unknown.
        """
        self.check_metric(module, metric)
        if metric == "learning_rate":
            return torch.tensor(self.lrs, dtype=torch.float64)
        points = self.stacked_points()
        if metric == "weight":
            return points[..., 0]
        if metric == "step_ratio":
            gradients = module.compute_gradients(points).norm(dim=-1)  # (k m)
            moved = (points[1:] - points[:-1]).norm(dim=-1)  # (k-1 m)
            missing = torch.full_like(gradients[:1], torch.nan)
            return torch.cat((moved / gradients[:-1], missing))
        return evaluate_metric(module, metric, points)


def evaluate_metric(module: Any, metric: str, points: Tensor) -> Tensor:
    """Return objective, gap, distance or gradient_norm (k m) of points (k m d)."""
    if metric == "gradient_norm":
        return module.compute_gradients(points).norm(dim=-1)
    if metric == "distance":
        minimizers = module.known_minimizers().to(points.dtype)  # (m p d)
        return (points.unsqueeze(2) - minimizers).norm(dim=-1).amin(-1)
    if metric == "gap":
        evaluate_gaps = getattr(module, "evaluate_gaps", None)
        if evaluate_gaps is not None:
            return evaluate_gaps(points)
        return module.evaluate_points(points) - module.known_minimum().to(points.dtype)
    return module.evaluate_points(points)


def evaluates_points(module: Any) -> bool:
    """Whether a module evaluates the points of members of few variables, such as Objective."""
    return all(callable(getattr(module, method, None)) for method in METHODS)


def count_samples(callback: Callback, module: Any) -> Tensor:
    """Return the samples of one optimizer step of each member (m).

    Raises:
        UsageError: the module has no samples; the message names the callback.
    """
    samples_per_step = getattr(module, "samples_per_step", None)
    samples = samples_per_step() if samples_per_step is not None else None
    if samples is None:
        raise UsageError(
            f"{type(callback).__name__}: {type(module).__name__} has no samples, and an axis "
            "counts them",
            ["Regression", "axes of steps, seconds or learning rates"],
            hint="use another axis",
        )
    return samples


def list_member_params(module: Any) -> Sequence[Sequence[Tensor]]:
    """Return the parameters of each member; a module without members is one member."""
    list_members: Any = getattr(module, "member_parameters", None)
    if list_members is None:
        return [list(module.parameters())]
    return list_members()


def member_points(module: Any) -> Tensor:
    """Return a copy of the current points (m d), detached."""
    return module.member_points().detach().clone()


def member_lrs(trainer: L.Trainer, module: Any) -> list[float]:
    """Return the current learning rate of each member (m); NaN without one."""
    rates = {
        id(p): float(group.get("lr", "nan"))
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return [rates.get(id(member[0]), float("nan")) for member in list_member_params(module)]
