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
from torch.distributed.tensor import DTensor, distribute_tensor

# Of whole matrices, to as many of the same shape and dtype.
Function = Callable[[list[Tensor]], list[Tensor]]


def apply_to_whole(
    function: Function, parts: list[Tensor], like: Tensor, replicas: ProcessGroup | None = None
) -> list[Tensor]:
    """This rank's parts of function(matrices), given its parts of the matrices.

    Args:
        function: what needs whole matrices.
        parts: what this rank holds of each; the matrices have one shape and one layout.
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
    whole = function([matrix.full_tensor() for matrix in spread])
    return [distribute_tensor(w, mesh, placements, src_data_rank=None).to_local() for w in whole]


def _slots(count: int, ranks: int, rank: int) -> tuple[int, int]:
    """Places for matrices on each rank, and how many of this rank's are taken."""
    slots = -(-count // ranks)
    return slots, min(max(count - rank * slots, 0), slots)


def _shared(function: Function, matrices: list[Tensor], group: ProcessGroup) -> list[Tensor]:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    slots, taken = _slots(len(matrices), ranks, rank)
    mine = matrices[rank * slots : rank * slots + taken]
    send = matrices[0].new_zeros(slots, *matrices[0].shape)  # idle places are sent, and not read
    for place, matrix in enumerate(function(mine) if mine else []):
        send[place] = matrix
    received = send.new_empty(ranks * slots, *matrices[0].shape)
    dist.all_gather_into_tensor(received, send, group=group)
    return list(received[: len(matrices)])


def _exchanged(
    function: Function, shards: list[Tensor], rows: int, group: ProcessGroup
) -> list[Tensor]:
    """Shards (rows of this rank, ...) of len(shards) matrices of `rows` rows."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    slots, taken = _slots(len(shards), ranks, rank)
    chunk = -(-rows // ranks)  # rows of a full shard; the last ones may have fewer, or none
    inner = shards[0].shape[1:]

    def swap(buffer: Tensor) -> Tensor:
        received = torch.empty_like(buffer)
        dist.all_to_all_single(received, buffer, group=group)
        return received

    send = shards[0].new_zeros(ranks * slots, chunk, *inner)
    for place, shard in enumerate(shards):
        send[place, : len(shard)] = shard
    parts = swap(send).view(ranks, slots, chunk, *inner).transpose(0, 1)  # slot, from rank, ...
    whole = parts.reshape(slots, ranks * chunk, *inner)[:taken, :rows]
    back = send.new_zeros(slots, ranks * chunk, *inner)
    for place, matrix in enumerate(function(list(whole)) if taken else []):
        back[place, :rows] = matrix
    parts = back.view(slots, ranks, chunk, *inner).transpose(0, 1).contiguous()
    received = swap(parts.view(ranks * slots, chunk, *inner))
    return [received[place, : len(shard)] for place, shard in enumerate(shards)]
