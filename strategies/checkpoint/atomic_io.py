"""Atomic checkpoint writes, and validated reads: a killed writer leaves the old file intact.

    write -> `ravine.files.atomic_write`
    read  <- verify each record's checksum, which torch does not <- tensors and plain types only

Ranks that resume together (`collective_loading`) map the file into memory. A machine holds its
pages once, and a rank copies the parts that it needs. One of the ranks verifies the checksum of
each record.
"""

import errno
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
from ravine.files import atomic_write

from . import mapped_file, sharded, sharded_index, validation, zip_archive
from .checkpoint_error import CheckpointError
from .mapped_file import SAFE_TORCH_TYPES, SAFE_TYPES
from .plain_values import with_plain_hyperparameters
from .reading_ranks import ReadingRanks
from .safe_pickle import UnsafePickle
from .staging_folder import STAGING_PATTERN

CHECKPOINT_SUFFIX = ".ckpt"
SAFE_CONTAINERS = (list, tuple, set)
MAX_OPEN_ATTEMPTS = 3  # to open the same file on all ranks, if a writer replaces it meanwhile
_verified_files: set[tuple[int, ...]] = set()  # verified checksums: 10 GB take 5 s
_collective_context: ContextVar[tuple[ReadingRanks, frozenset[str]]] = ContextVar(
    "together", default=(ReadingRanks(), frozenset())
)


