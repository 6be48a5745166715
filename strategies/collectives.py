"""All-gather of tensors, in all supported torch versions, and of Python values."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.14 deprecates `all_gather_into_tensor`; older versions lack `all_gather_single`.
# Both have the same arguments. Remove this when all supported versions have `all_gather_single`.
_ALL_GATHER_NAMES = ("all_gather_single", "all_gather_into_tensor")
_all_gather: Callable[..., Any] = next(
    getattr(dist, n) for n in _ALL_GATHER_NAMES if hasattr(dist, n)
)


def all_gather_single(output: Tensor, input: Tensor, group: ProcessGroup | None = None) -> None:
    """Gather `input` of every rank into `output`, in the order of ranks.

    Args:
        output: (ranks * n, ...), the inputs one after another.
        input: (n, ...), of the same shape and dtype on every rank.
        group: the participating ranks; None: all.
    """
    _all_gather(output, input, group=group)


def all_gather_values(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, in the order of ranks.

    Args:
        value: what this rank contributes; any object that pickle can write.
        group: the participating ranks; None: all.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
