"""Spread any module over a mesh, in one written order.

    1  rank 0's values everywhere        ranks may have initialised differently
    2  stages            (axis pp)       strategies/pipeline_parallel.py
    3  tensor plan       (axis tp)       strategies/tensor_parallel.py
    4  recompute                         strategies/activation_checkpointing.py
    5  experts           (axis ep)       strategies/expert_parallel.py
    6  fully_shard       (data axes)     block by block, then the rest of each child

A LightningModule's own forward is not what training calls, so it cannot be the unit that gathers
parameters: its children are. Parameters outside of them, those that several of them share, scalars,
and under mixed precision the weights of norms (mixed_precision.py) stay whole on each rank; their
gradients are averaged in one message (`settle`).

A member of a list that is smaller than `smallest` bytes is no unit of its own, because each message
has a fixed cost. It stays with its parent, and small children of the LightningModule are gathered
together around each step (step_unit.py).
"""

import inspect
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
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ravine.errors import UsageError

from .activation_checkpointing import Mode, recompute
from .device_mesh import Layout
from .expert_parallel import settle_experts, spread_experts
from .fsdp.mixed_precision import UnitAutocast, full_precision, look_up_in_fp32, unit_policy
from .fsdp.step_unit import StepUnit
from .tensor_parallel import split_matrices
from .zero1 import OwnedGradients

CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # they have no forward, so they cannot be units
SMALLEST = 2**20  # bytes of a unit, by default
# before torch 2.12 a shard requires a gradient for a moment: bits of quantized weights stay whole
SHARDS_INTEGERS = "requires_grad=" in inspect.getsource(FSDPParam._init_sharded_param)
TOGETHER = 2**25  # bytes of small members that one unit gathers; with more, each is a unit


@dataclass
class Spread:
    """A module on its mesh, and what is left to do with gradients before each optimizer step."""

    module: nn.Module
    layout: Layout
    partial: list[nn.Module] = field(default_factory=list)  # each rank of tp has a part of a sum
    experts: list[nn.Module] = field(default_factory=list)  # those that are spread over ep
    step_unit: StepUnit | None = None  # small children, gathered around each step
    replicated: set[int] = field(default_factory=set)  # ids of parameters that no unit shards
    gather_once: bool = False  # keep what is gathered until the last micro-batch of a step
    owned: OwnedGradients | None = None  # with ZeRO-1, which averages over the data
    _units: list[FSDPModule] | None = None

    def whole(self) -> list[str]:
        """Names of the trainable parameters that are not sharded."""
        return [name for name, p in self._plain()]

    def _plain(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.module.named_parameters() if self._is_plain(p)]

    def _plain_parameters(self) -> list[nn.Parameter]:
        """As `_plain`, without the names, which cost more than the search."""
        found = {}
        for module in self.module.modules():
            for p in module._parameters.values():
                if p is not None and self._is_plain(p):
                    found[id(p)] = p
        return list(found.values())

    def _is_plain(self, p: nn.Parameter) -> bool:
        whole = not isinstance(p, DTensor) or id(p) in self.replicated
        return whole and p.requires_grad

    def units(self) -> list[FSDPModule]:
        """All units, searched once: no unit is made after the module was sharded."""
        if self._units is None:
            self._units = units(self.module)
        return self._units

    def replaced(self, new: dict[int, nn.Parameter]) -> None:
        """Update the ids of parameters that were replaced; `new` is by the old id."""
        self.replicated = {id(new[i]) if i in new else i for i in self.replicated}

    def accumulate(self, more: bool) -> None:
        """Announce the next backward pass: replicas all-reduce after the last micro-batch only.

        Shards are reduced in each: otherwise every rank would keep whole gradients in between.
        """
        for unit in self.units():
            unit.set_requires_all_reduce(not more, recurse=False)
            if self.gather_once:
                unit.set_reshard_after_backward(not more, recurse=False)

    @torch.no_grad()
    def settle(self) -> None:
        """Average what stayed whole over the data, sum what is partial over tp; once a step."""
        data = self.layout.data
        if data.size() > 1 and self.owned is None:
            _sum_together(self._plain_parameters(), data.get_group(), 1 / data.size())
        if self.partial:
            parts = [p for module in self.partial for p in module.parameters()]
            if self.owned is not None:  # ranks of tp own the same parameters
                parts = [p for p in parts if p.grad is not None]
            _sum_together([p for p in parts if p.requires_grad], self.layout.tp.get_group())
        if self.layout.replicas is not None:
            settle_experts(self.experts, self.layout.replicas, data.size())


