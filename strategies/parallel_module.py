"""Parallelize a module over a device mesh: the order of the steps, and sharding by FSDP2.

    1  broadcast from rank 0             ranks may have initialized differently
    2  pipeline stages       (axis pp)   strategies/pipeline_parallel.py
    3  tensor parallelism    (axis tp)   strategies/tensor_parallel.py
    4  activation checkpointing          strategies/activation_checkpointing.py
    5  expert parallelism    (axis ep)   strategies/expert_parallel.py
    6  fully_shard           (data axes) each block, then the rest of each child

An FSDP unit gathers its parameters around its forward. Training does not call the forward of the
LightningModule itself, so its children are the units. Some parameters stay replicated: those
outside of all children, those that several children share, scalars, and under mixed precision the
weights of norms (fsdp/mixed_precision.py). Their gradients are averaged in one message
(`reduce_gradients`).

A member of a list with less than `min_unit_bytes` bytes is not a unit of its own, because each
message has a fixed cost. It belongs to the unit of its parent. Small children of the
LightningModule are gathered together around each step (fsdp/step_unit.py).
"""

import inspect
from collections import Counter
from collections.abc import Container, Iterator, Set
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

from .activation_checkpointing import CheckpointingMode, apply_activation_checkpointing
from .device_mesh import MeshLayout
from .expert_parallel import reduce_expert_gradients, shard_experts
from .fsdp.mixed_precision import (
    UnitAutocast,
    build_mp_policy,
    full_precision_params,
    keep_embeddings_in_fp32,
    show_fp32_weights,
)
from .fsdp.step_unit import StepUnit
from .tensor_parallel import apply_tensor_parallel
from .zero1 import Zero1Reducer

MODULE_CONTAINERS = (nn.ModuleDict, nn.ModuleList)  # they have no forward, so they cannot be units
DEFAULT_MIN_UNIT_BYTES = 2**20  # default minimum size of a unit, in bytes
# before torch 2.12 a shard briefly requires a gradient, so integer parameters stay replicated
CAN_SHARD_INTEGERS = "requires_grad=" in inspect.getsource(FSDPParam._init_sharded_param)
MAX_JOINT_UNIT_BYTES = (
    2**25
)  # most bytes of small members in one unit; above it each member is a unit


