"""A checkpoint in parts: each rank writes its own, and it exists once the last word is written.

    step=000100.ckpt/  __0_0.distcp __1_0.distcp ...   torch.distributed.checkpoint: one file a rank
                       .metadata                       which part of which tensor is where
                       meta.pt                         all that is no large tensor
                       manifest.json                   size and checksum of each file, written last

It is written under another name and renamed, where the store can rename; elsewhere the manifest
alone tells that it is whole. A tensor is found by its path in the checkpoint, and any part of it
can be read: so what any layout wrote is loaded on any other, or put together to one file.
"""

import fcntl
import json
import os
import pickle
import shutil
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

MANIFEST, META, INDEX = "manifest.json", "meta.pt", ".metadata"
SPREAD = ("state_dict", "optimizer_states", "ema")  # whose tensors are written in parts
Place = tuple[str | int, ...]


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the checkpoint, which differs from rank to rank; every rank calls it.

    Where one fails, all do, and what stood at `path` is as it was.
    """
    rank = dist.get_rank()
    name: list[Any] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name)
    draft = path.with_name(f".tmp-{name[0]}")
    tensors, rest = part(checkpoint)
    with _drafting(draft, rank) as error:
        _agree(error)
        writer = FileSystemWriter(draft, thread_count=1)
        save({key_of(place): t for place, t in tensors.items()}, storage_writer=writer)
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


class _drafting:
    """A folder that others may remove as a leftover as soon as its writer is dead."""

    def __init__(self, draft: Path, rank: int) -> None:
        self.draft, self.rank, self.lock = draft, rank, None

    def __enter__(self) -> OSError | None:
        if self.rank:
            return None
        try:
            self.draft.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.draft.parent)
            self.draft.mkdir()
            self.lock = _locked(self.draft)
        except OSError as error:
            return error
        return None

    def __exit__(self, *_: Any) -> None:
        if self.rank == 0:
            shutil.rmtree(self.draft, ignore_errors=True)  # unless it was renamed
            if self.lock is not None:
                os.close(self.lock)


def remove_leftovers(folder: Path) -> None:
    """Remove folders of writers that were killed; one who still writes holds his lock."""
    for leftover in folder.glob(".tmp-*/"):
        with suppress(OSError):
            lock = _locked(leftover)
            shutil.rmtree(leftover)
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
    if path.exists():
        os.replace(path, old)
    os.replace(draft, path)
    _sync(path.parent)
    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


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
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        if not begun(path):
            return "it is a folder, not a checkpoint file"
        return f"it is incomplete: a folder without {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, wanted in files.items():
        if not (path / name).is_file():
            return f"its part {name} is missing"
        if _sum(path / name) != wanted:
            return f"its part {name} does not match its checksum"
    return None


def part(checkpoint: dict[str, Any]) -> tuple[dict[Place, Tensor], dict[str, Any]]:
    """The tensors that are written in parts, by their place, and the checkpoint without them."""
    tensors: dict[Place, Tensor] = {}

    def without(value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            kept = {k: without(v, (*place, k)) for k, v in value.items()}
            return {k: v for k, v in kept.items() if (*place, k) not in tensors}
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(without(v, (*place, i)) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            tensors[place] = value.detach()
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


class _Index(pickle.Unpickler):
    """Reads torch's index of the parts, and nothing that could run a program."""

    def find_class(self, module: str, name: str) -> Any:
        good = module.startswith("torch.distributed.checkpoint.") or module in (
            "torch",
            "torch._utils",
        )
        good = good or (module, name) in (("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"))
        good = good or (module, name) == ("torch.serialization", "_get_layout")
        if not good or name in ("load", "save", "hub"):
            raise pickle.UnpicklingError(f"{INDEX} asks for {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path, INDEX), "rb") as file:
            metadata = _unpickled(file)
        self.storage_data = metadata.storage_data
        return metadata


def _unpickled(file: IO[bytes]) -> Metadata:
    return _Index(file).load()


def entries(path: Path) -> Iterator[tuple[Place, TensorStorageMetadata]]:
    """Place, size and dtype of each tensor that was written in parts."""
    with (path / INDEX).open("rb") as file:
        index = _unpickled(file).state_dict_metadata
    for key, entry in index.items():
        if isinstance(entry, TensorStorageMetadata):
            yield tuple(json.loads(key)), entry


def read(path: Path, tensors: dict[Place, Tensor]) -> None:
    """Fill tensors, or this rank's parts of them, in place; no rank waits for another."""
    wanted = {key_of(place): tensor for place, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
        load(wanted, storage_reader=_Reader(path), no_dist=True)


def like(entry: TensorStorageMetadata, parameter: Tensor | None) -> Tensor:
    """An empty tensor for an entry, spread as the parameter is if they have one shape."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and parameter.shape == entry.size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype)


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint without the tensors that were written in parts."""
    return torch.load(path / META, map_location="cpu", weights_only=True)


def read_whole(path: Path) -> dict[str, Any]:
    """The checkpoint as a single file would hold it."""
    checkpoint = read_meta(path)
    tensors = {place: like(entry, None) for place, entry in entries(path)}
    read(path, tensors)
    for place, tensor in tensors.items():
        put(checkpoint, place, tensor)
    return checkpoint
