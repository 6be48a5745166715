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
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from ravine.errors import UsageError
from ravine.files import fsync

from ..collectives import all_gather_values
from ..dtensor import MAX_MESSAGE_BYTES, IndexRange, ShardIndices, shard_blocks, shard_indices
from . import zip_archive
from .checkpoint_error import CheckpointError
from .sharded_index import (
    INDEX_FILE,
    MANIFEST_FILE,
    META_FILE,
    SHARDED_KEYS,
    TensorPath,
    encode_path,
    file_checksum,
    list_stored_tensors,
)
from .staging_folder import StagingFolder, replace_folder


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint of which each rank has its shards; every rank calls it.

    The folder is written under a temporary name, and then renamed. If one rank fails, all ranks
    raise, and an earlier checkpoint at `path` is not changed.

    Args:
        checkpoint: the checkpoint, with this rank's shards as DTensors.
        path: the folder.
    """
    rank = dist.get_rank()
    # tensors of weights, optimizer states and averages, by path; unsharded: everything else
    tensors, unsharded = split_tensors(checkpoint)
    # staging: the temporary folder that rank 0 has created; error: of rank 0, or None
    with StagingFolder(path, rank) as (staging, error):
        # rank 0's error is raised on all ranks; None: all continue
        _broadcast_error(error)
        alias_keys = _alias_keys(tensors)  # further names of tensors, which are written once
        alias_keys_of_all_ranks: dict[str, str] = {}
        for rank_alias_keys in all_gather_values(alias_keys):
            alias_keys_of_all_ranks |= rank_alias_keys
        # encode_path: the path as text, which is the name of the tensor in the index
        tensors_by_key = {
            encode_path(tensor_path): tensor for tensor_path, tensor in tensors.items()
        }
        try:
            save(
                {k: v for k, v in tensors_by_key.items() if k not in alias_keys},
                # it also lists the further names in torch's index
                storage_writer=_AliasingWriter(staging, alias_keys_of_all_ranks),
            )
        except CheckpointException as problem:  # on all ranks; not a subclass of Exception
            raise _os_error_of(problem) from problem
        # values other than tensors that only the owner of a parameter has, e.g. step counts
        states_by_rank = all_gather_values(_non_tensor_states(unsharded))
        # torch puts the rank into the names of the files that it writes
        own_checksums = {file.name: file_checksum(file) for file in staging.glob(f"__{rank}_*")}
        checksums_by_rank = all_gather_values(own_checksums)
        error = None
        if rank == 0:
            try:
                for rank_states in states_by_rank:
                    for tensor_path, value in rank_states.items():
                        set_nested(unsharded, tensor_path, value)
                with (staging / META_FILE).open("wb") as file:
                    # torch.save, which raises the OSError of a full disk
                    zip_archive.save_archive(unsharded, file)
                checksums: dict[str, list[int]] = {}
                for rank_checksums in checksums_by_rank:
                    checksums |= rank_checksums
                # _save_manifest: adds the checksums of META_FILE and of torch's index
                _save_manifest(staging, checksums)
                replace_folder(staging, path)
            except Exception as problem:  # the other ranks would wait for rank 0
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


def _broadcast_error(error: Exception | None) -> None:
    """Raise rank 0's error on every rank; on other ranks as OSError or CheckpointError."""
    message: list[Any] = [None]  # number (None if it is no OSError) and text of the error
    if isinstance(error, OSError):
        message = [(error.errno, error.strerror or str(error))]
    elif error is not None:
        message = [(None, str(error))]
    dist.broadcast_object_list(message)
    if error is not None:
        raise error
    if message[0] is not None:
        number, text = message[0]
        raise CheckpointError(text, exit_status=1) if number is None else OSError(number, text)


def _save_manifest(staging: Path, files: dict[str, list[int]]) -> None:
    """Write the manifest atomically, after fsync of the files that it lists."""
    for name in (META_FILE, INDEX_FILE):
        files[name] = file_checksum(staging / name)
        fsync(staging / name)
    text = json.dumps({"format": 1, "files": files}, indent=1)
    (staging / ".manifest").write_text(text)
    fsync(staging / ".manifest")
    os.replace(staging / ".manifest", staging / MANIFEST_FILE)
    fsync(staging)


