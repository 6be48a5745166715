"""A checkpoint in parts: each rank writes its own, and it exists once the last word is written.

    step=000100.ckpt/  __0_0.distcp __1_0.distcp ...   torch.distributed.checkpoint: one file a rank
                       .metadata                       which part of which tensor is where
                       meta.pt                         all that is no large tensor
                       manifest.json                   size and checksum of each file, written last

It is written under another name and renamed, where the store can rename; elsewhere the manifest
alone tells that it is whole. A tensor is found by its path in the checkpoint, and any part of it
can be read: so what any layout wrote is loaded on any other, or put together to one file. A tensor
with several names (tied weights) is written once: the index gives each name the same place.
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

from ..dtensor import MESSAGE, Run, Runs, blocks, runs_of
from . import safe_pickle as plain_pickle
from . import zip_archive as archive
from .checkpoint_error import CheckpointError
from .safe_pickle import Name, Record, UnsafePickle

MANIFEST, META, INDEX = "manifest.json", "meta.pt", ".metadata"
LONGEST_ENTRY = 2000  # bytes of a file in the manifest: a name of 255, escaped, and two numbers
SPREAD = ("state_dict", "optimizer_states", "ema")  # whose tensors are written in parts
Place = tuple[str | int, ...]
DRAFT = re.compile(r"\.tmp-[0-9a-f]{32}(-old)?")  # of a writer that was killed
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
NAMES = {  # all that an index may name
    *((_METADATA, each) for each in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, each) for each in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_METADATA, each) for each in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILESYSTEM, "_StorageInfo"),
    ("torch", "Size"),
    *(("torch", each) for each in DTYPES),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the checkpoint, which differs from rank to rank; every rank calls it.

    Where one fails, all do, and what stood at `path` is as it was.
    """
    rank = dist.get_rank()
    tensors, rest = part(checkpoint)
    with _drafting(path, rank) as (draft, error):
        _agree(error)
        first_keys = _first_keys(tensors)
        writer = _Writer(draft, {k: v for each in _gathered(first_keys) for k, v in each.items()})
        named = {key_of(place): tensor for place, tensor in tensors.items()}
        try:
            save({k: v for k, v in named.items() if k not in first_keys}, storage_writer=writer)
        except CheckpointException as problem:  # on all ranks; it is no Exception
            raise _cause(problem) from problem
        others = _gathered(_plain_states(rest))
        error = None
        sums = _gathered({f.name: _sum(f) for f in draft.glob(f"__{rank}_*")})
        if rank == 0:
            try:
                for place, value in (pair for each in others for pair in each.items()):
                    put(rest, place, value)
                with (draft / META).open("wb") as file:
                    torch.save(rest, file)
                files = {n: s for each in sums for n, s in each.items()}
                _finish(draft, files)
                _rename(draft, path)
            except OSError as problem:
                error = problem
        _agree(error)


def _cause(problem: CheckpointException) -> BaseException:
    """What the system has refused on some rank (a full disk), else the problem itself."""
    for error, _ in problem.failures.values():
        if isinstance(error, OSError):
            return error
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            # torch closes its archive and hides the OSError, which no other rank gets
            return OSError(errno.ENOSPC, "no space left, or a limit on the size of files")
    return problem


def _first_keys(tensors: dict[Place, Tensor]) -> dict[str, str]:
    """For each further name of a tensor, the name under which it is written."""
    first: dict[int, str] = {}
    keys = {key_of(place): first.setdefault(id(t), key_of(place)) for place, t in tensors.items()}
    return {key: known for key, known in keys.items() if known != key}


class _Writer(FileSystemWriter):
    """FileSystemWriter with further names for tensors that are written once."""

    def __init__(self, path: Path, first_keys: dict[str, str]) -> None:
        super().__init__(path, thread_count=1)
        self.first_keys = first_keys

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written: dict[str, list[WriteResult]] = {}
        for result in (each for rank in results for each in rank):
            written.setdefault(result.index.fqn, []).append(result)
        further = []
        for key, first in self.first_keys.items():
            if key not in written:
                metadata.state_dict_metadata[key] = metadata.state_dict_metadata[first]
                further += [replace(r, index=replace(r.index, fqn=key)) for r in written[first]]
        super().finish(metadata, [*results, further])


