"""Sharded checkpoints: a folder to which each rank writes its shards, with a manifest.

    step=000100.ckpt/  __0_0.distcp __1_0.distcp ...   torch.distributed.checkpoint, a file per rank
                       .metadata                       index: the location of each chunk of a tensor
                       meta.pt                         everything except the large tensors
                       manifest.json                   size and checksum of each file, written last

The folder is written under another name and renamed. It is valid only if the manifest, which is
written last, is present. A tensor is found by its path in the checkpoint, and any part of it can be
read. So a checkpoint of any layout can be loaded with any other layout, or merged into one file. A
tensor with several names (tied weights) is written once; the index has one location for all names.
"""

import errno
import fcntl
import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from ravine.errors import UsageError
from ravine.files import fsync

from ..dtensor import MAX_MESSAGE_BYTES, IndexRange, ShardIndices, shard_blocks, shard_indices
from . import safe_pickle, zip_archive
from .checkpoint_error import CheckpointError
from .safe_pickle import CallRecord, GlobalName, UnsafePickle

MANIFEST_FILE, META_FILE, INDEX_FILE = "manifest.json", "meta.pt", ".metadata"
MAX_ENTRY_BYTES = 2000  # of a manifest entry: an escaped name of 255 bytes, and two numbers
SHARDED_KEYS = ("state_dict", "optimizer_states", "ema")  # sections whose tensors are sharded
TensorPath = tuple[str | int, ...]
STAGING_PATTERN = re.compile(r"\.tmp-[0-9a-f]{32}(-old)?")  # folders of killed writers
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_FILESYSTEM_MODULE = "torch.distributed.checkpoint.filesystem"
DTYPES_BY_NAME = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
ALLOWED_INDEX_NAMES = {  # the classes and functions that an index may name
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA_MODULE, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_METADATA_MODULE, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    (_FILESYSTEM_MODULE, "_StorageInfo"),
    ("torch", "Size"),
    *(("torch", name) for name in DTYPES_BY_NAME),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint of which each rank has its shards; every rank calls it.

    If one rank fails, all ranks raise, and an earlier checkpoint at `path` is not changed.
    """
    rank = dist.get_rank()
    tensors, unsharded = split_tensors(checkpoint)
    with _StagingFolder(path, rank) as (staging, error):
        _broadcast_error(error)
        alias_keys = _alias_keys(tensors)
        writer = _AliasingWriter(
            staging, {k: v for rank_value in _all_gather(alias_keys) for k, v in rank_value.items()}
        )
        tensors_by_key = {
            encode_path(tensor_path): tensor for tensor_path, tensor in tensors.items()
        }
        try:
            save(
                {k: v for k, v in tensors_by_key.items() if k not in alias_keys},
                storage_writer=writer,
            )
        except CheckpointException as problem:  # on all ranks; not a subclass of Exception
            raise _os_error_of(problem) from problem
        states_by_rank = _all_gather(_non_tensor_states(unsharded))
        error = None
        checksums_by_rank = _all_gather(
            {f.name: _file_checksum(f) for f in staging.glob(f"__{rank}_*")}
        )
        if rank == 0:
            try:
                for tensor_path, value in (
                    pair for rank_value in states_by_rank for pair in rank_value.items()
                ):
                    set_nested(unsharded, tensor_path, value)
                with (staging / META_FILE).open("wb") as file:
                    torch.save(unsharded, file)
                files = {n: s for rank_value in checksums_by_rank for n, s in rank_value.items()}
                _save_manifest(staging, files)
                _replace_folder(staging, path)
            except OSError as problem:
                error = problem
        _broadcast_error(error)


def _os_error_of(problem: CheckpointException) -> BaseException:
    """Return the OSError of some rank, e.g. of a full disk, else the exception itself."""
    for error, _ in problem.failures.values():
        if isinstance(error, OSError):
            return error
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            # torch closes its archive and hides the OSError, which other ranks do not receive
            return OSError(errno.ENOSPC, "no space left, or a limit on the size of files")
    return problem


def _alias_keys(tensors: dict[TensorPath, Tensor]) -> dict[str, str]:
    """Map each additional name of a tensor to the name under which it is written."""
    first_by_id: dict[int, str] = {}
    keys = {
        encode_path(tensor_path): first_by_id.setdefault(id(t), encode_path(tensor_path))
        for tensor_path, t in tensors.items()
    }
    return {key: first_key for key, first_key in keys.items() if first_key != key}


class _AliasingWriter(FileSystemWriter):
    """A FileSystemWriter that adds aliases of tensors to the index."""

    def __init__(self, path: Path, alias_keys: dict[str, str]) -> None:
        super().__init__(path, thread_count=1)
        self.alias_keys = alias_keys

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        results_by_key: dict[str, list[WriteResult]] = {}
        for result in (rank_result for rank in results for rank_result in rank):
            results_by_key.setdefault(result.index.fqn, []).append(result)
        alias_results = []
        for key, first in self.alias_keys.items():
            if key not in results_by_key:
                metadata.state_dict_metadata[key] = metadata.state_dict_metadata[first]
                alias_results += [
                    replace(r, index=replace(r.index, fqn=key)) for r in results_by_key[first]
                ]
        super().finish(metadata, [*results, alias_results])


class _StagingFolder:
    """A locked temporary folder, which other writers may remove after its writer was killed.

    Another writer may remove it between creation and locking. Then another folder is created.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.lock_fd = path, rank, None
        self.folder = path

    def __enter__(self) -> tuple[Path, OSError | None]:
        error = None
        if self.rank == 0:
            try:
                self._create()
            except OSError as problem:
                error = problem
        name: list[Any] = [self.folder.name]
        dist.broadcast_object_list(name)
        self.folder = self.path.with_name(name[0])
        return self.folder, error

    def _create(self) -> None:
        if (
            self.path.is_dir()
            and not self.path.is_symlink()
            and not looks_like_checkpoint(self.path)
        ):
            raise OSError(errno.EEXIST, "a folder that is no checkpoint stands there")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_folders(self.path.parent)
        while self.lock_fd is None:
            candidate = self.path.with_name(f".tmp-{uuid.uuid4().hex}")
            candidate.mkdir()
            self.folder = candidate
            with suppress(BlockingIOError, FileNotFoundError):  # another writer is removing it
                candidate_lock = _lock_folder(candidate)
                if candidate.is_dir() and os.path.samestat(
                    os.fstat(candidate_lock), candidate.stat()
                ):
                    self.lock_fd = candidate_lock
                else:
                    os.close(candidate_lock)

    def __exit__(self, *_: Any) -> None:
        if self.rank == 0:
            if self.folder != self.path:
                shutil.rmtree(self.folder, ignore_errors=True)  # unless it was renamed
            if self.lock_fd is not None:
                os.close(self.lock_fd)


def remove_stale_folders(folder: Path) -> None:
    """Remove the folders of killed writers; a running writer holds a lock on its folder."""
    for leftover in folder.glob(".tmp-*/"):
        if STAGING_PATTERN.fullmatch(leftover.name) and not leftover.is_symlink():
            with suppress(OSError):
                lock = _lock_folder(leftover)
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _lock_folder(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _broadcast_error(error: OSError | None) -> None:
    """Raise rank 0's error on every rank."""
    message: list[Any] = [None if error is None else (error.errno, error.strerror or str(error))]
    dist.broadcast_object_list(message)
    if error is not None:
        raise error
    if message[0] is not None:
        raise OSError(*message[0])


def _all_gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _save_manifest(staging: Path, files: dict[str, list[int]]) -> None:
    """Write the manifest atomically, after fsync of the files that it lists."""
    for name in (META_FILE, INDEX_FILE):
        files[name] = _file_checksum(staging / name)
        fsync(staging / name)
    text = json.dumps({"format": 1, "files": files}, indent=1)
    (staging / ".manifest").write_text(text)
    fsync(staging / ".manifest")
    os.replace(staging / ".manifest", staging / MANIFEST_FILE)
    fsync(staging)


def _replace_folder(staging: Path, path: Path) -> None:
    old = path.with_name(f"{staging.name}-old")
    if os.path.lexists(path):
        os.replace(path, old)
    os.replace(staging, path)
    fsync(path.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _file_checksum(path: Path) -> list[int]:
    """Return the size in bytes and the CRC-32 of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a folder holds any file of a sharded checkpoint."""
    return any((path / name).exists() for name in (MANIFEST_FILE, META_FILE, INDEX_FILE))


def find_folder_damage(path: Path) -> str | None:
    """Return None if the folder is a valid checkpoint, else a description of the damage."""
    reason = find_structural_damage(path)
    return find_checksum_mismatch(path) if reason is None else reason


def find_structural_damage(path: Path) -> str | None:
    """Return the damage of a folder, without comparing the checksums of tensor data."""
    if not (path / MANIFEST_FILE).is_file():
        if not looks_like_checkpoint(path):
            return "it is a folder, not a checkpoint file"
        return f"it is incomplete: a folder without {MANIFEST_FILE}, which is written last"
    try:
        files = _load_manifest(path)
        for name, (size, _) in files.items():
            if not (path / name).is_file():
                return f"its part {name} is missing"
            if (path / name).stat().st_size != size:
                return f"its part {name} does not match its checksum"
        if (reason := find_checksum_mismatch(path, [META_FILE, INDEX_FILE])) is not None:
            return reason
        with (path / META_FILE).open("rb") as file, zipfile.ZipFile(file) as table:
            zip_archive.validate_zip_entries(table, files[META_FILE][0])
            zip_archive.validate_pickled_tensors(table, files[META_FILE][0])
        _load_index(path)
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # a changed byte can make zipfile raise nearly any type
        text = " ".join(str(error).split())[:80] or type(error).__name__
        return f"its part {META_FILE} is damaged ({text})"
    return None


def find_checksum_mismatch(path: Path, names: Collection[str] | None = None) -> str | None:
    """Return the first mismatch of a checksum, of these files or of all with tensor data."""
    try:
        checked_names = tensor_file_sizes(path) if names is None else names
        for name, (size, crc) in _load_manifest(path).items():
            if name in checked_names and _file_checksum(path / name) != [size, crc]:
                return f"its part {name} does not match its checksum"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def tensor_file_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each file that holds tensor data."""
    return {
        name: size
        for name, (size, _) in _load_manifest(path).items()
        if name not in (META_FILE, INDEX_FILE)
    }


def folder_identity(path: Path) -> tuple[int, ...]:
    """Return an identity of a folder's content: device, and inode, size and times of each file."""
    values = [path.stat().st_dev]
    for name in [MANIFEST_FILE, *sorted(_load_manifest(path))]:
        status = (path / name).stat()
        values += [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return tuple(values)


def _load_manifest(path: Path) -> dict[str, tuple[int, int]]:
    """Read the size and checksum of each file, by name, from the manifest.

    Raises:
        CheckpointError: the manifest is damaged, or does not list META_FILE and INDEX_FILE.
    """
    limit = MAX_ENTRY_BYTES * (2 + sum(1 for _ in path.iterdir()))
    with (path / MANIFEST_FILE).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # a megabyte of nested lists takes seconds to parse
        raise CheckpointError(f"its {MANIFEST_FILE} is longer than {limit:,} bytes")
    try:
        files = json.loads(content)["files"]
        entries = {str(name): (int(size), int(crc)) for name, (size, crc) in files.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise CheckpointError(f"its {MANIFEST_FILE} is damaged") from None
    if any(name != os.path.basename(name) or name in ("", ".", "..") for name in entries):
        raise CheckpointError(f"its {MANIFEST_FILE} names a file outside the folder")
    if missing := {META_FILE, INDEX_FILE} - entries.keys():
        raise CheckpointError(f"its {MANIFEST_FILE} does not list {' and '.join(sorted(missing))}")
    return entries


def split_tensors(checkpoint: dict[str, Any]) -> tuple[dict[TensorPath, Tensor], dict[str, Any]]:
    """Split a checkpoint into the tensors of SHARDED_KEYS, by their path, and the rest."""
    tensors: dict[TensorPath, Tensor] = {}
    first_by_id: dict[int, Tensor] = {}  # a tensor with several names stays one object

    def remove_tensors(value: Any, tensor_path: TensorPath) -> Any:
        if isinstance(value, dict):
            remaining = {k: remove_tensors(v, (*tensor_path, k)) for k, v in value.items()}
            return {k: v for k, v in remaining.items() if (*tensor_path, k) not in tensors}
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(remove_tensors(v, (*tensor_path, i)) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            tensors[tensor_path] = first_by_id.setdefault(id(value), value.detach())
        return value

    unsharded = {
        k: remove_tensors(v, (k,)) if k in SHARDED_KEYS else v for k, v in checkpoint.items()
    }
    return tensors, unsharded


def _non_tensor_states(unsharded: dict[str, Any]) -> dict[TensorPath, Any]:
    """Return the non-tensor optimizer states by path, because another rank may own them."""
    return {
        ("optimizer_states", i, "state", number, key): value
        for i, state in enumerate(unsharded.get("optimizer_states", []))
        for number, values in state.get("state", {}).items()
        for key, value in values.items()
    }


def encode_path(tensor_path: TensorPath) -> str:
    """Encode a path as the name of a tensor in the index."""
    return json.dumps(tensor_path)


def set_nested(tree: dict[Any, Any], tensor_path: TensorPath, value: Any) -> None:
    """Set a value at a path of nested dicts and lists, creating missing dicts."""
    node: Any = tree
    step: Any
    for step in tensor_path[:-1]:
        node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
    node[tensor_path[-1]] = value


def _load_index(path: Path) -> Metadata:
    """Load torch's index of the chunks safely: it is rebuilt from validated plain values.

    The index is a pickle. No class or function that it names is called, and it may name only those
    of ALLOWED_INDEX_NAMES.

    Raises:
        CheckpointError: the index names another class, or does not match the files.
    """
    file_sizes = {name: size for name, (size, _) in _load_manifest(path).items()}
    try:
        content = (path / INDEX_FILE).read_bytes()
        root = safe_pickle.load_plain(
            content,
            lambda global_name: (global_name.module, global_name.name) in ALLOWED_INDEX_NAMES,
        )
        return _parse_metadata(root, file_sizes)
    except UnsafePickle as error:
        raise CheckpointError(f"its {INDEX_FILE} cannot be used: {error}") from None
    except OSError as error:
        raise CheckpointError(f"its {INDEX_FILE} cannot be read ({error.strerror})") from None
    except (AssertionError, LookupError, RecursionError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise CheckpointError(f"its {INDEX_FILE} is damaged ({text})") from None


def _parse_metadata(root: Any, file_sizes: dict[str, int]) -> Metadata:
    fields = _record_fields(root, "Metadata")
    entries, storage_infos = {}, {}
    total = 0
    bytes_by_location: dict[tuple[Any, ...], int] = {}
    for key, record in fields["state_dict_metadata"].items():
        if record.name.name != "BytesStorageMetadata":
            _decode_path(key)
            entries[key] = entry = _parse_tensor_entry(record)
            total += math.prod(entry.size) * entry.properties.dtype.itemsize
    # names may share a tensor
    if total > 4 * sum(file_sizes.values()) + zip_archive.MAX_EXTRA_BYTES:
        raise UsageError("its tensors are larger than its parts")
    for record, info_record in fields["storage_data"].items():
        index, info = (
            _record_fields(record, "MetadataIndex"),
            _record_fields(info_record, "_StorageInfo"),
        )
        name, start, length = info["relative_path"], info["offset"], info["length"]
        if info.get("transform_descriptors"):
            raise UsageError("a part is compressed")
        if name not in file_sizes or not 0 <= start <= start + length <= file_sizes[name]:
            raise UsageError("a tensor is outside its part")
        offset = None if index.get("offset") is None else _parse_shape(index["offset"])
        storage_infos[MetadataIndex(index["fqn"], offset)] = _StorageInfo(name, start, length)
    for key, entry in entries.items():
        for chunk in entry.chunks:
            if (info := storage_infos.get(MetadataIndex(key, chunk.offsets))) is None:
                raise UsageError(f"{key[:40]} is in no part")
            size = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            bytes_by_location[info.relative_path, info.offset] = size
            if size > info.length:
                raise UsageError(f"{key[:40]} is larger than its part")
    if sum(bytes_by_location.values()) > sum(file_sizes.values()):
        raise UsageError("its tensors are larger than its parts")
    return Metadata(entries, storage_data=storage_infos, storage_meta=StorageMeta())


def _record_fields(record: Any, name: str) -> dict[str, Any]:
    if not isinstance(record, CallRecord) or record.name.name != name:
        raise UsageError(f"no {name}")
    if not isinstance(record.state, dict):
        raise UsageError(f"a {name} without its fields")
    return record.state


def _parse_tensor_entry(record: Any) -> TensorStorageMetadata:
    fields = _record_fields(record, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, GlobalName) or dtype.name not in DTYPES_BY_NAME:
        raise UsageError("a tensor of no dtype")
    size = _parse_shape(fields["size"])
    chunks = []
    for chunk_record in fields["chunks"]:
        chunk_fields = _record_fields(chunk_record, "ChunkStorageMetadata")
        chunk = ChunkStorageMetadata(
            _parse_shape(chunk_fields["offsets"]), _parse_shape(chunk_fields["sizes"])
        )
        ends = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if any(start + length > full_size for start, length, full_size in ends):
            raise UsageError("a part of a tensor is outside the tensor")
        chunks.append(chunk)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise UsageError("the parts of a tensor are not the whole")
    return TensorStorageMetadata(TensorProperties(DTYPES_BY_NAME[dtype.name]), size, chunks)


def _parse_shape(record: Any) -> torch.Size:
    (sizes,) = record.arguments if record.name == GlobalName("torch", "Size") else ((-1,),)
    if len(sizes) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise UsageError("a shape is no shape")
    return torch.Size(sizes)


def _decode_path(key: str) -> TensorPath:
    tensor_path = tuple(json.loads(key))
    is_valid = 2 <= len(tensor_path) <= 16 and all(type(step) in (str, int) for step in tensor_path)
    if not is_valid or tensor_path[0] not in SHARDED_KEYS:
        raise UsageError(f"{key[:40]} is no place in a checkpoint")
    return tensor_path


class StoredTensor(NamedTuple):
    """A tensor of a sharded checkpoint: shape, dtype, and the location of each chunk."""

    entry: TensorStorageMetadata
    chunks: list[tuple[ChunkStorageMetadata, _StorageInfo]]

    @property
    def location(self) -> tuple[Any, ...]:
        """Return the file and offset of each chunk; equal for two names of one tensor."""
        return tuple((info.relative_path, info.offset) for _, info in self.chunks)


def list_stored_tensors(path: Path) -> dict[TensorPath, StoredTensor]:
    """Return all tensors in the index of a folder, by their path in the checkpoint."""
    metadata, tensors = _load_index(path), {}
    for key, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        chunks = [(c, metadata.storage_data[MetadataIndex(key, c.offsets)]) for c in entry.chunks]
        tensors[_decode_path(key)] = StoredTensor(entry, chunks)
    return tensors


def iter_tensor_entries(path: Path) -> Iterator[tuple[TensorPath, TensorStorageMetadata]]:
    """Yield path and entry (shape, dtype) of each tensor in the index of a folder."""
    for tensor_path, stored_tensor in list_stored_tensors(path).items():
        yield tensor_path, stored_tensor.entry


def load_sharded(path: Path, tensors: dict[TensorPath, Tensor]) -> None:
    """Load tensors, or this rank's shards of them, in place, without communication.

    Only the needed rows of each chunk are read, at most MAX_MESSAGE_BYTES at a time. A tensor with
    two names is read once.

    Raises:
        CheckpointError: the files do not match the index.
    """
    try:
        stored_tensors, loaded = list_stored_tensors(path), set()
        for tensor_path, tensor in tensors.items():
            stored_tensor = stored_tensors[tensor_path]
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            load_key = (local.data_ptr(), tuple(local.shape), stored_tensor.location)
            if not local.numel() or load_key in loaded:
                continue
            loaded.add(load_key)
            if tensor.shape != stored_tensor.entry.size:
                raise UsageError(f"{encode_path(tensor_path)[:40]} has another shape")
            for chunk, info in stored_tensor.chunks:
                dtype = stored_tensor.entry.properties.dtype
                _load_chunk(path, info, chunk, dtype, local.detach(), shard_indices(tensor))
    except CheckpointError:
        raise
    except Exception as error:  # a changed byte can make zipfile and torch raise nearly any type
        text = " ".join(str(error).split())[-120:] or type(error).__name__
        raise CheckpointError(f"the parts of {path} are not those of its index ({text})") from error


def _load_chunk(
    path: Path,
    info: _StorageInfo,
    chunk: ChunkStorageMetadata,
    dtype: torch.dtype,
    local: Tensor,
    indices: ShardIndices,
) -> None:
    """Copy a chunk of a tensor into `local`, this rank's shard, given by `indices`."""
    chunk_indices = [
        _intersect_ranges(ranges, start, size)
        for ranges, start, size in zip(indices, chunk.offsets, chunk.sizes, strict=True)
    ]
    if not all(chunk_indices):
        return
    with Path(path, info.relative_path).open("rb") as file:
        window = zip_archive.FileWindow(file, info.offset, info.length)
        with zipfile.ZipFile(window) as table:  # type: ignore[arg-type]
            zip_archive.validate_zip_entries(table, info.length)
            zip_archive.validate_pickled_tensors(table, info.length)
            window.seek(0)
            stored_tensor = torch.load(window, "meta", weights_only=True)  # type: ignore[arg-type]
            if (
                not isinstance(stored_tensor, Tensor)
                or stored_tensor.shape != chunk.sizes
                or stored_tensor.dtype != dtype
            ):
                raise UsageError("a part holds another tensor")
            record = zip_archive.open_tensor_record(table, window)  # type: ignore[arg-type]
        is_dense = (
            stored_tensor.is_contiguous()
            and not stored_tensor.storage_offset()
            and not stored_tensor.is_conj()
        )
        if not is_dense or record.length < stored_tensor.numel() * dtype.itemsize:
            window.seek(0)
            stored_tensor = torch.load(window, "cpu", weights_only=True)  # type: ignore[arg-type]
            for source, target in shard_blocks(chunk_indices):
                local[target] = stored_tensor[source].to(local.device)
            return
        for first, last, rows_tensor in _load_rows(
            record, chunk.sizes, dtype, chunk_indices[0] if chunk_indices else []
        ):
            row_indices = (
                [_intersect_ranges(chunk_indices[0], first, last - first), *chunk_indices[1:]]
                if chunk_indices
                else []
            )
            for source, target in shard_blocks(row_indices):
                local[target] = rows_tensor[source].to(local.device)


def _intersect_ranges(ranges: list[IndexRange], start: int, size: int) -> list[IndexRange]:
    """Intersect index ranges with [start, start + size), relative to `start`."""
    intersection = []
    for index_range in ranges:
        first, last = (
            max(index_range.global_start, start),
            min(index_range.global_start + index_range.length, start + size),
        )
        if first < last:
            intersection.append(
                IndexRange(
                    first - start,
                    index_range.local_start + first - index_range.global_start,
                    last - first,
                )
            )
    return intersection


def _load_rows(
    record: zip_archive.FileWindow,
    sizes: torch.Size,
    dtype: torch.dtype,
    wanted_ranges: list[IndexRange],
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield start row, end row and values of pieces of a dense tensor with the wanted rows."""
    row_bytes = math.prod(sizes[1:]) * dtype.itemsize
    step = max(1, MAX_MESSAGE_BYTES // max(1, row_bytes))
    for index_range in wanted_ranges if sizes else [IndexRange(0, 0, 1)]:
        for first in range(
            index_range.global_start, index_range.global_start + index_range.length, step
        ):
            last = min(first + step, index_range.global_start + index_range.length)
            content = bytearray((last - first) * row_bytes)
            record.seek(first * row_bytes)
            if record.readinto(content) != len(content):
                raise UsageError("a part is cut short")
            shape = [last - first, *sizes[1:]] if sizes else []
            yield first, last, torch.frombuffer(content, dtype=dtype).view(shape)


def empty_like_entry(entry: TensorStorageMetadata, parameter: Tensor | None) -> Tensor:
    """Return an empty tensor for an entry, sharded like `parameter` if the shapes are equal."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and parameter.shape == entry.size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype)


def load_unsharded(path: Path) -> dict[str, Any]:
    """Load META_FILE: the checkpoint without the sharded tensors.

    Raises:
        CheckpointError: torch cannot read the file, even if its checksum matches.
    """
    try:
        return torch.load(path / META_FILE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message recommends weights_only=False
        raise CheckpointError(
            f"its {META_FILE} holds more than tensors and plain values"
        ) from error
    except (LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path / META_FILE} is damaged ({text})") from error


def load_full(path: Path) -> dict[str, Any]:
    """Load the full checkpoint, with the content that a single file would have."""
    checkpoint = load_unsharded(path)
    tensors_by_location: dict[tuple[Any, ...], Tensor] = {}
    tensors = {}
    for tensor_path, stored_tensor in list_stored_tensors(path).items():
        tensors[tensor_path] = tensors_by_location.setdefault(
            (stored_tensor.location, stored_tensor.entry.size),
            empty_like_entry(stored_tensor.entry, None),
        )
    load_sharded(path, tensors)
    try:
        for tensor_path, tensor in tensors.items():
            set_nested(checkpoint, tensor_path, tensor)
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"its {INDEX_FILE} does not fit its {META_FILE} ({error!r})"
        ) from None
    return checkpoint
