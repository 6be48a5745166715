"""Each rank orthogonalises whole matrices of its own, however they are spread over ranks.

    sharded by rows (FSDP2), 2 ranks, matrices A B:           replicated (DDP), matrices A B:
      rank 0  A[top]  B[top]   -all-to-all->  A               rank 0  A B  -work-> A
      rank 1  A[low]  B[low]                  B               rank 1  A B          B
              A'[top] B'[top]  <-all-to-all-  A'                      A'B' <-all-gather-

Two collectives for all matrices of one shape, or one where they are replicated. Matrices that are
spread over a mesh in any other way (tensor parallelism) are made whole on every rank.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ravine.strategies.collectives import all_gather_single
from ravine.strategies.shards import part_of

# Of a stack of whole matrices, to a stack of the same shape and dtype.
Function = Callable[[Tensor], Tensor]


def apply_to_whole(
    function: Function, parts: Tensor, like: Tensor, replicas: ProcessGroup | None = None
) -> Tensor:
    """This rank's parts of function(matrices), given its parts of the matrices.

    Args:
        function: what needs whole matrices.
        parts: (n, ...): what this rank holds of n matrices of one shape and one layout.
        like: a parameter of that layout.
        replicas: the ranks that hold the same plain tensors, and share the work.
    """
    if not isinstance(like, DTensor):
        if replicas is None or dist.get_world_size(replicas) == 1:
            return function(parts)
        return _shared(function, parts, replicas)
    mesh, placements = like.device_mesh, like.placements
    sharded = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    if not sharded:
        return function(parts)
    if len(sharded) == 1 and placements[sharded[0]].is_shard(0):
        return _exchanged(function, parts, like.shape[0], mesh.get_group(sharded[0]))
    size = {"shape": like.shape, "stride": like.stride()}
    spread = [DTensor.from_local(p, mesh, placements, run_check=False, **size) for p in parts]
    whole = function(torch.stack([matrix.full_tensor() for matrix in spread]))
    return torch.stack([part_of(matrix, like) for matrix in whole])


def _slots(count: int, ranks: int, rank: int) -> tuple[int, int]:
    """Places for matrices on each rank, and how many of this rank's are taken."""
    slots = -(-count // ranks)
    return slots, min(max(count - rank * slots, 0), slots)


def _shared(function: Function, matrices: Tensor, group: ProcessGroup) -> Tensor:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    slots, taken = _slots(len(matrices), ranks, rank)
    send = matrices.new_zeros(slots, *matrices.shape[1:])  # idle places are sent, and not read
    if taken:
        send[:taken] = function(matrices[rank * slots : rank * slots + taken])
    received = send.new_empty(ranks * slots, *matrices.shape[1:])
    all_gather_single(received, send, group=group)
    return received[: len(matrices)]


def _exchanged(function: Function, shards: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """Shards (n, rows of this rank, ...) of n matrices of `rows` rows."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    count, mine, inner = shards.shape[0], shards.shape[1], shards.shape[2:]
    slots, taken = _slots(count, ranks, rank)
    chunk = -(-rows // ranks)  # rows of a full shard; the last ones may have fewer, or none

    def swap(buffer: Tensor) -> Tensor:
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=group)
        return received

    send = shards.new_zeros(ranks * slots, chunk, *inner)
    send[:count, :mine] = shards
    parts = swap(send).view(ranks, slots, chunk, *inner).transpose(0, 1)  # slot, from rank, ...
    whole = parts.reshape(slots, ranks * chunk, *inner)[:taken, :rows]
    back = send.new_zeros(slots, ranks * chunk, *inner)
    if taken:
        back[:taken, :rows] = function(whole)
    parts = back.view(slots, ranks, chunk, *inner).transpose(0, 1).contiguous()
    return swap(parts.view(ranks * slots, chunk, *inner))[:count, :mine]
