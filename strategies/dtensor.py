"""Shards of a tensor as index ranges: copy one out of a whole tensor, or collect all on one rank.

The placements of a DTensor give the indices that any rank holds. So a rank can read its shard from
a file without the rest, and a whole tensor can be assembled on one rank alone:

    local_part(whole, like)         this rank's shard of `whole`; a view where it is one block
    collect(tensor)                 the whole tensor on the mesh's first rank, None on the others
    to_first(tree, group)           the trees of all ranks of a group, on its first rank
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

MESSAGE = 2**24  # bytes sent or read at once: the memory beside the tensors themselves


class Run(NamedTuple):
    """Consecutive indices of a dimension: in the whole tensor, and in the shard."""

    start: int
    local: int
    length: int


Runs = list[list[Run]]  # for each dimension


def runs_of(tensor: Tensor, coordinate: tuple[int, ...] | None = None) -> Runs:
    """The indices that a rank holds of a tensor, for each dimension; all of a plain tensor.

    Args:
        tensor: a DTensor, or a plain tensor.
        coordinate: of the rank in the tensor's mesh; by default this rank's.
    """
    if not isinstance(tensor, DTensor):
        return [[Run(0, 0, size)] for size in tensor.shape]
    mesh = tensor.device_mesh
    here = mesh.get_coordinate() if coordinate is None else coordinate
    indices = [torch.arange(size) for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        split: Any = placement
        if not hasattr(split, "dim"):  # replicated
            continue
        along = type(split)(0, **_factor(split))
        shards, _ = along._split_tensor(
            indices[split.dim], mesh.size(axis), with_padding=False, contiguous=False
        )
        indices[split.dim] = shards[here[axis]] if here is not None else indices[split.dim][:0]
    return [_runs(index) for index in indices]


def _factor(placement: Any) -> dict[str, Any]:
    """The extra argument of a placement that splits a dimension a second time."""
    factor = getattr(placement, "split_factor", None)
    return {} if factor is None else {"split_factor": factor}


def _runs(index: Tensor) -> list[Run]:
    if not len(index):
        return []
    breaks = ((index[1:] - index[:-1]) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(index)]
    return [Run(int(index[a]), a, b - a) for a, b in zip(starts, ends, strict=True)]


def blocks(runs: Runs) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The blocks that a shard consists of, as slices of the whole tensor and of the shard."""
    for each in itertools.product(*runs):
        yield (
            tuple(slice(run.start, run.start + run.length) for run in each),
            tuple(slice(run.local, run.local + run.length) for run in each),
        )


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, placed as `like` is; nothing is sent.

    A view of `whole` where the shard is one block, as under ZeRO, and a copy of the shard where it
    is several (ZeRO across tensor parallelism). Of a plain `like` all of `whole`.
    """
    if isinstance(whole, DTensor):
        return whole.to_local()
    if not isinstance(like, DTensor):
        return whole
    runs = runs_of(like)
    if all(len(each) <= 1 for each in runs):
        for dim, each in enumerate(runs):
            run = each[0] if each else Run(0, 0, 0)
            whole = whole.narrow(dim, run.start, run.length)
        return whole
    part = whole.new_empty([sum(run.length for run in each) for each in runs])
    for there, here in blocks(runs):
        part[here] = whole[there]
    return part


def keeper(mesh: DeviceMesh) -> int:
    """The rank on which `collect` puts the tensors of a mesh: the one at its origin."""
    return int(mesh.mesh.flatten()[0])


@torch.no_grad()
def collect(tensor: Tensor) -> Tensor | None:
    """The whole tensor on the CPU of the mesh's first rank; None elsewhere. All of them call it.

    Shards are sent to that rank only, in messages of at most MESSAGE bytes.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    mesh, local = tensor.device_mesh, tensor.to_local().detach()
    first, rank = keeper(mesh), dist.get_rank()
    sharded = [hasattr(placement, "dim") for placement in tensor.placements]
    if not any(sharded):
        return local.cpu() if rank == first else None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype) if rank == first else None
    for coordinate in itertools.product(*(range(n) for n in mesh.mesh.shape)):
        if any(at and not split for at, split in zip(coordinate, sharded, strict=True)):
            continue  # a copy of what another rank sends
        sender = int(mesh.mesh[coordinate])
        if rank == sender and sender != first:
            for piece in _pieces(local):
                dist.send(_bytes(piece), first)
        elif whole is not None:
            runs = runs_of(tensor, coordinate)
            shape = [sum(run.length for run in each) for each in runs]
            for rows, piece in _received(shape, local, sender if sender != first else None):
                for there, here in blocks([_within(runs[0], rows), *runs[1:]] if runs else []):
                    whole[there] = piece[here].to(whole.device)
    return whole


