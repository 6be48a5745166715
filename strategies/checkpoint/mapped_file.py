"""The tensors of a `torch.save` file as views of the file's pages: nothing is read before use.

    tree with meta tensors (torch.load) + offset of each record -> tensors in a private mapping

Processes of one machine share the pages. A tensor that is written to gets pages of its own, and the
file does not change. The mapping keeps the file's content alive if the file is replaced or removed;
if it is truncated in place, the next access to a lost page ends the process (SIGBUS).
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

PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None))
PLAIN_TORCH = (torch.Size, torch.device, torch.dtype, torch.layout)


class Unmappable(ValueError):
    """The file holds something that cannot be a view of its pages; it has to be read instead."""


def load(file: IO[bytes], sections: Collection[str]) -> Any:
    """Read a file whose archive and pickle were checked; tensors of `sections` are mapped.

    Args:
        file: the open file; it may be closed afterwards.
        sections: top-level keys whose tensors are views; those of all other keys are copied.

    Raises:
        Unmappable: for tensors or objects that are not plain, or where no memory can be mapped.
    """
    with zipfile.ZipFile(file) as table:
        orders = [name for name in table.namelist() if name.partition("/")[2] == "byteorder"]
        if orders and table.read(orders[0]).decode(errors="replace") != sys.byteorder:
            raise Unmappable("it was written on a machine with another order of bytes")
    file.seek(0)
    try:
        tree = torch.load(file, "meta", weights_only=True)
    except NotImplementedError as error:  # torch compares the indices of a sparse tensor
        raise Unmappable("it holds a sparse tensor") from error
    try:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise Unmappable(str(error)) from error
    tree = _Views(pages).tree(tree)
    if not isinstance(tree, dict):
        return copy.deepcopy(tree)
    rest = copy.deepcopy({key: value for key, value in tree.items() if key not in sections})
    for key, value in rest.items():
        tree[key] = value
    return tree


class _Views:
    """Puts views of the pages in the place of meta tensors."""

    def __init__(self, pages: mmap.mmap) -> None:
        self.pages = pages
        self.storages: dict[tuple[int, int], torch.UntypedStorage] = {}
        self.done: dict[int, Any] = {}  # containers may occur twice

    def tree(self, value: Any) -> Any:
        """The same value; dicts and lists are changed in place."""
        kind = type(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if kind in PLAIN or kind in PLAIN_TORCH:
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        if kind in (dict, OrderedDict, Counter):
            self.done[id(value)] = value
            for key, item in value.items():
                if isinstance(key, Tensor):
                    raise Unmappable("a key is a tensor")
                value[key] = self.tree(item)
        elif kind is list:
            self.done[id(value)] = value
            value[:] = [self.tree(item) for item in value]
        elif kind is tuple:
            before, value = value, tuple(self.tree(item) for item in value)
            self.done[id(before)] = value
            self.done[-id(before)] = before  # its id must not be used again
        elif kind is not set or any(isinstance(item, Tensor) for item in value):
            raise Unmappable(f"it holds a {kind.__name__}")
        return value

    def tensor(self, like: Tensor) -> Tensor:
        """The view in the place of a meta tensor."""
        plain = type(like) in (Tensor, nn.Parameter) and like.layout == torch.strided
        if not plain or like.is_quantized or like.is_conj() or like.is_neg():
            raise Unmappable(f"it holds a {type(like).__name__} that is no plain tensor")
        storage = like.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None:
            raise Unmappable("this version of torch does not say where records begin")
        view = torch.empty(0, dtype=like.dtype).set_(
            self.storage(start, storage.nbytes()), like.storage_offset(), like.shape, like.stride()
        )
        if type(like) is nn.Parameter:
            return nn.Parameter(view, like.requires_grad)
        return view.requires_grad_(like.requires_grad)

    def storage(self, start: int, length: int) -> torch.UntypedStorage:
        """The pages of a record; tensors that shared a storage share it again."""
        if start + length > len(self.pages):
            raise UsageError("a record reaches beyond the end of the file")
        if (start, length) not in self.storages:
            self.storages[start, length] = (
                torch.frombuffer(self.pages, dtype=torch.uint8, count=length, offset=start)
                if length
                else torch.empty(0, dtype=torch.uint8)
            ).untyped_storage()
        return self.storages[start, length]
