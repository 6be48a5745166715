"""Manifest and index of a sharded checkpoint, read safely and compared with its files.

    manifest.json   size and checksum of each file
    .metadata       index: torch's pickle with the location of each chunk of a tensor

No class or function that the index names is called. `find_structural_damage` and
`find_checksum_mismatch` describe the damage of a folder.
"""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ravine.errors import UsageError

from . import safe_pickle, zip_archive
from .checkpoint_error import CheckpointError
from .safe_pickle import CallRecord, GlobalName, UnsafePickle

MANIFEST_FILE, META_FILE, INDEX_FILE = "manifest.json", "meta.pt", ".metadata"
MAX_ENTRY_BYTES = 2000  # of a manifest entry: an escaped name of 255 bytes, and two numbers
SHARDED_KEYS = ("state_dict", "optimizer_states", "ema")  # sections whose tensors are sharded
TensorPath = tuple[str | int, ...]
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
    # Python 3.13 defines them in a module of pathlib
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *((module, "PurePosixPath") for module in ("pathlib", "pathlib._local")),
}


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a folder holds any file of a sharded checkpoint."""
    return any((path / name).exists() for name in (MANIFEST_FILE, META_FILE, INDEX_FILE))


def find_structural_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint folder, or return None if there is none.

    The checksums of tensor data are not compared; see `find_checksum_mismatch`.
    """
    if not (path / MANIFEST_FILE).is_file():
        if not looks_like_checkpoint(path):
            return "it is a folder, not a checkpoint file"
        return f"it is incomplete: a folder without {MANIFEST_FILE}, which is written last"
    try:
        # size in bytes and checksum of each file
        files = _load_manifest(path)
        for name, (size, _) in files.items():
            if not (path / name).is_file():
                return f"its file {name} is missing"
            if (path / name).stat().st_size != size:
                return f"its file {name} does not match its checksum"
        if (reason := find_checksum_mismatch(path, [META_FILE, INDEX_FILE])) is not None:
            return reason
        # A checksum detects accidental damage only: a forged file can have a matching checksum. So
        # entries and pickled tensors must also have sizes that fit the file.
        with (path / META_FILE).open("rb") as file, zipfile.ZipFile(file) as table:
            zip_archive.validate_zip_entries(table, files[META_FILE][0])
            zip_archive.validate_pickled_tensors(table, files[META_FILE][0])
        _load_index(path)  # raises an error for an invalid index
    except CheckpointError as error:
        return error.problem
    except Exception as error:  # zipfile raises many types for a forged archive
        text = " ".join(str(error).split())[:80] or type(error).__name__
        return f"its file {META_FILE} is damaged ({text})"
    return None


def find_checksum_mismatch(path: Path, names: Collection[str] | None = None) -> str | None:
    """Return the first mismatch of a checksum, of these files or of all with tensor data."""
    try:
        checked_names = tensor_file_sizes(path) if names is None else names
        for name, (size, crc) in _load_manifest(path).items():
            if name in checked_names and file_checksum(path / name) != [size, crc]:
                return f"its file {name} does not match its checksum"
    except CheckpointError as error:
        return error.problem
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


def file_checksum(path: Path) -> list[int]:
    """Return the size in bytes and the CRC-32 of a file."""
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _load_manifest(path: Path) -> dict[str, tuple[int, int]]:
    """Read the size and checksum of each file, by name, from the manifest.

    Raises:
        CheckpointError: the manifest is damaged, or does not list META_FILE and INDEX_FILE.
    """
    num_files = sum(1 for _ in path.iterdir())
    limit = MAX_ENTRY_BYTES * (2 + num_files)  # 2: for what surrounds the entries
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


