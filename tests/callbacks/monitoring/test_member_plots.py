"""ConvergencePlot, StepsToTarget and TrajectoryPlot: the recorded points, labels and pictures."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from external_modules.net_in_init import NetInInit
from matplotlib.figure import Figure
from member_runs import run, sweep
from torch.optim import LBFGS, SGD

from ravine.callbacks import (
    ConvergencePlot,
    Newton,
    OptimizerPlan,
    Panel,
    StepsToTarget,
    TrajectoryPlot,
)
from ravine.cli.trainer import Trainer
from ravine.datamodules import RegressionDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import Objective, Regression


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    figures: list[Figure] = []
    write = "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png"
    monkeypatch.setattr(write, lambda self, path: figures.append(self.figure))
    return figures


def fit(module: Any, steps: int, *callbacks: Any, data: Any = None, **settings: Any) -> str:
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": "csv"}
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), **{**options, **settings}
    )
    trainer.fit(module, datamodule=data)
    return str(trainer.log_dir)


@pytest.mark.parametrize("optimizer", [partial(LBFGS, max_iter=4), None])
def test_a_point_is_recorded_once_a_step_whatever_the_optimizer_evaluates(optimizer: Any) -> None:
    """LBFGS and Newton evaluate the loss at other points too, within a step."""
    module = Objective("coupled_ravine", start=[3.0, 1.0])
    callback = Newton(lr=0.5, damping=0.0) if optimizer is None else OptimizerPlan(optimizer)
    paths = run(module, 5, callback)
    assert paths.steps == [0, 1, 2, 3, 4, 5]
    values = paths.compute_metric(module, "objective").flatten()
    assert (values.diff() < 0).all()
    assert paths.points[0].tolist() == [[3.0, 1.0]]


def test_an_interval_records_every_nth_point_and_the_last():
    module = Objective("quadratic", start=[1.0], steps_per_batch=4)
    paths = run(module, 22, sweep(0.1), every_n_steps=10)
    assert paths.steps == [0, 10, 20, 24]
    assert paths.stacked_points().flatten().tolist() == pytest.approx([0.9**k for k in paths.steps])


def test_the_metrics_of_a_quadratic_are_their_formulas():
    module = Objective("quadratic", start=[2.0, 1.0], condition_number=4)
    paths = run(module, 3, sweep(0.1))
    x, y = paths.stacked_points()[:, 0].T
    expected = {
        "objective": (x**2 + 4 * y**2) / 2,
        "gap": (x**2 + 4 * y**2) / 2,
        "distance": (x**2 + y**2).sqrt(),
        "gradient_norm": (x**2 + 16 * y**2).sqrt(),
    }
    for name, values in expected.items():
        assert torch.allclose(paths.compute_metric(module, name)[:, 0], values), name
    ratio = paths.compute_metric(module, "step_ratio")[:, 0]
    assert ratio[:3].tolist() == pytest.approx([0.1] * 3)
    assert ratio[3].isnan()


def test_panels_have_curves_axes_and_the_predicted_floor(drawn: list[Figure]) -> None:
    data = RegressionDataModule(sampling_seed=[0, 0], num_replicas=2, batch_size=5)
    plot = ConvergencePlot(
        [Panel("gap", title="a"), Panel("distance", axis="samples", settings=[1], log_x=True)],
        show_floor=True,
        num_replicas=2,
        title="The title",
    )
    fit(Regression(), 40, sweep(0.3, 0.1, num_replicas=2), plot, data=data)
    (figure,) = [f for f in drawn if f.get_suptitle() == "The title"]
    gap, distance = figure.axes
    assert [line.get_label() for line in gap.lines[::2]] == ["lr 0.3", "lr 0.1"]
    assert (gap.get_xlabel(), gap.get_ylabel()) == ("optimizer step", "gap to the minimum")
    assert (distance.get_xlabel(), distance.get_xscale()) == ("samples", "log")
    assert list(distance.lines[0].get_xdata())[:2] == [5, 10]
    assert [line.get_label() for line in distance.lines] == ["lr 0.1"]
    assert gap.lines[1].get_ydata()[0] == pytest.approx(plot.floors["lr 0.3"][1])


def test_metrics_of_the_panels_are_logged_for_each_setting():
    plot = ConvergencePlot([Panel("gap"), Panel("learning_rate")], labels=["slow", "fast"])
    module = Objective("quadratic", start=[1.0], num_members=2)
    log_dir = fit(module, 4, sweep(0.1, 0.5), plot, log_every_n_steps=2)
    head, *rows = Path(log_dir, "metrics.csv").read_text().splitlines()
    assert {"gap/slow", "gap/fast"} <= set(head.split(","))
    column = head.split(",").index("gap/fast")
    assert [float(row.split(",")[column]) for row in rows] == pytest.approx([0.5**5, 0.5**9])


def test_a_stopped_member_ends_its_curve(drawn: list[Figure]) -> None:
    module = Objective("quadratic", start=[5.0], num_members=2, objective_target=1e-5)
    fit(module, 100, sweep(0.5, 0.25), ConvergencePlot(title="x"))
    (figure,) = [f for f in drawn if f.get_suptitle() == "x"]
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [12, 26]


def test_a_trajectory_has_contours_paths_and_a_zoomed_panel(drawn: list[Figure]) -> None:
    module = Objective("ravine", start=[3.0, 2.0], num_members=2)
    plot = TrajectoryPlot(["a", "b"], zoom=[-0.5, 0.5, -1, 1], title="paths")
    fit(module, 20, sweep(0.05, 0.01), plot)
    (figure,) = [f for f in drawn if f.get_suptitle() == "paths"]
    left, right = figure.axes
    labels = [line.get_label() for line in left.lines]
    assert labels == ["minimum", "a", "b", "start"]
    assert list(left.lines[1].get_xdata()) == plot.stacked_points()[:, 0, 0].tolist()
    assert (left.get_xlabel(), left.get_ylabel()) == ("x", "y")
    assert left.get_xlim()[0] < 0 < 3 < left.get_xlim()[1]
    assert right.get_xlim() == (-0.5, 0.5)
    assert left.collections  # the contour lines


def test_steps_to_a_target_are_drawn_over_the_rates(drawn: list[Figure]) -> None:
    plot = StepsToTarget(1e-5, title="steps")
    module = Objective("quadratic", start=[5.0], num_members=3)
    fit(module, 30, sweep(0.5, 0.25, 0.01), plot)
    assert plot.results == [(0.5, 11), (0.25, 25), (0.01, None)]
    (figure,) = [f for f in drawn if f.axes[0].get_title() == "steps"]
    reached, missed = figure.axes[0].lines
    assert list(reached.get_ydata()) == [11, 25]
    assert list(missed.get_xdata()) == [0.01]
    assert figure.axes[0].get_xlabel() == "learning rate"


def test_steps_to_a_target_are_drawn_over_batch_sizes(drawn: list[Figure]) -> None:
    """Twice the batch and twice the rate need half the steps, on the mean of the replicas."""
    data = RegressionDataModule(batch_size=[4, 8], num_replicas=4, noise=0.0)
    plot = StepsToTarget(1e-4, "gap", "steps", axis="batch_size", num_replicas=4)
    module = Regression()
    fit(module, 60, sweep(0.5, 1.0, num_replicas=4), plot, data=data)
    gaps = plot.compute_metric(module, "gap").unflatten(1, (2, 4)).mean(2)
    firsts = [next(k for k in range(60) if gaps[k, i] <= 1e-4) for i in range(2)]
    assert plot.results == [(4, firsts[0]), (8, firsts[1])]
    assert firsts[0] / firsts[1] == pytest.approx(2, rel=0.2)
    (figure,) = [f for f in drawn if f.axes[0].get_title() == "steps"]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "batch size (samples)"
    line = axes.lines[1]
    assert list(line.get_ydata()) == [firsts[0], firsts[0] / 2]


@pytest.mark.parametrize(("every_n_steps", "expected"), [(1, range(7)), (2, [0, 2, 4, 6])])
def test_a_resumed_run_keeps_its_points(
    every_n_steps: int, expected: Sequence[int], tmp_path: Path
) -> None:
    def train(steps: int, path: str | None = None) -> ConvergencePlot:
        plot = ConvergencePlot(every_n_steps=every_n_steps)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[sweep(0.1), plot], logger=False
        )
        trainer.fit(Objective("quadratic", start=[1.0]), ckpt_path=path)
        trainer.save_checkpoint("end.ckpt")
        return plot

    once = train(6)
    train(3)
    resumed = train(6, "end.ckpt")
    assert resumed.steps == once.steps == list(expected)  # without the end of the first run, 3
    assert torch.equal(resumed.stacked_points(), once.stacked_points())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvergencePlot(panels=[]), "panels is empty; allowed: one panel or more"),
        (lambda: ConvergencePlot(every_n_steps=0), "every_n_steps=0 is too small"),
        (lambda: TrajectoryPlot(window=[0, 1]), "window=[0, 1] is not a window"),
        (
            lambda: ConvergencePlot(labels=["a", "b"]),
            "labels has 2 names, and the number of settings is 1",
        ),
        (lambda: ConvergencePlot([Panel("step_ratio")], every_n_steps=2), "needs every step"),
        (lambda: ConvergencePlot(show_floor=True), "no closed form of the noise floor is known"),
        (
            lambda: ConvergencePlot([Panel(axis="samples")]),
            "ConvergencePlot: Objective has no samples",
        ),
        (lambda: StepsToTarget(axis="batch_size"), "StepsToTarget: Objective has no samples"),
        (lambda: StepsToTarget(axis="rate"), "there is no axis 'rate'; allowed: learning_rate"),
        (lambda: ConvergencePlot(num_replicas=2), "num_replicas=2 does not divide the 1 members"),
    ],
)
def test_a_wrong_argument_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        fit(Objective("quadratic", start=[1.0]), 2, make())


def test_a_module_that_evaluates_no_points_is_refused():
    with pytest.raises(UsageError, match="NetInInit does not evaluate points; allowed: Objective"):
        fit(NetInInit(), 2, ConvergencePlot())
    with pytest.raises(UsageError, match="NetInInit does not evaluate points"):
        fit(NetInInit(), 2, OptimizerPlan(SGD), TrajectoryPlot(plane="axes"))
