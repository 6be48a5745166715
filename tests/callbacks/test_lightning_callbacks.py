"""Every callback that Lightning exports works beside Ravine's or is refused before the first step.

`python tests/callbacks/test_lightning_callbacks.py` writes docs/lightning_callbacks.md's table.
"""

import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as stock
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    Timer,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from ravine.callbacks import EMA, Checkpoint, ExactResume, LRSchedule, OptimizerPlan, ParamRule
from ravine.cli.trainer import Trainer
from ravine.datamodules.loaders import DataParallelInfo, EvalLoader, ResumableLoader
from ravine.datamodules.samplers import EpochSampler
from ravine.errors import UsageError
from ravine.lightning_modules.task_module import TaskModule

PAGE = Path(__file__).parents[2] / "docs" / "lightning_callbacks.md"
ROWS = torch.linspace(-1, 1, 64).view(16, 4)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Late(L.LightningModule):
    """A backbone and a head, built by `configure_model`; it has a learning rate to find."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.1
        self.head = None

    def configure_model(self) -> None:
        if self.head is None:
            g = torch.Generator().manual_seed(0)
            self.backbone, self.head = nn.Linear(4, 6), nn.Linear(6, 1)
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5, generator=g)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.head(torch.tanh(self.backbone(rows))), rows.sum(1, keepdim=True))

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.loss(rows)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, rows: torch.Tensor, index: int) -> None:
        self.log("val/loss", self.loss(rows))

    def predict_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        return self.head(self.backbone(rows))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Data(L.LightningDataModule):
    """16 rows; batch_size is that of one optimizer step."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> ResumableLoader:
        share = DataParallelInfo.from_trainer(self.trainer)
        return ResumableLoader(
            EpochSampler(0, 16), lambda items: ROWS[items], 16, self.batch_size, share
        )

    def val_dataloader(self) -> EvalLoader:
        return EvalLoader(
            lambda items: ROWS[items], 16, 16, DataParallelInfo.from_trainer(self.trainer)
        )

    predict_dataloader = val_dataloader


class Unfreezing(stock.BaseFinetuning):
    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.backbone)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=0.01)


class Written(stock.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(self, *args: Any) -> None:
        Path("written").touch()


class Silent(stock.ProgressBar):
    def disable(self) -> None: ...

    def enable(self) -> None: ...


FINDER = {"num_training_steps": 15, "min_lr": 1e-4, "early_stop_threshold": None}
MAKE: dict[str, Callable[[], L.Callback]] = {
    "BackboneFinetuning": lambda: BackboneFinetuning(1, backbone_initial_lr=0.01),
    "BaseFinetuning": Unfreezing,
    "BasePredictionWriter": Written,
    "BatchSizeFinder": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=4),
    "Callback": stock.Callback,
    "Checkpoint": stock.Checkpoint,
    "DeviceStatsMonitor": lambda: stock.DeviceStatsMonitor(cpu_stats=True),
    "EarlyStopping": lambda: stock.EarlyStopping("val/loss", patience=99),
    "EMAWeightAveraging": stock.EMAWeightAveraging,
    "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
    "LambdaCallback": lambda: stock.LambdaCallback(on_train_start=lambda *args: None),
    "LearningRateFinder": lambda: LearningRateFinder(**FINDER),
    "LearningRateMonitor": stock.LearningRateMonitor,
    "ModelCheckpoint": lambda: stock.ModelCheckpoint("stock", monitor="val/loss"),
    "ModelPruning": lambda: stock.ModelPruning("l1_unstructured", amount=0.5),
    "ModelSummary": stock.ModelSummary,
    "OnExceptionCheckpoint": lambda: stock.OnExceptionCheckpoint("failed"),
    "ProgressBar": Silent,
    "RichModelSummary": stock.RichModelSummary,
    "RichProgressBar": stock.RichProgressBar,
    "SpikeDetection": lambda: stock.SpikeDetection(atol=1e6),
    "StochasticWeightAveraging": lambda: stock.StochasticWeightAveraging(0.1, 1),
    "TQDMProgressBar": stock.TQDMProgressBar,
    "ThroughputMonitor": lambda: stock.ThroughputMonitor(len),
    "Timer": lambda: Timer({"minutes": 10}),
    "WeightAveraging": stock.WeightAveraging,
}
NEED_LOGGER = ("DeviceStatsMonitor", "LearningRateMonitor", "ThroughputMonitor")


def plan(**more: Any) -> OptimizerPlan:
    return OptimizerPlan(partial(torch.optim.AdamW, lr=0.05), schedule=LRSchedule("cosine"), **more)