def split_tensors(checkpoint: dict[str, Any]) -> tuple[dict[TensorPath, Tensor], dict[str, Any]]:
    """Split a checkpoint into the tensors of its large sections, by their path, and the rest.

    The sections are those of SHARDED_KEYS: weights, optimizer states, averaged weights. A path is
    the sequence of keys and indices, e.g. ("state_dict", "net.weight").
    """
    tensors: dict[TensorPath, Tensor] = {}
    first_by_id: dict[int, Tensor] = {}  # a tensor with several names stays one object

    def remove_tensors(value: Any, tensor_path: TensorPath) -> Any:
        """Put the tensors of a value into `tensors`, and return the rest."""
        if isinstance(value, dict):
            remaining = {k: remove_tensors(v, (*tensor_path, k)) for k, v in value.items()}
            # a dict has no entry for a removed tensor; a list keeps its place
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


def set_nested(tree: dict[Any, Any], tensor_path: TensorPath, value: Any) -> None:
    """Set a value at a path of nested dicts and lists, creating missing dicts."""
    node: Any = tree
    step: Any
    for step in tensor_path[:-1]:
        node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
    node[tensor_path[-1]] = value


def load_sharded(path: Path, tensors: dict[TensorPath, Tensor]) -> None:
    """Load tensors, or this rank's shards of them, in place, without communication.

    Only the needed rows of each chunk are read, at most MAX_MESSAGE_BYTES at a time. A tensor with
    two names is read once.

    Args:
        path: the folder.
        tensors: the tensors to fill, by their path in the checkpoint.

    Raises:
        CheckpointError: the files do not match the index.
    """
    try:
        # entry: shape and dtype; chunks: pairs of a part of the tensor and its place in a file
        stored_tensors = list_stored_tensors(path)
        loaded_keys = set()  # memory and stored location of the tensors loaded so far
        for tensor_path, tensor in tensors.items():
            stored_tensor = stored_tensors[tensor_path]
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            load_key = (local.data_ptr(), tuple(local.shape), stored_tensor.location)
            if not local.numel() or load_key in loaded_keys:
                continue
            loaded_keys.add(load_key)
            if tensor.shape != stored_tensor.entry.size:
                raise UsageError(f"{encode_path(tensor_path)[:40]} has another shape")
            for chunk, info in stored_tensor.chunks:
                dtype = stored_tensor.entry.properties.dtype
                # shard_indices: for each dimension the indices that this rank holds
                _load_chunk(path, info, chunk, dtype, local.detach(), shard_indices(tensor))
    except CheckpointError:
        raise
    except Exception as error:  # a changed byte can make zipfile and torch raise nearly any type
        text = " ".join(str(error).split())[-120:] or type(error).__name__
        raise CheckpointError(f"the files of {path} do not match its index ({text})") from error


