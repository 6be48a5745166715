"""Regression: SGD of lecture 2 to the seeds' digits, noise floors, Lasso, refused combinations."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from member_runs import run, sweep
from torch.optim import SGD, Adam

from ravine.callbacks import ConvergencePlot, LRSchedule, OptimizerPlan, Panel
from ravine.datamodules import RegressionDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import Objective, Regression


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last_before(gaps: torch.Tensor, bound: float) -> list[int]:
    """The step, counted from 0, whose update leads each member below the bound, as in lecture 2."""
    return ((gaps < bound).int().argmax(0) - 1).tolist()


def test_sgd_equals_the_loop_of_the_lecture():
    """w <- w - lr (x_i w - y_i) x_i with indices of one generator, for three members."""
    data = RegressionDataModule(sampling_seed=[0, 0, 7], steps_per_batch=10)
    module = Regression()
    points = run(module, 50, sweep(0.5, 0.1, 0.1), data=data).stacked_points()
    x, y = data.x[:, 0], data.y[0]
    for member, (lr, seed) in enumerate(((0.5, 0), (0.1, 0), (0.1, 7))):
        generator = torch.Generator().manual_seed(seed)
        w = torch.zeros((), dtype=torch.float64)
        for k in range(51):
            assert points[k, member].item() == pytest.approx(w.item(), abs=1e-14)
            i = torch.randint(200, (1,), generator=generator)
            w = w - lr * ((x[i] * w - y[i]) * x[i]).squeeze()


def test_larger_steps_are_faster_first_and_worse_last():
    """Lecture 2, figure 2.2: gap below 1e-3 by steps 25, 82, 145, 803, with the draws of seed 0."""
    module, data = Regression(), RegressionDataModule(sampling_seed=[0] * 4, steps_per_batch=50)
    gaps = run(module, 850, sweep(0.5, 0.1, 0.05, 0.01), data=data).compute_metric(module, "gap")
    assert last_before(gaps, 1e-3) == [25, 82, 145, 803]


def test_without_noise_sgd_converges_at_a_constant_step():
    """Figure 2.5: every sample's gradient vanishes at w*. Below 1e-20 by step 602, at 0.5 by 94."""
    data = RegressionDataModule(noise=[0.0, 0.0], data_seed=222, steps_per_batch=50)
    module = Regression()
    gaps = run(module, 650, sweep(0.1, 0.5), data=data).compute_metric(module, "gap")
    assert last_before(gaps, 1e-20) == [602, 94]


def test_the_floor_is_proportional_to_the_variance_of_the_noise():
    """Figure 2.6: with the same draws, gaps in ratios of 100, apart from the start's decay."""
    data = RegressionDataModule(noise=[0.01, 0.1, 1.0], data_seed=222, steps_per_batch=50)
    module = Regression(start=1.0)
    gaps = run(module, 1000, sweep(0.1, 0.1, 0.1), data=data).compute_metric(module, "gap")
    means = gaps[500:].mean(0)
    assert (means[1:] / means[:-1]).tolist() == pytest.approx([100, 100], rel=1e-6)


def test_batches_trade_steps_for_samples():
    """Figure 2.7: gap below 1e-4 by steps 2143, 214 and 20 of 1, 10 and 100 samples."""
    data = RegressionDataModule(batch_size=[1, 10, 100], steps_per_batch=50)
    module = Regression()
    gaps = run(module, 2150, sweep(0.005, 0.05, 0.5), data=data).compute_metric(module, "gap")
    assert last_before(gaps, 1e-4) == [2143, 214, 20]
    assert module.samples_per_step().tolist() == [1, 10, 100]


def test_the_measured_noise_floor_is_the_predicted_one_within_five_percent():
    rates, replicas = (0.5, 0.1), 48
    data = RegressionDataModule(
        sampling_seed=[0] * len(rates), num_replicas=replicas, steps_per_batch=50
    )
    module = Regression(start=1.0)  # near the minimizer: a short start
    descent = sweep(*rates, num_replicas=replicas, foreach=True)
    paths = run(module, 1500, descent, data=data, num_replicas=replicas, every_n_steps=5)
    gaps = paths.compute_metric(module, "gap")[60:].unflatten(1, (-1, replicas)).mean((0, 2))
    predicted = module.predicted_gap(torch.tensor(rates).repeat_interleave(replicas).double())
    assert predicted is not None
    assert gaps.tolist() == pytest.approx(predicted[::replicas].tolist(), rel=0.05)


