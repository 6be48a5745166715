"""Spread any module over a mesh, in one written order.

    1  rank 0's values everywhere        ranks may have initialised differently
    2  tensor plan       (axis tp)       strategies/tensor.py
    3  fully_shard       (axis dp)       block by block, then the rest of each child

A LightningModule's own forward is not what training calls, so it cannot be the unit that gathers
parameters: its children are. What stands outside of them, what several of them share, and scalars
stay whole on each rank, and have their gradients averaged (`average_whole`).
"""

from collections import Counter
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from .tensor import split_matrices

CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # they have no forward, so they cannot be units


def is_parallel(module: nn.Module) -> bool:
    """Whether somebody has spread parameters of the module already."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def parallelize(module: nn.Module, dp: DeviceMesh, tp: DeviceMesh) -> None:
    """Apply the order above to the children of `module`, in place; both meshes have one axis."""
    names = _names_of_tied(module)
    if tp.size() > 1:
        split_matrices(module, tp)
    if dp.size() > 1 or tp.size() == 1:
        shard(module, dp)
    untied = sorted(names - _names_of_tied(module))
    if untied:
        raise ValueError(
            f"{type(module).__name__}: {' and '.join(untied[0])} share one parameter and cannot be"
            " split apart: leave them out of tp_plan, or give each its own"
        )
    if not is_parallel(module):
        raise ValueError(
            f"{type(module).__name__} has nothing to shard: no child module holds a parameter"
            " (build them in __init__ or configure_model); or type --trainer.strategy ddp"
        )


def shard(module: nn.Module, dp: DeviceMesh) -> None:
    """Apply fully_shard to the blocks of `module`, then to the rest of each of its children."""
    blocks = _blocks(module)
    roots = [root for root in _roots(module) if root not in blocks]
    holders = Counter(p for root in roots for p in root.parameters())
    whole = {p for p in module.parameters() if p.ndim == 0 or holders[p] > 1}
    for unit in blocks + roots:
        unit.register_forward_hook(_own_outputs)  # before fully_shard's own hook
        # always reshard: after a forward without backward, `parameters()` would else yield gathered
        # copies, and a callback that swaps weights (EMA) would write into those
        fully_shard(unit, mesh=dp, reshard_after_forward=True, ignored_params=whole)


def _own_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Copy outputs that are views, like the last token's of a language model.

    An in-place operation on a view (`x += y`) would drop the hook that gathers for the backward.
    """

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.requires_grad and tensor._base is not None else tensor

    return tree_map_only(Tensor, own, outputs)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Members of lists, dicts and sequences, innermost first: each is gathered by itself.

    A member that shares a parameter with the outside is left to its parent, which holds both.
    """
    owners = Counter(p for _, p in module.named_parameters(remove_duplicate=False))
    blocks = []
    for parent in reversed(list(module.modules())):
        for child in parent.children() if isinstance(parent, (*CONTAINERS, nn.Sequential)) else ():
            inside = Counter(p for _, p in child.named_parameters(remove_duplicate=False))
            alone = all(count == owners[p] for p, count in inside.items())
            if inside and alone and not isinstance(child, CONTAINERS):
                blocks.append(child)
    return blocks


def _roots(module: nn.Module) -> list[nn.Module]:
    """The children of `module` that hold parameters, those of a container in its place."""
    roots = []
    for child in module.children():
        if isinstance(child, CONTAINERS):
            roots += _roots(child)
        elif any(True for _ in child.parameters()):
            roots.append(child)
    return roots


def _names_of_tied(module: nn.Module) -> set[tuple[str, ...]]:
    """Groups of names that mean one parameter."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


def copy_from_rank_zero(module: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values of all that is not sharded, as DDP does."""
    for tensor in chain(module.parameters(), module.buffers()):
        if isinstance(tensor, DTensor) or tensor.is_meta or tensor.numel() == 0:
            continue
        flat = tensor.detach().to(device).reshape(-1).contiguous()
        dist.broadcast(flat.view(torch.uint8), 0)  # as bytes: gloo knows few types
        tensor.detach().copy_(flat.view(tensor.shape))


def average_whole(module: nn.Module, dp: DeviceMesh) -> list[str]:
    """Average the gradients of what stayed whole over `dp`; returns the names.

    The mean of an accumulated gradient is right too: its earlier part is equal on all ranks.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=dp.get_group())
        parameter.grad /= dp.size()

    names = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            names.append(name)
            if dp.size() > 1:
                parameter.register_post_accumulate_grad_hook(average)
    return names
