"""Validate the zip archive of `torch.save` before torch reads it.

torch does not validate the archive. It decompresses records without a limit, and reads as many
bytes of a record as the pickle states, even beyond its end. This module compares the table of
contents with the pickle, without reading tensor data. `save_archive` is torch.save, with the
OSError that torch hides.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import IO, Any

import torch

from . import safe_pickle
from .safe_pickle import CallRecord, GlobalName, UnsafePickle

MAX_EXTRA_BYTES = 2**28  # allowed beyond 4 x the file size: tensors may share a storage
STORAGE_ITEM_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    "ComplexDoubleStorage": 16,
}
TENSOR_BUILDERS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_qtensor",
)


class DamagedArchiveError(ValueError):
    """An archive that torch.save would not have written."""


class FileWindow(io.RawIOBase):
    """A part of an open file as a read-only file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        """Take `length` bytes from `start` on."""
        self.file, self.start, self.length, self.position = file, start, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position within the part, and return it."""
        self.position = max(0, (0, self.position, self.length)[whence] + offset)
        return self.position

    def tell(self) -> int:
        """Return the position within the part."""
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, at most up to the end of the part."""
        count = max(0, min(len(buffer), self.length - self.position))
        self.file.seek(self.start + self.position)
        count = self.file.readinto(memoryview(buffer).cast("B")[:count])  # type: ignore
        self.position += count
        return count


def save_archive(content: Any, file: IO[bytes]) -> None:
    """Write a content by torch.save.

    Raises:
        OSError: the file cannot be written, e.g. on a full disk.
    """
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch closes its archive and hides the OSError
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from error


def validate_zip_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Raise DamagedArchiveError for compressed or overlapping records, or ambiguous names.

    Args:
        archive: the open archive.
        size: size of the file, in bytes.
    """
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    # bit 0 of the flags: encrypted
    if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
        raise DamagedArchiveError(
            "its records are compressed or encrypted, and torch.save's are not"
        )
    # sizes of a stored record are equal, so a difference shows a changed table
    if any(e.compress_size != e.file_size for e in entries):
        raise DamagedArchiveError("its table of contents was changed")
    if sum(entry.file_size for entry in entries) > size:
        raise DamagedArchiveError("its records overlap")
    if len({name.lower() for name in names}) != len(names):  # torch ignores case
        raise DamagedArchiveError("two of its records have one name")
    # torch.save puts all records into one folder
    if len({name.partition("/")[0] for name in names}) != 1:
        raise DamagedArchiveError("its records are of more than one archive")


def tensor_record_sizes(file: IO[bytes]) -> tuple[dict[str, int], int]:
    """Return the bytes of each record of tensor data, and a checksum of the table of contents.

    The table has the checksum of each record, so files with equal tables have equal content.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        non_tensor_names = set(non_tensor_records(archive))
    table = repr([(e.filename, e.header_offset, e.file_size, e.CRC) for e in entries])
    sizes = {e.filename: e.file_size for e in entries if e.filename not in non_tensor_names}
    return sizes, zlib.crc32(table.encode())


def non_tensor_records(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of records without tensor data: the pickle, and a few short records."""
    return [name for name in archive.namelist() if name.split("/")[1:2] != ["data"]]


def find_corrupt_record(archive: zipfile.ZipFile, names: Collection[str]) -> str | None:
    """Return the first of these records that does not match its checksum, or None."""
    for name in names:
        try:
            with archive.open(name) as record:
                while record.read(2**20):
                    pass
        except OSError:
            raise
        except Exception:  # a flipped byte can make zipfile raise nearly any type
            return name
    return None


def open_tensor_record(archive: zipfile.ZipFile, file: "FileWindow") -> "FileWindow":
    """Open the data of the only tensor of an archive as a file."""
    (entry,) = [e for e in archive.infolist() if e.filename.split("/")[1:2] == ["data"]]
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise DamagedArchiveError("a record has no header")
    start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + entry.file_size > file.length:
        raise DamagedArchiveError("a record reaches beyond its part")
    return FileWindow(file.file, file.start + start, entry.file_size)


def validate_pickled_tensors(archive: zipfile.ZipFile, size: int) -> None:
    """Compare the tensors of the pickle with the records of the archive.

    Args:
        archive: the open archive of torch.save.
        size: size of the file, in bytes.

    Raises:
        UnsafePickle: the pickle is damaged or too large.
        DamagedArchiveError: a tensor reaches beyond its record.
    """
    record_sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    (pickle_name,) = [name for name in record_sizes if name.partition("/")[2] == "data.pkl"]
    data_folder = pickle_name.removesuffix("data.pkl") + "data/"

    def resolve_storage(persistent_id: Any) -> Any:
        """Return the record of a storage: its class, and its number of elements."""
        match persistent_id:
            # the fourth item is the device
            case ("storage", GlobalName() as kind, str() as key, str(), int() as count):
                # bytes of an element, by the class name of the storage
                item_size = STORAGE_ITEM_SIZES.get(kind.name)
            case _:
                raise UnsafePickle("it refers to an object that is not a storage")
        record_size = record_sizes.get(data_folder + key)
        if item_size is None or record_size is None or not 0 <= count * item_size <= record_size:
            raise DamagedArchiveError(f"storage {key[:20]!r} is larger than its record, or missing")
        return CallRecord(kind, (count,))

    # every name is allowed, because load_plain calls none of them
    tree = safe_pickle.load_plain(archive.read(pickle_name), lambda _: True, resolve_storage)
    total_bytes = 0
    todo, visited = [tree], set()
    while todo:
        item = todo.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, CallRecord):
            # TENSOR_BUILDERS: torch's functions that a pickle calls to make a tensor from a storage
            if item.name.name in TENSOR_BUILDERS:
                total_bytes += _tensor_bytes(item.arguments)
            todo += [item.arguments, item.state, item.items]
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
    # Tensors may share a storage, so the total may exceed the size of the file. A factor of 4 is
    # allowed, and MAX_EXTRA_BYTES beyond it, because small files may have more.
    if total_bytes > 4 * size + MAX_EXTRA_BYTES:
        raise DamagedArchiveError("its tensors are larger than the file")


def _tensor_bytes(arguments: tuple[Any, ...]) -> int:
    """Return the bytes of a tensor's elements, which can exceed those of its storage.

    Args:
        arguments: arguments of torch's function that builds the tensor: storage, offset in
            elements, shape, strides, and others.

    Raises:
        DamagedArchiveError: they are not valid, or the tensor reaches beyond its storage.
    """
    match arguments:
        # count: number of elements of the storage
        case (CallRecord(arguments=(count,)) as storage, int() as offset,
              tuple() | CallRecord() as size,
              tuple() as stride, *_):  # fmt: skip
            size = size.arguments[0] if isinstance(size, CallRecord) else size  # torch.Size(size)
        case _:
            raise DamagedArchiveError("a tensor has no storage")
    numbers = [*size, *stride, offset]
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise DamagedArchiveError("the shape of a tensor is not valid")
    item_size = STORAGE_ITEM_SIZES[storage.name.name]
    # the number of elements of an untyped storage is not known here
    if storage.name.name != "UntypedStorage" and math.prod(size):
        last_element = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last_element >= count:
            raise DamagedArchiveError("a tensor reaches beyond its storage")
    return math.prod(size) * item_size
