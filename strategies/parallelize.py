"""Spread any module over a mesh, in one written order.

    1  rank 0's values everywhere        ranks may have initialised differently
    2  stages            (axis pp)       strategies/pipeline.py
    3  tensor plan       (axis tp)       strategies/tensor.py
    4  recompute                         strategies/recompute.py
    5  experts           (axis ep)       strategies/expert.py
    6  fully_shard       (data axes)     block by block, then the rest of each child

A LightningModule's own forward is not what training calls, so it cannot be the unit that gathers
parameters: its children are. What stands outside of them, what several of them share, and scalars
stay whole on each rank, and have their gradients averaged (`settle`).
"""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from .expert import settle_experts, spread_experts
from .layout import Layout
from .recompute import Mode, recompute
from .tensor import split_matrices

CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # they have no forward, so they cannot be units


@dataclass
class Spread:
    """A module on its mesh, and what is left to do with gradients before each optimizer step."""

    module: nn.Module
    layout: Layout
    partial: list[nn.Module] = field(default_factory=list)  # each rank of tp has a part of a sum
    experts: list[nn.Module] = field(default_factory=list)  # those that are spread over ep

    def whole(self) -> list[str]:
        """Names of the trainable parameters that are not sharded."""
        return [name for name, p in self._plain()]

    def _plain(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, p)
            for name, p in self.module.named_parameters()
            if p.requires_grad and not isinstance(p, DTensor)
        ]

    def accumulate(self, more: bool) -> None:
        """Announce the next backward pass: replicas meet after the last micro-batch of a step only.

        Shards are reduced in each: otherwise every rank would keep whole gradients in between.
        """
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_requires_all_reduce(not more, recurse=False)

    @torch.no_grad()
    def settle(self) -> None:
        """Average what stayed whole over the data, sum what is partial over tp; once a step."""
        data = self.layout.data
        if data.size() > 1:
            _sum_together([p for _, p in self._plain()], data.get_group(), 1 / data.size())
        if self.partial:
            parts = [p for module in self.partial for p in module.parameters()]
            _sum_together([p for p in parts if p.requires_grad], self.layout.tp.get_group())
        if self.layout.replicas is not None:
            settle_experts(self.experts, self.layout.replicas, data.size())


def _sum_together(parameters: list[Any], group: ProcessGroup, factor: float = 1.0) -> None:
    """Sum gradients over a group, one message for each dtype; none is as good as zero."""
    for dtype in {p.dtype: None for p in parameters}:
        alike = [p for p in parameters if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        flat *= factor
        for part, new in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(new.view(part.shape))


def is_parallel(module: nn.Module) -> bool:
    """Whether somebody has spread parameters of the module already."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def parallelize(
    module: nn.Module,
    layout: Layout,
    zero: int = 3,
    sequence_parallel: bool = False,
    mode: Mode = "none",
) -> Spread:
    """Apply the order above to the children of `module`, in place."""
    names, spread = _names_of_tied(module), Spread(module, layout)
    tp = layout.tp
    if tp.size() > 1:
        spread.partial = split_matrices(module, tp, sequence_parallel)
    recompute(module, mode)
    if layout.experts is not None:
        spread.experts = spread_experts(module, layout.experts)
    if layout.data.size() > 1 or tp.size() * layout.degrees["pp"] == 1:
        apart = {p for experts in spread.experts for p in experts.parameters()}
        shard(module, layout.shard, apart, keep=zero == 2)
    untied = sorted(names - _names_of_tied(module))
    if untied:
        raise ValueError(
            f"{type(module).__name__}: {' and '.join(untied[0])} share one parameter and cannot be"
            " split apart: leave them out of tp_plan, or give each its own"
        )
    if not is_parallel(module) and layout.degrees["pp"] == 1:
        raise ValueError(
            f"{type(module).__name__} has nothing to shard: no child module holds a parameter"
            " (build them in __init__ or configure_model); or type --trainer.strategy ddp"
        )
    return spread


def shard(
    module: nn.Module, mesh: DeviceMesh, apart: Set[Tensor] = frozenset(), keep: bool = False
) -> None:
    """Apply fully_shard to the blocks of `module`, then to the rest of each of its children.

    Parameters in `apart` are left as they are.
    With `keep` the gathered parameters stay from a forward to its backward (ZeRO-2).
    """
    blocks = _blocks(module)
    roots = [root for root in _roots(module) if root not in blocks]
    holders = Counter(p for root in roots for p in root.parameters())
    whole = {p for p in module.parameters() if p.ndim == 0 or holders[p] > 1 or p in apart}
    for unit in blocks + roots:
        unit.register_forward_hook(_own_outputs)  # before fully_shard's own hook
        fully_shard(unit, mesh=mesh, reshard_after_forward=not keep, ignored_params=whole)
        if keep:
            unit.register_forward_hook(_let_go)
            unit.register_forward_pre_hook(cast(Any, _gather_anew), prepend=True)


def _let_go(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Free what was gathered where no backward will.

    `parameters()` would else yield gathered copies, and a callback that swaps weights (EMA) would
    write into those.
    """
    if not torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()


@torch.compiler.disable
def _gather_anew(module: nn.Module, inputs: Any) -> None:
    """Free what an earlier forward without a backward has left gathered.

    The shards may have been stepped or toggled (`requires_grad`) since. A block that is computed
    again within a backward needs what is gathered.
    """
    if torch._C._current_graph_task_id() < 0 and isinstance(module, FSDPModule):
        module.reshard()


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