@pytest.mark.parametrize(
    ("batch_size", "replacement"), [(0, True), ([1, 0], True), (0, False), (201, False)]
)
def test_a_batch_that_cannot_be_drawn_is_refused(batch_size, replacement):
    data = RegressionDataModule(batch_size=batch_size, replacement=replacement)
    with pytest.raises(UsageError, match=r"batch_size=(0|201) does not fit the 200 samples"):
        data.setup("fit")


def test_a_batch_with_replacement_may_have_more_draws_than_the_data_have_samples():
    data = RegressionDataModule(batch_size=1000)
    data.setup("fit")
    assert data.make_batch(torch.arange(2)).x.shape == (2, 1, 1000, 1)


@pytest.mark.parametrize(
    ("batch_size", "replacement", "factor"),
    [(1, True, 1.0), (10, True, 0.1), (100, True, 0.01), (100, False, 0.5025 / 100)],
)
def test_the_variance_of_a_gradient_falls_with_the_batch(batch_size, replacement, factor):
    """Var / B with replacement; without, also times (n - B) / (n - 1). Var = .0957311 at w = 0."""
    data = RegressionDataModule(batch_size=batch_size, replacement=replacement)
    data.setup("fit")
    batch = data.make_batch(torch.arange(20_000 if batch_size == 1 else 4_000))
    gradients = -(batch.x[..., 0] * batch.y).mean(-1).flatten()  # at w = 0
    rows = -(data.x[:, 0] * data.y[0])
    assert rows.var(correction=0).item() == pytest.approx(0.0957311, abs=1e-7)
    assert gradients.var().item() == pytest.approx(factor * 0.0957311, rel=0.05)
    assert gradients.mean().item() == pytest.approx(rows.mean().item(), abs=0.02)  # unbiased


def test_the_full_batch_without_replacement_has_no_variance():
    data = RegressionDataModule(batch_size="all", replacement=False)
    data.setup("fit")
    batch = data.make_batch(torch.arange(5))
    gradients = (batch.x[..., 0] * batch.y).mean(-1)
    assert gradients.std().item() < 1e-16


def test_a_proximal_step_gives_the_zeros_of_the_lasso_and_a_subgradient_none():
    counts, distances = [], []
    for proximal in (True, False):
        data = RegressionDataModule("diabetes", batch_size="all", replacement=False)
        module = Regression("squared", l1=0.1 * 90.32006, proximal=proximal)
        paths = run(module, 500, OptimizerPlan(partial(SGD, lr=0.1)), data=data)
        counts.append(int((module.member_points() != 0).sum()))
        distances.append(paths.compute_metric(module, "distance")[-1].item())
    assert counts == [5, 10]
    assert distances[0] < 1e-9 < distances[1]


def test_logistic_regression_on_separable_data_drifts_like_the_logarithm():
    """w is 4.018 after 100 steps of 1, and 6.231 after 1,000; there is no minimizer."""
    data = RegressionDataModule("separable", batch_size="all", replacement=False)
    module = Regression("logistic")
    paths = run(module, 1000, OptimizerPlan(partial(SGD, lr=1.0)), data=data, every_n_steps=100)
    weights = paths.stacked_points().flatten()
    assert weights[1].item() == pytest.approx(4.018, abs=2e-3)
    assert weights[10].item() == pytest.approx(6.231, abs=2e-3)
    assert module.known_minimizers() is None


@pytest.mark.parametrize(
    ("source", "loss", "accuracy"), [("breast_cancer", "logistic", 0.96), ("wine", "softmax", 0.98)]
)
def test_a_classifier_of_a_table_reaches_its_accuracy(source, loss, accuracy):
    data = RegressionDataModule(source, batch_size=32, intercept=True)
    module = Regression(loss, l2=1e-3)
    paths = run(module, 400, OptimizerPlan(partial(SGD, lr=0.1)), data=data, every_n_steps=50)
    scores = module._predict(data.x, module.member_points())[0]
    labels = scores.argmax(-1) if loss == "softmax" else scores.sign()
    assert (labels == data.y[0]).double().mean() >= accuracy
    gaps = paths.compute_metric(module, "gap").flatten()
    assert 0 < gaps[-1] < gaps[0] / 10