def _sum_together(parameters: list[Any], group: ProcessGroup, factor: float = 1.0) -> None:
    """Sum gradients over a group, one message for each dtype.

    A parameter without a gradient on some rank counts as zero there, and gets the sum; one without
    a gradient on every rank keeps None.
    """
    for dtype in {p.dtype: None for p in parameters}:
        alike = [p for p in parameters if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        has = torch.tensor([float(p.grad is not None) for p in alike], device=parts[0].device)
        flat = torch.cat([*(part.reshape(-1) for part in parts), has.to(dtype)])
        dist.all_reduce(flat, group=group)
        flat *= factor
        *sums, found = flat.split([*(part.numel() for part in parts), len(alike)])
        for part, new in zip(parts, sums, strict=True):
            part.copy_(new.view(part.shape))
        absent = [i for i, p in enumerate(alike) if p.grad is None]
        if absent:  # only here the host waits for the result
            for i, others in zip(absent, found[absent].real.tolist(), strict=True):
                alike[i].grad = grads[i] if others > 0 else None


def units(module: nn.Module) -> list[FSDPModule]:
    """All units of a LightningModule, that of its small children included."""
    found: list[FSDPModule] = [each for each in module.modules() if isinstance(each, FSDPModule)]
    step_unit = module.__dict__.get("_step_unit")
    return found if step_unit is None else [*found, step_unit]


def is_parallel(module: nn.Module) -> bool:
    """Whether somebody has spread parameters of the module already."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@dataclass
class UnitOptions:
    """How units are gathered, and which modules become units.

    Args:
        sharded: if false, there are no units, and each rank has whole parameters (ZeRO-1).
        keep: the gathered parameters stay from a forward to its backward (ZeRO-2).
        smallest: bytes below which a member of a list is no unit of its own; None: SMALLEST.
        half: dtype of the gathered parameters; None: that of the shards.
        around_steps: whether small children may be gathered together around a step, whose backward
            must then follow it.
        gather_once: what is gathered stays until the last micro-batch of a step.
    """

    sharded: bool = True
    keep: bool = False
    smallest: int | None = None
    half: torch.dtype | None = None
    around_steps: bool = False
    gather_once: bool = False


def parallelize(
    module: nn.Module,
    layout: Layout,
    options: UnitOptions,
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
    if options.sharded and (layout.data.size() > 1 or tp.size() * layout.degrees["pp"] == 1):
        apart = {id(p) for experts in spread.experts for p in experts.parameters()}
        spread.replicated = shard(module, layout.shard, options, apart)
        spread.step_unit = module.__dict__.get("_step_unit")
        spread.gather_once = options.gather_once
    untied = sorted(names - _names_of_tied(module))
    if untied:
        raise UsageError(
            f"{type(module).__name__}: {' and '.join(untied[0])} share one parameter and cannot be"
            " split apart",
            ["a tp_plan that splits none of them"],
            "leave them out of tp_plan",
        )
    if options.sharded and not is_parallel(module) and layout.degrees["pp"] == 1:
        raise UsageError(
            f"{type(module).__name__} has nothing to shard: no child module holds a parameter",
            ["modules that are built in __init__ or configure_model"],
            "use a strategy that shards nothing, such as ddp",
            flag="--trainer.strategy ddp",
        )
    return spread


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    options: UnitOptions = UnitOptions(),  # noqa: B008 (it is not changed)
    apart: Set[int] = frozenset(),
) -> set[int]:
    """Apply fully_shard to the blocks of `module`, then to the rest of each of its children.

    Parameters with ids in `apart` are left as they are.

    Returns:
        ids of the parameters that stay whole and have their gradients averaged by `settle`.
    """
    smallest = SMALLEST if options.smallest is None else options.smallest
    blocks = _blocks(module, smallest)
    roots = [root for root in _roots(module) if root not in blocks]
    together: list[nn.Module] = []
    if options.around_steps:
        small = [r for r in roots if not _contains(r, blocks) and _size(r) < smallest]
        if len(small) > 1 and sum(map(_size, small)) <= TOGETHER:
            together = small
    holders = Counter(id(p) for root in roots for p in root.parameters())  # ids hold no references
    alone = {id(p) for p in module.parameters() if p.ndim == 0 or holders[id(p)] > 1}
    alone |= {id(p) for p in module.parameters() if _has_own_class(p) or not p.numel()}
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other, as channels_last
    if not SHARDS_INTEGERS:
        alone |= {
            id(p) for p in module.parameters() if not (p.is_floating_point() or p.is_complex())
        }
    if options.half is not None:
        alone |= {id(p) for p in full_precision(module)}
        look_up_in_fp32(module)
    whole = {p for p in module.parameters() if id(p) in alone | apart}
    policy = unit_policy(options.half)
    if together:
        roots = [root for root in roots if root not in together]
        step_unit = StepUnit(together)
        module.__dict__["_step_unit"] = step_unit  # not a child: not in state_dict()
        roots.append(step_unit)
    for unit in blocks + roots:
        unit.register_forward_hook(_own_outputs)  # before fully_shard's own hook
        if options.half is not None:
            UnitAutocast(unit, torch.device(mesh.device_type), options.half)
        # the backward pass of a step unit follows its forward: gather a small one once for both
        keep = options.keep or (isinstance(unit, StepUnit) and _size(unit) < smallest)
        how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not keep}
        fully_shard(unit, mp_policy=policy, ignored_params=whole, **how)
        cast(Any, type(unit)).__deepcopy__ = _refuse_copy
        if keep:
            unit.register_forward_hook(_let_go)
        if keep and not options.gather_once:
            unit.register_forward_pre_hook(cast(Any, _gather_anew), prepend=True)
    return alone - apart


def _size(module: nn.Module) -> int:
    """Bytes of the parameters of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _refuse_copy(unit: nn.Module, memo: Any) -> None:
    """`copy.deepcopy` of a unit: torch's FSDP2 has none, and its error does not say what to do."""
    name = type(unit).__name__.removeprefix("FSDP")
    raise UsageError(
        f"copy.deepcopy({name}): ranks share its parameters; allowed: a copy that __init__, setup "
        "or configure_model makes, and copies of parameters and of state_dict(); make it there, or "
        "type --trainer.strategy ddp"
    )


def _has_own_class(parameter: nn.Parameter) -> bool:
    """Whether somebody's subclass of Parameter has to be kept, which a shard would not be."""
    return type(parameter) not in (nn.Parameter, DTensor) and not isinstance(parameter, DTensor)


def _contains(module: nn.Module, others: list[nn.Module]) -> bool:
    return any(part is other for part in module.modules() for other in others)


def _let_go(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Free what was gathered where no backward will, and frozen layers, as zero3 does.

    `parameters()` would else yield gathered copies, and a callback that swaps weights (EMA) would
    write into those.
    """
    frozen = not any(p.requires_grad for p in module.parameters())
    if (not torch.is_grad_enabled() or frozen) and isinstance(module, FSDPModule):
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


def _blocks(module: nn.Module, smallest: int = 0) -> list[nn.Module]:
    """Members of lists, dicts and sequences, innermost first: each is gathered by itself.

    A member that shares a parameter with the outside is left to its parent, which holds both; so is
    one of less than `smallest` bytes, as long as its parent has at most `TOGETHER` of such members.
    """
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    blocks: list[nn.Module] = []
    for parent in reversed(list(module.modules())):
        small, bytes_of_small = [], 0
        for child in parent.children() if isinstance(parent, (*CONTAINERS, nn.Sequential)) else ():
            inside = Counter(id(p) for _, p in child.named_parameters(remove_duplicate=False))
            alone = all(count == owners[i] for i, count in inside.items())
            if not inside or not alone or isinstance(child, CONTAINERS):
                continue
            taken = {id(p) for b in blocks if b in set(child.modules()) for p in b.parameters()}
            rest = {id(p): p for p in child.parameters() if id(p) not in taken}
            size = sum(p.numel() * p.element_size() for p in rest.values())
            if size >= smallest:
                blocks.append(child)
            else:
                small.append(child)
                bytes_of_small += size
        if bytes_of_small > TOGETHER:
            blocks += small
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
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


def copy_from_rank_zero(module: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values of all that is not sharded, as DDP does.

    Raises:
        ValueError: a lazy layer has not been called yet.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UsageError(
                f"{type(module).__name__}: {name} is of a lazy layer that has not been called, so "
                "that ranks cannot share it; allowed: layers whose shapes are known; call the "
                "network once with an example in __init__ or configure_model"
            )
    for tensor in chain(module.parameters(), module.buffers()):
        if isinstance(tensor, DTensor) or tensor.is_meta or tensor.numel() == 0:
            continue
        flat = tensor.detach().to(device).reshape(-1).contiguous()
        dist.broadcast(flat.view(torch.uint8), 0)  # as bytes: gloo knows few types
        if flat.data_ptr() != tensor.data_ptr():  # else the broadcast has written into the tensor
            tensor.detach().copy_(flat.view(tensor.shape))
