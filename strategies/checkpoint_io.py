"""Checkpoints that are whole or absent: whatever kills the writer, the file before it survives.

    write -> .tmp-<uuid> beside the target -> fsync -> rename onto the target -> fsync the folder
    read  <- every record's checksum, which torch does not compare <- tensors and plain types only

The temporary file stands beside the target because a rename is atomic on one file system only; a
rename from $TMPDIR on another is a copy, and a copy that is killed leaves half a checkpoint.
"""

import errno
import fcntl
import os
import pickle
import re
import uuid
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from . import sharded

SUFFIX = ".ckpt"
PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None))
PLAIN_TORCH = (torch.Size, torch.device, torch.dtype, torch.layout)
CONTAINERS = (list, tuple, set)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the text says why and what to do, in one line.

    `exit_status` is what a command ends with: 1 where the run failed, 2 where the user can choose
    another file.
    """

    def __init__(self, text: str, exit_status: int = 2) -> None:
        """Say it in words; a file that cannot be read is the default."""
        super().__init__(text)
        self.exit_status = exit_status


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoint files; `Trainer(plugins=[AtomicCheckpointIO()])`.

    Remote paths (s3://, gs://) go to Lightning's own writer: object stores replace atomically.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Stream the checkpoint to disk; on any failure the target is as it was before."""
        target = _local(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        refuse_foreign(checkpoint)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent)
            _write(checkpoint, target)
        except OSError as error:
            raise _unwritable(target, error) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any | None = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint that `check` finds whole; `weights_only=False` admits any object."""
        source, plain = _local(path), weights_only is not False
        if source is None:  # Lightning would unpickle what an http address sends
            return super().load_checkpoint(path, map_location, plain)
        if not source.exists():
            raise _missing(source)
        if source.is_dir():
            if reason := sharded.damage(source):
                raise _unreadable(source, reason)
            return sharded.read_whole(source)
        try:
            with source.open("rb") as file:  # one file for both: it may be replaced meanwhile
                if reason := _damage(file, plain):
                    raise _unreadable(source, reason)
                file.seek(0)
                return torch.load(file, map_location, weights_only=plain)
        except OSError as error:
            raise _unreadable(source, _words(error)) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a folder; a folder loses its name first, and then what is in it."""
        target = _local(path)
        if target is not None and target.is_dir():
            going = target.with_name(f".tmp-{uuid.uuid4().hex}")
            target.rename(going)
            path = going
        super().remove_checkpoint(path)


def check(path: str | Path) -> str | None:
    """None if the file or folder is a whole checkpoint, else what is wrong with it, in words."""
    if Path(path).is_dir():
        return sharded.damage(Path(path))
    try:
        with open(path, "rb") as file:
            return _damage(file)
    except OSError as error:
        return _words(error)


def refusal(path: Path) -> str | None:
    """None if the file or folder is a whole checkpoint, else what to say of it."""
    reason = check(path)
    return None if reason is None else str(_unreadable(path, reason))


