"""Memory-map (mmap) the tensors of a `torch.save` file: data is read on first access.

    tree with meta tensors (torch.load) + offset of each record -> tensors in a private mapping

Processes of one machine share the pages. Writing to a tensor copies its pages and does not change
the file. The mapping stays valid if the file is replaced or removed. If the file is truncated in
place, the next access to a lost page kills the process (SIGBUS).
"""

import copy
import mmap
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import IO, Any

import torch
from torch import Tensor, nn

from ravine.errors import UsageError

SAFE_TYPES = (bool, int, float, complex, str, bytes, bytearray, type(None))
SAFE_TORCH_TYPES = (torch.Size, torch.device, torch.dtype, torch.layout)


class UnmappableFileError(ValueError):
    """The file holds an object that cannot be a view of its pages, so it must be read."""


def load_mapped(file: IO[bytes], sections: Collection[str]) -> Any:
    """Load a validated file; the tensors of `sections` are views of the mapped file.

    Args:
        file: the open file; it may be closed afterwards.
        sections: top-level keys whose tensors are views; tensors of other keys are copied.

    Raises:
        UnmappableFileError: a tensor or object is not plain, or memory cannot be mapped.
    """
    with zipfile.ZipFile(file) as table:
        # torch.load would swap the bytes of each number, which a view cannot
        for name in table.namelist():
            is_byte_order = name.partition("/")[2] == "byteorder"
            if is_byte_order and table.read(name).decode(errors="replace") != sys.byteorder:
                raise UnmappableFileError("it was written on a machine with another byte order")
    file.seek(0)
    try:
        # on the meta device a tensor has no values, but its offset in the file
        tree = torch.load(file, "meta", weights_only=True)
    except NotImplementedError as error:  # torch compares the indices of a sparse tensor
        raise UnmappableFileError("it holds a sparse tensor") from error
    try:
        # ACCESS_COPY: a write into a view changes memory only, not the file
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise UnmappableFileError(str(error)) from error
    # _TensorMapper: replaces the meta tensors of the tree by views of the pages
    tree = _TensorMapper(pages).map_tree(tree)
    if not isinstance(tree, dict):  # it has no sections: everything is copied
        return copy.deepcopy(tree)
    # one deepcopy, so that sections that share a tensor share its copy
    copied = copy.deepcopy({key: value for key, value in tree.items() if key not in sections})
    for key, value in copied.items():
        tree[key] = value
    return tree


class _TensorMapper:
    """Replaces meta tensors by views of the mapped pages."""

    def __init__(self, pages: mmap.mmap) -> None:
        self.pages = pages
        self.storages: dict[tuple[int, int], torch.UntypedStorage] = {}
        self.mapped_containers: dict[int, Any] = {}  # by id: a container may occur twice
        self.replaced_tuples: list[tuple[Any, ...]] = []  # kept, so that no id is used again

    def map_tree(self, value: Any) -> Any:
        """Return a value with views of the mapped pages in place of its meta tensors.

        Dicts and lists are changed in place. A container that occurs twice stays one object.
        """
        value_type = type(value)
        if isinstance(value, Tensor):
            return self.map_tensor(value)
        # SAFE_TYPES: numbers, text and None; SAFE_TORCH_TYPES: shapes, devices, dtypes and layouts
        if value_type in SAFE_TYPES or value_type in SAFE_TORCH_TYPES:
            return value
        if id(value) in self.mapped_containers:  # it occurs a second time
            return self.mapped_containers[id(value)]
        if value_type in (dict, OrderedDict, Counter):
            self.mapped_containers[id(value)] = value
            for key, item in value.items():
                if isinstance(key, Tensor):
                    raise UnmappableFileError("a key is a tensor")
                value[key] = self.map_tree(item)
        elif value_type is list:
            self.mapped_containers[id(value)] = value
            value[:] = [self.map_tree(item) for item in value]
        elif value_type is tuple:
            mapped_tuple = tuple(self.map_tree(item) for item in value)
            self.mapped_containers[id(value)] = mapped_tuple
            # keeps the tuple alive, so that no other object gets its id
            self.replaced_tuples.append(value)
            return mapped_tuple
        elif value_type is not set or any(isinstance(item, Tensor) for item in value):
            raise UnmappableFileError(f"it holds a {value_type.__name__}")
        return value

    def map_tensor(self, like: Tensor) -> Tensor:
        """Return a view of the mapped pages with shape, strides and dtype of a meta tensor.

        Raises:
            UnmappableFileError: the tensor is not plain (sparse, quantized, a subclass).
        """
        is_strided = type(like) in (Tensor, nn.Parameter) and like.layout == torch.strided
        if not is_strided or like.is_quantized or like.is_conj() or like.is_neg():
            raise UnmappableFileError(
                f"it holds a {type(like).__name__} that is not a plain tensor"
            )
        storage = like.untyped_storage()
        # torch.load sets the offset of the storage in the file
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None:
            raise UnmappableFileError(
                "this version of torch does not return the offsets of records"
            )
        # set_: the new tensor uses the mapped storage, without a copy
        view = torch.empty(0, dtype=like.dtype).set_(
            self.map_storage(start, storage.nbytes()),
            like.storage_offset(),
            like.shape,
            like.stride(),
        )
        if type(like) is nn.Parameter:
            return nn.Parameter(view, like.requires_grad)
        return view.requires_grad_(like.requires_grad)

    def map_storage(self, start: int, length: int) -> torch.UntypedStorage:
        """Return the storage of a record; tensors with a shared storage share it again."""
        if start + length > len(self.pages):
            raise UsageError("a record reaches beyond the end of the file")
        if (start, length) not in self.storages:
            self.storages[start, length] = (
                torch.frombuffer(self.pages, dtype=torch.uint8, count=length, offset=start)
                if length
                else torch.empty(0, dtype=torch.uint8)
            ).untyped_storage()
        return self.storages[start, length]