def test_padding_of_a_smaller_batch_changes_nothing():
    """A member of batch size 3 beside one of 10 equals the same member alone."""
    module, data = Regression(), RegressionDataModule(batch_size=[3, 10])
    both = run(module, 20, sweep(0.3, 0.3), data=data).stacked_points()[:, 0]
    alone = run(Regression(), 20, sweep(0.3), data=RegressionDataModule(batch_size=3))
    assert torch.allclose(both, alone.stacked_points()[:, 0], atol=1e-14)


def test_a_checkpoint_restores_the_sizes(folder: Path) -> None:
    import ravine

    module = Regression()
    trainer = ravine.Trainer(accelerator="cpu", max_steps=5, logger=False)
    trainer.fit(module, datamodule=RegressionDataModule(noise=[0.1, 0.2]))
    trainer.save_checkpoint("end.ckpt")
    loaded = Regression.load_from_checkpoint("end.ckpt")
    assert torch.equal(loaded.member_points(), module.member_points())
    assert loaded.sizes["num_members"] == 2


def test_the_validation_loss_at_the_minimizer_is_that_of_the_lecture():
    import ravine

    data = RegressionDataModule(num_val_samples=200)
    module = Regression(start=1.0142993704575556)
    trainer = ravine.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    assert metrics["val/loss"] == pytest.approx(0.02078606, abs=1e-8)


def refusal(module: Any, data: Any, *callbacks: Any) -> str:
    with pytest.raises(UsageError) as error:
        run(module, 4, *callbacks, data=data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("module", "data", "callbacks", "message"),
    [
        (Regression("logistic"), ("line",), (), "does not fit the labels of line"),
        (Regression("softmax"), ("breast_cancer",), (), "breast_cancer, which have 2 classes"),
        (Regression(), ("wine",), (), "wine, which have 3 classes"),
        (
            Regression("squared", l1=0.1),
            ("diabetes",),
            (OptimizerPlan(Adam),),
            "needs a step of lr times the gradient, and the optimizer is Adam",
        ),
        (
            Regression("logistic"),
            ("separable",),
            (ConvergencePlot([Panel("gap")]),),
            "the gap needs the minimizer, which is unknown here",
        ),
    ],
)
def test_a_combination_of_loss_and_data_that_cannot_work_is_one_line(
    module, data, callbacks, message
):
    assert message in refusal(module, RegressionDataModule(*data), *callbacks)


class OtherData(L.LightningDataModule):
    def train_dataloader(self) -> range:
        return range(4)


class OtherDataWithValidation(OtherData):
    def val_dataloader(self) -> range:
        return range(4)


def test_data_of_another_kind_are_one_line():
    assert "Objective uses no data, and OtherData is" in refusal(Objective(), OtherData())
    assert "has no finite sum" in refusal(Regression(), OtherDataWithValidation())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"batch_size": 201, "replacement": False},
            "batch_size=201 does not fit the 200 samples of line",
        ),
        ({"noise": [0.1, 0.2], "batch_size": [1, 2, 3]}, "noise has 2 values and batch_size has 3"),
        ({"num_replicas": 0}, "num_replicas=0 is too small"),
    ],
)
def test_wrong_data_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        run(Regression(), 4, data=RegressionDataModule(**arguments))


def test_a_schedule_is_advanced_within_a_batch():
    data = RegressionDataModule(steps_per_batch=5)
    schedule = LRSchedule("power", power=0.7)
    descent = OptimizerPlan(partial(SGD, lr=0.3), schedule=schedule)
    paths = run(Regression(), 20, descent, data=data)
    assert [row[0] for row in paths.lrs[:20]] == pytest.approx(
        [0.3 / (k + 1) ** 0.7 for k in range(20)]
    )


def test_the_geometric_schedule_of_figure_2_4_ends_at_its_printed_gap():
    """0.2 * 0.999^k, seed 0: after 24,000 of 1.2 million steps the rate is 7e-12, and w stays."""
    schedule = LRSchedule("exponential", decay_factor=0.999)
    descent = OptimizerPlan(partial(SGD, lr=0.2, foreach=False), schedule=schedule)
    data, module = RegressionDataModule(steps_per_batch=1000), Regression()
    paths = run(module, 24_000, descent, data=data, every_n_steps=24_000)
    gap = paths.compute_metric(module, "gap")[-1].item()
    assert gap == pytest.approx(3.424576458e-7, rel=1e-6)