@dataclass
class ParallelModule:
    """A parallelized module, with the gradient reductions that FSDP2 does not do."""

    module: nn.Module
    mesh_layout: MeshLayout
    # modules whose gradients are partial sums on each tp rank
    partial_sum_modules: list[nn.Module] = field(default_factory=list)
    expert_modules: list[nn.Module] = field(default_factory=list)  # experts sharded over ep
    step_unit: StepUnit | None = None  # small children, gathered around each step
    replicated_ids: set[int] = field(default_factory=set)  # ids of parameters that no unit shards
    gather_once: bool = False  # keep gathered parameters until the last micro-batch of a step
    zero1_reducer: Zero1Reducer | None = None  # with ZeRO-1; it averages over the data ranks
    _cached_units: list[FSDPModule] | None = None

    def replicated_param_names(self) -> list[str]:
        """Return the names of the trainable parameters that are not sharded."""
        return [name for name, p in self._replicated_params()]

    def _replicated_params(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.module.named_parameters() if self._is_replicated(p)]

    def _replicated_params_unnamed(self) -> list[nn.Parameter]:
        """Return the parameters of `_replicated_params` without names, which are slow to build."""
        params_by_id = {}
        for module in self.module.modules():
            for p in module._parameters.values():
                if p is not None and self._is_replicated(p):
                    params_by_id[id(p)] = p
        return list(params_by_id.values())

    def _is_replicated(self, p: nn.Parameter) -> bool:
        is_unsharded = not isinstance(p, DTensor) or id(p) in self.replicated_ids
        return is_unsharded and p.requires_grad

    def cached_units(self) -> list[FSDPModule]:
        """Return all FSDP units, searched once: none is added after the module was sharded."""
        if self._cached_units is None:
            self._cached_units = fsdp_units(self.module)
        return self._cached_units

    def update_replaced_ids(self, new: dict[int, nn.Parameter]) -> None:
        """Update the ids of replaced parameters; `new` maps an old id to the new parameter."""
        self.replicated_ids = {id(new[i]) if i in new else i for i in self.replicated_ids}

    def set_requires_all_reduce(self, is_accumulating: bool) -> None:
        """Set whether the next backward pass all-reduces gradients between replicas (HSDP).

        Replicas all-reduce after the last micro-batch only. Each micro-batch reduce-scatters to
        the shards: otherwise every rank would keep full gradients between micro-batches.
        """
        for unit in self.cached_units():
            unit.set_requires_all_reduce(not is_accumulating, recurse=False)
            if self.gather_once:
                unit.set_reshard_after_backward(not is_accumulating, recurse=False)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Average the gradients that FSDP2 does not reduce; called once per optimizer step.

        Gradients of replicated parameters are averaged over the data ranks, partial sums are summed
        over tp, and gradients of experts are averaged over their replicas.
        """
        data_mesh = self.mesh_layout.data_mesh
        if data_mesh.size() > 1 and self.zero1_reducer is None:  # ZeRO-1 averages all gradients
            _all_reduce_flat(
                # trainable parameters that FSDP2 has not sharded
                self._replicated_params_unnamed(),
                data_mesh.get_group(),
                factor=1 / data_mesh.size(),
            )
        # with sequence parallelism each tp rank has the gradient of its tokens only
        if self.partial_sum_modules:
            partial_params = [p for module in self.partial_sum_modules for p in module.parameters()]
            if self.zero1_reducer is not None:
                # only the owner has the gradient; the tp ranks of a group own the same parameters
                partial_params = [p for p in partial_params if p.grad is not None]
            _all_reduce_flat(
                [p for p in partial_params if p.requires_grad], self.mesh_layout.tp_mesh.get_group()
            )
        if self.mesh_layout.expert_replica_mesh is not None:
            reduce_expert_gradients(
                self.expert_modules, self.mesh_layout.expert_replica_mesh, data_mesh.size()
            )


def _all_reduce_flat(parameters: list[Any], group: ProcessGroup, factor: float = 1.0) -> None:
    """Sum gradients over a group in one flat message per dtype, and scale them by `factor`.

    A parameter without a gradient on some rank counts as zero there, and gets the sum. A parameter
    without a gradient on any rank keeps None.
    """
    for dtype in {p.dtype: None for p in parameters}:  # a dict: the same order on all ranks
        same_dtype = [p for p in parameters if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in same_dtype]
        local_grads = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        has_grad = torch.tensor(
            [float(p.grad is not None) for p in same_dtype], device=local_grads[0].device
        )
        flat = torch.cat(
            [*(local_grad.reshape(-1) for local_grad in local_grads), has_grad.to(dtype)]
        )
        dist.all_reduce(flat, group=group)
        flat *= factor
        # the last values are the number of ranks that have each gradient, times `factor`
        *sums, grad_counts = flat.split(
            [*(local_grad.numel() for local_grad in local_grads), len(same_dtype)]
        )
        for local_grad, new in zip(local_grads, sums, strict=True):
            local_grad.copy_(new.view(local_grad.shape))  # shares memory with `grads`
        absent = [i for i, p in enumerate(same_dtype) if p.grad is None]
        if absent:  # the host waits for the result in this case only
            counts = grad_counts[absent].real.tolist()  # real: parameters may be complex
            for i, count in zip(absent, counts, strict=True):
                same_dtype[i].grad = grads[i] if count > 0 else None


def fsdp_units(module: nn.Module) -> list[FSDPModule]:
    """Return all FSDP units of a LightningModule, including the step unit of small children."""
    all_units: list[FSDPModule] = [
        submodule for submodule in module.modules() if isinstance(submodule, FSDPModule)
    ]
    step_unit = module.__dict__.get("_step_unit")
    return all_units if step_unit is None else [*all_units, step_unit]


def has_sharded_params(module: nn.Module) -> bool:
    """Whether any parameter of the module is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def named_trainable(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and trainable floating-point parameters, as shards if they are sharded.

    Units are resharded first: a forward may have left gathered copies in place of the shards.
    """
    for unit in fsdp_units(module):
        unit.reshard()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            yield name, parameter


def named_tracked(module: nn.Module, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield trainable parameters, and those of the given names even if they are frozen."""
    trainable_names = {name for name, _ in named_trainable(module)}
    for name, parameter in module.named_parameters():
        if name in trainable_names or (name in names and parameter.is_floating_point()):
            yield name, parameter


@dataclass
class UnitOptions:
    """Options of FSDP units: which modules become units, and when parameters are gathered.

    Args:
        is_sharded: if false, there are no units, and each rank has full parameters (ZeRO-1).
        keep_until_backward: keep gathered parameters from a forward to its backward (ZeRO-2).
        min_unit_bytes: a smaller member of a list is not a unit of its own; None:
            DEFAULT_MIN_UNIT_BYTES.
        half_dtype: dtype of the gathered parameters; None: the dtype of the shards.
        gather_around_steps: whether small children may be gathered together around a step. The
            backward pass must then follow the step.
        gather_once: keep gathered parameters until the last micro-batch of a step.
    """

    is_sharded: bool = True
    keep_until_backward: bool = False
    min_unit_bytes: int | None = None
    half_dtype: torch.dtype | None = None
    gather_around_steps: bool = False
    gather_once: bool = False


def parallelize_module(
    module: nn.Module,
    mesh_layout: MeshLayout,
    options: UnitOptions,
    sequence_parallel: bool = False,
    checkpointing_mode: CheckpointingMode = "none",
) -> ParallelModule:
    """Apply tensor and expert parallelism, activation checkpointing and FSDP2 to a module.

    The children of the module are changed in place. The caller has already broadcast the weights
    and dropped the pipeline stages of other ranks.

    Args:
        module: the LightningModule.
        mesh_layout: the meshes of each axis.
        options: the options of FSDP units.
        sequence_parallel: whether activations are split along the sequence over tp ranks.
        checkpointing_mode: the mode of activation checkpointing.

    Raises:
        UsageError: the plan would untie a shared parameter, or no child holds a parameter.
    """
    # groups of names that belong to one parameter
    tied_names = _tied_param_names(module)
    parallel_module = ParallelModule(module, mesh_layout)
    tp_mesh = mesh_layout.tp_mesh
    if tp_mesh.size() > 1:
        # with sequence parallelism these modules get the tokens of their rank only
        parallel_module.partial_sum_modules = apply_tensor_parallel(
            module, tp_mesh, sequence_parallel
        )
    apply_activation_checkpointing(module, checkpointing_mode)
    if mesh_layout.expert_mesh is not None:
        parallel_module.expert_modules = shard_experts(module, mesh_layout.expert_mesh)
    has_no_model_axes = tp_mesh.size() * mesh_layout.degrees["pp"] == 1
    # with a single data rank, tp or pp alone divide the parameters
    if options.is_sharded and (mesh_layout.data_mesh.size() > 1 or has_no_model_axes):
        ignored_ids = {
            id(p) for experts in parallel_module.expert_modules for p in experts.parameters()
        }
        parallel_module.replicated_ids = shard_module(
            module, mesh_layout.fsdp_mesh, options, ignored_ids
        )
        # _step_unit: set by shard_module if small children are gathered together
        parallel_module.step_unit = module.__dict__.get("_step_unit")
        parallel_module.gather_once = options.gather_once
    # e.g. a plan that splits the head but not the embedding with the same weight
    untied = sorted(tied_names - _tied_param_names(module))  # shared before, but not any more
    if untied:
        raise UsageError(
            f"{type(module).__name__}: {' and '.join(untied[0])} share one parameter and cannot be"
            " split apart",
            ["a tensor_parallel_plan that splits none of them"],
            "leave them out of tensor_parallel_plan",
        )
    # with pp a rank has its stage only, which need not be sharded further
    if options.is_sharded and not has_sharded_params(module) and mesh_layout.degrees["pp"] == 1:
        raise UsageError(
            f"{type(module).__name__} has nothing to shard: no child module holds a parameter",
            ["modules that are built in __init__ or configure_model"],
            "use a strategy that shards nothing, such as ddp",
            flag="--trainer.strategy=ddp",
        )
    return parallel_module


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    options: UnitOptions = UnitOptions(),  # noqa: B008 (it is not changed)
    ignored_ids: Set[int] = frozenset(),
) -> set[int]:
    """Apply fully_shard to the blocks of `module`, then to the rest of each of its children.

    Args:
        module: the LightningModule.
        mesh: the ranks over which parameters are sharded.
        options: the options of the units.
        ignored_ids: ids of parameters that are not changed.

    Returns:
        ids of the parameters that stay replicated; `reduce_gradients` averages their gradients.
    """
    min_unit_bytes = (
        DEFAULT_MIN_UNIT_BYTES if options.min_unit_bytes is None else options.min_unit_bytes
    )
    # blocks: members of lists and Sequentials; roots: children, for the rest of the parameters;
    # joint_modules: small children that become one unit together
    fsdp_blocks, fsdp_roots, joint_modules = _find_units(
        module, min_unit_bytes, options.gather_around_steps
    )
    replicated_ids = _find_replicated_ids(module, fsdp_roots)
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()  # FSDP2 rejects e.g. channels_last
    if options.half_dtype is not None:
        # parameters that autocast uses in fp32, e.g. of norms
        replicated_ids |= {id(p) for p in full_precision_params(module)}
        # embeddings return fp32 rows, because sums of half-precision gradients lose small terms
        keep_embeddings_in_fp32(module)
        # layers that use weights other than in matrix products read them in fp32
        show_fp32_weights(module)
    ignored_params = {p for p in module.parameters() if id(p) in replicated_ids | ignored_ids}
    # FSDP2's MixedPrecisionPolicy: the dtype of gathered parameters
    policy = build_mp_policy(options.half_dtype)
    if joint_modules:
        fsdp_roots = [root for root in fsdp_roots if root not in joint_modules]
        # StepUnit: an FSDP unit that is gathered for a whole step
        step_unit = StepUnit(joint_modules)
        module.__dict__["_step_unit"] = step_unit  # not a child: not in state_dict()
        fsdp_roots.append(step_unit)
    for unit in fsdp_blocks + fsdp_roots:
        # a view as output could lose FSDP2's hook by an in-place operation
        unit.register_forward_hook(_clone_view_outputs)  # before fully_shard's own hook
        if options.half_dtype is not None:
            # adds hooks to the unit, so that its forward runs in autocast
            UnitAutocast(unit, torch.device(mesh.device_type), options.half_dtype)
        # the backward pass of a step unit follows its forward, so a small unit is gathered once
        keep_gathered = options.keep_until_backward or (
            isinstance(unit, StepUnit) and _param_bytes(unit) < min_unit_bytes
        )
        fsdp_kwargs: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not keep_gathered}
        fully_shard(unit, mp_policy=policy, ignored_params=ignored_params, **fsdp_kwargs)
        cast(Any, type(unit)).__deepcopy__ = _raise_on_deepcopy  # FSDP2's error has no hint
        if keep_gathered:
            # without gradients no backward pass would reshard the unit
            unit.register_forward_hook(_reshard_after_eval)
        if keep_gathered and not options.gather_once:
            # reshards a unit that a forward without a backward has left gathered
            unit.register_forward_pre_hook(cast(Any, _reshard_stale), prepend=True)
    return replicated_ids - ignored_ids


