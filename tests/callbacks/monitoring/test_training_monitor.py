"""What is logged by default: learning rates, gradient norm and throughput, under equal steps."""

import csv
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import get_total_norm
from torch.optim import SGD

from ravine.callbacks import (
    Checkpoint,
    GradientClipping,
    LRSchedule,
    OptimizerPlan,
    ParamRule,
    ProgressBar,
    Throughput,
    TrainingMonitor,
    UpdateMonitor,
)
from ravine.callbacks.monitoring import progress as progress_module
from ravine.callbacks.monitoring import training_monitor
from ravine.callbacks.monitoring.progress import format_rates
from ravine.cli.trainer import Trainer
from ravine.datamodules.loaders import DataParallelInfo, ResumableLoader
from ravine.datamodules.samplers import EpochSampler
from ravine.lightning_modules import LanguageModel
from ravine.strategies import MeshStrategy

SETTINGS: dict[str, Any] = {"accelerator": "cpu", "enable_model_summary": False}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class NormRecorder(L.Callback):
    """Records torch's own norm of all gradients by step."""

    takes_partial_gradients = True

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms[trainer.global_step + 1] = get_total_norm(gradients).item()


def plan(steps: int, kind: Any = "bias") -> OptimizerPlan:
    """Two rules with rates of their own, and a schedule with a warmup."""
    rules = [ParamRule(kind, lr_scale=0.5), ParamRule()]
    schedule = LRSchedule("linear", warmup=steps // 4, final_fraction=0.1)
    return OptimizerPlan(partial(SGD, lr=0.25), schedule=schedule, rules=rules)


def logged_rows(folder: str | Path | None) -> list[dict[str, str]]:
    (file,) = Path(str(folder)).glob("metrics.csv")
    return list(csv.DictReader(file.read_text().splitlines()))


def column(rows: list[dict[str, str]], name: str) -> dict[int, float]:
    """The values of a metric by step; a step must have one value."""
    pairs = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    values = dict(pairs)
    assert len(values) == len(pairs)
    return values


def test_rates_follow_the_schedule_and_norms_are_those_of_torch_at_the_logged_steps() -> None:
    recorder, optimizer_plan = NormRecorder(), plan(24)
    trainer = Trainer(
        **SETTINGS, max_steps=24, log_every_n_steps=3, callbacks=[recorder, optimizer_plan]
    )
    trainer.fit(NetInInit())
    rows, steps = logged_rows(trainer.log_dir), range(3, 25, 3)
    factors = {step: optimizer_plan.schedule.factor(step - 1, 24) for step in steps}
    assert len({*factors.values()}) == 8  # else a shift by one step would not show
    for rule, peak in (("bias", 0.125), ("rest", 0.25)):
        expected = {step: pytest.approx(peak * factor) for step, factor in factors.items()}
        assert column(rows, f"lr/{rule}") == expected
    norms = column(rows, "train/grad_norm")
    assert norms == {step: pytest.approx(recorder.norms[step], rel=1e-6) for step in steps}


def test_steps_are_equal_in_csv_tensorboard_terminal_and_names_of_checkpoints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = Checkpoint(monitor="val_loss", every_n_train_steps=6, save_top_k=-1)
    trainer = Trainer(
        **SETTINGS,
        max_steps=18,
        log_every_n_steps=6,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        callbacks=[checkpoint, plan(18)],
    )
    trainer.fit(NetInInit())
    folder = Path(str(trainer.log_dir))
    rows, events = logged_rows(folder), EventAccumulator(str(folder)).Reload()
    names = [
        "train_loss",
        "val_loss",
        "lr/bias",
        "train/grad_norm",
        "throughput/samples_per_second",
    ]
    for name in names:
        assert [*column(rows, name)] == [6, 12, 18]
        assert [event.step for event in events.Scalars(name)] == [6, 12, 18]
    shown = re.findall(
        r"step (\d+)/18 loss \S+  lr (\S+)  grad_norm (\S+)  ", capsys.readouterr().out
    )
    rates = [column(rows, "lr/bias"), column(rows, "lr/rest")]
    assert shown == [
        (str(n), format_rates(r[n] for r in rates), f"{column(rows, 'train/grad_norm')[n]:.3g}")
        for n in (6, 12, 18)
    ]
    files = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert files == ["step=000006.ckpt", "step=000012.ckpt", "step=000018.ckpt"]


@pytest.mark.parametrize("is_fast", ["1", "0"])
def test_lightnings_loop_and_the_fast_one_log_the_same(
    is_fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAVINE_FAST_LOOP", is_fast)
    trainer = Trainer(
        **SETTINGS,
        max_epochs=2,
        log_every_n_steps=2,
        accumulate_grad_batches=3,
        callbacks=[plan(4)],
    )
    trainer.fit(NetInInit())
    rows = logged_rows(trainer.log_dir)
    # an epoch of four batches has two steps: one of three batches and one of one
    for name in ("train_loss", "val_loss", "lr/rest", "train/grad_norm"):
        assert [*column(rows, name)] == [2, 4]


def test_clipping_logs_the_norm_before_it_and_the_norm_is_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        training_monitor, "optimizer_gradient_norm", lambda *args: calls.append(args)
    )
    recorder = NormRecorder()
    trainer = Trainer(
        **SETTINGS, max_steps=8, log_every_n_steps=4, callbacks=[recorder, GradientClipping(1e-3)]
    )
    trainer.fit(NetInInit())
    norms = column(logged_rows(trainer.log_dir), "train/grad_norm")
    assert norms == {n: pytest.approx(recorder.norms[n], rel=1e-6) for n in (4, 8)}
    assert calls == []


def test_the_throughput_is_units_by_seconds_without_validations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock(NetInInit):
        """Two seconds a training batch, ten a validation."""

        seconds = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            type(self).seconds += 2
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            type(self).seconds += 10

    monkeypatch.setattr(training_monitor.time, "perf_counter", lambda: Clock.seconds)
    trainer = Trainer(**SETTINGS, max_epochs=2, log_every_n_steps=2, enable_progress_bar=False)
    trainer.fit(Clock())
    speeds = column(logged_rows(trainer.log_dir), "throughput/samples_per_second")
    assert speeds == {n: 4 for n in (2, 4, 6, 8)}  # 8 rows in 2 seconds


def test_another_callback_that_logs_the_throughput_is_not_doubled() -> None:
    trainer = Trainer(
        **SETTINGS, max_steps=4, log_every_n_steps=2, callbacks=[Throughput(), UpdateMonitor()]
    )
    trainer.fit(NetInInit())
    rows = logged_rows(trainer.log_dir)
    assert [*column(rows, "throughput/samples_per_second")] == [2, 4]
    assert column(rows, "lr/group 0") == {2: 0.01, 4: 0.01}


def test_a_checkpoint_holds_rates_and_norm_but_no_times() -> None:
    trainer = Trainer(**SETTINGS, max_steps=4, log_every_n_steps=2, callbacks=[plan(4)])
    trainer.fit(NetInInit())
    names = {name for name in trainer.callback_metrics if name.count("/")}
    assert names == {"lr/bias", "lr/rest", "train/grad_norm"}


def test_manual_optimization_logs_under_the_steps_of_both_optimizers() -> None:
    trainer = Trainer(**SETTINGS, max_steps=8, log_every_n_steps=2)
    trainer.fit(TwoOptimizers())
    rows = logged_rows(trainer.log_dir)
    names = ["train_loss", "lr/group 0", "lr/1 group 0", "train/grad_norm/0", "train/grad_norm/1"]
    for name in names:
        assert [*column(rows, name)] == [4, 8]
    assert column(rows, "lr/1 group 0") == {4: 0.01, 8: 0.01}


def test_lightnings_monitors_write_under_the_same_steps() -> None:
    monitors = [LearningRateMonitor(logging_interval="step"), DeviceStatsMonitor(cpu_stats=True)]
    trainer = Trainer(**SETTINGS, max_steps=8, log_every_n_steps=4, callbacks=[plan(8), *monitors])
    trainer.fit(NetInInit())
    rows = logged_rows(trainer.log_dir)
    assert column(rows, "lr-CompositeOptimizer/pg1") == column(rows, "lr/bias")
    (name,) = [n for n in rows[0] if n.endswith("batch_end/cpu_percent") and "train" in n]
    assert [*column(rows, name)] == [4, 8]


def test_values_with_a_step_of_their_own_keep_it() -> None:
    class Own(NetInInit):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.global_step == 3:
                for logger in self.trainer.loggers:
                    logger.log_metrics({"own": 1.0}, step=77)

        def on_validation_epoch_end(self) -> None:
            self.log("step", 500.0 + self.trainer.global_step)

    trainer = Trainer(**SETTINGS, max_steps=4, log_every_n_steps=2)
    trainer.fit(Own())
    rows = logged_rows(trainer.log_dir)
    assert column(rows, "own") == {77: 1.0}
    assert [*column(rows, "val_loss")] == [504]
    assert [*column(rows, "train_loss")] == [2, 4]


def test_an_evaluation_is_logged_under_the_step_of_its_checkpoint() -> None:
    trainer = Trainer(**SETTINGS, max_steps=4)
    trainer.fit(NetInInit())
    (path,) = Path(str(trainer.log_dir)).rglob("step=000004.ckpt")
    evaluation = Trainer(**SETTINGS)
    evaluation.validate(NetInInit(), ckpt_path=str(path), verbose=False)
    assert [*column(logged_rows(evaluation.log_dir), "val_loss")] == [4]


def test_a_stock_trainer_keeps_its_own_numbers(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="", version="stock")
    trainer = L.Trainer(
        **SETTINGS,
        logger=logger,
        max_steps=8,
        log_every_n_steps=4,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[TrainingMonitor(), GradientClipping()],
    )
    trainer.fit(NetInInit())
    rows = logged_rows(tmp_path / "stock")
    for name in ("train_loss", "lr/group 0", "train/grad_norm", "throughput/samples_per_second"):
        assert [*column(rows, name)] == [3, 7]


def test_a_trainer_without_a_logger_has_no_monitor() -> None:
    def monitors(**settings: Any) -> int:
        callbacks: Any = Trainer(**SETTINGS, **settings).callbacks
        return sum(isinstance(callback, TrainingMonitor) for callback in callbacks)

    assert [monitors(), monitors(logger=False), monitors(fast_dev_run=True)] == [1, 0, 0]
    assert monitors(callbacks=[TrainingMonitor()]) == 1


# Several ranks: the same global batches, sharded in every way.

TOKENS = torch.randint(65, (32, 17), generator=torch.Generator().manual_seed(0))
STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "single": lambda: {"devices": 1},
    "ddp": lambda: {"strategy": "ddp", "devices": 2},
    "zero1": lambda: {"strategy": "zero1", "devices": 2},
    "zero3": lambda: {"strategy": "zero3", "devices": 2},
    "pp": lambda: {"strategy": "pp", "devices": 2},
    "zero3 x tp": lambda: {"strategy": MeshStrategy(tp=2), "devices": 4},
}


