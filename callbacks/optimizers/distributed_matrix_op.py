"""Distributed whole-matrix op: each rank processes full matrices of sharded or replicated params.

    sharded by rows (FSDP2), 2 ranks, matrices A B:           replicated (DDP), matrices A B:
      rank 0  A[top]  B[top]   -all-to-all->  A               rank 0  A B  -func-> A
      rank 1  A[low]  B[low]                  B               rank 1  A B          B
              A'[top] B'[top]  <-all-to-all-  A'                      A'B' <-all-gather-

All matrices of one shape take two collectives together, or one if they are replicated. Matrices
with any other layout on a mesh (tensor parallelism) are gathered in full on every rank.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ravine.strategies.collectives import all_gather_single
from ravine.strategies.dtensor import shard_like

# Maps a stack of full matrices (n, rows, ...) to a stack of the same shape and dtype.
MatrixFunction = Callable[[Tensor], Tensor]


def apply_to_full_matrices(
    function: MatrixFunction,
    shards: Tensor,
    like: Tensor,
    replica_group: ProcessGroup | None = None,
) -> Tensor:
    """Apply a function to full matrices; return this rank's shards of the result.

    The ranks of a layout divide the matrices among them. All ranks must call it.

    Args:
        function: the function, which needs full matrices.
        shards: (n, ...), this rank's shards of n matrices with equal shape and layout.
        like: a parameter with that shape and layout.
        replica_group: the ranks that hold the same plain tensors and divide the work.
    """
    if not isinstance(like, DTensor):
        if replica_group is None or dist.get_world_size(replica_group) == 1:
            return function(shards)
        return _apply_replicated(function, shards, replica_group)  # each rank computes some
    mesh, placements = like.device_mesh, like.placements
    sharded_axes = [axis for axis, p in enumerate(placements) if not p.is_replicate()]
    if not sharded_axes:
        return function(shards)
    if len(sharded_axes) == 1 and placements[sharded_axes[0]].is_shard(0):  # by rows
        group = mesh.get_group(sharded_axes[0])
        return _apply_row_sharded(function, shards, like.shape[0], group)
    # any other layout: every rank gathers and computes all matrices
    size = {"shape": like.shape, "stride": like.stride()}
    dtensors = [DTensor.from_local(p, mesh, placements, run_check=False, **size) for p in shards]
    outputs = function(torch.stack([matrix.full_tensor() for matrix in dtensors]))
    return torch.stack([shard_like(matrix, like) for matrix in outputs])


def _assign_slots(count: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the number of matrix slots per rank, and how many of them this rank uses."""
    slots = -(-count // ranks)
    return slots, min(max(count - rank * slots, 0), slots)


def _apply_replicated(function: MatrixFunction, matrices: Tensor, group: ProcessGroup) -> Tensor:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    slots, num_used = _assign_slots(len(matrices), ranks, rank)
    send = matrices.new_zeros(slots, *matrices.shape[1:])  # unused slots are sent and not read
    if num_used:
        send[:num_used] = function(matrices[rank * slots : rank * slots + num_used])
    received = send.new_empty(ranks * slots, *matrices.shape[1:])
    all_gather_single(received, send, group=group)
    return received[: len(matrices)]


def _apply_row_sharded(
    function: MatrixFunction, shards: Tensor, num_rows: int, group: ProcessGroup
) -> Tensor:
    """Apply a function to n full matrices that are sharded by rows; return this rank's rows.

    One all-to-all gives each rank its share of full matrices, and one returns the results. Each
    rank has equally many slots for matrices. An unused slot, and the rows beyond a short shard,
    are padding: the collective needs equal sizes.

    Args:
        function: maps full matrices (k, num_rows, ...) to the same shape.
        shards: (n, rows of this rank, ...).
        num_rows: rows of a full matrix.
        group: the ranks that hold the shards.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    count, num_local_rows, inner = shards.shape[0], shards.shape[1], shards.shape[2:]
    slots, num_used = _assign_slots(count, ranks, rank)  # this rank uses its first `num_used`
    chunk = -(-num_rows // ranks)  # rows of a full shard; the last shards may have fewer or none

    def all_to_all(buffer: Tensor) -> Tensor:
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=group)
        return received

    # rank 0 gets the first `slots` matrices, rank 1 the next, and so on
    send = shards.new_zeros(ranks * slots, chunk, *inner)
    send[:count, :num_local_rows] = shards
    # (slot, source rank, row of the shard, ...)
    blocks = all_to_all(send).view(ranks, slots, chunk, *inner).transpose(0, 1)
    matrices = blocks.reshape(slots, ranks * chunk, *inner)[:num_used, :num_rows]
    results = send.new_zeros(slots, ranks * chunk, *inner)
    if num_used:
        results[:num_used, :num_rows] = function(matrices)
    # (destination rank, slot, row of the shard, ...)
    blocks = results.view(slots, ranks, chunk, *inner).transpose(0, 1).contiguous()
    return all_to_all(blocks.view(ranks * slots, chunk, *inner))[:count, :num_local_rows]