def _find_units(
    module: nn.Module, min_unit_bytes: int, joins_small: bool
) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Return the blocks, the other children, and which of these become one unit together."""
    fsdp_blocks = _fsdp_blocks(module, min_unit_bytes)
    fsdp_roots = [root for root in _fsdp_roots(module) if root not in fsdp_blocks]
    joint_modules: list[nn.Module] = []
    if joins_small:
        small = [
            r
            for r in fsdp_roots
            if not _contains_any(r, fsdp_blocks) and _param_bytes(r) < min_unit_bytes
        ]
        # the unit is in memory during the whole step, so its size is limited
        if len(small) > 1 and sum(map(_param_bytes, small)) <= MAX_JOINT_UNIT_BYTES:
            joint_modules = small
    return fsdp_blocks, fsdp_roots, joint_modules


def find_unit_names(module: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the parameters of each FSDP unit that `shard_module` would make."""
    blocks, roots, joint_modules = _find_units(module, DEFAULT_MIN_UNIT_BYTES, joins_small=True)
    names = {id(p): name for name, p in module.named_parameters()}
    taken: set[int] = set()
    units = []
    joint_ids = [id(p) for child in joint_modules for p in child.parameters()]
    # inner units come first, and a unit has the parameters that no earlier one has
    for ids in [
        *(
            [id(p) for p in unit.parameters()]
            for unit in [*blocks, *roots]
            if unit not in joint_modules
        ),
        joint_ids,
    ]:
        new_ids = [i for i in dict.fromkeys(ids) if i not in taken]
        taken.update(new_ids)
        if new_ids:
            units.append(tuple(names[i] for i in new_ids))
    return units


