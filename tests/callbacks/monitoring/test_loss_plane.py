"""Paths in planes of weights: the validation loss on them, pictures, animations and errors."""

import random
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from external_modules.net_in_init import NetInInit
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from member_runs import sweep
from PIL import Image

from ravine.callbacks import TrajectoryPlot
from ravine.callbacks.monitoring.loss_plane import WeightPlane, plane_of_path, plane_of_points
from ravine.cli.trainer import Trainer
from ravine.errors import UsageError
from ravine.lightning_modules import Objective


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    figures: list[Figure] = []
    write = FigureCanvasAgg.print_png

    def record(self: FigureCanvasAgg, path: Any, **settings: Any) -> None:
        write(self, path, **settings)
        figures.append(self.figure)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", record)
    return figures


def train(steps: int, *callbacks: Any, module: Any = None, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    module = NetInInit() if module is None else module
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir="runs",
        **settings,
    )
    trainer.fit(module)
    return trainer


def save_checkpoints(*counts: int) -> list[str]:
    """Train from one start with these numbers of steps; return the files."""
    for steps in counts:
        train(steps).save_checkpoint(f"{steps}.ckpt")
    return [f"{steps}.ckpt" for steps in counts]


def test_the_loss_at_each_of_three_checkpoints_is_exactly_its_validation_loss(
    drawn: list[Figure],
) -> None:
    paths = save_checkpoints(2, 9, 20)
    plot = TrajectoryPlot(checkpoints=paths, grid_size=3, title="plane")
    trainer = train(20, plot)
    expected = []
    for path in paths:
        state = torch.load(path, weights_only=True)["state_dict"]
        module = NetInInit()
        module.load_state_dict(state)
        (metrics,) = trainer.validate(module, verbose=False)
        expected.append(metrics["val_loss"])
    assert plot.checkpoint_losses == expected
    assert len(set(expected)) == 3
    (figure,) = [f for f in drawn if f.get_suptitle() == "plane"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    corners = torch.tensor(lines["checkpoints"].get_xydata())
    path = torch.tensor(lines["lr 0.01"].get_xydata())
    # the path goes through the three checkpoints, which are points of the same run
    for steps, corner in zip((2, 9, 20), corners, strict=True):
        assert torch.allclose(path[steps], corner, atol=1e-6)


def random_states() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),  # type: ignore[index]
    ]


def test_training_is_bitwise_the_same_with_the_plot(drawn: list[Figure]) -> None:
    outcomes = []
    for callbacks in ([], [TrajectoryPlot(grid_size=3)]):
        trainer = train(10, *callbacks)
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        is_training = trainer.model.training
        outcomes.append((weights.tolist(), metrics, random_states(), is_training))
    assert outcomes[0] == outcomes[1]
    assert any(f.axes[0].get_xlabel().startswith("first main direction") for f in drawn)


def test_a_path_of_any_module_ends_in_the_origin_of_its_main_directions(
    drawn: list[Figure],
) -> None:
    plot = TrajectoryPlot(grid_size=4, zoom=[-0.1, 0.1, -0.1, 0.1], title="path")
    train(12, plot)
    (figure,) = [f for f in drawn if f.get_suptitle() == "path"]
    left, right = figure.axes
    path = left.lines[0].get_xydata()
    assert len(path) == 13
    assert path[-1].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert right.get_xlim() == (-0.1, 0.1)
    share = float(re.findall(r"([\d.]+) %", left.get_xlabel())[0])
    offsets = plot.stacked_points()[:, 0].double() - plot.stacked_points()[-1, 0].double()
    variances = torch.linalg.svdvals(offsets) ** 2
    assert share == pytest.approx(100 * float(variances[0] / variances.sum()), rel=0.01)
    assert left.collections  # the contour lines


def test_an_animation_has_the_requested_frames():
    train(12, TrajectoryPlot(grid_size=3, gif_frames=5))
    (path,) = Path("runs").rglob("trajectory.gif")
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 5
        frames = []
        for index in range(5):
            image.seek(index)
            frames.append(image.convert("RGB").tobytes())
    assert len(set(frames)) == 5


def test_a_function_of_three_variables_is_drawn_in_its_main_directions(
    drawn: list[Figure],
) -> None:
    module = Objective("quadratic", start=[3.0, 2.0, 1.0], condition_number=9)
    plot = TrajectoryPlot(plane="main_directions", title="three")
    train(20, plot, sweep(0.05), module=module)
    (figure,) = [f for f in drawn if f.get_suptitle() == "three"]
    path = figure.axes[0].lines[0].get_xydata()
    assert len(path) == 21
    # the plane has most of the path, and keeps its distances
    points = plot.stacked_points()[:, 0]
    length = float((points[0] - points[-1]).norm())
    assert numpy.linalg.norm(path[0]) == pytest.approx(length, rel=0.01)


def test_coordinates_in_a_plane_are_distances_and_invert_to_weights():
    points = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    plane = plane_of_points(points)
    corners = plane.coordinates(points)
    for i in range(3):
        assert torch.equal(plane.weights(*corners[i].tolist()).float(), points[i])
        distances = (corners - corners[i]).norm(dim=1)
        assert torch.allclose(distances, (points - points[i]).double().norm(dim=1), atol=1e-6)


def test_a_straight_path_has_no_plane():
    line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert plane_of_path(line) is None
    assert WeightPlane(torch.zeros(3), line[1:3]).is_flat
    bent = torch.cat((line, torch.tensor([[0.0, 0.0, 1.0]])))
    assert plane_of_path(bent) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": ["a.ckpt"]}, "a plane has three checkpoints, and checkpoints has 1"),
        ({"checkpoints": ["a", "b", "c"], "plane": "axes"}, "allowed: plane or checkpoints"),
        ({"plane": "pca"}, "there is no plane 'pca'; allowed: axes, main_directions"),
        ({"plane": "axes"}, "NetInInit does not evaluate points"),
        ({"checkpoints": ["a.ckpt", "b.ckpt", "c.ckpt"]}, "a.ckpt does not exist"),
        ({"metric": "val/loss"}, "does not log val/loss; allowed: val_loss"),
        ({"grid_size": 1}, "grid_size=1 is too small; allowed: 2 or more"),
        ({"gif_frames": -1}, "gif_frames=-1 is too small; allowed: 0 or more"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        train(2, TrajectoryPlot(**arguments))


def test_a_module_without_validation_is_refused():
    with pytest.raises(UsageError, match="NetInInit has no validation data in this run"):
        train(2, TrajectoryPlot(), limit_val_batches=0)


def test_checkpoints_of_another_model_and_on_a_line_are_refused():
    paths = save_checkpoints(1, 2)
    with pytest.raises(UsageError, match=r"2\.ckpt lie on a line; allowed: three checkpoints"):
        train(2, TrajectoryPlot(checkpoints=[paths[0], *paths]))
    train(1, module=NetInInit(width=8)).save_checkpoint("small.ckpt")
    with pytest.raises(UsageError, match=r"small\.ckpt has no weights of this NetInInit: net\.0"):
        train(2, TrajectoryPlot(checkpoints=[*paths, "small.ckpt"]))