class _drafting:
    """A draft folder that other writers may remove once its writer has been killed.

    Between its making and its lock another writer may take it for a leftover; then the next is
    made.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.lock = path, rank, None
        self.draft = path

    def __enter__(self) -> tuple[Path, OSError | None]:
        error = None
        if self.rank == 0:
            try:
                self._make()
            except OSError as problem:
                error = problem
        name: list[Any] = [self.draft.name]
        dist.broadcast_object_list(name)
        self.draft = self.path.with_name(name[0])
        return self.draft, error

    def _make(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink() and not begun(self.path):
            raise OSError(errno.EEXIST, "a folder that is no checkpoint stands there")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path.parent)
        while self.lock is None:
            draft = self.path.with_name(f".tmp-{uuid.uuid4().hex}")
            draft.mkdir()
            self.draft = draft
            with suppress(BlockingIOError, FileNotFoundError):  # it is being removed, or was
                lock = _locked(draft)
                if draft.is_dir() and os.path.samestat(os.fstat(lock), draft.stat()):
                    self.lock = lock
                else:
                    os.close(lock)

    def __exit__(self, *_: Any) -> None:
        if self.rank == 0:
            if self.draft != self.path:
                shutil.rmtree(self.draft, ignore_errors=True)  # unless it was renamed
            if self.lock is not None:
                os.close(self.lock)


def remove_leftovers(folder: Path) -> None:
    """Remove folders of killed writers; a live writer holds the lock of its folder."""
    for leftover in folder.glob(".tmp-*/"):
        if DRAFT.fullmatch(leftover.name) and not leftover.is_symlink():
            with suppress(OSError):
                lock = _locked(leftover)
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _agree(error: OSError | None) -> None:
    """Raise rank 0's error on every rank."""
    said: list[Any] = [None if error is None else (error.errno, error.strerror or str(error))]
    dist.broadcast_object_list(said)
    if error is not None:
        raise error
    if said[0] is not None:
        raise OSError(*said[0])


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _finish(draft: Path, files: dict[str, list[int]]) -> None:
    """Write the manifest, after all it speaks of is on the disk."""
    for name in (META, INDEX):
        files[name] = _sum(draft / name)
        _sync(draft / name)
    text = json.dumps({"format": 1, "files": files}, indent=1)
    (draft / ".manifest").write_text(text)
    _sync(draft / ".manifest")
    os.replace(draft / ".manifest", draft / MANIFEST)
    _sync(draft)


