"""However a writer ends, a complete checkpoint remains; every damage of a file is reported."""

import errno
import faulthandler
import fcntl
import os
import pathlib
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from ravine.strategies.checkpoint import mapped_file
from ravine.strategies.checkpoint.atomic_io import (
    AtomicCheckpointIO,
    CheckpointError,
    collective_loading,
    find_damage,
    latest_valid_checkpoint,
    list_checkpoints,
)
from ravine.strategies.checkpoint.saving import MAX_WEIGHT, first_non_finite, save_on_all_ranks

IO = AtomicCheckpointIO()
CONTENT = {
    "state_dict": {"weight": torch.randn(3, 10), "bias": torch.randn(3)},
    "epoch": 3,
    "hyper_parameters": {"sizes": [1, 2.5, "three", None], "shape": torch.Size([2])},
}


def same(loaded: Any) -> bool:
    weights = CONTENT["state_dict"]
    return (
        loaded.keys() == CONTENT.keys()
        and loaded["epoch"] == 3
        and loaded["hyper_parameters"] == CONTENT["hyper_parameters"]
        and all(torch.equal(loaded["state_dict"][k], weights[k]) for k in weights)
    )


def in_fork(work: Callable[[], Any]) -> int:
    """Start work in a process of its own; its id."""
    if child := os.fork():
        return child
    try:
        work()
    finally:
        os._exit(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "runs" / "step=000001.ckpt"
    IO.save_checkpoint(CONTENT, target)
    return target


def test_saved_values_are_loaded_unchanged(path: Path) -> None:
    assert same(IO.load_checkpoint(path))
    assert find_damage(path) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_a_writer_killed_fifty_times_leaves_a_complete_newest_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary folder is on another file system, as it is on clusters."""
    assert os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev
    target = tmp_path / "last.ckpt"
    dice = random.Random(1)
    content = {"weights": torch.randn(300_000), "number": 0}
    IO.save_checkpoint(content, target)
    done, interrupted = 0, 0
    for _ in range(50):
        reader, writer = os.pipe()

        def work(writer: int = writer, start: int = done) -> None:
            monkeypatch.setenv("TMPDIR", "/dev/shm")
            tempfile.tempdir = None
            for number in range(start + 1, start + 1000):
                IO.save_checkpoint(content | {"number": number}, target)
                os.write(writer, b".")

        child = in_fork(work)
        os.close(writer)
        os.read(reader, 1)  # it is at work
        time.sleep(dice.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            done += 1 + len(pipe.read())
        newest, damaged = latest_valid_checkpoint(tmp_path)
        assert newest == target
        assert damaged == []
        number = IO.load_checkpoint(target)["number"]
        assert number in (done, done + 1)  # killed between the rename and the report
        done = number
        interrupted += any(tmp_path.glob(".tmp-*"))
    assert interrupted > 10  # or the kills did not meet a save
    IO.save_checkpoint(content, target)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_temporary_files_of_dead_processes_are_removed_and_those_of_live_ones_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = path.with_name(f".tmp-{'0d' * 16}")
    dead.write_bytes(b"half a checkpoint")
    path.with_name(".tmp-notes").write_bytes(b"of the user")
    torch_save = torch.save

    def another_run_saves_meanwhile(*args: Any) -> None:
        monkeypatch.setattr(torch, "save", torch_save)
        IO.save_checkpoint(CONTENT, path.with_name("other.ckpt"))
        torch_save(*args)

    monkeypatch.setattr(torch, "save", another_run_saves_meanwhile)
    IO.save_checkpoint(CONTENT, path)
    names = [".tmp-notes", "other.ckpt", path.name]
    assert sorted(p.name for p in path.parent.iterdir()) == names


def test_several_writers_in_one_folder_do_not_interfere(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer clears leftovers at the worst moments: before the lock, and after it."""
    lock, folder = fcntl.flock, path.parent

    def interrupted(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        IO.save_checkpoint(CONTENT, folder / "other.ckpt")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", interrupted)
    IO.save_checkpoint(CONTENT, path)
    assert sorted(p.name for p in folder.iterdir()) == ["other.ckpt", path.name]
    children = []
    for number in range(3):

        def work(number: int = number) -> None:
            for _ in range(40):
                IO.save_checkpoint(CONTENT, folder / f"{number}.ckpt")
            os._exit(0)

        children.append(in_fork(work))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_only_what_was_written_is_removed(path: Path, tmp_path: Path) -> None:
    """A checkpoint names the files of the run before, and may name any other."""
    victim = tmp_path / "victim"
    (victim / "deep").mkdir(parents=True)
    (path.parent / "link.ckpt").symlink_to(path)
    other = AtomicCheckpointIO()
    for name in (path, victim, path.parent / "../victim", path.parent / "link.ckpt"):
        other.remove_checkpoint(name)
    IO.remove_checkpoint(path.parent / "link.ckpt")
    assert (victim / "deep").is_dir()
    assert path.is_file()
    IO.remove_checkpoint(path.parent / ".." / path.parent.name / path.name)
    assert not path.exists()


def test_a_disk_that_is_full_at_any_moment_keeps_the_previous_file(path: Path) -> None:
    size = path.stat().st_size
    reader, writer = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in (0, 10, size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                IO.save_checkpoint(CONTENT | {"epoch": 4}, path)
            except CheckpointError as error:
                os.write(writer, f"{error.exit_status} {error}\n".encode())

    os.waitpid(in_fork(work), 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read().splitlines()
    message = (
        f"1 the checkpoint {path} cannot be written (File too large); earlier checkpoints are "
        f"unchanged; free space in {path.parent}, then resume from {path}"
    )
    assert said == [message] * 4
    assert same(IO.load_checkpoint(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_space_left_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_open = pathlib.Path.open
    monkeypatch.setattr(
        pathlib.Path,
        "open",
        lambda self, *mode: plain_open(
            Path("/dev/full") if self.name.startswith(".tmp-") else self, *mode
        ),
    )
    with pytest.raises(
        CheckpointError, match=r"\(No space left on device\).*free space in"
    ) as message:
        IO.save_checkpoint(CONTENT | {"epoch": 4}, path)
    assert message.value.exit_status == 1
    assert "\n" not in str(message.value)
    monkeypatch.undo()
    assert same(IO.load_checkpoint(path))


def test_a_folder_that_may_not_be_written_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError) as message:
        IO.save_checkpoint(CONTENT | {"epoch": 4}, path)
    assert str(message.value) == (
        f"the checkpoint {path} cannot be written (Permission denied); earlier checkpoints are "
        f"unchanged; make {path.parent} writable, or use Trainer(default_root_dir=...)"
    )
    assert same(IO.load_checkpoint(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_truncated_anywhere_is_reported(path: Path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 11), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"empty|cut short|not a checkpoint"):
            IO.load_checkpoint(path)


def test_a_flipped_byte_anywhere_is_reported_or_harmless(path: Path) -> None:
    """Between records lies padding; all else is under a checksum or compared."""
    whole = path.read_bytes()
    table = whole.index(b"PK\x01\x02")  # contents, which no checksum covers
    harmless = 0
    for place in [*range(0, table, 17), *range(table, len(whole), 3)]:
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            loaded = IO.load_checkpoint(path)
        except CheckpointError:
            continue
        assert same(loaded), place
        harmless += 1
    assert harmless < len(whole) / 3


def test_a_directory_flag_in_the_archive_is_reported(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"archive/data/0", raw.index(b"PK\x01\x02")) - 46  # its line in the table
    raw[entry + 38] ^= 0x10
    path.write_bytes(raw)
    assert find_damage(path) == "it is damaged: its table of contents was changed"


def test_the_newest_complete_file_is_found_and_damaged_ones_are_named(path: Path) -> None:
    others = [path.with_name(f"step=00000{i}.ckpt") for i in (2, 3)]
    for i, other in enumerate(others):
        other.write_bytes(path.read_bytes()[: -100 * i - 1])
        os.utime(other, ns=(0, time.time_ns() + (i + 1) * 10**9))
    path.with_name("step=000009.ckpt").mkdir()
    found, damaged = latest_valid_checkpoint(path.parent)
    assert found == path
    assert [p for p, _ in damaged] == others[::-1]
    assert all("cut short" in reason for _, reason in damaged)
    assert latest_valid_checkpoint(path.parent / "nowhere") == (None, [])
    with pytest.raises(CheckpointError) as message:
        IO.load_checkpoint(others[1])
    assert str(message.value) == (
        f"the checkpoint {others[1]} cannot be used: {damaged[0][1]}; use "
        f'ckpt_path="{path}", the newest valid checkpoint there'
    )
    assert message.value.exit_status == 2


def test_only_temporary_folders_of_writers_are_not_searched(tmp_path: Path) -> None:
    own, staging = tmp_path / ".tmp-mine", tmp_path / f".tmp-{'0d' * 16}"
    for folder in (own, staging):
        folder.mkdir()
        torch.save({"state_dict": {}}, folder / "last.ckpt")
    assert [path for _, path in list_checkpoints(tmp_path)] == [own / "last.ckpt"]


def test_a_missing_file_names_the_nearest(path: Path) -> None:
    with pytest.raises(CheckpointError) as message:
        IO.load_checkpoint(path.with_name("step=000010.ckpt"))
    assert str(message.value) == (
        f"there is no checkpoint {path.with_name('step=000010.ckpt')}; allowed: {path.name}; use "
        f'ckpt_path="{path}"'
    )
    assert message.value.flag == f"--ckpt_path={path}"
    with pytest.raises(CheckpointError, match=r"no checkpoint .*: there is no folder .*; use the"):
        IO.load_checkpoint(path.parent / "nowhere" / "last.ckpt")


@pytest.mark.parametrize("content", [b"Never gonna give", b"PK\x03\x04 but no archive", b""])
def test_a_file_that_is_not_a_checkpoint_is_reported(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be used: it is"):
        IO.load_checkpoint(path)
    assert find_damage(path.parent) == "it is a folder, not a checkpoint file"
    assert find_damage(path.with_name("x")) == "the file does not exist"


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"hyper_parameters": {"root": nn.ReLU()}}, "hyper_parameters['root'] is a torch.nn"),
        ({"callbacks": {"EMA": [1, {2.0, 1j}, nn.ReLU()]}}, "callbacks['EMA'][2] is a torch.nn"),
        ({"loops": {Path("/"): 1}}, "a key of loops is a pathlib"),
    ],
)
def test_a_foreign_type_is_refused_by_name_when_saved(
    path: Path, bad: dict[str, Any], name: str
) -> None:
    with pytest.raises(CheckpointError) as message:
        IO.save_checkpoint(bad, path)
    assert str(message.value).startswith(name)
    assert same(IO.load_checkpoint(path))


def test_a_file_with_foreign_types_is_read_only_on_trust(path: Path) -> None:
    torch.save({"root": Path("/")}, path)
    with pytest.raises(CheckpointError, match=r"it holds pathlib[\w.]+, more than tensors"):
        IO.load_checkpoint(path)
    assert IO.load_checkpoint(path, weights_only=False) == {"root": Path("/")}


@pytest.mark.parametrize("content", [None, 3, [torch.ones(2)], torch.ones(2)])
def test_a_file_without_a_dict_is_loaded_unchanged(path: Path, content: Any) -> None:
    torch.save(content, path)
    with collective_loading(mapped_sections=("state_dict",)):
        mapped = IO.load_checkpoint(path)
    for loaded in (mapped, IO.load_checkpoint(path)):
        assert str(loaded) == str(content)


@dataclass
class Point:
    """An object that a file may hold if its reader allows the class."""

    x: int


SPARSE = torch.eye(2).to_sparse()


def test_a_mapped_file_that_is_cut_in_place_ends_the_process(path: Path) -> None:
    def read() -> None:
        faulthandler.disable()
        content = {"state_dict": {"weight": torch.ones(2**16)}}
        IO.save_checkpoint(content, path)
        with collective_loading(mapped_sections=("state_dict",)):
            loaded = IO.load_checkpoint(path)
        os.truncate(path, 0)
        loaded["state_dict"]["weight"].sum()

    _, status = os.waitpid(in_fork(read), 0)
    assert os.WTERMSIG(status) == signal.SIGBUS


UNMAPPABLE = {
    "another order of bytes": ({"state_dict": {}}, "another byte order"),
    "a tensor as a key": ({"state_dict": {}, "a": {torch.ones(1): 1}}, "a key is a tensor"),
    "an object": ({"state_dict": {"a": Point(1)}}, "it holds a Point"),
    "a set of tensors": ({"state_dict": {"a": {torch.ones(1)}}}, "it holds a set"),
    "a sparse tensor": (
        {"state_dict": {"a": SPARSE}},
        "holds a sparse tensor|is not a plain tensor",
    ),
    "a conjugate": (
        {"state_dict": {"a": torch.ones(2, dtype=torch.complex64).conj()}},
        "it holds a Tensor that is not a plain tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("name", UNMAPPABLE)
def test_a_file_that_cannot_be_mapped_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, reason = UNMAPPABLE[name]
    torch.save(content, path)
    with torch.serialization.safe_globals([Point]):
        if name == "another order of bytes":
            monkeypatch.setattr(mapped_file, "sys", SimpleNamespace(byteorder="middle"))
        with path.open("rb") as file, pytest.raises(mapped_file.UnmappableFileError, match=reason):
            mapped_file.load_mapped(file, ["state_dict"])
        with collective_loading(mapped_sections=("state_dict",)):
            assert str(IO.load_checkpoint(path)) == str(content)


def test_a_remote_path_is_left_to_lightning() -> None:
    IO.save_checkpoint(CONTENT, "memory://runs/last.ckpt")
    assert same(IO.load_checkpoint("memory://runs/last.ckpt", weights_only=True))


def test_a_download_is_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", lambda *args: calls.append(args[-1]))
    IO.load_checkpoint("memory://runs/last.ckpt")
    assert calls == [True]  # Lightning's own default for http is False


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    tensors = {"a": torch.ones(3), "b": torch.arange(3), "c": torch.tensor([1, float("inf")])}
    assert first_non_finite(tensors.items()) == "c"
    tensors["a"][1] = float("nan")
    assert first_non_finite(tensors.items()) == "a"
    assert first_non_finite(list(tensors.items())[1:2]) is None
    assert first_non_finite([]) is None
    assert (
        first_non_finite([("none", torch.empty(0)), ("bf16", torch.tensor(1e20).bfloat16())])
        is None
    )


def test_a_weight_whose_square_is_infinite_is_named_where_that_matters() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = {"fine": torch.tensor([-1e19]).to(dtype), "lost": torch.tensor([-1e20]).to(dtype)}
        assert first_non_finite(tensors.items(), limit=MAX_WEIGHT) == "lost"
    assert torch.tensor(MAX_WEIGHT).square().isinf()
    assert torch.tensor(MAX_WEIGHT * 0.999).square().isfinite()


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fail_to_save(folder: str) -> str:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(torch.ones(4, 2), 1))
    save_on_all_ranks(trainer, f"{folder}/good.ckpt")
    try:
        save_on_all_ranks(trainer, "/dev/null/bad.ckpt")
    except CheckpointError as error:
        return f"{error.exit_status} {error}"
    return "no error"


def test_if_the_writing_rank_fails_every_rank_raises_its_error(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(fail_to_save, 2, str(tmp_path))
    assert first == second
    assert first.startswith("1 the checkpoint /dev/null/bad.ckpt cannot be written (File exists)")
    assert find_damage(tmp_path / "good.ckpt") is None
