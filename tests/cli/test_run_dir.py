"""Each run has its own folder, and a folder that cannot be created is a one-line error."""

import csv
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from external_modules.net_in_init import NetInInit

from ravine.cli.trainer import Trainer


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_run_has_its_own_folder_with_plot_metrics_and_checkpoint() -> None:
    for _ in range(2):
        Trainer(max_epochs=1, log_every_n_steps=1, accelerator="cpu").fit(NetInInit())
    for number in range(2):
        folder = Path("runs/netininit", f"version_{number}")
        names = {p.name.split(".")[0] for p in folder.iterdir()} - {"changes"}
        assert names == {"metrics", "events", "loss", "hparams", "checkpoints", "run", "packages"}
        assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step=000004.ckpt"]
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        assert [row["train_loss"] != "" for row in rows] == [True] * 4 + [False]


def test_a_folder_that_another_run_has_just_created_is_not_used(
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


def test_a_folder_that_cannot_be_created_is_named_without_an_endless_search() -> None:
    Path("runs/b/version_²").mkdir(parents=True)  # a digit, but no number
    trainer = Trainer(name="b", max_steps=1, accelerator="cpu")
    trainer.fit(NetInInit())
    assert trainer.log_dir == os.path.join("runs", "b", "version_0")
    Path("runs").rename("others")
    Path("runs").symlink_to("nowhere")
    with pytest.raises(
        ValueError, match=r"directory runs/a/version_0 cannot be created: File exists"
    ):
        Trainer(name="a", max_steps=1, accelerator="cpu").fit(NetInInit())
    Path("file").touch()
    with pytest.raises(ValueError, match=r"; use default_root_dir=\'FOLDER\'"):
        Trainer(default_root_dir="file", max_steps=1, accelerator="cpu").fit(NetInInit())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_refused_run_directory_is_one_error(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    full = code == errno.ENOSPC  # where another place on the disk would not help
    said = (
        r"\[Errno 28\] No space"
        if full
        else r"a/version_0 cannot be created: .*; use default_root_dir="
    )
    with pytest.raises(OSError if full else ValueError, match=said):
        Trainer(name="a", max_steps=1, accelerator="cpu").fit(NetInInit())


def _refused(root: str) -> str:
    trainer = Trainer(
        default_root_dir=root, max_steps=1, accelerator="cpu", devices=2, strategy="ddp"
    )
    with pytest.raises(ValueError, match="cannot be created") as wrong:
        trainer.fit(NetInInit())
    return str(wrong.value)


def test_a_folder_that_rank_0_cannot_create_is_an_error_on_all_ranks(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    first, other = ranks(_refused, 2, str(tmp_path / "file"))
    assert "; use default_root_dir='FOLDER'" in first
    assert "; use default_root_dir='FOLDER'" in other


def test_fit_and_validate_of_one_trainer_share_a_folder_and_log_dir_is_none_before() -> None:
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