def _rows(shape: torch.Size | list[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """First and last row of the pieces of a tensor of this shape, each MESSAGE bytes at most."""
    size = itemsize
    for n in shape:
        size *= n
    if not size:
        return
    if not shape:
        yield 0, 1
        return
    step = max(1, MESSAGE * shape[0] // size)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _pieces(local: Tensor) -> Iterator[Tensor]:
    for start, end in _rows(local.shape, local.element_size()):
        yield local[start:end] if local.ndim else local


def _received(
    shape: list[int], like: Tensor, sender: int | None
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Pieces of a rank's shard, by its first rows; without a sender `like` is the shard."""
    for rows in _rows(shape, like.element_size()):
        if sender is None:
            yield rows, like[rows[0] : rows[1]] if like.ndim else like
            continue
        piece = torch.empty(
            [rows[1] - rows[0], *shape[1:]] if shape else [], dtype=like.dtype, device=like.device
        )
        dist.recv(_bytes(piece), sender)
        yield rows, piece


def _within(runs: list[Run], rows: tuple[int, int]) -> list[Run]:
    """The part of the runs that lies in some rows of the shard, counted from the first of them."""
    found = []
    for run in runs:
        start, end = max(run.local, rows[0]), min(run.local + run.length, rows[1])
        if start < end:
            found.append(Run(run.start + start - run.local, start - rows[0], end - start))
    return found


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo sends few types."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class _Slot:
    """The place of a tensor in a tree that is sent."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def to_first(tree: Any, group: ProcessGroup, device: torch.device) -> list[Any]:
    """The trees of all ranks of a group, in their order, on its first rank; [] on the others.

    Trees are nested dicts and lists of plain tensors and plain values. Every rank of the group
    calls it. Tensors are sent in messages of MESSAGE bytes at most.

    Args:
        tree: what this rank holds.
        group: the ranks that send; the first of them receives.
        device: on which the group sends and receives.
    """
    ranks = dist.get_process_group_ranks(group)
    first, rank = ranks[0], dist.get_rank()
    if rank == first:
        return [tree, *(_receive_tree(sender, device) for sender in ranks[1:])]
    leaves, spec = tree_flatten(tree)
    slots = [_Slot(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    dist.send_object_list([tree_unflatten(slots, spec)], first)
    for leaf in leaves:
        for piece in _pieces(leaf.detach()) if isinstance(leaf, Tensor) else ():
            dist.send(_bytes(piece.to(device)), first)
    return []


def _receive_tree(sender: int, device: torch.device) -> Any:
    message: list[Any] = [None]
    dist.recv_object_list(message, sender)
    slots, spec = tree_flatten(message[0])
    return tree_unflatten([_filled(slot, sender, device) for slot in slots], spec)


def _filled(slot: Any, sender: int, device: torch.device) -> Any:
    if not isinstance(slot, _Slot):
        return slot
    tensor = torch.empty(slot.shape, dtype=slot.dtype)
    for start, end in _rows(slot.shape, tensor.element_size()):
        target = tensor[start:end] if tensor.ndim else tensor
        piece = torch.empty_like(target, device=device)
        dist.recv(_bytes(piece), sender)
        target.copy_(piece)
    return tensor