def _load_chunk(
    path: Path,
    info: _StorageInfo,
    chunk: ChunkStorageMetadata,
    dtype: torch.dtype,
    local: Tensor,
    indices: ShardIndices,
) -> None:
    """Copy the part of a stored chunk that belongs to this rank's shard into the shard.

    Args:
        path: the folder.
        info: file, offset and length in bytes of the chunk, which is a file of torch.save.
        chunk: offsets and sizes of the chunk in the full tensor.
        dtype: the dtype of the tensor.
        local: this rank's shard.
        indices: the indices of the shard in the full tensor.

    Raises:
        UsageError: the file has another tensor.
    """
    # for each dimension the ranges of the shard within the chunk
    chunk_indices = [
        _intersect_ranges(ranges, start, size)
        for ranges, start, size in zip(indices, chunk.offsets, chunk.sizes, strict=True)
    ]
    if not all(chunk_indices):  # no overlap
        return
    with Path(path, info.relative_path).open("rb") as file:
        # the chunk as a file of its own: a file of the folder has several chunks
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
                raise UsageError("a file has another tensor")
            # the elements of the tensor, as a file
            record = zip_archive.open_tensor_record(table, window)  # type: ignore[arg-type]
        is_dense = (
            stored_tensor.is_contiguous()
            and not stored_tensor.storage_offset()
            and not stored_tensor.is_conj()
        )
        if not is_dense or record.length < stored_tensor.numel() * dtype.itemsize:
            window.seek(0)  # its rows cannot be read separately
            stored_tensor = torch.load(window, "cpu", weights_only=True)  # type: ignore[arg-type]
            # slices of the chunk, and of the shard, for each block that both have
            for source, target in shard_blocks(chunk_indices):
                local[target] = stored_tensor[source].to(local.device)
            return
        row_ranges = chunk_indices[0] if chunk_indices else []  # a scalar has no dimensions
        for first, last, rows_tensor in _load_rows(record, chunk.sizes, dtype, row_ranges):
            piece_indices = list(chunk_indices)
            if chunk_indices:
                piece_indices[0] = _intersect_ranges(row_ranges, first, last - first)
            for source, target in shard_blocks(piece_indices):
                local[target] = rows_tensor[source].to(local.device)


def _intersect_ranges(ranges: list[IndexRange], start: int, size: int) -> list[IndexRange]:
    """Intersect index ranges of a shard with the range [start, start + size) of global indices.

    In the result `global_start` is relative to `start`.

    Args:
        ranges: ranges of one dimension; `local_start` is the index in the shard.
        start: first index of the stored chunk.
        size: number of indices of the stored chunk.
    """
    intersection = []
    for index_range in ranges:
        first = max(index_range.global_start, start)
        end = min(index_range.global_start + index_range.length, start + size)
        if first < end:
            intersection.append(
                IndexRange(
                    global_start=first - start,
                    local_start=index_range.local_start + first - index_range.global_start,
                    length=end - first,
                )
            )
    return intersection


def _load_rows(
    record: zip_archive.FileWindow,
    sizes: torch.Size,
    dtype: torch.dtype,
    wanted_ranges: list[IndexRange],
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the wanted rows of a stored tensor, in pieces of at most MAX_MESSAGE_BYTES.

    Args:
        record: the elements of the dense tensor, as a file.
        sizes: the shape of the tensor; a scalar is one row.
        dtype: its dtype.
        wanted_ranges: the wanted rows, by `global_start` and `length`.

    Yields:
        first row, end row (exclusive) and values of a piece.
    """
    row_bytes = math.prod(sizes[1:]) * dtype.itemsize
    rows_per_piece = max(1, MAX_MESSAGE_BYTES // max(1, row_bytes))
    # IndexRange(global_start, local_start, length): one row for a scalar
    for index_range in wanted_ranges if sizes else [IndexRange(0, 0, 1)]:
        end = index_range.global_start + index_range.length
        for first in range(index_range.global_start, end, rows_per_piece):
            last = min(first + rows_per_piece, end)
            content = bytearray((last - first) * row_bytes)
            record.seek(first * row_bytes)
            if record.readinto(content) != len(content):
                raise UsageError("a file ends too early")
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
    """Load the full checkpoint from a folder, with the content that a single file would have.

    Raises:
        CheckpointError: the files do not fit together.
    """
    # load_unsharded: the checkpoint without the tensors that are stored in shards
    checkpoint = load_unsharded(path)
    # a tensor with several names has one location, and stays one tensor
    tensors_by_location: dict[tuple[Any, ...], Tensor] = {}
    tensors = {}
    for tensor_path, stored_tensor in list_stored_tensors(path).items():
        tensors[tensor_path] = tensors_by_location.setdefault(
            (stored_tensor.location, stored_tensor.entry.size),
            # parameter=None: a full tensor, not sharded like a parameter
            empty_like_entry(stored_tensor.entry, parameter=None),
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