def _find_replicated_ids(module: nn.Module, fsdp_roots: list[nn.Module]) -> set[int]:
    """Return ids of the parameters that FSDP2 cannot shard: they stay replicated.

    These are parameters of several units, scalars, empty ones, and those of a class of their own.
    Parameters outside of all units are not listed: fully_shard is not applied to them.
    """
    # ids, because they hold no references
    num_holders = Counter(id(p) for root in fsdp_roots for p in root.parameters())
    replicated_ids = set()
    for p in module.parameters():
        is_integer = not (p.is_floating_point() or p.is_complex())
        if (
            p.ndim == 0
            or not p.numel()
            or num_holders[id(p)] > 1
            # a parameter of a class of its own, which its shard would lose
            or _is_param_subclass(p)
            or (is_integer and not CAN_SHARD_INTEGERS)  # it depends on the version of torch
        ):
            replicated_ids.add(id(p))
    return replicated_ids


def _param_bytes(module: nn.Module) -> int:
    """Return the size of a module's parameters in bytes."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _raise_on_deepcopy(unit: nn.Module, memo: Any) -> None:
    """Replace `__deepcopy__` of a unit: FSDP2 does not support it, and its error has no hint."""
    name = type(unit).__name__.removeprefix("FSDP")
    raise UsageError(
        f"copy.deepcopy({name}) is called for a module whose parameters are sharded",
        [
            "copies in __init__, setup or configure_model, and copies of parameters or of "
            "state_dict()"
        ],
        f'copy {name} in configure_model, or use Trainer(strategy="ddp")',
        flag="--trainer.strategy=ddp",
    )


def _is_param_subclass(parameter: nn.Parameter) -> bool:
    """Whether a parameter has its own class, which its shard would lose."""
    return type(parameter) not in (nn.Parameter, DTensor) and not isinstance(parameter, DTensor)


def _contains_any(module: nn.Module, candidates: list[nn.Module]) -> bool:
    return any(submodule is other for submodule in module.modules() for other in candidates)


def _reshard_after_eval(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Reshard a unit after a forward without gradients, or of a frozen layer, as zero3 does.

    Otherwise `parameters()` would yield gathered copies, and a callback that swaps weights (EMA)
    would write into those copies.
    """
    frozen = not any(p.requires_grad for p in module.parameters())
    if (not torch.is_grad_enabled() or frozen) and isinstance(module, FSDPModule):
        module.reshard()


