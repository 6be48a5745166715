"""A run that will not validate says so before its first step, and only then."""

import itertools
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from torch.utils.data import DataLoader, IterableDataset

from ravine.callbacks.checks.missing_validation import find_missing_validation
from ravine.callbacks.checks.run_checks import RunChecks
from ravine.datamodules import ImageDataModule, RegressionDataModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Watch(L.Callback):
    """Records the notice at the start, and the number of validations."""

    def __init__(self) -> None:
        self.notice: Any = None
        self.num_validations = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.notice = find_missing_validation(trainer, module)

    def on_validation_start(self, *args: Any) -> None:
        self.num_validations += 1


def watched(module: L.LightningModule, ckpt_path: Any = None, **settings: Any) -> Watch:
    watch = Watch()
    quiet = QUIET | {"enable_checkpointing": False}
    L.Trainer(**quiet, **settings, callbacks=[watch]).fit(module, ckpt_path=ckpt_path)
    return watch


LENGTHS = [{"max_epochs": 1}, {"max_epochs": 3}, {"max_steps": 3}, {"max_steps": 6}]
INTERVALS = [
    {},
    {"check_val_every_n_epoch": 2},
    {"val_check_interval": 3},
    {"val_check_interval": 0.5},
    {"val_check_interval": 7, "check_val_every_n_epoch": None},
    {"val_check_interval": 20, "check_val_every_n_epoch": None},
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_the_notice_is_there_exactly_if_no_validation_runs(
    interval: dict[str, Any], accumulate: int
) -> None:
    for length in LENGTHS:  # an epoch has four batches
        watch = watched(NetInInit(), **length, **interval, accumulate_grad_batches=accumulate)
        assert (watch.notice is not None) == (watch.num_validations == 0), length


def test_a_run_with_the_named_interval_validates() -> None:
    watch = watched(NetInInit(), max_steps=3)
    assert watch.notice.problem == (
        "no validation runs: the run ends after batch 3, before the first validation "
        "(val_check_interval=1.0, check_val_every_n_epoch=1)"
    )
    assert watch.notice.hint == "use val_check_interval=1, check_val_every_n_epoch=None"
    named = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    assert watched(NetInInit(), max_steps=3, **named).num_validations == 3


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_run_counts_its_batches_from_the_beginning(tmp_path: Any) -> None:
    trainer = L.Trainer(**QUIET, max_steps=6, enable_checkpointing=False)
    trainer.fit(NetInInit())
    trainer.save_checkpoint(path := tmp_path / "six.ckpt")
    interval = {"val_check_interval": 5, "check_val_every_n_epoch": None}
    for end in (8, 9, 10, 11):
        watch = watched(NetInInit(), path, max_steps=end, **interval)
        assert (watch.notice is not None) == (watch.num_validations == 0) == (end < 10)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return itertools.repeat((torch.ones(4), torch.ones(1)))


def test_the_steps_decide_for_data_of_unknown_length() -> None:
    class Module(NetInInit):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(Endless(), batch_size=2)

    for steps, limit in ((3, None), (5, None), (3, 4), (5, 4)):
        settings: dict[str, Any] = {"limit_train_batches": limit} if limit else {}
        if not limit:
            settings = {"val_check_interval": 4, "check_val_every_n_epoch": None}
        watch = watched(Module(), max_steps=steps, max_epochs=-1, **settings)
        assert (watch.notice is not None) == (watch.num_validations == 0) == (steps < 4)


@pytest.mark.filterwarnings("ignore:You .* Skipping val loop")
def test_a_module_without_a_validation_step_and_data_without_a_loader_are_named() -> None:
    class NoStep(NetInInit):
        validation_step = L.LightningModule.validation_step

    class NoLoader(NetInInit):
        val_dataloader = L.LightningModule.val_dataloader

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return NetInInit().loader()

    watch = watched(NoStep(), max_steps=1)
    assert watch.notice.problem == "no validation runs: NoStep has no validation_step"
    watch = watched(NoLoader(), max_steps=1)
    assert watch.notice.problem == "no validation runs: fit has no validation data"
    watch = Watch()
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[watch])
    trainer.fit(NoLoader(), datamodule=Data())
    assert watch.notice.problem == "no validation runs: Data has no validation data"


@pytest.mark.parametrize(
    ("data", "hint", "flag"),
    [
        (ImageDataModule(val_fraction=0), "use val_fraction=0.1", "--data.val_fraction=0.1"),
        (
            RegressionDataModule(num_samples=4),
            "use num_val_samples=100",
            "--data.num_val_samples=100",
        ),
        (RegressionDataModule(source="separable"), "", ""),  # there are no other samples
    ],
)
def test_data_without_validation_name_the_argument_that_gives_it(
    data: L.LightningDataModule, hint: str, flag: str
) -> None:
    data.trainer = SimpleNamespace(limit_val_batches=1.0)  # type: ignore
    data.setup("fit")
    trainer = SimpleNamespace(datamodule=data, limit_val_batches=0, enable_validation=False)
    notice = find_missing_validation(trainer, NetInInit())
    assert notice is not None
    assert notice.problem.endswith(f"{type(data).__name__} has no validation data")
    assert (notice.hint, notice.flag) == (hint, flag)


@pytest.mark.filterwarnings("ignore:You .* Skipping val loop")
def test_nothing_is_said_of_a_validation_that_the_user_has_switched_off() -> None:
    class NoStep(NetInInit):
        validation_step = L.LightningModule.validation_step

    for kind in (NetInInit, NoStep):
        assert watched(kind(), max_steps=1, limit_val_batches=0).notice is None
    assert watched(NetInInit(), fast_dev_run=1).notice is None
    # the number of batches of manual optimization is not known
    assert watched(TwoOptimizers(), max_steps=2).notice is None


def test_the_checks_of_a_run_print_the_notice_once(capsys: pytest.CaptureFixture[str]) -> None:
    checks = RunChecks()
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False, callbacks=[checks])
    trainer.fit(NetInInit())
    assert capsys.readouterr().out.count("no validation runs: the run ends after batch 1") == 1
    assert checks.has_printed_notice
