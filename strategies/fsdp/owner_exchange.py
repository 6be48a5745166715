"""Gather full tensors on the ranks that own them, and scatter them back, by all-to-all.

    rank 0   A[top] B[top]   ->  A        A owned by rank 0
    rank 1   A[low] B[low]   ->  B        B owned by rank 1

The parameters are sharded by rows, as FSDP2 does. All tensors of one dtype and process group are
sent in one message.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sharded_axis(parameter: Any) -> int | None:
    """Return the mesh axis over which a parameter is sharded; None if it is replicated."""
    for axis, placement in enumerate(parameter.placements):
        if not placement.is_replicate() and parameter.device_mesh.size(axis) > 1:
            return axis
    return None


def shard_group(parameter: Any) -> ProcessGroup:
    """Return the ranks over which a parameter is sharded."""
    axis = sharded_axis(parameter)
    assert axis is not None
    return parameter.device_mesh.get_group(axis)


def _iter_message_groups(
    pairs: list[tuple[Any, Tensor]],
) -> Iterator[tuple[ProcessGroup | None, list[int]]]:
    """Yield the process group and the indices of tensors that one message can hold."""
    message_groups: dict[Any, tuple[ProcessGroup | None, list[int]]] = {}
    for index, (p, tensor) in enumerate(pairs):
        group = shard_group(p) if sharded_axis(p) is not None else None
        message_groups.setdefault((group, tensor.dtype), (group, []))[1].append(index)
    yield from message_groups.values()


def _num_rows(parameter: Any, num_ranks: int, rank: int) -> int:
    """Return how many rows of a parameter a rank holds."""
    chunk = -(-parameter.shape[0] // num_ranks)
    return min(max(parameter.shape[0] - rank * chunk, 0), chunk)


def _exchange_sizes(
    pairs: list[tuple[Any, Tensor]], indices: list[int], owner: dict[int, int], num_ranks: int
) -> list[list[list[int]]]:
    """Return the number of elements of each tensor, in order, as [owner][holder]."""
    sizes: list[list[list[int]]] = [[[] for _ in range(num_ranks)] for _ in range(num_ranks)]
    for index in indices:
        p = pairs[index][0]
        row_numel = p.shape[1:].numel()
        for holder in range(num_ranks):
            sizes[owner[id(p)]][holder].append(_num_rows(p, num_ranks, holder) * row_numel)
    return sizes


@torch.no_grad()
def gather_to_owners(pairs: list[tuple[Any, Tensor]], owner: dict[int, int]) -> list[Any]:
    """Gather full tensors on the owners of their parameters; None on other ranks.

    Every rank calls it. There is one all-to-all per dtype: a rank sends its rows to the owner of
    each tensor.

    Args:
        pairs: sharded parameters, and this rank's rows of a tensor of the same shape (the
            parameter itself or its gradient).
        owner: the owner's rank in the shard group, by the id of the parameter.
    """
    full_tensors: list[Any] = [None] * len(pairs)
    # indices of the pairs with one shard group and dtype, sent together
    for group, indices in _iter_message_groups(pairs):
        if group is None:  # replicated
            for index in indices:
                full_tensors[index] = pairs[index][1].clone()
            continue
        num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        # numbers of elements [owner][holder][tensor]; holder: the rank that has the rows
        sizes = _exchange_sizes(pairs, indices, owner, num_ranks)
        # for each rank the indices of the pairs that it owns
        by_owner = [[i for i in indices if owner[id(pairs[i][0])] == r] for r in range(num_ranks)]
        send = torch.cat(
            [pairs[i][1].reshape(-1) for owned_indices in by_owner for i in owned_indices]
        )
        send_sizes = [sum(sizes[r][rank]) for r in range(num_ranks)]
        receive_sizes = [sum(sizes[rank][r]) for r in range(num_ranks)]
        received = send.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=group)
        # the rows of each owned tensor, from each rank
        rows_by_rank = [
            chunk.split(sizes[rank][r]) if by_owner[rank] else []
            for r, chunk in enumerate(received.split(receive_sizes))
        ]
        for number, i in enumerate(by_owner[rank]):
            full = torch.cat([rows[number] for rows in rows_by_rank])
            full_tensors[i] = full.view(pairs[i][0].shape)
    return full_tensors


@torch.no_grad()
def scatter_from_owners(pairs: list[tuple[Any, Tensor]], owner: dict[int, int]) -> None:
    """Scatter the rows of the owners' full tensors into the shards of the parameters.

    Every rank calls it.

    Args:
        pairs: sharded parameters, and their full values; on a rank that is not the owner any
            tensor of the dtype.
        owner: the owner's rank in the shard group, by the id of the parameter.
    """
    # indices of the pairs with one shard group and dtype, sent together
    for group, indices in _iter_message_groups(pairs):
        if group is None:  # replicated
            for index in indices:
                pairs[index][0]._local_tensor.copy_(pairs[index][1])
            continue
        num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        # numbers of elements [owner][holder][tensor]; holder: the rank that gets the rows
        sizes = _exchange_sizes(pairs, indices, owner, num_ranks)
        # for each rank the indices of the pairs that it owns
        by_owner = [[i for i in indices if owner[id(pairs[i][0])] == r] for r in range(num_ranks)]
        send_chunks = []
        for holder in range(num_ranks):
            for i in by_owner[rank]:
                p, full = pairs[i]
                first_row = holder * -(-p.shape[0] // num_ranks)  # rows per rank, rounded up
                # _num_rows: rows of the holder; the last ranks may have fewer, or none
                rows = full[first_row : first_row + _num_rows(p, num_ranks, holder)]
                send_chunks.append(rows.reshape(-1))
        empty = pairs[indices[0]][0]._local_tensor.new_empty(0)
        send = torch.cat(send_chunks) if send_chunks else empty
        send_sizes = [sum(sizes[rank][r]) for r in range(num_ranks)]
        receive_sizes = [sum(sizes[r][rank]) for r in range(num_ranks)]
        received = send.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=group)
        for r, received_rows in enumerate(received.split(receive_sizes)):
            for i, rows in zip(by_owner[r], received_rows.split(sizes[r][rank]), strict=True):
                local = pairs[i][0]._local_tensor
                local.copy_(rows.view(local.shape))