@torch.compiler.disable
def _reshard_stale(module: nn.Module, inputs: Any) -> None:
    """Reshard a unit that an earlier forward without a backward has left gathered.

    The shards may have been stepped, or `requires_grad` toggled, since then. A block that is
    recomputed within a backward pass needs the gathered parameters, so it is not resharded.
    """
    if torch._C._current_graph_task_id() < 0 and isinstance(module, FSDPModule):
        module.reshard()


def _clone_view_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Clone outputs that are views, such as the last token's output of a language model.

    An in-place operation on a view (`x += y`) would drop FSDP2's hook that gathers the parameters
    for the backward pass.
    """

    def clone_view(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.requires_grad and tensor._base is not None else tensor

    return tree_map_only(Tensor, clone_view, outputs)


def _fsdp_blocks(module: nn.Module, min_unit_bytes: int = 0) -> list[nn.Module]:
    """Return the members of lists, dicts and Sequentials that become FSDP units, innermost first.

    A member that shares a parameter with a module outside belongs to the unit of its parent. So
    does a member of less than `min_unit_bytes` bytes, unless such members of its parent together
    have more than `MAX_JOINT_UNIT_BYTES` bytes. The bytes of inner units do not count.
    """
    use_counts = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    blocks: list[nn.Module] = []
    for parent in reversed(list(module.modules())):  # reversed: inner modules first
        # MODULE_CONTAINERS: ModuleList and ModuleDict, which are never units themselves
        if not isinstance(parent, (*MODULE_CONTAINERS, nn.Sequential)):
            continue
        small, bytes_of_small = [], 0
        for child in parent.children():
            child_counts = Counter(id(p) for _, p in child.named_parameters(remove_duplicate=False))
            # unshared: all uses of its parameters are inside of it
            is_unshared = all(count == use_counts[i] for i, count in child_counts.items())
            if not child_counts or not is_unshared or isinstance(child, MODULE_CONTAINERS):
                continue
            unit_param_ids = {
                id(p) for b in blocks if b in set(child.modules()) for p in b.parameters()
            }
            remaining = {id(p): p for p in child.parameters() if id(p) not in unit_param_ids}
            size = sum(p.numel() * p.element_size() for p in remaining.values())
            if size >= min_unit_bytes:
                blocks.append(child)
            else:
                small.append(child)
                bytes_of_small += size
        if bytes_of_small > MAX_JOINT_UNIT_BYTES:
            blocks += small
    return blocks


def _fsdp_roots(module: nn.Module) -> list[nn.Module]:
    """Return the children of `module` with parameters; a container counts as its members."""
    roots = []
    for child in module.children():
        if isinstance(child, MODULE_CONTAINERS):
            roots += _fsdp_roots(child)
        elif any(True for _ in child.parameters()):
            roots.append(child)
    return roots


def _tied_param_names(module: nn.Module) -> set[tuple[str, ...]]:
    """Return the groups of names that refer to one (tied) parameter."""
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    return {tuple(group) for group in names_by_id.values() if len(group) > 1}


def broadcast_from_rank_zero(module: nn.Module, device: torch.device) -> None:
    """Broadcast rank 0's values of all unsharded parameters and buffers, as DDP does.

    Args:
        module: the module whose tensors are overwritten on other ranks.
        device: the device on which the ranks communicate; tensors may be on another one.

    Raises:
        UsageError: a lazy layer has not been called yet.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UsageError(
                f"{type(module).__name__}: {name} belongs to a lazy layer that has not been "
                "called, so it has no shape",
                ["layers whose shapes are known"],
                "call the network once with an example in __init__ or configure_model",
            )
    for tensor in chain(module.parameters(), module.buffers()):
        # meta tensors have no values yet: they are filled in after sharding
        if isinstance(tensor, DTensor) or tensor.is_meta or tensor.numel() == 0:
            continue
        flat = tensor.detach().to(device).reshape(-1).contiguous()
        dist.broadcast(flat.view(torch.uint8), 0)  # as bytes: gloo supports few dtypes
        if flat.data_ptr() != tensor.data_ptr():  # else the broadcast wrote into the tensor
            tensor.detach().copy_(flat.view(tensor.shape))