def _load_index(path: Path) -> Metadata:
    """Load torch's index of the chunks safely: it is rebuilt from validated plain values.

    The index is a pickle. It may name only the classes and functions of ALLOWED_INDEX_NAMES. None
    of them is called: a CallRecord of the name, arguments and state stands for the call's result.

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
        # root: the CallRecord of the whole index
        return _parse_metadata(root, file_sizes)
    except UnsafePickle as error:
        raise CheckpointError(f"its {INDEX_FILE} cannot be used: {error}") from None
    except OSError as error:
        raise CheckpointError(f"its {INDEX_FILE} cannot be read ({error.strerror})") from None
    except (AssertionError, LookupError, RecursionError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise CheckpointError(f"its {INDEX_FILE} is damaged ({text})") from None


def _parse_metadata(root: Any, file_sizes: dict[str, int]) -> Metadata:
    """Build torch's index from the records of its pickle, and compare it with the files.

    Args:
        root: the record of the whole index: of a call of `Metadata`.
        file_sizes: bytes of each file of the folder, by name.

    Raises:
        UsageError: a record is not valid, or a tensor does not fit its file.
    """
    # _record_fields: checks the class of a record, and returns its attributes by name
    fields = _record_fields(root, "Metadata")
    entries: dict[str, Any] = {}  # TensorStorageMetadata by encoded path
    total_bytes = 0
    for key, record in fields["state_dict_metadata"].items():
        if record.name.name != "BytesStorageMetadata":  # not an object other than a tensor
            _decode_path(key)  # raises if the key is not valid
            entries[key] = entry = _parse_tensor_entry(record)
            total_bytes += math.prod(entry.size) * entry.properties.dtype.itemsize
    # Several names may refer to one stored tensor, so the total may exceed the size of the files.
    # A factor of 4 is allowed, and MAX_EXTRA_BYTES beyond it, because small files may have more.
    if total_bytes > 4 * sum(file_sizes.values()) + zip_archive.MAX_EXTRA_BYTES:
        raise UsageError("its tensors are larger than its files")
    storage_infos = _parse_storage_infos(fields["storage_data"], file_sizes)
    bytes_by_location: dict[tuple[Any, ...], int] = {}
    for key, entry in entries.items():
        for chunk in entry.chunks:
            if (info := storage_infos.get(MetadataIndex(key, chunk.offsets))) is None:
                raise UsageError(f"{key[:40]} is in no file")
            chunk_bytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            bytes_by_location[info.relative_path, info.offset] = chunk_bytes
            if chunk_bytes > info.length:
                raise UsageError(f"{key[:40]} is larger than its file")
    if sum(bytes_by_location.values()) > sum(file_sizes.values()):
        raise UsageError("its tensors are larger than its files")
    return Metadata(entries, storage_data=storage_infos, storage_meta=StorageMeta())


def _parse_storage_infos(
    records: dict[Any, Any], file_sizes: dict[str, int]
) -> dict[MetadataIndex, _StorageInfo]:
    """Return the file, offset and length in bytes of each stored chunk.

    Args:
        records: records of `_StorageInfo`, by records of `MetadataIndex`.
        file_sizes: bytes of each file of the folder, by name.

    Raises:
        UsageError: a chunk is compressed, or outside its file.
    """
    storage_infos = {}
    for index_record, info_record in records.items():
        index = _record_fields(index_record, "MetadataIndex")
        info = _record_fields(info_record, "_StorageInfo")
        name, start, length = info["relative_path"], info["offset"], info["length"]
        if info.get("transform_descriptors"):
            raise UsageError("a file is compressed")
        if name not in file_sizes or not 0 <= start <= start + length <= file_sizes[name]:
            raise UsageError("a tensor is outside its file")
        # MetadataIndex: name of the tensor (fqn) and first indices of the chunk; an object that is
        # no tensor has no indices
        offset = None if index.get("offset") is None else _parse_shape(index["offset"])
        storage_infos[MetadataIndex(index["fqn"], offset)] = _StorageInfo(name, start, length)
    return storage_infos


def _record_fields(record: Any, name: str) -> dict[str, Any]:
    """Return the fields of a record, which must be of a call of the class `name`."""
    if not isinstance(record, CallRecord) or record.name.name != name:
        raise UsageError(f"a record is not a {name}")
    if not isinstance(record.state, dict):
        raise UsageError(f"a {name} without its fields")
    return record.state


def _parse_tensor_entry(record: Any) -> TensorStorageMetadata:
    """Build the index entry of one tensor (dtype, shape, chunks) from its record in the pickle.

    Args:
        record: a CallRecord, which holds the arguments and the state of a pickled object as plain
            values; a class or function is a GlobalName, and is not imported.

    Raises:
        UsageError: a value is not valid, or the chunks do not make up the tensor.
    """
    # _record_fields: checks the class of the record, and returns its attributes by name
    fields = _record_fields(record, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]  # its state is (dtype, layout, requires_grad, ...)
    if not isinstance(dtype, GlobalName) or dtype.name not in DTYPES_BY_NAME:
        raise UsageError("a tensor has no valid dtype")
    size = _parse_shape(fields["size"])
    chunks = []
    for chunk_record in fields["chunks"]:
        chunk_fields = _record_fields(chunk_record, "ChunkStorageMetadata")
        chunk = ChunkStorageMetadata(
            _parse_shape(chunk_fields["offsets"]), _parse_shape(chunk_fields["sizes"])
        )
        ends = zip(chunk.offsets, chunk.sizes, size, strict=True)
        if any(start + length > full_size for start, length, full_size in ends):
            raise UsageError("a chunk of a tensor is outside the tensor")
        chunks.append(chunk)
    # the number of elements is compared; whether chunks overlap is not checked
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise UsageError("the chunks of a tensor do not make up the tensor")
    return TensorStorageMetadata(TensorProperties(DTYPES_BY_NAME[dtype.name]), size, chunks)


def _parse_shape(record: Any) -> torch.Size:
    (sizes,) = record.arguments if record.name == GlobalName("torch", "Size") else ((-1,),)
    if len(sizes) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in sizes):
        raise UsageError("a shape is not valid")
    return torch.Size(sizes)


def encode_path(tensor_path: TensorPath) -> str:
    """Encode a path as the name of a tensor in the index."""
    return json.dumps(tensor_path)


def _decode_path(key: str) -> TensorPath:
    tensor_path = tuple(json.loads(key))
    is_valid = 2 <= len(tensor_path) <= 16 and all(type(step) in (str, int) for step in tensor_path)
    if not is_valid or tensor_path[0] not in SHARDED_KEYS:
        raise UsageError(f"{key[:40]} is not a path in a checkpoint")
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