class Tokens(L.LightningDataModule):
    def train_dataloader(self) -> ResumableLoader:
        share = DataParallelInfo.from_trainer(self.trainer)
        return ResumableLoader(EpochSampler(0, 32), self.fetch, 32, 8, share)

    def fetch(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return TOKENS[items, :-1], TOKENS[items, 1:]


class Model(LanguageModel):
    def configure_from_data(self, datamodule: Any) -> None: ...


def logged_by(name: str) -> list[dict[str, str]]:
    L.seed_everything(0, verbose=False)
    module = Model(65, 16, num_layers=2, d_model=16, num_heads=2, zero_init_residual=False)
    trainer = Trainer(
        **SETTINGS,
        **STRATEGIES[name](),
        max_steps=4,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=name,
        callbacks=[plan(4, "embedding")],
    )
    trainer.fit(module, datamodule=Tokens())
    return logged_rows(trainer.log_dir) if trainer.is_global_zero else []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_several_ranks_log_what_one_process_logs(
    ranks: Callable[..., list[Any]], name: str
) -> None:
    world = STRATEGIES[name]()["devices"]
    rows, alone = ranks(logged_by, world, name)[0], logged_by("single")
    for metric in ("lr/embedding", "lr/rest", "train/grad_norm"):
        expected = {n: pytest.approx(x, rel=2e-5) for n, x in column(alone, metric).items()}
        assert column(rows, metric) == expected
        assert [*expected] == [2, 4]
    # tokens of all ranks, counted once
    ratio = "throughput/tokens_per_second"
    assert [*column(rows, ratio)] == [2, 4]


# The bar.


def test_rates_that_are_equal_are_shown_once_and_many_as_a_range() -> None:
    assert format_rates([0.01, 0.01]) == "0.01"
    assert format_rates([0.02, 0.005, 0.02]) == "0.02/0.005"
    assert format_rates([0.02, 0.005, 3e-4]) == "0.0003-0.02"


def test_the_bar_of_a_hundred_columns_is_one_line_with_four_numbers_and_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fast(NetInInit):
        unit = "tokens"

        def count_units(self, batch: Any) -> int:
            return 10**6

    screen = io.StringIO()
    monkeypatch.setattr(
        progress_module, "Console", lambda: Console(file=screen, force_terminal=True, width=100)
    )
    monkeypatch.setattr(progress_module, "MIN_REDRAW_S", 0.0)
    Trainer(
        **SETTINGS,
        max_steps=24,
        limit_val_batches=0,
        log_every_n_steps=12,
        enable_checkpointing=False,
        callbacks=[plan(24), ProgressBar(refresh_rate=12)],
    ).fit(Fast())
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue()).splitlines()
    (last,) = [line for line in lines if "24/24" in line][-1:]
    pattern = r"24/24 loss \S+  lr \S+/\S+  grad_norm \S+  [\d,]+ tokens/s  \d+:\d\d of \d+:\d\d"
    assert re.search(pattern, last)
    assert max(map(len, lines)) <= 100
