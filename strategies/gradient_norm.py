"""The norm of gradients that are partly sharded, and clipping by it.

norm = sqrt(sum over all gradients of g²);   g <- g min(1, max_norm / norm)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that the norm of all of them is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, which refuses DTensors of different meshes, or with others.

    Returns:
        the norm before, () on the device of the gradients, the same on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        sharded = isinstance(gradient, DTensor)
        key = (gradient.device_mesh, gradient.placements) if sharded else None
        groups.setdefault(key, []).append(gradient)
    norms = [get_total_norm(group) for group in groups.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if not norms:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack(norms))
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale)
    return total
