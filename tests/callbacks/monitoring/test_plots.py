"""LossPlot and MetricPlot draw the curves of a run, also of a resumed one."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from external_modules.net_in_init import NetInInit
from scripted_module import Scripted, fit

from ravine.callbacks import LossPlot, MetricPlot
from ravine.callbacks.monitoring import plots as plots_module
from ravine.callbacks.monitoring.plots import save_loss_plot
from ravine.callbacks.stability.gradient_clipping import GRADIENT_NORM
from ravine.cli.trainer import Trainer


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )


def test_the_plot_has_means_of_the_training_and_all_validations() -> None:
    plot = LossPlot()
    trainer(plot, max_epochs=3, accumulate_grad_batches=2).fit(NetInInit())
    curves = plot.state_dict()
    assert [step for step, _ in curves["train"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in curves["val"]] == [2, 4, 6]
    picture = Path("runs/netininit/version_0/loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_the_first_point_is_the_mean_loss_of_the_first_optimizer_step() -> None:
    plot = LossPlot()
    module = NetInInit(lr=0.0)
    module.log = lambda *args, **kwargs: None  # type: ignore
    with torch.no_grad():
        losses = [module.training_step(batch, 0) for batch in module.train_dataloader()]
    run = trainer(plot, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1)
    run.fit(module)
    expected = [float((a + b) / 2) for a, b in (losses[:2], losses[2:])]
    assert [value for _, value in plot.state_dict()["train"]] == pytest.approx(expected)


def test_a_resumed_run_draws_the_full_curve() -> None:
    once, cut, rest = LossPlot(), LossPlot(), LossPlot()
    trainer(once, max_epochs=4).fit(NetInInit())
    torch.manual_seed(0)
    run = trainer(cut, max_epochs=2)
    run.fit(NetInInit())
    run.save_checkpoint("half.ckpt")
    trainer(rest, max_epochs=4).fit(NetInInit(), ckpt_path="half.ckpt")
    steps = [[step for step, _ in plot.state_dict()["train"]] for plot in (once, rest)]
    assert steps[0] == steps[1] == list(range(1, 17))
    assert [s for s, _ in rest.state_dict()["val"]] == [4, 8, 12, 16]


def test_a_long_curve_is_subsampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots_module, "MAX_POINTS", 20)
    plot = LossPlot()
    trainer(plot, max_steps=90, log_every_n_steps=1, limit_val_batches=0).fit(NetInInit())
    steps = [step for step, _ in plot.state_dict()["train"]]
    assert len(steps) <= 20
    assert steps[-1] > 80
    assert {b - a for a, b in pairwise(steps)} <= {7, 8}  # 1, doubled whenever it grows too long


def test_the_plot_labels_its_axes_and_uses_a_log_scale_for_large_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    seen: list[Any] = []
    real = Figure.add_subplot
    monkeypatch.setattr(
        Figure,
        "add_subplot",
        lambda self, *a, **k: seen.append(real(self, *a, **k)) or seen[-1],
    )
    for start, scale in ((10.0, "log"), (2.0, "linear"), (float("nan"), "linear")):
        curves = {"train": [(1, start), (2, 1.0)], "val": [(2, 1.5)]}
        save_loss_plot(curves, tmp_path / "loss.png", "loss in nats (mean per token)", interval=5)
        axes = seen[-1]
        assert axes.get_yscale() == scale
        shown = [label.get_text() for label in axes.get_yticklabels() if label.get_text()]
        assert [f"{float(text):g}" for text in shown] == shown  # plain numbers, no "2 x 10^0"
        assert len(shown) >= 3
        assert axes.get_xlabel() == "optimizer step"
        assert axes.get_ylabel() == "loss in nats (mean per token)"
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == ["training (mean of 5 steps)", "validation (best 1.5 at step 2)"]


def test_a_missing_curve_gives_a_line(tmp_path: Path, capsys) -> None:
    fit(Scripted(reward=[0.1]), MetricPlot(["train/reward", "train/e"]), tmp_path, 2)
    assert "MetricPlot: Scripted does not log train/e\n" in capsys.readouterr().out


def test_curves_are_drawn_and_continue(tmp_path: Path) -> None:
    curves = MetricPlot(["train/reward", "val/reward"])
    folder = fit(Scripted(reward=[0.1, 0.2, 0.3]), curves, tmp_path, 3)
    assert (Path(folder) / "curves.png").stat().st_size > 5000
    kept = curves.state_dict()["train/reward"]
    assert [step for step, _ in kept] == [1, 2, 3]
    assert [value for _, value in kept] == pytest.approx([0.1, 0.2, 0.3])
    again = MetricPlot(["train/reward"])
    again.load_state_dict(curves.state_dict())
    assert again.state_dict()["train/reward"] == kept


class Rewarded(Scripted):
    """A module whose reward no list of metrics contains."""

    plotted_metrics = ("train/own_metric", "train/reward", "train/missing")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/reward", 0.5)
        self.log("lr-SGD", 0.1)


def test_curves_include_the_rewards_of_the_module_and_by_default_all_metrics(
    tmp_path: Path,
) -> None:
    for metrics, expected in (
        (["train/reward"], {"train/reward", "train/own_metric"}),
        (None, {"train/reward", "train/own_metric", "train_loss", "val/reward", GRADIENT_NORM}),
    ):
        module, curves = Rewarded(reward=[0.1, 0.2], own_metric=[3.0]), MetricPlot(metrics)
        fit(module, curves, tmp_path, 2, limit_val_batches=1)
        assert set(curves.state_dict()) == expected