def fit(
    kind: type[L.Trainer],
    name: str,
    epochs: int = 3,
    resume: Any = None,
    save_at: int | None = None,
) -> tuple[L.Trainer, Late]:
    """Plan, EMA, accumulation, a network built late, checkpoints; and the callback of that name.

    Checkpoints are written at multiples of `save_at` steps, and at the end, into a new folder: with
    an OnExceptionCheckpoint, Lightning would resume from the files of an earlier fit.
    """
    L.seed_everything(0, verbose=False)
    keep = Checkpoint(tempfile.mkdtemp(dir="."), every_n_train_steps=save_at, save_top_k=-1)
    options = QUIET | {
        "max_epochs": epochs,
        "callbacks": [EMA(0.5), plan(), ExactResume(), keep, MAKE[name]()],
        "enable_checkpointing": True,
        "accumulate_grad_batches": 1 if name == "GradientAccumulationScheduler" else 2,
        "logger": L.pytorch.loggers.CSVLogger(".") if name in NEED_LOGGER else False,
        "log_every_n_steps": 1,
        "enable_progress_bar": "ProgressBar" in name,
        "enable_model_summary": "Summary" in name,
    }
    trainer, module = kind(**options), Late()
    trainer.fit(module, datamodule=Data(4), ckpt_path=resume)
    if epochs == 3 and resume is None and name != "BatchSizeFinder":
        assert trainer.global_step == 12
    if name == "BasePredictionWriter":
        trainer.predict(module, datamodule=Data())
        assert Path("written").exists()
    return trainer, module


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def outcome(name: str) -> tuple[str, str, str]:
    """The result of a fit under either Trainer, and of one that is cut within an epoch."""
    found, cut = [], None
    for kind in (Trainer, L.Trainer):
        try:
            trainer, module = fit(kind, name, save_at=cut)
            found.append("works")
            cut = int(trainer.global_step * 0.55)  # within the second of three epochs
        except ValueError as error:
            early = trainer_steps(error) == 0 and isinstance(error, UsageError)
            found.append("refused" if early else f"late: {error}")
    if found != ["works", "works"]:
        return found[0], found[1], "-"
    straight = weights(module)
    file = Path(trainer.checkpoint_callbacks[0].dirpath) / f"step={cut:06}.ckpt"
    _, resumed = fit(L.Trainer, name, resume=str(file))
    exact = all(torch.equal(a, b) for a, b in zip(straight, weights(resumed), strict=True))
    return found[0], found[1], "bitwise" if exact else "differs"


def trainer_steps(error: Exception) -> int:
    """Optimizer steps that had been taken when the error was raised."""
    frame, steps = error.__traceback__, 0
    while frame is not None:
        trainer = frame.tb_frame.f_locals.get("trainer")
        if isinstance(trainer, L.Trainer) and hasattr(trainer, "fit_loop"):
            steps = max(steps, trainer.global_step)
        frame = frame.tb_next
    return steps


def table() -> dict[str, tuple[str, str, str]]:
    """The rows of the page."""
    lines = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|", PAGE.read_text(), re.M)
    return {name: tuple(rest) for name, *rest in lines}


NOISE = pytest.mark.filterwarnings("ignore")  # warnings of Lightning's own callbacks


def test_the_page_has_a_row_for_every_callback_that_lightning_exports() -> None:
    assert set(table()) == set(stock.__all__) == set(MAKE)