def newest_valid(folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint of a folder, and the damaged ones that are newer, with reasons.

    Newest by the time of writing: a run resumed at an early step is newer than its first half.
    """
    passed_over = []
    there = Path(folder).glob(f"*{SUFFIX}")
    files = [path for path in there if path.is_file() or sharded.begun(path)]
    for path in sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        reason = check(path)
        if reason is None:
            return path, passed_over
        passed_over.append((path, reason))
    return None, passed_over


def refuse_foreign(value: Any, name: str = "") -> None:
    """Raise for anything in a checkpoint that `torch.load(weights_only=True)` will not read back.

    Now, by the name of its key, and not when the file is needed.
    """
    kind = type(value)
    if isinstance(value, Tensor) or kind in PLAIN or kind in PLAIN_TORCH:
        return
    if kind in (dict, OrderedDict, Counter):
        for key, item in value.items():
            refuse_foreign(key, f"a key of {name or 'the checkpoint'}")
            refuse_foreign(item, f"{name}[{key!r}]" if name else str(key))
    elif kind in CONTAINERS:
        for i, item in enumerate(value):
            refuse_foreign(item, f"{name}[{i}]")
    elif kind not in torch.serialization.get_safe_globals():
        raise CheckpointError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds tensors and "
            "plain values (numbers, text, lists, dicts): convert it, or leave it out with "
            "save_hyperparameters(ignore=[...])",
            exit_status=1,
        )


def _local(path: str | Path) -> Path | None:
    """The path on this machine; None for a remote one."""
    system, bare = url_to_fs(str(path))
    return Path(bare) if isinstance(system, LocalFileSystem) else None


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            _lock(file)  # held while we live: see _remove_leftovers
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch closes its archive and hides what the disk said
                raise _cause(error) or error from error
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def _cause(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _lock(file: IO[bytes]) -> None:
    with suppress(OSError):  # a file system without locks: then leftovers stay
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left; whoever still writes holds the lock of his file."""
    for leftover in folder.glob(".tmp-*"):
        with suppress(OSError), leftover.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _damage(file: IO[bytes], plain: bool = True) -> str | None:
    """What is wrong with an open checkpoint: torch.save writes an uncompressed zip archive."""
    start = file.read(4)
    if not start:
        return "it is empty"
    if start != b"PK\x03\x04":
        return "it is not a checkpoint: torch.save begins a file differently"
    try:
        archive = zipfile.ZipFile(file)
    except Exception:  # the table at the end of the file is missing or unreadable
        return f"it is cut short or damaged at its end ({file.seek(0, os.SEEK_END)} bytes)"
    try:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "it is not a checkpoint: a zip archive without data.pkl"
        if broken := archive.testzip():
            return f"it is damaged: {broken} does not match its checksum"
        if any(entry.external_attr for entry in archive.infolist()):
            # no checksum covers the table; torch gives uninitialised memory for a "folder"
            return "it is damaged: its table of contents was changed"
        file.seek(0)
        torch.load(file, "meta", weights_only=plain)  # everything but the numbers
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"it holds {name[1] if name else 'objects'}, more than tensors and plain values "
            "(if you trust its writer: trainer.fit(..., weights_only=False))"
        )
    except Exception as error:  # a flipped byte can ask zipfile and torch for anything
        return f"it is damaged ({' '.join(str(error).split())[:80] or type(error).__name__})"
    return None


def _words(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a checkpoint file"
    return f"it cannot be read ({error.strerror or error})"


def _unreadable(path: Path, reason: str) -> CheckpointError:
    other, _ = newest_valid(path.parent)
    way_out = f"the newest whole one there: --ckpt_path {other}" if other else "none there is whole"
    return CheckpointError(f"the checkpoint {path} cannot be used: {reason}; {way_out}")


def _missing(path: Path) -> CheckpointError:
    folder = path.parent
    names = sorted(p.name for p in folder.glob(f"*{SUFFIX}"))
    nearest = get_close_matches(path.name, names, n=3, cutoff=0) or names[:3]
    if not nearest:
        there = f"{folder} holds none" if folder.is_dir() else f"there is no folder {folder}"
        return CheckpointError(f"no checkpoint {path}: {there}; --ckpt_path auto finds the newest")
    return CheckpointError(
        f"no checkpoint {path}; {folder} holds {', '.join(nearest)}; "
        f"--ckpt_path {folder / nearest[0]}"
    )


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    way_out = (
        f"make room in {path.parent}, then go on with --ckpt_path auto"
        if full
        else f"make {path.parent} writable or choose a folder: --trainer.default_root_dir=<folder>"
    )
    return CheckpointError(
        f"the checkpoint {path} cannot be written ({error.strerror or error}); "
        f"the files written before are untouched; {way_out}",
        exit_status=1,
    )
