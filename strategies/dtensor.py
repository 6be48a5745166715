"""DTensors: convert between full tensors and shards, which are index ranges of a full tensor.

A sharded parameter is a DTensor. Elementwise arithmetic needs only the local shards, which share
its memory. Files and other layouts need full tensors.

The placements of a DTensor give the indices that each rank holds. So a rank can read only its shard
from a file, and a full tensor can be assembled on one rank:

    to_local(tensor)                                   this rank's shard, which shares memory
    full_tensor(tensor)                                the full tensor, on every rank
    local_shard(full, like)                            this rank's shard of `full`
    gather_to_first_rank(tensor)                       the full tensor on the mesh's first rank
    gather_trees_to_first_rank(tree, group, device)    the trees of all ranks on the first rank
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

MAX_MESSAGE_BYTES = 2**24  # sent or read at once: the extra memory besides the tensors


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares memory; a plain tensor is returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gather the full tensor; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class IndexRange(NamedTuple):
    """A range of consecutive indices of a dimension, in the full tensor and in the shard."""

    global_start: int
    local_start: int
    length: int


ShardIndices = list[list[IndexRange]]  # the ranges of each dimension


def shard_indices(tensor: Tensor, coordinate: tuple[int, ...] | None = None) -> ShardIndices:
    """Return the indices of a tensor that a rank holds, for each dimension.

    Args:
        tensor: a DTensor, or a plain tensor, of which a rank holds all indices.
        coordinate: coordinate of the rank in the tensor's mesh; None: this rank.

    Returns:
        for each dimension the ranges of consecutive indices; no range if the rank is not in the
        mesh or its shard is empty.
    """
    if not isinstance(tensor, DTensor):
        return [[IndexRange(0, 0, size)] for size in tensor.shape]
    mesh = tensor.device_mesh
    # None if this rank is not in the mesh
    mesh_coordinate = mesh.get_coordinate() if coordinate is None else coordinate
    # torch splits the indices of a dimension as it splits the tensor
    indices = [torch.arange(size) for size in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        shard_placement: Any = placement
        if not hasattr(shard_placement, "dim"):  # replicated
            continue
        dim = shard_placement.dim
        # the same placement for a tensor of one dimension; it may be a strided one (FSDP with tp)
        one_dim_placement = type(shard_placement)(0, **_split_factor_kwargs(shard_placement))
        shards, _ = one_dim_placement._split_tensor(
            indices[dim], mesh.size(axis), with_padding=False, contiguous=False
        )
        if mesh_coordinate is None:
            indices[dim] = indices[dim][:0]
        else:
            indices[dim] = shards[mesh_coordinate[axis]]
    # _consecutive_ranges: an IndexRange (global_start, local_start, length) for each run
    return [_consecutive_ranges(index) for index in indices]


def _split_factor_kwargs(placement: Any) -> dict[str, Any]:
    """Return the extra argument of a strided placement, which splits a dimension twice."""
    factor = getattr(placement, "split_factor", None)
    return {} if factor is None else {"split_factor": factor}


def _consecutive_ranges(index: Tensor) -> list[IndexRange]:
    if not len(index):
        return []
    breaks = ((index[1:] - index[:-1]) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(index)]
    return [IndexRange(int(index[a]), a, b - a) for a, b in zip(starts, ends, strict=True)]


def shard_blocks(indices: ShardIndices) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield the blocks of a shard, as slices of the full tensor and slices of the shard."""
    for ranges in itertools.product(*indices):
        yield (
            tuple(
                slice(index_range.global_start, index_range.global_start + index_range.length)
                for index_range in ranges
            ),
            tuple(
                slice(index_range.local_start, index_range.local_start + index_range.length)
                for index_range in ranges
            ),
        )


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor, with the placements of `like`; sends nothing.

    The result is a view of `full` if the shard is one block, as with ZeRO. It is a copy if the
    shard has several blocks (ZeRO with tensor parallelism). If `like` is a plain tensor, the result
    is `full`.
    """
    if isinstance(full, DTensor):
        return full.to_local()
    if not isinstance(like, DTensor):
        return full
    indices = shard_indices(like)  # for each dimension the ranges of this rank's shard
    if all(len(ranges) <= 1 for ranges in indices):  # one block, or an empty shard
        for dim, ranges in enumerate(indices):
            index_range = ranges[0] if ranges else IndexRange(0, 0, 0)
            full = full.narrow(dim, index_range.global_start, index_range.length)
        return full
    shard = full.new_empty(
        [sum(index_range.length for index_range in ranges) for ranges in indices]
    )
    # slices of the full tensor, and of the shard
    for source, target in shard_blocks(indices):
        shard[target] = full[source]
    return shard


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full value, with the placements of `like`; sends nothing."""
    return local_shard(value, like).to(like.device)  # a value of a sharded file is a DTensor