@NOISE
@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_row_of_the_page_equals_the_measured_result(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(name) == table()[name]


@NOISE
def test_only_averages_and_pruning_are_refused() -> None:
    refused = {name for name, row in table().items() if "refused" in row}
    averages = {"EMAWeightAveraging", "StochasticWeightAveraging", "WeightAveraging"}
    assert refused == averages | {"ModelPruning"}
    assert "differs" not in {row[2] for row in table().values()}


@NOISE
@pytest.mark.parametrize("kind", [L.Trainer, Trainer])
def test_the_unfrozen_backbone_moves_under_a_plan_and_is_averaged(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = Late()
    before.configure_model()
    trainer, module = fit(kind, "BackboneFinetuning")
    ema = next(c for c in trainer.callbacks if isinstance(c, EMA))
    assert not torch.equal(module.backbone.weight, before.backbone.weight)
    raw = ema.weights_outside_model["backbone.weight"]
    assert not torch.equal(module.backbone.weight, raw)  # the average is left
    _, frozen = fit(kind, "BackboneFinetuning", epochs=1)
    assert torch.equal(frozen.backbone.weight, before.backbone.weight)


class Rates(L.Callback):
    """The first group's rate in each optimizer step, and the rows it takes."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.rows: list[int] = []
        self.open = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.open += len(batch)
        if not trainer.fit_loop._should_accumulate():
            self.rows.append(self.open)
            self.open = 0

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@NOISE
@pytest.mark.parametrize("kind", [L.Trainer, Trainer])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_found_rate_is_the_base_of_the_schedule(kind, scale, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder, rates = LearningRateFinder(**FINDER), Rates()
    linear = OptimizerPlan(
        partial(torch.optim.SGD, lr=0.05),
        schedule=LRSchedule("linear"),
        rules=[ParamRule(lr_scale=scale)],
    )
    trainer = kind(**QUIET, max_epochs=2, callbacks=[finder, linear, rates])
    trainer.fit(Late(), datamodule=Data(1))
    found = finder.optimal_lr.suggestion()
    assert found != pytest.approx(0.05)
    assert rates.rates == pytest.approx([scale * found * (1 - k / 32) for k in range(32)])


@NOISE
def test_a_search_before_the_fit_counts_as_well(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rates = Rates()
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[plan(), rates])
    module = Late()
    finder = Tuner(trainer).lr_find(module, datamodule=Data(1), num_training=15, min_lr=1e-4)
    trainer.fit(module, datamodule=Data(1))
    assert rates.rates[0] == pytest.approx(finder.suggestion())


def test_a_rate_finder_with_two_base_rates_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    two = OptimizerPlan(
        partial(torch.optim.SGD, lr=0.05),
        rules=[ParamRule(pattern="head*", optimizer=partial(torch.optim.SGD, lr=0.1)), ParamRule()],
    )
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[LearningRateFinder(**FINDER), two])
    with pytest.raises(
        ValueError, match=r"have the learning rates 0.05, 0.1, .*allowed: one learning rate"
    ):
        trainer.fit(Late(), datamodule=Data())


@pytest.mark.parametrize("kind", [L.Trainer, Trainer])
@pytest.mark.parametrize("schedule", [{0: 1, 1: 4}, {0: 2, 2: 1}, {1: 2}])
def test_a_step_keeps_its_size_and_a_cosine_its_end(kind, schedule) -> None:
    rates, planned = Rates(), plan()
    scheduler = GradientAccumulationScheduler(dict(schedule))
    trainer = kind(**QUIET, max_epochs=3, callbacks=[rates, scheduler, planned])
    trainer.fit(Late(), datamodule=Data())
    assert rates.rows == [4] * 12
    assert planned._total_steps == trainer.global_step == 12
    assert rates.rates == pytest.approx([0.05 * planned.schedule.factor(k, 12) for k in range(12)])
    assert trainer.accumulate_grad_batches == 1
    if kind is Trainer:
        assert trainer.estimated_stepping_batches == 12


def test_other_loaders_keep_their_batches_and_the_steps_are_counted() -> None:
    planned, rates = plan(), Rates()
    scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[rates, scheduler, planned])
    trainer.fit(Late(), DataLoader(ROWS, 4), DataLoader(ROWS, 16))
    assert planned._total_steps == trainer.global_step == 6
    assert rates.rows == [4] * 4 + [16] * 2


def test_a_factor_that_a_batch_cannot_be_split_by_is_refused_before_the_first_step() -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[scheduler, plan()])
    with pytest.raises(ValueError, match="does not divide into 1 ranks x 3"):
        trainer.fit(Late(), datamodule=Data())
    assert trainer.global_step == 0


def test_the_loader_refuses_a_schedule_of_accumulation_without_run_checks(monkeypatch) -> None:
    for kind in (DataLoader, BatchSampler):  # Lightning leaves its own there after an error
        for name in ("__init__", "__setattr__", "__delattr__"):
            monkeypatch.setattr(kind, name, getattr(kind, name))
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    trainer = L.Trainer(**QUIET, max_epochs=2, callbacks=[scheduler])
    with pytest.raises(ValueError, match=r"larger than batch_size.*add RunChecks"):
        trainer.fit(Late(), datamodule=Data())


@NOISE
def test_a_search_for_the_largest_batch_ends_at_the_size_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Data(2)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[BatchSizeFinder(steps_per_trial=1), plan()])
    trainer.fit(Late(), datamodule=data)
    assert data.batch_size == 16
    assert trainer.global_step == 1


def test_a_timer_stops_the_run_and_its_checkpoint_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Slow(Timer):
        def time_elapsed(self, stage="train"):
            return 100.0 if self.due else 0.0

    timer = Slow({"seconds": 60})
    timer.due = False

    class Ends(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            timer.due = trainer.global_step == 2

    kept = Checkpoint("kept")
    trainer = Trainer(**QUIET | {"enable_checkpointing": True}, max_epochs=9,
                      callbacks=[timer, Ends(), kept, plan(), EMA()])  # fmt: skip
    trainer.fit(Late(), datamodule=Data())
    assert trainer.global_step == 3
    assert Path(kept.last_model_path).name == "step=000003.ckpt"


class Task(TaskModule):
    def build_net(self) -> nn.Module:
        return nn.Linear(4, 1)

    def training_step(self, batch, index):
        return self(batch[0]).square().mean()


def test_a_task_without_other_callbacks_refuses_an_average_made_before_its_net() -> None:
    callbacks = [stock.StochasticWeightAveraging(0.1)]
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"replace StochasticWeightAveraging by EMA\(\)"):
        trainer.fit(Task(), DataLoader(TensorDataset(ROWS), 4))


if __name__ == "__main__":  # write the table
    warnings.simplefilter("ignore")
    written = []
    for name in sorted(MAKE, key=str.lower):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            written.append((name, outcome(name)))
            print(*written[-1])
    text = PAGE.read_text()
    for name, row in written:
        text = re.sub(rf"^\| `{name}` \| .*? \| .*? \| .*? \|", f"| `{name}` | {' | '.join(row)} |",
                      text, flags=re.M)  # fmt: skip
    PAGE.write_text(text)
