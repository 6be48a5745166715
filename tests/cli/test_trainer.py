"""The Trainer is that of Lightning with other defaults, and a folder for each run."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from ravine.callbacks import (
    Checkpoint,
    ExactResume,
    GracefulStop,
    LossPlot,
    OutOfMemoryReport,
    PredictionTable,
    ProgressBar,
    TokenWeightedLoss,
    TrainingMonitor,
)
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.callbacks.monitoring.heartbeat import Heartbeat
from ravine.cli import trainer as trainer_module
from ravine.cli.run_folders.recorder import RunRecorder
from ravine.cli.trainer import Trainer, default_precision
from ravine.strategies import AtomicCheckpointIO


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("key", ["accumulate_grad_batches", "num_nodes", "val_check_interval"])
def test_counts_of_zero_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=0 is too small; allowed: .*; use {key}=1$"):
        Trainer(**{key: 0})  # type: ignore


@pytest.mark.parametrize("devices", [0, "0", "two", -2, "1.5", ""])
def test_invalid_devices_are_refused(devices: int | str) -> None:
    with pytest.raises(
        ValueError, match=rf"devices={devices!r} names no devices; .*; use devices=1$"
    ):
        Trainer(devices=devices)


@pytest.mark.parametrize("devices", ["auto", 1, "1"])
def test_valid_devices_are_accepted(devices: int | str) -> None:
    assert Trainer(devices=devices, accelerator="cpu").num_devices == 1


@pytest.mark.parametrize("devices", ["-1", -1, "0,", "0,3", "0, 3", 16])
def test_devices_of_other_machines_are_checked_by_lightning(devices: int | str) -> None:
    trainer_module.check_counts({"devices": devices})


def kinds(trainer: L.Trainer) -> list[type]:
    """Classes of the callbacks, without the model's summary."""
    return [type(c) for c in trainer.callbacks if "Summary" not in type(c).__name__]


def test_default_callbacks_are_present_once_and_are_replaced_by_given_ones() -> None:
    defaults = {ExactResume, GracefulStop, TokenWeightedLoss, Checkpoint, ProgressBar, LossPlot}
    defaults |= {
        Heartbeat,
        OutOfMemoryReport,
        PredictionTable,
        RunChecks,
        RunRecorder,
        TrainingMonitor,
    }
    assert set(kinds(Trainer())) == defaults
    resume, checkpoint = ExactResume(), ModelCheckpoint(monitor="val_loss")
    given = Trainer(callbacks=[resume, checkpoint], logger=False)
    assert resume in given.callbacks
    assert checkpoint in given.callbacks
    without_logger = {Checkpoint, LossPlot, TrainingMonitor}
    assert set(kinds(given)) == defaults - without_logger | {ModelCheckpoint}
    assert len(kinds(given)) == len(set(kinds(given)))
    off = Trainer(enable_checkpointing=False, enable_progress_bar=False)
    assert set(kinds(off)) == defaults - {Checkpoint, ProgressBar}
    assert isinstance(given.strategy.checkpoint_io, AtomicCheckpointIO)


def test_fast_dev_run_and_barebones_leave_no_file() -> None:
    Trainer(fast_dev_run=True, accelerator="cpu").fit(NetInInit())
    with pytest.warns(UserWarning, match="barebones"):
        Trainer(barebones=True, max_steps=1, accelerator="cpu").fit(NetInInit())
    assert list(Path().iterdir()) == []


def test_loggers_are_given_by_name_by_object_or_switched_off() -> None:
    own = CSVLogger("mine")
    for logger, expected in ((["csv"], 1), ("tensorboard", 1), ([own, "csv"], 2), (False, 0)):
        trainer = Trainer(logger=logger, max_steps=1, accelerator="cpu")  # type: ignore
        trainer.fit(NetInInit())
        assert len(trainer.loggers) == expected
        assert Path(trainer.log_dir or "", "checkpoints").is_dir()
    assert own.log_dir.startswith("mine")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"pip install {name}, or use logger="):
        Trainer(logger=name)  # type: ignore


def test_automatic_precision_is_bf16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = set()
    for avx512, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        chosen.add((avx512 or amx, default_precision("cpu")))
    assert chosen == {(True, "bf16-mixed"), (False, "32-true")}
    assert Trainer(precision="auto", accelerator="cpu").precision == "32-true"
    assert Trainer(accelerator="cpu").precision == "32-true"


def test_advertisements_are_silenced_and_other_messages_are_kept(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        Trainer(max_steps=1, accelerator="cpu").fit(NetInInit())
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if "Tip" in line or "available" in line]
    assert any("max_steps=1" in line for line in said)
    assert "run: runs/netininit/version_0, on CPU, 1 thread, precision 32-true" in (
        capsys.readouterr().out
    )


class PlainSteps(NetInInit):
    """By SGD: Adam reads its own step count, which lies on the host."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_training_reads_no_value_from_the_device_except_for_logging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[int] = []
    trainer = Trainer(max_epochs=5, log_every_n_steps=10, limit_val_batches=0, accelerator="cpu")
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        plain = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, real: Any = plain) -> Any:
            reads.append(trainer.global_step)
            return real(self)

        monkeypatch.setattr(torch.Tensor, name, read)
    trainer.fit(PlainSteps())
    assert {step for step in reads if step % 4} == {10}  # an epoch of 4 steps ends with a file


def test_lightning_averaging_that_copies_the_net_too_early_is_refused_with_ema_as_the_hint():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(Exception, match="EMAWeightAveraging copies the network in setup") as e:
        Trainer(callbacks=[EMAWeightAveraging()])
    assert "; replace EMAWeightAveraging by EMA() in Trainer(callbacks=...)" in str(e.value)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_strategies_that_pickle_the_trainer_are_refused(method):
    strategy = DDPStrategy(start_method=method)
    with pytest.raises(ValueError, match=f"by {method}, .*; use strategy='ddp'$"):
        Trainer(accelerator="cpu", devices=2, strategy=strategy)
