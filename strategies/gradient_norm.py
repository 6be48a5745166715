"""Gradient clipping (clip_grad_norm) by the total norm of sharded and unsharded gradients.

norm = sqrt(sum over all gradients of g²);   g <- g min(1, max_norm / norm)
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[Tensor], max_norm: float, group: ProcessGroup | None = None
) -> Tensor:
    """Scale gradients in place so that their total norm is at most `max_norm`.

    It equals `torch.nn.utils.clip_grad_norm_`, which does not support DTensors of different meshes,
    or DTensors together with plain tensors.

    Args:
        parameters: the parameters of an optimizer.
        max_norm: the maximum norm.
        group: with ZeRO-1 the ranks that have the gradients of different parameters.

    Returns:
        the total norm before clipping, () on the device of the gradients, the same on every rank.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    grads_by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        is_sharded = isinstance(gradient, DTensor)
        key = (gradient.device_mesh, gradient.placements) if is_sharded else None
        grads_by_mesh.setdefault(key, []).append(gradient)
    # of sharded gradients the result is a DTensor, whose full value needs a reduction
    norms = [get_total_norm(same_mesh_grads) for same_mesh_grads in grads_by_mesh.values()]
    # full_tensor reduces the norms of the shards to the norm over all ranks
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    # with a group, a rank without gradients still joins the all-reduce below
    if not norms and (group is None or not parameters):
        return torch.zeros(())
    device = norms[0].device if norms else parameters[0].device
    # with ZeRO-1 a rank may have no gradient: the zero makes a norm of it
    total = torch.linalg.vector_norm(torch.stack([*norms, torch.zeros((), device=device)]))
    if group is not None:  # in float64, so that all ranks use the same dtype
        square = total.double().square()
        dist.all_reduce(square, group=group)
        total = square.sqrt().to(total.dtype)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale)
    return total
