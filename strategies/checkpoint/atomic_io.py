"""Checkpoints that are whole or absent: whatever kills the writer, the file before it survives.

    write -> .tmp-<uuid> beside the target -> fsync -> rename onto the target -> fsync the folder
    read  <- every record's checksum, which torch does not compare <- tensors and plain types only

Ranks that resume together (`reading_together`) map the file: a machine holds its pages once, and a
rank copies what it uses. Each record's checksum is compared by one of the ranks.

The temporary file stands beside the target because a rename is atomic on one file system only; a
rename from $TMPDIR on another is a copy, and a copy that is killed leaves half a checkpoint.
"""

import errno
import fcntl
import os
import pickle
import re
import shutil
import stat
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from ravine.errors import sort_by_similarity

from . import mapped_file, sharded
from . import validation as checkpoint_form
from . import zip_archive as archive
from .checkpoint_error import CheckpointError as CheckpointError
from .mapped_file import PLAIN, PLAIN_TORCH
from .plain_values import with_plain_hyperparameters
from .reading_ranks import Readers
from .safe_pickle import UnsafePickle

SUFFIX = ".ckpt"
LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{32}")  # of a writer that was killed
CONTAINERS = (list, tuple, set)
TRIES = 3  # to open the same file on all ranks, if a writer replaces it meanwhile
_whole: set[tuple[int, ...]] = set()  # files whose sums were compared: one of 10 GB takes 5 s
_together: ContextVar[tuple[Readers, frozenset[str]]] = ContextVar(
    "together", default=(Readers(), frozenset())
)