def _rename(draft: Path, path: Path) -> None:
    old = path.with_name(f"{draft.name}-old")
    if os.path.lexists(path):
        os.replace(path, old)
    os.replace(draft, path)
    _sync(path.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sum(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def begun(path: Path) -> bool:
    """Whether a folder holds anything of a checkpoint."""
    return any((path / name).exists() for name in (MANIFEST, META, INDEX))


def damage(path: Path) -> str | None:
    """None if the folder is a whole checkpoint, else what is wrong with it, in words."""
    reason = structure(path)
    return other_sum(path) if reason is None else reason


def structure(path: Path) -> str | None:
    """What is wrong with a folder; the checksums of tensor data are not compared."""
    if not (path / MANIFEST).is_file():
        if not begun(path):
            return "it is a folder, not a checkpoint file"
        return f"it is incomplete: a folder without {MANIFEST}, which is written last"
    try:
        files = _files(path)
        for name, (size, _) in files.items():
            if not (path / name).is_file():
                return f"its part {name} is missing"
            if (path / name).stat().st_size != size:
                return f"its part {name} does not match its checksum"
        if (reason := other_sum(path, [META, INDEX])) is not None:
            return reason
        with (path / META).open("rb") as file, zipfile.ZipFile(file) as table:
            archive.check_contents(table, files[META][0])
            archive.check_pickle(table, files[META][0])
        _index(path)
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # a changed byte can make zipfile raise nearly any type
        text = " ".join(str(error).split())[:80] or type(error).__name__
        return f"its part {META} is damaged ({text})"
    return None


def other_sum(path: Path, names: Collection[str] | None = None) -> str | None:
    """The first part that does not match its checksum, of these names or of all with tensors."""
    try:
        wanted = lengths(path) if names is None else names
        for name, (size, crc) in _files(path).items():
            if name in wanted and _sum(path / name) != [size, crc]:
                return f"its part {name} does not match its checksum"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None


def lengths(path: Path) -> dict[str, int]:
    """The bytes of each part that holds tensor data."""
    return {name: size for name, (size, _) in _files(path).items() if name not in (META, INDEX)}


def identity(path: Path) -> tuple[int, ...]:
    """Identifies a state of a folder: its device, and inode, size and times of each part."""
    found = [path.stat().st_dev]
    for name in [MANIFEST, *sorted(_files(path))]:
        status = (path / name).stat()
        found += [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return tuple(found)


def _files(path: Path) -> dict[str, tuple[int, int]]:
    """Name, size and checksum of each part; META and INDEX are among them."""
    limit = LONGEST_ENTRY * (2 + sum(1 for _ in path.iterdir()))
    with (path / MANIFEST).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # a megabyte of lists within lists takes seconds to read
        raise CheckpointError(f"its {MANIFEST} is longer than {limit:,} bytes")
    try:
        files = json.loads(content)["files"]
        found = {str(name): (int(size), int(crc)) for name, (size, crc) in files.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise CheckpointError(f"its {MANIFEST} is damaged") from None
    if any(name != os.path.basename(name) or name in ("", ".", "..") for name in found):
        raise CheckpointError(f"its {MANIFEST} names a file outside the folder")
    if missing := {META, INDEX} - found.keys():
        raise CheckpointError(f"its {MANIFEST} does not list {' and '.join(sorted(missing))}")
    return found


def part(checkpoint: dict[str, Any]) -> tuple[dict[Place, Tensor], dict[str, Any]]:
    """The tensors that are written in parts, by their place, and the checkpoint without them."""
    tensors: dict[Place, Tensor] = {}
    known: dict[int, Tensor] = {}  # a tensor with several names stays one

    def without(value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            kept = {k: without(v, (*place, k)) for k, v in value.items()}
            return {k: v for k, v in kept.items() if (*place, k) not in tensors}
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(without(v, (*place, i)) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            tensors[place] = known.setdefault(id(value), value.detach())
        return value

    rest = {k: without(v, (k,)) if k in SPREAD else v for k, v in checkpoint.items()}
    return tensors, rest


def _plain_states(rest: dict[str, Any]) -> dict[Place, Any]:
    """What optimizers keep of a parameter that is no tensor: another rank may own it."""
    return {
        ("optimizer_states", i, "state", number, key): value
        for i, state in enumerate(rest.get("optimizer_states", []))
        for number, values in state.get("state", {}).items()
        for key, value in values.items()
    }


def key_of(place: Place) -> str:
    """A place as the name of a tensor."""
    return json.dumps(place)


def put(tree: dict[Any, Any], place: Place, value: Any) -> None:
    """Set a value deep in dicts and lists, making the dicts on the way."""
    branch: Any = tree
    step: Any
    for step in place[:-1]:
        branch = branch.setdefault(step, {}) if isinstance(branch, dict) else branch[step]
    branch[place[-1]] = value


def _index(path: Path) -> Metadata:
    """torch's index of the parts, rebuilt from plain values after each was checked.

    The index is a pickle. Nothing that it names is called, and it may name the classes of NAMES
    only.

    Raises:
        CheckpointError: if it names another class, or does not describe the parts there are.
    """
    lengths = {name: size for name, (size, _) in _files(path).items()}
    try:
        content = (path / INDEX).read_bytes()
        root = plain_pickle.load(content, lambda each: (each.module, each.name) in NAMES)
        return _metadata(root, lengths)
    except UnsafePickle as error:
        raise CheckpointError(f"its {INDEX} cannot be used: {error}") from None
    except OSError as error:
        raise CheckpointError(f"its {INDEX} cannot be read ({error.strerror})") from None
    except (AssertionError, LookupError, RecursionError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise CheckpointError(f"its {INDEX} is damaged ({text})") from None


def _metadata(root: Any, lengths: dict[str, int]) -> Metadata:
    fields = _state(root, "Metadata")
    entries, stored = {}, {}
    total = 0
    places: dict[tuple[Any, ...], int] = {}
    for key, record in fields["state_dict_metadata"].items():
        if record.name.name != "BytesStorageMetadata":
            _place(key)
            entries[key] = entry = _entry(record)
            total += math.prod(entry.size) * entry.properties.dtype.itemsize
    if total > 4 * sum(lengths.values()) + archive.MAX_EXPANDED:  # names may share a tensor
        raise UsageError("its tensors are larger than its parts")
    for record, place in fields["storage_data"].items():
        index, info = _state(record, "MetadataIndex"), _state(place, "_StorageInfo")
        name, start, length = info["relative_path"], info["offset"], info["length"]
        if info.get("transform_descriptors"):
            raise UsageError("a part is compressed")
        if name not in lengths or not 0 <= start <= start + length <= lengths[name]:
            raise UsageError("a tensor is outside its part")
        offset = None if index.get("offset") is None else _shape(index["offset"])
        stored[MetadataIndex(index["fqn"], offset)] = _StorageInfo(name, start, length)
    for key, entry in entries.items():
        for chunk in entry.chunks:
            if (info := stored.get(MetadataIndex(key, chunk.offsets))) is None:
                raise UsageError(f"{key[:40]} is in no part")
            size = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            places[info.relative_path, info.offset] = size
            if size > info.length:
                raise UsageError(f"{key[:40]} is larger than its part")
    if sum(places.values()) > sum(lengths.values()):
        raise UsageError("its tensors are larger than its parts")
    return Metadata(entries, storage_data=stored, storage_meta=StorageMeta())


def _state(record: Any, name: str) -> dict[str, Any]:
    if not isinstance(record, Record) or record.name.name != name:
        raise UsageError(f"no {name}")
    if not isinstance(record.state, dict):
        raise UsageError(f"a {name} without its fields")
    return record.state


def _entry(record: Any) -> TensorStorageMetadata:
    fields = _state(record, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, Name) or dtype.name not in DTYPES:
        raise UsageError("a tensor of no dtype")
    size = _shape(fields["size"])
    chunks = []
    for each in fields["chunks"]:
        inside = _state(each, "ChunkStorageMetadata")
        chunk = ChunkStorageMetadata(_shape(inside["offsets"]), _shape(inside["sizes"]))
        ends = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if any(start + length > whole for start, length, whole in ends):
            raise UsageError("a part of a tensor is outside the tensor")
        chunks.append(chunk)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise UsageError("the parts of a tensor are not the whole")
    return TensorStorageMetadata(TensorProperties(DTYPES[dtype.name]), size, chunks)


def _shape(record: Any) -> torch.Size:
    (sizes,) = record.arguments if record.name == Name("torch", "Size") else ((-1,),)
    if len(sizes) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise UsageError("a shape is no shape")
    return torch.Size(sizes)


def _place(key: str) -> Place:
    place = tuple(json.loads(key))
    good = 2 <= len(place) <= 16 and all(type(step) in (str, int) for step in place)
    if not good or place[0] not in SPREAD:
        raise UsageError(f"{key[:40]} is no place in a checkpoint")
    return place


class Stored(NamedTuple):
    """A tensor in the parts: its size and dtype, and where each chunk of it is."""

    entry: TensorStorageMetadata
    chunks: list[tuple[ChunkStorageMetadata, _StorageInfo]]

    @property
    def place(self) -> tuple[Any, ...]:
        """The same for two names of one tensor."""
        return tuple((info.relative_path, info.offset) for _, info in self.chunks)


def stored(path: Path) -> dict[Place, Stored]:
    """Each tensor that was written in parts, by its place in the checkpoint."""
    metadata, found = _index(path), {}
    for key, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        chunks = [(c, metadata.storage_data[MetadataIndex(key, c.offsets)]) for c in entry.chunks]
        found[_place(key)] = Stored(entry, chunks)
    return found


def entries(path: Path) -> Iterator[tuple[Place, TensorStorageMetadata]]:
    """Place, size and dtype of each tensor that was written in parts."""
    for place, each in stored(path).items():
        yield place, each.entry


def read(path: Path, tensors: dict[Place, Tensor]) -> None:
    """Fill tensors, or this rank's parts of them, in place; no rank waits for another.

    Of each chunk only the rows that are wanted are read, MESSAGE bytes at a time. A tensor that is
    given under two names is read once.
    """
    try:
        found, done = stored(path), set()
        for place, tensor in tensors.items():
            each = found[place]
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            mark = (local.data_ptr(), tuple(local.shape), each.place)
            if not local.numel() or mark in done:
                continue
            done.add(mark)
            if tensor.shape != each.entry.size:
                raise UsageError(f"{key_of(place)[:40]} has another shape")
            for chunk, info in each.chunks:
                dtype = each.entry.properties.dtype
                _read_chunk(path, info, chunk, dtype, local.detach(), runs_of(tensor))
    except CheckpointError:
        raise
    except Exception as error:  # a changed byte can make zipfile and torch raise nearly any type
        text = " ".join(str(error).split())[-120:] or type(error).__name__
        raise CheckpointError(f"the parts of {path} are not those of its index ({text})") from error


def _read_chunk(
    path: Path,
    info: _StorageInfo,
    chunk: ChunkStorageMetadata,
    dtype: torch.dtype,
    local: Tensor,
    runs: Runs,
) -> None:
    """Copy a chunk of a tensor into the part of it that this rank holds, given by `runs`."""
    inside = [
        _overlap(each, start, size)
        for each, start, size in zip(runs, chunk.offsets, chunk.sizes, strict=True)
    ]
    if not all(inside):
        return
    with Path(path, info.relative_path).open("rb") as file:
        part = archive.Window(file, info.offset, info.length)
        with zipfile.ZipFile(part) as table:  # type: ignore[arg-type]
            archive.check_contents(table, info.length)
            archive.check_pickle(table, info.length)
            part.seek(0)
            whole = torch.load(part, "meta", weights_only=True)  # type: ignore[arg-type]
            if not isinstance(whole, Tensor) or whole.shape != chunk.sizes or whole.dtype != dtype:
                raise UsageError("a part holds another tensor")
            rows = archive.first_record(table, part)  # type: ignore[arg-type]
        dense = whole.is_contiguous() and not whole.storage_offset() and not whole.is_conj()
        if not dense or rows.length < whole.numel() * dtype.itemsize:
            part.seek(0)
            whole = torch.load(part, "cpu", weights_only=True)  # type: ignore[arg-type]
            for there, here in blocks(inside):
                local[here] = whole[there].to(local.device)
            return
        for first, last, some in _rows(rows, chunk.sizes, dtype, inside[0] if inside else []):
            wanted = [_overlap(inside[0], first, last - first), *inside[1:]] if inside else []
            for there, here in blocks(wanted):
                local[here] = some[there].to(local.device)


def _overlap(runs: list[Run], start: int, size: int) -> list[Run]:
    """The parts of the runs in `size` indices from `start` on, counted from there."""
    found = []
    for run in runs:
        first, last = max(run.start, start), min(run.start + run.length, start + size)
        if first < last:
            found.append(Run(first - start, run.local + first - run.start, last - first))
    return found


def _rows(
    record: archive.Window, sizes: torch.Size, dtype: torch.dtype, wanted: list[Run]
) -> Iterator[tuple[int, int, Tensor]]:
    """First row, last row and content of pieces of a dense tensor that hold the wanted rows."""
    row = math.prod(sizes[1:]) * dtype.itemsize
    step = max(1, MESSAGE // max(1, row))
    for run in wanted if sizes else [Run(0, 0, 1)]:
        for first in range(run.start, run.start + run.length, step):
            last = min(first + step, run.start + run.length)
            content = bytearray((last - first) * row)
            record.seek(first * row)
            if record.readinto(content) != len(content):
                raise UsageError("a part is cut short")
            shape = [last - first, *sizes[1:]] if sizes else []
            yield first, last, torch.frombuffer(content, dtype=dtype).view(shape)


def like(entry: TensorStorageMetadata, parameter: Tensor | None) -> Tensor:
    """An empty tensor for an entry, spread as the parameter is if they have one shape."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and parameter.shape == entry.size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype)


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint without the tensors that were written in parts.

    Raises:
        CheckpointError: if torch cannot read the file, whose checksum may be right all the same.
    """
    try:
        return torch.load(path / META, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text recommends to run the file
        raise CheckpointError(f"its {META} holds more than tensors and plain values") from error
    except (LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path / META} is damaged ({text})") from error


def read_whole(path: Path) -> dict[str, Any]:
    """The checkpoint as a single file would hold it."""
    checkpoint = read_meta(path)
    once: dict[tuple[Any, ...], Tensor] = {}
    tensors = {}
    for place, each in stored(path).items():
        tensors[place] = once.setdefault((each.place, each.entry.size), like(each.entry, None))
    read(path, tensors)
    try:
        for place, tensor in tensors.items():
            put(checkpoint, place, tensor)
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"its {INDEX} does not fit its {META} ({error!r})") from None
    return checkpoint