def first_mesh_rank(mesh: DeviceMesh) -> int:
    """Return the rank at the origin of a mesh, on which `gather_to_first_rank` puts tensors."""
    return int(mesh.mesh.flatten()[0])


@torch.no_grad()
def gather_to_first_rank(tensor: Tensor) -> Tensor | None:
    """Gather a full tensor on the CPU of the mesh's first rank; return None on other ranks.

    All ranks of the mesh call it. Shards are sent to the first rank only, one after another, in
    messages of at most MAX_MESSAGE_BYTES. A plain tensor is returned on every rank.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    mesh, local = tensor.device_mesh, tensor.to_local().detach()
    # first_mesh_rank: global rank of the first process of the mesh
    first_rank, rank = first_mesh_rank(mesh), dist.get_rank()
    is_sharded_axis = [hasattr(placement, "dim") for placement in tensor.placements]
    if not any(is_sharded_axis):
        return local.cpu() if rank == first_rank else None
    full = torch.empty(tensor.shape, dtype=tensor.dtype) if rank == first_rank else None
    # each rank of the mesh in turn; all ranks run the same loop
    for coordinate in itertools.product(*(range(n) for n in mesh.mesh.shape)):
        if any(
            i > 0 and not sharded for i, sharded in zip(coordinate, is_sharded_axis, strict=True)
        ):
            continue  # a replica of a shard that another rank sends
        sender = int(mesh.mesh[coordinate])
        if rank == sender and sender != first_rank:
            # _chunks: rows of at most MAX_MESSAGE_BYTES; _as_bytes: gloo supports few dtypes
            for chunk in _chunks(local):
                dist.send(_as_bytes(chunk), first_rank)  # in the default group: a global rank
        elif full is not None:
            indices = shard_indices(tensor, coordinate)
            # None: the first rank copies its own shard
            _copy_shard_from(sender if sender != first_rank else None, local, indices, full)
    return full


def _copy_shard_from(
    sender: int | None, local: Tensor, indices: ShardIndices, full: Tensor
) -> None:
    """Copy the shard of a rank into the full tensor, in chunks of rows.

    Args:
        sender: the rank that sends its shard; None: `local` is the shard.
        local: the shard of this rank; chunks are received with its dtype, on its device.
        indices: the indices of the shard in the full tensor.
        full: the full tensor, on the CPU.
    """
    shape = [sum(index_range.length for index_range in ranges) for ranges in indices]
    # rows: first and end row of a chunk; with sender=None the chunk is `local` itself
    for rows, chunk in _receive_chunks(shape, local, sender):
        # _ranges_within: the parts of the ranges inside the chunk; a scalar has no indices
        chunk_indices = [_ranges_within(indices[0], rows), *indices[1:]] if indices else []
        for target, source in shard_blocks(chunk_indices):
            full[target] = chunk[source].to(full.device)


def _row_chunks(shape: torch.Size | list[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield start and end row of chunks of a tensor, each of at most MAX_MESSAGE_BYTES."""
    size = itemsize
    for n in shape:
        size *= n
    if not size:
        return
    if not shape:
        yield 0, 1
        return
    step = max(1, MAX_MESSAGE_BYTES * shape[0] // size)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _chunks(local: Tensor) -> Iterator[Tensor]:
    for start, end in _row_chunks(local.shape, local.element_size()):
        yield local[start:end] if local.ndim else local


def _receive_chunks(
    shape: list[int], like: Tensor, sender: int | None
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield row ranges and chunks of a rank's shard; without a sender `like` is the shard."""
    for rows in _row_chunks(shape, like.element_size()):
        if sender is None:
            yield rows, like[rows[0] : rows[1]] if like.ndim else like
            continue
        chunk = torch.empty(
            [rows[1] - rows[0], *shape[1:]] if shape else [], dtype=like.dtype, device=like.device
        )
        dist.recv(_as_bytes(chunk), sender)
        yield rows, chunk


def _ranges_within(ranges: list[IndexRange], rows: tuple[int, int]) -> list[IndexRange]:
    """Return the parts of index ranges inside a chunk of rows of the shard.

    Args:
        ranges: ranges of the first dimension.
        rows: first row of the chunk in the shard, and the row after its last one.

    Returns:
        ranges whose `local_start` counts from the first row of the chunk.
    """
    first_row, end_row = rows
    ranges_in_chunk = []
    for index_range in ranges:
        start = max(index_range.local_start, first_row)
        end = min(index_range.local_start + index_range.length, end_row)
        if start < end:
            ranges_in_chunk.append(
                IndexRange(
                    global_start=index_range.global_start + start - index_range.local_start,
                    local_start=start - first_row,
                    length=end - start,
                )
            )
    return ranges_in_chunk


def _as_bytes(tensor: Tensor) -> Tensor:
    """View a tensor as bytes, because gloo supports few dtypes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class _TensorSpec:
    """Placeholder of a tensor in a tree that is sent: its shape and dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


def gather_trees_to_first_rank(tree: Any, group: ProcessGroup, device: torch.device) -> list[Any]:
    """Return the trees of all ranks of a group, in rank order, on its first rank; [] elsewhere.

    Trees are nested dicts and lists of plain tensors and plain values. Every rank of the group
    calls it. Tensors are sent in messages of at most MAX_MESSAGE_BYTES.

    Args:
        tree: the tree of this rank.
        group: the ranks that send; the first of them receives.
        device: the device on which the group sends and receives.
    """
    ranks = dist.get_process_group_ranks(group)
    first_rank, rank = ranks[0], dist.get_rank()
    if rank == first_rank:
        # _receive_tree: the counterpart of the sends below
        return [tree, *(_receive_tree(sender, device) for sender in ranks[1:])]
    leaves, tree_spec = tree_flatten(tree)
    # first the tree with the shape and dtype of each tensor, then the tensors
    specs = [_TensorSpec(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    dist.send_object_list([tree_unflatten(specs, tree_spec)], first_rank)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            for chunk in _chunks(leaf.detach()):
                # through the default group, so `first_rank` is a global rank
                dist.send(_as_bytes(chunk.to(device)), first_rank)
    return []


def _receive_tree(sender: int, device: torch.device) -> Any:
    message: list[Any] = [None]
    dist.recv_object_list(message, sender)
    specs, tree_spec = tree_flatten(message[0])
    return tree_unflatten(
        [_receive_leaf(tensor_spec, sender, device) for tensor_spec in specs], tree_spec
    )


def _receive_leaf(tensor_spec: Any, sender: int, device: torch.device) -> Any:
    if not isinstance(tensor_spec, _TensorSpec):
        return tensor_spec
    tensor = torch.empty(tensor_spec.shape, dtype=tensor_spec.dtype)
    for start, end in _row_chunks(tensor_spec.shape, tensor.element_size()):
        target = tensor[start:end] if tensor.ndim else tensor
        chunk = torch.empty_like(target, device=device)
        dist.recv(_as_bytes(chunk), sender)
        target.copy_(chunk)
    return tensor