@contextmanager
def reading_together(mapped: Collection[str] = (), divided: bool = True) -> Iterator[None]:
    """Let the ranks of the job share the work of `load_checkpoint`; every rank calls it.

    Each rank compares the checksums of its share. All ranks read one file, and refuse a damaged one
    with the same error. With one process only `mapped` has an effect.

    Args:
        mapped: sections of a single file whose tensors are views of the file's pages. The caller
            copies what it keeps; mapped_file.py says what happens to a view if the file changes.
        divided: whether the ranks share the checksums; if not, a rank may call it alone.
    """
    token = _together.set((Readers.of_job() if divided else Readers(), frozenset(mapped)))
    try:
        yield
    finally:
        _together.reset(token)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes checkpoint files; `Trainer(plugins=[AtomicCheckpointIO()])`.

    Remote paths (s3://, gs://) go to Lightning's own writer: object stores replace atomically.

    It removes only what it has written itself: a checkpoint names files of the run before, and
    may name any other.
    """

    def __init__(self) -> None:
        """Start without any written file."""
        super().__init__()
        self.written: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Stream the checkpoint to disk; on any failure the target is as it was before."""
        target = _local(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        checkpoint = with_plain_hyperparameters(checkpoint)
        refuse_foreign(checkpoint)
        self.written.add(resolved(target))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent)
            _write(checkpoint, target)
        except OSError as error:
            raise unwritable(target, error) from error

    def load_checkpoint(
        self,
        path: str | Path | IO[bytes],
        map_location: Any | None = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint that `check` finds whole; `weights_only=False` admits any object.

        The path may be an open file, which one process alone reads.
        """
        plain = weights_only is not False
        if not isinstance(path, str | Path):
            return _load_open(path, map_location, plain)
        source = _local(path)
        if source is None:  # Lightning would unpickle what an http address sends
            return super().load_checkpoint(path, map_location, plain)
        readers, mapped = _together.get()
        if source.is_dir():
            check_folder(source)
            try:
                return sharded.read_whole(source)
            except CheckpointError as error:
                raise _unreadable(source, str(error)) from error
        return _load(source, map_location, plain, readers, mapped)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a folder that this object has written; any other is left as it is.

        A folder loses its name first, and then what is in it.
        """
        target = _local(path)
        if target is None:
            super().remove_checkpoint(path)
        elif resolved(target) in self.written and not target.is_symlink():
            self.written.discard(resolved(target))
            if target.is_dir():
                going = target.with_name(f".tmp-{uuid.uuid4().hex}")
                target.rename(going)
                shutil.rmtree(going, ignore_errors=True)  # another writer may clear it away too
            else:
                target.unlink(missing_ok=True)


def resolved(path: Path) -> Path:
    """The path without links and without `..` in the folders above it."""
    return path.parent.resolve() / path.name


def check(path: str | Path, sums: bool = True) -> str | None:
    """None if the file or folder is a whole checkpoint, else what is wrong with it, in words.

    Args:
        path: the file or folder.
        sums: whether the checksums are compared, once a process; without, only tables and pickles
            are read.
    """
    path, key = Path(path), ()
    try:
        if path.is_dir():
            if (reason := sharded.structure(path)) is None:
                key = sharded.identity(path)
                if sums and key not in _whole:
                    reason = sharded.other_sum(path)
        else:
            with _opened(path) as file:
                key = _identity(file)
                if (reason := _damage(file)) is None and sums and key not in _whole:
                    reason = _other_sum(file)
    except OSError as error:
        return _words(error)
    if reason is None and sums:
        _whole.add(key)
    return reason


def refusal(path: Path, sums: bool = True) -> str | None:
    """None if the file or folder is a whole checkpoint, else what to say of it; see `check`."""
    reason = check(path, sums)
    return None if reason is None else str(_unreadable(path, reason))


def check_folder(path: Path) -> None:
    """Raise CheckpointError if a folder is no whole checkpoint; see `reading_together`."""
    readers, _ = _together.get()
    key: tuple[int, ...] = ()
    sizes: dict[str, int] = {}

    def words(reason: str) -> str:
        return str(_unreadable(path, reason))

    if (reason := sharded.structure(path)) is None:
        try:
            key, sizes = sharded.identity(path), sharded.lengths(path)
        except (OSError, CheckpointError) as error:  # it is being removed
            reason = str(error)
    readers.agree(reason, words)
    readers.agree(sharded.other_sum(path, readers.share(sizes, key[1:], key in _whole)), words)
    _whole.add(key)


def newest_valid(folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint of a folder, and the damaged ones that are newer, with reasons.

    Newest by the time of writing: a run resumed at an early step is newer than its first half.
    """
    passed_over = []
    for _, path in sorted(dated(folder), reverse=True):
        reason = check(path)
        if reason is None:
            return path, passed_over
        passed_over.append((path, reason))
    return None, passed_over


def dated(folder: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder and in those below it, with the time of writing (ns).

    Below it, because a metric's name has a slash: `{val/loss:.2f}` in a file name makes a folder.
    A link to nowhere, and a file that another run removes meanwhile, are left out.
    """
    found = []
    for top, folders, files in os.walk(folder):
        whole = [name for name in folders if name.endswith(SUFFIX)]
        folders[:] = [name for name in folders if name not in whole and not name.startswith(".tmp")]
        for name in [*whole, *(name for name in files if name.endswith(SUFFIX))]:
            path = Path(top, name)
            with suppress(OSError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode) or sharded.begun(path):
                    found.append((status.st_mtime_ns, path))
    return found


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
    temporary, file = _draft(target.parent)
    try:
        with file:
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


def _draft(folder: Path) -> tuple[Path, IO[bytes]]:
    """A new file, locked as long as it is open: see _remove_leftovers.

    Between its making and its lock another writer may take it for a leftover; then the next is
    made.
    """
    for attempt in range(20):
        path = folder / f".tmp-{uuid.uuid4().hex}"
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return path, file
        except (BlockingIOError, FileNotFoundError):  # it is being removed, or was
            pass
        except OSError:  # a file system without locks: then leftovers stay
            return path, file
        if attempt < 19:
            file.close()
            path.unlink(missing_ok=True)
    return path, file  # the write will raise the error


def _cause(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _remove_leftovers(folder: Path) -> None:
    """Remove files of killed writers; a live writer holds the lock of its file."""
    for leftover in folder.glob(".tmp-*"):
        if LEFTOVER.fullmatch(leftover.name) and not leftover.is_symlink():
            with suppress(OSError), leftover.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _opened(path: Path) -> IO[bytes]:
    """Open a file to read; a FIFO or a device, which might never end, is an error."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    if stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def _load(
    path: Path, map_location: Any, plain: bool, readers: Readers, mapped: frozenset[str]
) -> dict[str, Any]:
    """Read a file that all ranks find undamaged, through one handle: it may be replaced."""

    def words(reason: str) -> str:
        return reason if reason.startswith("no checkpoint ") else str(_unreadable(path, reason))

    for _ in range(TRIES):
        reason, file = None, None
        try:
            file = _opened(path)
            reason = _damage(file, plain)
        except OSError as error:
            reason = str(_missing(path)) if not os.path.lexists(path) else _words(error)
        try:
            readers.agree(reason, words)
            assert file is not None
            key, (sizes, table) = _identity(file), archive.tensors(file)
            if len(set(readers.gather(table))) > 1:  # replaced before the last rank opened it
                continue
            mine = readers.share(sizes, key[1:], key in _whole)
            checkpoint = None
            try:
                if (reason := _other_sum(file, mine)) is None:
                    checkpoint = _read(file, map_location, plain, mapped)
            except OSError as error:
                reason = _words(error)
            except (LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
                if not plain:
                    raise
                reason = _damaged(error)
            readers.agree(reason, words)
            _whole.add(key)
            return cast(dict[str, Any], checkpoint)  # another program may have written any type
        finally:
            if file is not None:
                file.close()
    raise CheckpointError(words("it was replaced again and again while the ranks opened it"))


def _load_open(file: IO[bytes], map_location: Any, plain: bool) -> dict[str, Any]:
    """Read a checkpoint from an open file."""
    reason = _damage(file, plain) or _other_sum(file)
    if reason is not None:
        raise CheckpointError(f"the checkpoint in the open file cannot be used: {reason}")
    return _read(file, map_location, plain, frozenset())


def _read(file: IO[bytes], map_location: Any, plain: bool, mapped: frozenset[str]) -> Any:
    """The content of a file that was checked; `mapped` sections as views of its pages."""
    if plain and mapped and map_location in (None, "cpu"):
        with suppress(mapped_file.Unmappable):
            return mapped_file.load(file, mapped)
    file.seek(0)
    return torch.load(file, map_location, weights_only=plain)


def _other_sum(file: IO[bytes], names: Collection[str] | None = None) -> str | None:
    """The first record that does not match its checksum, of these names or of all."""
    with zipfile.ZipFile(file) as table:
        broken = archive.broken(table, table.namelist() if names is None else names)
    return broken and f"it is damaged: {broken} does not match its checksum"


def _damage(file: IO[bytes], plain: bool = True) -> str | None:
    """What is wrong with an open checkpoint; the checksums of tensor data are not compared.

    torch.save writes an uncompressed zip archive.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(4)
    if not start:
        return "it is empty"
    if start != b"PK\x03\x04":
        return "it is not a checkpoint: torch.save begins a file differently"
    try:
        table = zipfile.ZipFile(file)
    except Exception:  # the table at the end of the file is missing or unreadable
        return f"it is cut short or damaged at its end ({size} bytes)"
    try:
        if not any(name.partition("/")[2] == "data.pkl" for name in table.namelist()):
            return "it is not a checkpoint: a zip archive without data.pkl"
        if any(entry.external_attr for entry in table.infolist()):
            # no checksum covers the table; torch gives uninitialised memory for a "folder"
            return "it is damaged: its table of contents was changed"
        archive.check_contents(table, size)
        if broken := archive.broken(table, archive.others(table)):
            return f"it is damaged: {broken} does not match its checksum"
        if plain:
            archive.check_pickle(table, size)
        return checkpoint_form.odd(_without_numbers(file, plain))
    except (UnsafePickle, archive.DamagedArchive) as error:
        return f"it is damaged ({error})"
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"it holds {name[1] if name else 'objects'}, more than tensors and plain values "
            "(if you trust its writer: trainer.fit(..., weights_only=False))"
        )
    except Exception as error:  # a flipped byte can ask zipfile and torch for anything
        return _damaged(error)


def _without_numbers(file: IO[bytes], plain: bool) -> Any:
    """The content of a checkpoint with meta tensors; with numbers if there are sparse tensors."""
    for device in ("meta", "cpu"):
        file.seek(0)
        with suppress(NotImplementedError):  # torch compares the indices of a sparse tensor
            return torch.load(file, device, weights_only=plain)
    raise NotImplementedError("it holds a tensor that this version of torch cannot read")


def _damaged(error: BaseException) -> str:
    return f"it is damaged ({' '.join(str(error).split())[:80] or type(error).__name__})"


def _words(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        link = error.filename is not None and os.path.islink(error.filename)
        return "it is a link to a file that is not there" if link else "there is no such file"
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
    nearest = sort_by_similarity(path.name, names)[:3]
    if not nearest:
        there = f"{folder} holds none" if folder.is_dir() else f"there is no folder {folder}"
        return CheckpointError(f"no checkpoint {path}: {there}; --ckpt_path auto finds the newest")
    return CheckpointError(
        f"no checkpoint {path}; {folder} holds {', '.join(nearest)}; "
        f"--ckpt_path {folder / nearest[0]}"
    )


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """The error for a checkpoint that the system will not write, with what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    before = max(dated(path.parent), default=None)
    again = f"go on with --ckpt_path {before[1]}" if before else "begin anew: there is none before"
    way_out = (
        f"make room in {path.parent}, then {again}"
        if full
        else f"make {path.parent} writable or choose a folder: --trainer.default_root_dir=<folder>"
    )
    return CheckpointError(
        f"the checkpoint {path} cannot be written ({error.strerror or error}); "
        f"the files written before are untouched; {way_out}",
        exit_status=1,
    )
