"""Our Trainer is Lightning's with other defaults: same hooks and numbers, a folder for each run."""

import csv
import errno
import logging
import os
from collections.abc import Callable
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
    PredictionTable,
    ProgressBar,
    TokenWeightedLoss,
)
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.cli import trainer as trainer_module
from ravine.cli.trainer import Trainer, default_precision
from ravine.strategies import AtomicCheckpointIO


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_run_gets_a_folder_of_its_own_with_its_curves_numbers_and_checkpoint() -> None:
    for _ in range(2):
        Trainer(max_epochs=1, log_every_n_steps=1, accelerator="cpu").fit(NetInInit())
    for number in range(2):
        folder = Path("runs/netininit", f"version_{number}")
        names = {p.name.split(".")[0] for p in folder.iterdir()}
        assert names == {"metrics", "events", "loss", "hparams", "checkpoints"}
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step=000004.ckpt"]
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        assert [row["train_loss"] != "" for row in rows] == [True] * 4 + [False]


def test_a_folder_that_another_run_has_just_made_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, taken = Path.mkdir, []

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "version_0" and not taken:
            taken.append(self)
            real(self, parents=True)  # the other run is a moment quicker
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    trainer = Trainer(name="a/b", fast_dev_run=False, max_steps=1, accelerator="cpu")
    trainer.fit(NetInInit())
    assert trainer.log_dir == os.path.join("runs", "a/b", "version_1")


def test_a_folder_that_cannot_be_made_is_named_and_not_looked_for_for_ever() -> None:
    Path("runs/b/version_²").mkdir(parents=True)  # a digit, but no number
    trainer = Trainer(name="b", max_steps=1, accelerator="cpu")
    trainer.fit(NetInInit())
    assert trainer.log_dir == os.path.join("runs", "b", "version_0")
    Path("runs").rename("others")
    Path("runs").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"folder runs/a/version_0 cannot be made: File exists"):
        Trainer(name="a", max_steps=1, accelerator="cpu").fit(NetInInit())
    Path("file").touch()
    with pytest.raises(ValueError, match=r"; --trainer\.default_root_dir=FOLDER"):
        Trainer(default_root_dir="file", max_steps=1, accelerator="cpu").fit(NetInInit())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_refuses_a_runs_folder_is_left_in_words(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    full = code == errno.ENOSPC  # where another place on the disk would not help
    said = r"\[Errno 28\] No space" if full else r"a/version_0 cannot be made: .*; --trainer"
    with pytest.raises(OSError if full else ValueError, match=said):
        Trainer(name="a", max_steps=1, accelerator="cpu").fit(NetInInit())


def _refused(root: str) -> str:
    trainer = Trainer(
        default_root_dir=root, max_steps=1, accelerator="cpu", devices=2, strategy="ddp"
    )
    with pytest.raises(ValueError, match="cannot be made") as wrong:
        trainer.fit(NetInInit())
    return str(wrong.value)


def test_a_folder_that_rank_0_cannot_make_is_missed_by_all(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    first, other = ranks(_refused, 2, str(tmp_path / "file"))
    assert "; --trainer.default_root_dir=FOLDER" in first
    assert "; --trainer.default_root_dir=FOLDER" in other


@pytest.mark.parametrize("key", ["accumulate_grad_batches", "num_nodes", "val_check_interval"])
def test_every_nothing_is_no_interval(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} is 0; allowed: 1 or more"):
        Trainer(**{key: 0})  # type: ignore


@pytest.mark.parametrize("devices", [0, "0", "two", -2, "1.5", ""])
def test_devices_that_are_none_are_refused(devices: int | str) -> None:
    with pytest.raises(ValueError, match=rf"devices is {devices!r}; .*; --trainer.devices=1"):
        Trainer(devices=devices)


@pytest.mark.parametrize("devices", ["auto", 1, "1"])
def test_devices_that_are_some_are_taken(devices: int | str) -> None:
    assert Trainer(devices=devices, accelerator="cpu").num_devices == 1


@pytest.mark.parametrize("devices", ["-1", -1, "0,", "0,3", "0, 3", 16])
def test_devices_of_other_machines_are_left_to_lightning(devices: int | str) -> None:
    trainer_module.check_counts({"devices": devices})


def test_fit_and_test_on_one_trainer_share_a_folder_and_log_dir_is_none_before() -> None:
    trainer = Trainer(max_steps=1, default_root_dir="elsewhere", accelerator="cpu")
    assert trainer.log_dir is None
    trainer.fit(NetInInit())
    trainer.validate(NetInInit(), verbose=False)
    assert [str(p) for p in Path("elsewhere").glob("*/*")] == ["elsewhere/netininit/version_0"]


def _log_dir() -> list[str]:
    trainer = Trainer(max_steps=1, devices=2, accelerator="cpu", strategy="ddp", logger="csv")
    trainer.fit(NetInInit(batch_size=4))
    return [str(trainer.log_dir), *(str(c.dirpath) for c in trainer.checkpoint_callbacks)]


def test_all_ranks_agree_on_the_folder(ranks: Callable[..., list[Any]]) -> None:
    one, other = ranks(_log_dir, 2)
    assert one == other
    assert one[0].endswith("version_0")
    assert one[1] == os.path.join(one[0], "checkpoints")


def kinds(trainer: L.Trainer) -> list[type]:
    """Classes of the callbacks, without the model's summary."""
    return [type(c) for c in trainer.callbacks if "Summary" not in type(c).__name__]


def test_defaults_are_there_once_and_what_is_given_takes_their_place() -> None:
    defaults = {ExactResume, GracefulStop, TokenWeightedLoss, Checkpoint, ProgressBar, LossPlot}
    defaults |= {PredictionTable, RunChecks}
    assert set(kinds(Trainer())) == defaults
    resume, checkpoint = ExactResume(), ModelCheckpoint(monitor="val_loss")
    given = Trainer(callbacks=[resume, checkpoint], logger=False)
    assert resume in given.callbacks
    assert checkpoint in given.callbacks
    assert set(kinds(given)) == defaults - {Checkpoint, LossPlot} | {ModelCheckpoint}
    assert len(kinds(given)) == len(set(kinds(given)))
    off = Trainer(enable_checkpointing=False, enable_progress_bar=False)
    assert set(kinds(off)) == defaults - {Checkpoint, ProgressBar}
    assert isinstance(given.strategy.checkpoint_io, AtomicCheckpointIO)


def test_fast_dev_run_and_barebones_leave_no_file() -> None:
    Trainer(fast_dev_run=True, accelerator="cpu").fit(NetInInit())
    with pytest.warns(UserWarning, match="barebones"):
        Trainer(barebones=True, max_steps=1, accelerator="cpu").fit(NetInInit())
    assert list(Path().iterdir()) == []


def test_loggers_come_by_name_by_object_or_not_at_all() -> None:
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
    with pytest.raises(ValueError, match=f"pip install {name}, or --trainer.logger="):
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


def test_advertisements_are_left_out_and_the_rest_is_said(
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


def test_training_reads_no_value_back_except_where_it_is_logged(
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


def test_an_average_that_copies_the_net_too_early_is_refused_by_the_name_of_ours():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(Exception, match="EMAWeightAveraging copies the network in setup") as e:
        Trainer(callbacks=[EMAWeightAveraging()])
    assert "and add ravine.callbacks.EMA()" in str(e.value)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_would_need_a_pickled_trainer_are_refused(method):
    strategy = DDPStrategy(start_method=method)
    with pytest.raises(ValueError, match=f"by {method}.*type --trainer.strategy ddp$"):
        Trainer(accelerator="cpu", devices=2, strategy=strategy)