@contextmanager
def collective_loading(
    mapped_sections: Collection[str] = (), should_share_checksums: bool = True
) -> Iterator[None]:
    """Return a context in which `load_checkpoint` is a collective; every rank calls it.

    The ranks divide the verification of checksums. All ranks read the same file, and raise the same
    error if it is damaged. With one process only `mapped_sections` has an effect.

    Args:
        mapped_sections: sections of a single file whose tensors are views of the mapped file. The
            caller copies the values that it keeps; see mapped_file.py about changes of the file.
        should_share_checksums: whether the ranks divide the checksums; if false, one rank may call
            it alone.
    """
    # ReadingRanks() is this process alone
    readers = ReadingRanks.from_job() if should_share_checksums else ReadingRanks()
    # `load_checkpoint` and `require_valid_folder` read this context variable
    token = _collective_context.set((readers, frozenset(mapped_sections)))
    try:
        yield
    finally:
        _collective_context.reset(token)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and validates them; `Trainer(plugins=[AtomicCheckpointIO()])`.

    Lightning's TorchCheckpointIO handles remote paths (s3://, gs://): object stores replace
    atomically.

    It removes only files that it has written itself, because a loaded checkpoint can name any file
    as one to remove.
    """

    def __init__(self) -> None:
        """Start with an empty set of written files."""
        super().__init__()
        self.written_paths: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint atomically; if it fails, the target is not changed.

        Remote paths, and any `storage_options`, are left to Lightning's TorchCheckpointIO.

        Raises:
            CheckpointError: the file cannot be written, or a value is not serializable.
        """
        # _local_path: the Path, or None for a remote address
        target = _local_path(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # converts e.g. numpy numbers and paths, which a safe load would refuse
        checkpoint = with_plain_hyperparameters(checkpoint)
        check_serializable(checkpoint)
        # `remove_checkpoint` removes only these paths
        self.written_paths.add(with_resolved_parent(target))
        try:
            _save_atomically(checkpoint, target)
        except OSError as error:
            raise write_error(target, error) from error

    def load_checkpoint(
        self,
        path: str | Path | IO[bytes],
        map_location: Any | None = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Validate and read a checkpoint; `weights_only=False` allows any pickled object.

        The path may also be an open file, which only one process reads. In the context of
        `collective_loading` all ranks read the checkpoint together. A folder (sharded checkpoint)
        is always read onto the CPU, as tensors and plain values only.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
        """
        # None counts as true
        is_safe = weights_only is not False
        if not isinstance(path, str | Path):
            return _load_open(path, map_location, is_safe)
        source = _local_path(path)
        if source is None:  # a remote address
            # by default Lightning unpickles any object from an http address: is_safe is passed
            return super().load_checkpoint(path, map_location, is_safe)
        readers, mapped_sections = _collective_context.get()
        if source.is_dir():
            require_valid_folder(source)
            try:
                # all shards of the folder are joined into full tensors
                return sharded.load_full(source)
            except CheckpointError as error:
                # _damage_error: adds the newest valid checkpoint to the message
                raise _damage_error(source, error.problem) from error
        return _load_file(source, map_location, is_safe, readers, mapped_sections)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or folder that this object has written; ignore any other path.

        A folder is renamed first, and then deleted.
        """
        target = _local_path(path)
        if target is None:  # a remote address
            super().remove_checkpoint(path)
        # with_resolved_parent: as the path was recorded. A link may lead to the checkpoint of
        # another run.
        elif with_resolved_parent(target) in self.written_paths and not target.is_symlink():
            self.written_paths.discard(with_resolved_parent(target))
            if target.is_dir():
                # a reader never finds a folder of which some files are missing under the old name
                removed_path = target.with_name(f".tmp-{uuid.uuid4().hex}")
                target.rename(removed_path)
                # errors are ignored, because another writer may remove it as well
                shutil.rmtree(removed_path, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)


def with_resolved_parent(path: Path) -> Path:
    """Resolve links and `..` in the parent folders of a path, but not the path itself."""
    return path.parent.resolve() / path.name


def find_damage(path: str | Path, verify_checksums: bool = True) -> str | None:
    """Return None if a file or folder is a valid checkpoint, else a description of the damage.

    Args:
        path: the file or folder.
        verify_checksums: whether all checksums are compared, once per process; if false, only the
            tables of contents and pickles are checked.
    """
    path = Path(path)
    key: tuple[int, ...] = ()  # identity of the content, to verify its checksums only once
    try:
        # a folder is a sharded checkpoint
        if path.is_dir():
            reason = sharded_index.find_structural_damage(path)
            if reason is None:
                key = sharded_index.folder_identity(path)
                # _verified_files: identities of files and folders that this process has verified
                if verify_checksums and key not in _verified_files:
                    reason = sharded_index.find_checksum_mismatch(path)
        else:
            with _open_regular_file(path) as file:
                key = _file_identity(file)
                reason = _find_file_damage(file)
                if reason is None and verify_checksums and key not in _verified_files:
                    reason = _find_checksum_mismatch(file)
    except OSError as error:
        return _describe_os_error(error)
    if reason is None and verify_checksums:
        _verified_files.add(key)
    return reason


def damage_error(path: Path, verify_checksums: bool = True) -> CheckpointError | None:
    """Return None if a checkpoint is valid, else the error to raise; see `find_damage`."""
    reason = find_damage(path, verify_checksums)
    return None if reason is None else _damage_error(path, reason)


def require_valid_folder(path: Path) -> None:
    """Raise CheckpointError if a folder is not a valid checkpoint.

    In the context of `collective_loading` every rank calls it. The ranks then divide the checksums,
    and raise the same error.
    """
    # readers: the ranks that load together; without the context this process alone
    readers, _ = _collective_context.get()
    key: tuple[int, ...] = ()  # identity of the content: device, then inode, size and times
    sizes: dict[str, int] = {}  # bytes of each file with tensor data

    def make_error(reason: str) -> CheckpointError:
        return _damage_error(path, reason)

    reason = sharded_index.find_structural_damage(path)
    if reason is None:
        try:
            key = sharded_index.folder_identity(path)
            sizes = sharded_index.tensor_file_sizes(path)
        except (OSError, CheckpointError) as error:  # it is being removed
            reason = error.problem if isinstance(error, CheckpointError) else str(error)
    # raises on all ranks if one of them has found a reason
    readers.raise_first_problem(reason, make_error)
    # without the device number: nodes may number a shared file system differently
    # assign_parts: the files that this rank verifies; none if a rank has verified this folder
    assigned_files = readers.assign_parts(sizes, key[1:], key in _verified_files)
    mismatch = sharded_index.find_checksum_mismatch(path, assigned_files)
    readers.raise_first_problem(mismatch, make_error)
    _verified_files.add(key)


def latest_valid_checkpoint(folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest valid checkpoint of a folder, and newer damaged ones with reasons.

    The order is by time of writing: after a resume at an early step, later files have lower steps.
    """
    rejected = []
    for _, path in sorted(list_checkpoints(folder), reverse=True):
        reason = find_damage(path)
        if reason is None:
            return path, rejected
        rejected.append((path, reason))
    return None, rejected


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder and its subfolders, with the time of writing (ns).

    Subfolders are searched because a metric's name in a file name, `{val/loss:.2f}`, makes a
    folder. Broken links, and files that another run removes meanwhile, are left out.
    """
    checkpoints = []
    for top, folders, files in os.walk(folder):
        candidates = [name for name in [*folders, *files] if name.endswith(CHECKPOINT_SUFFIX)]
        folders[:] = [  # changed in place: os.walk enters these folders
            name
            for name in folders
            # a candidate is a checkpoint itself; a folder that is being written or removed has a
            # temporary name
            if name not in candidates and not STAGING_PATTERN.fullmatch(name)
        ]
        for name in candidates:
            path = Path(top, name)
            with suppress(OSError):
                status = path.stat()
                # a folder counts if it has the files of a sharded checkpoint
                if stat.S_ISREG(status.st_mode) or sharded_index.looks_like_checkpoint(path):
                    checkpoints.append((status.st_mtime_ns, path))
    return checkpoints


def check_serializable(value: Any, name: str = "") -> None:
    """Raise CheckpointError for a value that `torch.load(weights_only=True)` cannot read back.

    The check runs before writing, because torch's error while reading does not name the key.

    Args:
        value: the checkpoint, or a part of it.
        name: path of the part in the checkpoint, for the error, e.g. "callbacks['EMA']".
    """
    value_type = type(value)
    # SAFE_TYPES: numbers, text and None; SAFE_TORCH_TYPES: shapes, devices, dtypes and layouts
    if isinstance(value, Tensor) or value_type in SAFE_TYPES or value_type in SAFE_TORCH_TYPES:
        return
    if value_type in (dict, OrderedDict, Counter):
        for key, item in value.items():
            check_serializable(key, f"a key of {name or 'the checkpoint'}")
            check_serializable(item, f"{name}[{key!r}]" if name else str(key))
    elif value_type in SAFE_CONTAINERS:
        for i, item in enumerate(value):
            check_serializable(item, f"{name}[{i}]")
    # get_safe_globals: classes that the user has allowed for a safe load
    elif value_type not in torch.serialization.get_safe_globals():
        raise CheckpointError(
            f"{name} is a {value_type.__module__}.{value_type.__qualname__}, which "
            "torch.load(weights_only=True) cannot read",
            ["tensors", "numbers", "text", "lists", "dicts"],
            "convert it, or leave it out with save_hyperparameters(ignore=[...])",
            exit_status=1,
        )


def _local_path(path: str | Path) -> Path | None:
    """Return the path on this machine; None for a remote path."""
    system, local_path = url_to_fs(str(path))
    return Path(local_path) if isinstance(system, LocalFileSystem) else None


def _save_atomically(checkpoint: dict[str, Any], target: Path) -> None:
    with atomic_write(target) as file:
        # torch.save, which raises the OSError of a full disk
        zip_archive.save_archive(checkpoint, file)


def _open_regular_file(path: Path) -> IO[bytes]:
    """Open a regular file to read; raise OSError for a folder, FIFO or device."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
    if stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def _file_identity(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def _load_file(
    path: Path,
    map_location: Any,
    is_safe: bool,
    readers: ReadingRanks,
    mapped_sections: frozenset[str],
) -> dict[str, Any]:
    """Validate a file on all ranks, and load it; the ranks divide the checksums.

    Each rank opens the file once, because another program may replace it between two openings.

    Args:
        path: the file.
        map_location: as in torch.load.
        is_safe: whether only tensors and plain values are allowed.
        readers: the ranks that load together.
        mapped_sections: top-level keys whose tensors are views of the mapped file.

    Raises:
        CheckpointError: the file is missing or damaged; the same error on all ranks.
    """

    def make_error(reason: str) -> CheckpointError:
        return _damage_error(path, reason)

    for _ in range(MAX_OPEN_ATTEMPTS):
        reason: str | CheckpointError | None = None
        file = None
        try:
            # raises OSError for a folder, FIFO or device
            file = _open_regular_file(path)
            reason = _find_file_damage(file, is_safe)
        except OSError as error:
            if os.path.lexists(path):
                reason = _describe_os_error(error)
            else:
                reason = _missing_file_error(path)
        try:
            # raises on all ranks if one of them has found a reason
            readers.raise_first_problem(reason, make_error)
            assert file is not None
            # key: device, then inode, size and times
            key = _file_identity(file)
            # table_checksum: files with equal tables of contents have equal content
            sizes, table_checksum = zip_archive.tensor_record_sizes(file)
            if len(set(readers.gather_values(table_checksum))) > 1:
                continue  # the file was replaced before the last rank opened it: open it again
            # The records that this rank verifies; none if a rank has verified this file. Without
            # the device number, because nodes may number a shared file system differently.
            # _verified_files: identities of the files that this process has verified
            assigned_records = readers.assign_parts(sizes, key[1:], key in _verified_files)
            checkpoint = None
            try:
                if (reason := _find_checksum_mismatch(file, assigned_records)) is None:
                    # as torch.load; the mapped sections become views of the file
                    checkpoint = _load_content(file, map_location, is_safe, mapped_sections)
            except OSError as error:
                reason = _describe_os_error(error)
            except (LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
                if not is_safe:  # code of the pickled objects may have raised it
                    raise
                reason = _describe_damage(error)
            readers.raise_first_problem(reason, make_error)
            _verified_files.add(key)
            return cast(dict[str, Any], checkpoint)  # another program may have written any type
        finally:
            if file is not None:
                file.close()
    # all attempts ended by `continue`
    raise make_error("another program replaced it while the ranks opened it")


def _load_open(file: IO[bytes], map_location: Any, plain: bool) -> dict[str, Any]:
    """Validate and load a checkpoint from an open file."""
    reason = _find_file_damage(file, plain) or _find_checksum_mismatch(file)
    if reason is not None:
        raise CheckpointError(f"the checkpoint in the open file cannot be used: {reason}")
    return _load_content(file, map_location, plain, frozenset())


def _load_content(
    file: IO[bytes], map_location: Any, is_safe: bool, mapped_sections: frozenset[str]
) -> Any:
    """Load the content of a validated file; tensors of `mapped_sections` are views of its pages."""
    if is_safe and mapped_sections and map_location in (None, "cpu"):
        with suppress(mapped_file.UnmappableFileError):
            return mapped_file.load_mapped(file, mapped_sections)
    file.seek(0)
    return torch.load(file, map_location, weights_only=is_safe)


def _find_checksum_mismatch(file: IO[bytes], names: Collection[str] | None = None) -> str | None:
    """Return a message for the first record with a wrong checksum, of `names` or of all."""
    with zipfile.ZipFile(file) as table:
        corrupt_record = zip_archive.find_corrupt_record(
            table, table.namelist() if names is None else names
        )
    return corrupt_record and f"it is damaged: {corrupt_record} does not match its checksum"


def _find_file_damage(file: IO[bytes], is_safe: bool = True) -> str | None:
    """Describe the damage of an open checkpoint, or return None if there is none.

    The file must be an uncompressed zip archive, as torch.save writes it. The checksums of tensor
    data are not compared; see `_find_checksum_mismatch`.

    Args:
        file: the open file.
        is_safe: whether only tensors and plain values are allowed.
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
            # torch.save writes no attributes, and no checksum covers the table. An attribute can
            # mark a record as a folder, for which torch returns uninitialized memory.
            return "it is damaged: its table of contents was changed"
        zip_archive.validate_zip_entries(table, size)
        if corrupt_record := zip_archive.find_corrupt_record(
            table, zip_archive.non_tensor_records(table)
        ):
            return f"it is damaged: {corrupt_record} does not match its checksum"
        if is_safe:
            zip_archive.validate_pickled_tensors(table, size)
        # _load_on_meta: with meta tensors; with values only if there is a sparse tensor
        return validation.find_malformed_section(_load_on_meta(file, is_safe))
    except (UnsafePickle, zip_archive.DamagedArchiveError) as error:
        return f"it is damaged ({error})"
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        return (
            f"it holds {name[1] if name else 'objects'}, more than tensors and plain values "
            "(if you trust its writer: trainer.fit(..., weights_only=False))"
        )
    except Exception as error:  # a flipped byte can make zipfile and torch raise any type
        return _describe_damage(error)


def _load_on_meta(file: IO[bytes], is_safe: bool) -> Any:
    """Load a checkpoint with meta tensors, or with values if it has sparse tensors."""
    for device in ("meta", "cpu"):
        file.seek(0)
        with suppress(NotImplementedError):  # torch compares the indices of a sparse tensor
            return torch.load(file, device, weights_only=is_safe)
    raise NotImplementedError("it holds a tensor that this version of torch cannot read")


def _describe_damage(error: BaseException) -> str:
    return f"it is damaged ({' '.join(str(error).split())[:80] or type(error).__name__})"


def _describe_os_error(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        link = error.filename is not None and os.path.islink(error.filename)
        return "it is a link to a missing file" if link else "the file does not exist"
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a checkpoint file"
    return f"it cannot be read ({error.strerror or error})"


def _damage_error(path: Path, reason: str) -> CheckpointError:
    latest, _ = latest_valid_checkpoint(path.parent)
    problem = f"the checkpoint {path} cannot be used: {reason}"
    if latest is None:
        return CheckpointError(
            problem, hint=f"no checkpoint in {path.parent} is valid: use another"
        )
    return CheckpointError(
        problem,
        hint=f'use ckpt_path="{latest}", the newest valid checkpoint there',
        flag=f"--ckpt_path={latest}",
    )


def _missing_file_error(path: Path) -> CheckpointError:
    """Return the error for a missing file, with the checkpoints of most similar names."""
    folder = path.parent
    names = sorted(p.name for p in folder.glob(f"*{CHECKPOINT_SUFFIX}"))
    nearest = sort_by_similarity(path.name, names)[:3]
    if nearest:
        return CheckpointError(
            f"there is no checkpoint {path}",
            nearest,
            f'use ckpt_path="{folder / nearest[0]}"',
            flag=f"--ckpt_path={folder / nearest[0]}",
        )
    reason = f"{folder} has no checkpoint" if folder.is_dir() else f"there is no folder {folder}"
    return CheckpointError(
        f"there is no checkpoint {path}: {reason}",
        hint="use the path of an existing checkpoint",
        # flag: the command line option that the error shows; "auto" takes the newest checkpoint
        flag="--ckpt_path=auto",
    )


def write_error(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a checkpoint that cannot be written.

    The hint names the newest checkpoint if space is missing, else a folder option.
    """
    problem = (
        f"the checkpoint {path} cannot be written ({error.strerror or error}); earlier "
        "checkpoints are unchanged"
    )
    # EFBIG is the limit of the process on the size of a file (ulimit -f)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        # list_checkpoints: pairs of time and path, so the maximum is the newest one
        latest = max(list_checkpoints(path.parent), default=None)
        restart = f"resume from {latest[1]}" if latest else "train anew: there is no checkpoint"
        return CheckpointError(
            problem, hint=f"free space in {path.parent}, then {restart}", exit_status=1
        )
    return CheckpointError(
        problem,
        hint=f"make {path.parent} writable, or use Trainer(default_root_dir=...)",
        flag="--trainer.default_root_dir=FOLDER",
        exit_status=1,
    )
