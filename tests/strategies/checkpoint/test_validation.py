"""A damaged or invalid checkpoint is refused in one line before the first step."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ravine.callbacks import EMA, ExactResume, Pretrained
from ravine.cli import error_report
from ravine.cli.checkpoint_connector import explain_restore_errors
from ravine.cli.command import find_last_checkpoint
from ravine.cli.run_dir import raise_if_run_dir_removed
from ravine.cli.trainer import Trainer
from ravine.strategies import AtomicCheckpointIO, CheckpointError
from ravine.strategies.checkpoint.atomic_io import latest_valid_checkpoint


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 3))


def fit(folder: Path, steps: int, file: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        **{"logger": False, **options},
    )
    trainer.fit(Linear(), ckpt_path=file)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    trainer = fit(folder, 2, enable_checkpointing=False)
    trainer.save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


def state(checkpoint: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return checkpoint["optimizer_states"][0]["state"]


def weight(checkpoint: dict[str, Any], value: torch.Tensor) -> None:
    checkpoint["state_dict"]["net.weight"] = value


NAN, VERSION = float("nan"), "pytorch-lightning_version"
ODD = {  # what is done to the checkpoint, and what the refusal names
    "a NaN": (lambda c: weight(c, torch.tensor([[1, NAN, 0]])), "net.weight is not finite"),
    "infinity": (lambda c: weight(c, torch.full((1, 3), torch.inf)), "net.weight is not finite"),
    "int8": (
        lambda c: weight(c, torch.ones(1, 3, dtype=torch.int8)),
        "torch.int8 in the checkpoint",
    ),
    "bool": (
        lambda c: weight(c, torch.ones(1, 3, dtype=torch.bool)),
        "torch.bool in the checkpoint",
    ),
    "complex": (lambda c: weight(c, torch.ones(1, 3) * 1j), "torch.complex64 in the checkpoint"),
    "weight of a shape": (
        lambda c: weight(c, torch.ones(3, 1)),
        "net.weight is (1, 3) in the module",
    ),
    "no optimizers": (lambda c: c.update(optimizer_states=[]), "states of 0 optimizers"),
    "one state": (lambda c: state(c).pop(1), "optimizer state of net.bias is missing"),
    "one moment": (lambda c: state(c)[0].pop("exp_avg"), "exp_avg of net.weight is missing"),
    "moment of a shape": (
        lambda c: state(c)[0].update(exp_avg=torch.ones(5)),
        "exp_avg of net.weight has shape [5]",
    ),
    "moment of NaN": (
        lambda c: state(c)[0].update(exp_avg_sq=torch.full((1, 3), NAN)),
        "exp_avg_sq of net.weight in the optimizer state is not finite",
    ),
    "no loops": (lambda c: c.pop("loops"), "'loops'"),
    "no fit_loop": (lambda c: c["loops"].pop("fit_loop"), "fit_loop"),
    "loops cut short": (lambda c: c["loops"]["fit_loop"].pop("epoch_progress"), "epoch_progress"),
    "state_dict a list": (lambda c: c.update(state_dict=[1]), "state_dict is a list"),
    "names of numbers": (
        lambda c: c.update(state_dict={1: torch.ones(1)}),
        "its state_dict has the name 1, which is not a string",
    ),
    "optimizers a dict": (lambda c: c.update(optimizer_states={}), "optimizer_states is a dict"),
    "an optimizer a list": (lambda c: c.update(optimizer_states=[[]]), "[0] is a list"),
    "its state a list": (lambda c: c["optimizer_states"][0].update(state=[]), "'state'] is a list"),
    "groups a dict": (
        lambda c: c["optimizer_states"][0].update(param_groups={}),
        "'param_groups'] is a dict",
    ),
    "loops a list": (lambda c: c.update(loops=[]), "loops is a list"),
    "callbacks a str": (lambda c: c.update(callbacks="x"), "callbacks is a str"),
    "ravine a str": (lambda c: c.update(ravine="x"), "ravine is a str"),
    "exact_resume a list": (lambda c: c.update(exact_resume=[]), "exact_resume is a list"),
    "moment of int8": (
        lambda c: state(c)[0].update(exp_avg=torch.ones(1, 3, dtype=torch.int8)),
        "exp_avg of net.weight has whole numbers",
    ),
    "version of no form": (lambda c: c.update({VERSION: "x"}), "'pytorch-lightning_version'"),
    "version a number": (lambda c: c.update({VERSION: 3}), "'pytorch-lightning_version'"),
    "no version": (lambda c: c.pop(VERSION), "'pytorch-lightning_version'"),
    "a record of data": (lambda c: c["exact_resume"].update(data=3), "3 for data"),
    "a record of the seed": (lambda c: c["exact_resume"].update(seed="x"), "'x' for seed"),
    "a record of metrics": (lambda c: c["exact_resume"].update(metrics={"a": 1}), "for metrics"),
    "a record of shapes": (
        lambda c: c["exact_resume"].update(optimizer_shapes=[{"0": 3}]),
        "for optimizer_shapes",
    ),
    "a place in the data": (
        lambda c: c["loops"]["fit_loop"]["state_dict"].update(combined_loader=3),
        "the states of the loaders are not a list",
    ),
    "a list of files": (
        lambda c: c["callbacks"].update(Checkpoint={"best_k_models": ["x"]}),
        "its list of best files, of Checkpoint, is malformed",
    ),
    "a step of text": (lambda c: c.update(global_step="4"), "global_step is a str"),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_invalid_checkpoint_is_refused_in_one_line_that_names_the_invalid_part(
    kind, whole, tmp_path
):
    change, said = ODD[kind]
    checkpoint = torch.load(whole, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises((CheckpointError, ValueError)) as refused:
        fit(tmp_path, 4, tmp_path / "odd.ckpt")
    assert said in str(refused.value)
    assert error_report.exit_status(refused.value) == 2


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    trainer = fit(folder, 2, enable_checkpointing=False, callbacks=EMA())
    trainer.save_checkpoint(folder / "averaged.ckpt")
    return folder / "averaged.ckpt"


ODD_AVERAGES = {
    "no dict": (lambda c: c.update(ema="x"), "it has no raw weights"),
    "nothing raw": (lambda c: c["ema"].update(raw={}), "it has no raw weights"),
    "steps of text": (lambda c: c["ema"].update(num_updates="2"), "its number of updates is '2'"),
    "no tensor": (lambda c: c["ema"]["raw"].update({"net.bias": 1}), "net.bias is not a tensor"),
    "NaN": (
        lambda c: c["ema"]["raw"].update({"net.bias": torch.tensor([NAN])}),
        "the raw weight net.bias of EMA is not finite",
    ),
    "int8": (
        lambda c: c["ema"]["raw"].update({"net.bias": torch.ones(1, dtype=torch.int8)}),
        "the raw weight net.bias is torch.int8 of shape [1] in the checkpoint",
    ),
    "a shape": (
        lambda c: c["ema"]["raw"].update({"net.bias": torch.ones(1, 1)}),
        "of shape [1, 1] in the checkpoint, and torch.float32 of shape [1] in this model",
    ),
}


@pytest.mark.parametrize("kind", ODD_AVERAGES)
def test_an_invalid_average_is_refused_before_training(kind, averaged, tmp_path):
    change, said = ODD_AVERAGES[kind]
    checkpoint = torch.load(averaged, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError) as refused:
        fit(tmp_path, 4, tmp_path / "odd.ckpt", callbacks=EMA())
    assert said in str(refused.value)
    assert error_report.exit_status(refused.value) == 2


def test_auto_skips_a_checkpoint_whose_sections_have_other_types(whole, tmp_path):
    shutil.copy(whole, tmp_path / "good.ckpt")
    torch.save({**torch.load(whole, weights_only=True), "loops": []}, tmp_path / "odd.ckpt")
    path, damaged_paths = latest_valid_checkpoint(tmp_path)
    assert path == tmp_path / "good.ckpt"
    assert [(p.name, reason) for p, reason in damaged_paths] == [
        ("odd.ckpt", "its loops is a list and not a dict")
    ]


def test_a_valid_checkpoint_and_one_of_a_stock_trainer_resume(whole, tmp_path):
    assert fit(tmp_path, 4, whole, enable_checkpointing=False).global_step == 4
    checkpoint = torch.load(whole, weights_only=True)
    del checkpoint["exact_resume"]
    torch.save(checkpoint, tmp_path / "stock.ckpt")
    again = fit(tmp_path, 4, tmp_path / "stock.ckpt", enable_checkpointing=False)
    assert again.global_step == 4


def test_a_stock_trainer_with_exact_resume_refuses_a_nan_too(whole, tmp_path):
    checkpoint = torch.load(whole, weights_only=True)
    weight(checkpoint, torch.full((1, 3), NAN))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume()],
    )
    with pytest.raises(CheckpointError, match=r"net\.weight is not finite"):
        trainer.fit(Linear(), ckpt_path=tmp_path / "nan.ckpt")


@pytest.mark.parametrize("kind", ["a NaN", "int8", "complex"])
def test_pretrained_refuses_weights_that_cannot_be_trained(kind, whole, tmp_path):
    change, said = ODD[kind]
    checkpoint = torch.load(whole, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match="pass another path") as refused:
        fit(tmp_path, 4, callbacks=Pretrained(str(tmp_path / "odd.ckpt")))
    assert said in str(refused.value)


def test_a_full_disk_recommends_only_an_existing_checkpoint(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="train anew: there is no checkpoint"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "new.ckpt")
    monkeypatch.undo()
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "old.ckpt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"free space in .*, then resume from .*old\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, tmp_path / "new.ckpt")


def test_a_disk_that_fills_while_logging_does_the_same(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device", "metrics.csv")
    said = error_report.message_of(error, ["fit"])
    assert "no checkpoint was saved" in said
    assert "--ckpt_path" not in said
    error.checkpoint = "runs/x/version_0/checkpoints/step=000004.ckpt"
    said = error_report.message_of(error, ["fit"])
    assert f"run the same command with --ckpt_path={error.checkpoint}" in said


def test_an_error_within_pythons_own_packages_is_one_line_that_names_the_section():
    error = failed(lambda: json.loads("{"))
    section = explain_restore_errors("loops")
    section.__enter__()
    assert not section.__exit__(type(error), error, error.__traceback__)  # it passes on unchanged
    frames = error.__traceback__
    while "json" not in frames.tb_frame.f_code.co_filename:
        frames = frames.tb_next  # without this file, which counts as the user's own
    section = explain_restore_errors("loops")
    section.__enter__()
    with pytest.raises(CheckpointError, match=r"section 'loops' .* cannot be restored"):
        section.__exit__(type(error), error.with_traceback(frames), frames)


class RemovesItsFolder(L.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        module.log("train/loss", 1.0)
        if trainer.global_step == 2:
            shutil.rmtree(trainer.log_dir)


def test_a_run_whose_folder_was_removed_finishes_and_creates_it_again(tmp_path):
    trainer = fit(tmp_path, 4, callbacks=RemovesItsFolder(), logger="csv", log_every_n_steps=1)
    assert trainer.global_step == 4
    assert Path(trainer.log_dir, "metrics.csv").is_file()
    assert find_last_checkpoint(trainer)


def test_an_error_caused_by_a_removed_folder_names_the_folder(tmp_path):
    trainer = fit(tmp_path, 2, logger="csv")
    raise_if_run_dir_removed(trainer, FileNotFoundError("metrics.csv"))
    shutil.rmtree(trainer.log_dir)
    with pytest.raises(
        RuntimeError, match="was removed at step 2, while the run was writing to it"
    ) as e:
        raise_if_run_dir_removed(trainer, FileNotFoundError("metrics.csv"))
    assert error_report.exit_status(e.value) == 1


def failed(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [
        (lambda: Path("a" * 300).stat(), 2, "has 300 bytes"),
        (lambda: Path("ü" * 128).stat(), 2, "has 256 bytes"),
        (lambda: Path("a\0b").read_text(), 2, "a file name contains a NUL character"),
        (lambda: bytearray(2**62), 1, "out of memory"),
        (lambda: torch.empty(2**50), 1, "out of memory"),
    ],
    ids=["long", "long in bytes", "NUL", "Python", "torch"],
)
def test_an_invalid_file_name_and_missing_memory_are_one_line(action, status, said):
    error = failed(action)
    assert error_report.exit_status(error) == status
    assert said in error_report.message_of(error, ["fit"])
    assert len(error_report.message_of(error, ["fit"]).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "said"), [("a" * 300, "has 300 bytes"), ("a\0b", "NUL")], ids=["long", "NUL"]
)
def test_a_run_with_such_a_name_is_refused(name, said, tmp_path):
    error = failed(lambda: fit(tmp_path, 1, name=name, logger="csv"))
    assert error_report.exit_status(error) == 2
    assert said in error_report.message_of(error, ["fit"])
