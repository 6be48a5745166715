"""Gather and load model and optimizer state_dicts of a sharded module.

In a checkpoint, optimizer states are indexed by the order of `named_parameters()`. The index does
not depend on param groups or on the mesh, so any layout can load the state of any other.
`to_checkpoint` and `update_state_dict` let a callback store further weights (EMA) in the same way.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ravine.lightning_compat import saves_sharded

from ..collectives import all_gather_values
from ..dtensor import first_mesh_rank, gather_to_first_rank, gather_trees_to_first_rank, local_shard
from . import sharded, sharded_index
from .atomic_io import CheckpointError
from .validation import dtype_kind_mismatches

MAX_SHOWN = 5  # tensors named in a message
TensorPredicate = Callable[[Tensor], bool]
TensorShapes = dict[str, tuple[int, ...]]


class StageNames(NamedTuple):
    """The names of all parameters of a pipeline-parallel net, and the group of its stages.

    `group_indices` has for an optimizer the parameters of each param group in the full net, as
    indices of `param_names`. An optimizer that was built for one stage is not in it.
    """

    param_names: list[str]
    group: ProcessGroup
    group_indices: Mapping[Optimizer, list[list[int]]]


def param_indices(module: nn.Module, stages: StageNames | None) -> dict[Tensor, int]:
    """Return the index of each parameter in `named_parameters()` of the full net."""
    params_by_name = dict(module.named_parameters())
    names = list(params_by_name) if stages is None else stages.param_names
    return {params_by_name[name]: i for i, name in enumerate(names) if name in params_by_name}


def gather_model_state(
    module: nn.Module, is_distributed: bool, stages: StageNames | None
) -> dict[str, Any]:
    """Return the module's state_dict: this rank's shards, or all tensors on rank 0 (else empty).

    Every rank calls it. A tensor with several names is gathered once; the result has it under each
    name.

    Args:
        module: the LightningModule.
        is_distributed: whether each rank gets its shards, on the CPU, to write them to a folder.
        stages: the stages of a pipeline; None without a pipeline.
    """
    # values are DTensors, or plain tensors if nothing is sharded
    state = get_model_state_dict(module, options=StateDictOptions(cpu_offload=is_distributed))
    # the first name of a tensor, by each of its further names
    first_names = _shared_tensor_names(module, state)
    first_name_of = {name: first_names.get(name, name) for name in state}
    if is_distributed:
        return {name: state[first_name] for name, first_name in first_name_of.items()}
    collecting_ranks = _collecting_ranks(stages)  # the first rank of each stage
    tensors_by_name = {
        # the full value on the CPU of these ranks; None on other ranks
        name: _collect_value(value, collecting_ranks)
        for name, value in state.items()
        if name not in first_names
    }
    if stages is not None and dist.get_rank() in collecting_ranks:
        # the pairs of all stages, on the first rank of the pipeline; [] on other ranks
        trees = gather_trees_to_first_rank(
            (tensors_by_name, first_name_of), stages.group, _comm_device(module)
        )
        tensors_by_name, first_name_of = {}, {}
        for stage_tensors, stage_first_names in trees:  # of several stages the first one counts
            for name, tensor in stage_tensors.items():
                tensors_by_name.setdefault(name, tensor)
            for name, first_name in stage_first_names.items():
                first_name_of.setdefault(name, first_name)
    if dist.get_rank() != 0:
        return {}
    return {name: tensors_by_name[first_name] for name, first_name in first_name_of.items()}


def gather_stages(
    tensors: dict[str, Tensor], stages: StageNames, device: torch.device
) -> dict[str, Any]:
    """Gather on rank 0 the tensors of the first rank of each stage; every rank calls it."""
    tensors_by_name: dict[str, Any] = {}
    if dist.get_rank() in _collecting_ranks(stages):
        for stage_tensors in gather_trees_to_first_rank(tensors, stages.group, device):
            tensors_by_name |= {
                name: value for name, value in stage_tensors.items() if name not in tensors_by_name
            }
    return tensors_by_name


def _shared_tensor_names(module: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Map each additional name of a tensor to its first name."""
    first_name_by_id: dict[int, str] = {}
    aliases = {}
    named_tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named_tensors:
        if name in state and (first_name := first_name_by_id.setdefault(id(tensor), name)) != name:
            aliases[name] = first_name
    return aliases


def _collecting_ranks(stages: StageNames | None) -> list[int]:
    """Return the ranks on which full tensors are gathered: the first rank of each stage."""
    if stages is None:
        return [0]
    count, world = dist.get_world_size(stages.group), dist.get_world_size()
    return [stage * world // count for stage in range(count)]


def _collect_value(value: Any, collecting_ranks: list[int]) -> Any:
    """Gather a full value on the CPU of the collecting ranks; None on other ranks."""
    if isinstance(value, DTensor):
        return (
            gather_to_first_rank(value)
            if first_mesh_rank(value.device_mesh) in collecting_ranks
            else None
        )
    if dist.get_rank() not in collecting_ranks:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _comm_device(module: nn.Module) -> torch.device:
    """Return the device on which the ranks of the job send and receive."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def gather_optimizer_state(
    module: nn.Module,
    optimizer: Optimizer,
    is_distributed: bool,
    owner_group: ProcessGroup | None,
    stages: StageNames | None,
    is_owned: TensorPredicate = lambda parameter: True,
) -> dict[str, Any]:
    """Return the optimizer's state_dict: this rank's shards, or all state on rank 0 (else empty).

    Every rank calls it. Parameters are indexed by the order of `named_parameters()` of the full
    net.

    Args:
        module: the LightningModule.
        optimizer: the optimizer.
        is_distributed: whether each rank gets its shards, to write them to a folder.
        owner_group: the ranks that have the state of different parameters (ZeRO-1, optimizers
            that need full tensors); None if parameters have no owners.
        stages: the stages of a pipeline; None without a pipeline.
        is_owned: whether this rank has the state of a parameter.
    """
    # param_indices: index of each parameter in the full net, with a pipeline in all stages
    indices = param_indices(module, stages)
    state_dict = optimizer.state_dict()
    index_of = {}  # by the number that the optimizer gives to a parameter
    for group, own_group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(group["params"], own_group["params"], strict=True):
            index_of[number] = indices[parameter]
        group["params"] = [index_of[number] for number in group["params"]]
    state = {index_of[number]: values for number, values in state_dict["state"].items()}
    if stages is not None:  # a param group of the full net has parameters of all stages
        local_groups = [group["params"] for group in state_dict["param_groups"]]
        # the indices of each stage, by param group
        groups_by_stage = all_gather_values(local_groups, stages.group)
        # in the order of one process, which loads states by their place
        known_groups = stages.group_indices.get(optimizer, [])
        for i, group in enumerate(state_dict["param_groups"]):
            trained = {index for groups in groups_by_stage for index in groups[i]}
            known = known_groups[i] if i < len(known_groups) else []
            group["params"] = [index for index in known if index in trained]
            group["params"] += sorted(trained - set(known))  # added during the run
    rank = dist.get_rank()
    if not is_distributed:
        collecting_ranks = sending_ranks = _collecting_ranks(stages)  # first rank of each stage
        owner_ranks = [] if owner_group is None else dist.get_process_group_ranks(owner_group)
        if owner_ranks:  # of each stage, in the same places as in this stage
            offsets = [owner_rank - owner_ranks[0] for owner_rank in owner_ranks]
            sending_ranks = [first + offset for first in collecting_ranks for offset in offsets]

        def collect_tensor(tensor: Tensor) -> Tensor:
            # the full tensor on these ranks, else None; every rank of its mesh must call it
            return _collect_value(tensor, sending_ranks)

        state = tree_map_only(Tensor, collect_tensor, state)
        if "members" in state_dict:  # other state of member optimizers, equal on all ranks
            state_dict["members"] = tree_map_only(Tensor, collect_tensor, state_dict["members"])
        # the device on which the ranks send
        device = _comm_device(module)
        if owner_ranks and rank not in collecting_ranks:
            # sharded state is on the collecting ranks already: only owned state is sent
            owned_indices = {index for p, index in indices.items() if is_owned(p)}
            state = {index: values for index, values in state.items() if index in owned_indices}
        # the groups of other tp ranks own the same parameters, and send nothing
        if owner_group is not None and owner_ranks[0] in collecting_ranks:
            # _merge_states: joins the states by index; each parameter is in one of them
            state = _merge_states(gather_trees_to_first_rank(state, owner_group, device))
        if stages is not None and rank in collecting_ranks:
            state = _merge_states(gather_trees_to_first_rank(state, stages.group, device))
    state_dict["state"] = {i: state[i] for i in sorted(state)}
    return state_dict if is_distributed or rank == 0 else {}


def _merge_states(states: list[dict[int, Any]]) -> dict[int, Any]:
    return {i: values for rank_state in states for i, values in rank_state.items()}


def load_full_state(
    module: nn.Module,
    optimizers: list[Optimizer],
    checkpoint: dict[str, Any],
    is_owned: TensorPredicate,
    stages: StageNames | None,
    is_unsharded: TensorPredicate = lambda parameter: False,
) -> None:
    """Load weights and optimizer states from a checkpoint with full tensors.

    Args:
        module: the LightningModule; of a full weight only this rank's shard is copied.
        optimizers: its optimizers.
        checkpoint: the checkpoint; its tensors may be views of a mapped file.
        is_owned: whether this rank keeps the state of a parameter.
        stages: the stages of a pipeline; None without a pipeline.
        is_unsharded: whether the owner of a sharded parameter keeps its full state.

    Raises:
        CheckpointError: the kinds of the weights, or the optimizers, are not those of the
            checkpoint.
    """
    weights, module_state = checkpoint["state_dict"], module.state_dict()
    if stages is not None:  # a stage has some of the weights
        weights = {name: value for name, value in weights.items() if name in module_state}
    check_dtype_kinds(module, module_state, weights)
    loaded_weights = {
        # _copy_shard: copies this rank's shard of a full weight into the module's DTensor
        name: _copy_shard(module_state.get(name), value)
        for name, value in weights.items()
    }
    module.load_state_dict(loaded_weights, strict=module.strict_loading)  # type: ignore[arg-type]
    # without optimizers (evaluation) no states are loaded
    saved_states = checkpoint.get("optimizer_states", []) if optimizers else []
    _check_optimizer_count(optimizers, saved_states)
    indices = param_indices(module, stages) if stages else None
    for optimizer, saved in zip(optimizers, saved_states, strict=True):
        numbers = _saved_numbers(optimizer, saved, indices, stages)
        _load_optimizer(optimizer, saved, is_owned, numbers, is_unsharded, is_mapped=True)


def _saved_numbers(
    optimizer: Optimizer,
    saved: dict[str, Any],
    indices: dict[Tensor, int] | None,
    stages: StageNames | None,
) -> dict[Tensor, int] | None:
    """Return the number of each parameter of this stage in a saved optimizer state.

    One process numbers parameters in the order of its param groups, so a parameter is found by its
    place in the groups of the full net.

    Args:
        optimizer: the optimizer of this stage.
        saved: its state_dict in the checkpoint.
        indices: index of each parameter of this stage in the full net; None without a pipeline.
        stages: the stages of a pipeline; None without a pipeline.
    """
    if indices is None or stages is None:
        return None
    groups = stages.group_indices.get(optimizer, [])
    saved_groups = [group["params"] for group in saved["param_groups"]]
    if list(map(len, groups)) != list(map(len, saved_groups)):
        return indices
    number_of = {
        index: number
        for group, saved_group in zip(groups, saved_groups, strict=True)
        for index, number in zip(group, saved_group, strict=True)
    }
    return {p: number_of[index] for p, index in indices.items() if index in number_of}


@torch.no_grad()
def _copy_shard(module_value: Any, value: Any) -> Any:
    """Return the value to load: a full tensor, or the sharded one after its shard was copied.

    Of a full tensor in a mapped file only the shard is read, without another copy.
    """
    if (
        isinstance(module_value, DTensor)
        and isinstance(value, Tensor)
        and not isinstance(value, DTensor)
    ):
        module_value.to_local().copy_(local_shard(value, module_value))
        return module_value
    return value


def load_sharded_state(
    module: nn.Module,
    optimizers: list[Optimizer],
    path: Path,
    is_owned: TensorPredicate,
    stages: StageNames | None,
    is_unsharded: TensorPredicate = lambda parameter: False,
) -> dict[str, Any]:
    """Load weights and optimizer states from a folder; each rank reads its shards.

    Args:
        module: the LightningModule.
        optimizers: its optimizers; without any their states are not read.
        path: the folder.
        is_owned: whether this rank keeps the state of a parameter.
        stages: the stages of a pipeline; None without a pipeline.
        is_unsharded: whether the owner of a sharded parameter keeps its full state.

    Returns:
        the checkpoint without optimizer states; its weights are the module's own tensors.
    """
    # the checkpoint without the tensors that are stored in shards
    checkpoint = sharded.load_unsharded(path)
    indices = param_indices(module, stages)
    # shape and dtype of each stored tensor, by its path in the checkpoint
    entries = dict(sharded_index.iter_tensor_entries(path))
    weight_dtypes = {
        str(tensor_path[1]): entry.properties.dtype
        for tensor_path, entry in entries.items()
        if tensor_path[0] == "state_dict"
    }
    check_dtype_kinds(module, module.state_dict(), weight_dtypes)
    tensors: dict[sharded_index.TensorPath, Tensor] = {  # weights are loaded in place
        ("state_dict", name): value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and ("state_dict", name) in entries
    }
    owned_params = {index: p for p, index in indices.items() if is_owned(p)}
    params_by_name = dict(module.named_parameters())
    for tensor_path, entry in entries.items():
        section = tensor_path[0]
        if section == "optimizer_states" and optimizers:
            # ("optimizer_states", optimizer, "state", index of the parameter, name, ...)
            if tensor_path[2] != "state":
                # None: a full tensor, e.g. a setting of a param group
                tensors[tensor_path] = sharded.empty_like_entry(entry, None)
            elif tensor_path[3] in owned_params:
                parameter = owned_params[int(tensor_path[3])]
                tensors[tensor_path] = sharded.empty_like_entry(
                    # None: the full state of a sharded parameter, which its owner keeps
                    entry,
                    None if is_unsharded(parameter) else parameter,
                )
        elif section not in ("state_dict", "optimizer_states"):  # e.g. ("ema", ..., name)
            name = tensor_path[-1]
            # a pipeline stage leaves out the weights of other stages
            if stages is None or name in params_by_name:
                parameter = params_by_name.get(str(name))
                tensors[tensor_path] = sharded.empty_like_entry(entry, parameter)
    # fills the tensors in place
    sharded.load_sharded(path, tensors)
    for tensor_path, tensor in tensors.items():
        sharded.set_nested(checkpoint, tensor_path, tensor)
    saved_states = checkpoint.pop("optimizer_states", []) if optimizers else []
    _check_optimizer_count(optimizers, saved_states)
    for optimizer, saved in zip(optimizers, saved_states, strict=True):
        _load_optimizer(optimizer, saved, is_owned, indices if stages else None, is_unsharded)
    return checkpoint


def tensor_shapes(state: dict[str, Any]) -> TensorShapes:
    """Return the shape of each tensor of a state_dict."""
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, Tensor)}


def stored_tensor_shapes(path: Path) -> TensorShapes:
    """Return the shape of each weight in a sharded checkpoint."""
    return {
        str(tensor_path[1]): tuple(e.size)
        for tensor_path, e in sharded_index.iter_tensor_entries(path)
        if tensor_path[0] == "state_dict"
    }


def shape_mismatches(
    module_shapes: TensorShapes, checkpoint_shapes: TensorShapes, strict: bool
) -> str:
    """Describe how the weights of a checkpoint differ from those of a module; empty if equal.

    Args:
        module_shapes: shapes of the full net, equal on all ranks, so that all or none raise.
        checkpoint_shapes: shapes of the checkpoint.
        strict: whether missing and unexpected names count as differences.
    """
    mismatches = [
        f"{name} is {module_shapes[name]} in the module and {checkpoint_shapes[name]} in the "
        "checkpoint"
        for name in module_shapes.keys() & checkpoint_shapes.keys()
        if module_shapes[name] != checkpoint_shapes[name]
    ]
    if strict:
        mismatches += [
            f"{name} is only in the module"
            for name in module_shapes.keys() - checkpoint_shapes.keys()
        ]
        mismatches += [
            f"{name} is only in the checkpoint"
            for name in checkpoint_shapes.keys() - module_shapes.keys()
        ]
    rest_text = [f"and {len(mismatches) - MAX_SHOWN} more"] if len(mismatches) > MAX_SHOWN else []
    # the text has at most MAX_SHOWN differences
    return "; ".join(sorted(mismatches)[:MAX_SHOWN] + rest_text)


def check_shapes(
    module: nn.Module, module_shapes: TensorShapes, checkpoint_shapes: TensorShapes
) -> None:
    """Raise CheckpointError if shapes or names differ, before any weight is changed."""
    if mismatches := shape_mismatches(module_shapes, checkpoint_shapes, module.strict_loading):  # type: ignore[arg-type]
        raise CheckpointError(
            f"the checkpoint's weights do not fit this {type(module).__name__}: {mismatches}",
            hint="build the model as the run did, or choose another checkpoint",
        )


def check_dtype_kinds(
    module: nn.Module, module_values: Mapping[str, Any], checkpoint_values: Mapping[str, Any]
) -> None:
    """Raise CheckpointError for integer or complex values of real weights, or vice versa.

    torch would cast them silently.
    """
    if mismatches := dtype_kind_mismatches(module_values, checkpoint_values):
        raise CheckpointError(
            f"the checkpoint's weights have other dtypes than this {type(module).__name__}: "
            f"{mismatches}",
            hint="choose another checkpoint",
        )


def _check_optimizer_count(optimizers: list[Optimizer], saved: list[Any]) -> None:
    if len(optimizers) != len(saved):
        raise CheckpointError(
            f"the checkpoint has the states of {len(saved)} optimizers, and the module has "
            f"{len(optimizers)}",
            hint="return the optimizers of the run from configure_optimizers, or choose another "
            "checkpoint",
        )


def _load_optimizer(
    optimizer: Optimizer,
    saved: dict[str, Any],
    is_owned: TensorPredicate,
    indices: dict[Tensor, int] | None,
    is_unsharded: TensorPredicate,
    is_mapped: bool = False,
) -> None:
    """Load an optimizer state; tensors with the shape of their parameter are sharded like it.

    Args:
        optimizer: the optimizer.
        saved: its state_dict in the checkpoint; param groups have the same order with every layout.
        is_owned: whether this rank keeps the state of a parameter.
        indices: number of each parameter in `saved`; None: the order of the param groups. A
            pipeline stage has some parameters of each group.
        is_unsharded: whether the owner of a sharded parameter keeps its full state.
        is_mapped: whether tensors are views of a mapped file; they are copied, because views must
            not outlive the loading.

    Raises:
        CheckpointError: the number of param groups, or of parameters in a group, differs.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    saved_groups = [group["params"] for group in saved["param_groups"]]
    if len(groups) != len(saved_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved_groups)} param groups, and this optimizer "
            f"has {len(groups)}",
            hint="build the optimizer as the run did, or train without ckpt_path",
        )
    sizes, saved_sizes = list(map(len, groups)), list(map(len, saved_groups))
    if indices is None and sizes != saved_sizes:
        raise CheckpointError(
            f"the param groups of the checkpoint's optimizer have {saved_sizes} parameters, and "
            f"those of this optimizer have {sizes}",
            hint="freeze the same parameters as the run did, or train without ckpt_path",
        )
    parameters = [p for group_params in groups for p in group_params]
    if indices is None:
        saved_indices = [i for saved_group in saved_groups for i in saved_group]
    else:
        saved_indices = [indices[p] for p in parameters]
    index_by_param = dict(zip(parameters, saved_indices, strict=True))
    state = {
        i: {
            # converts a full tensor to this rank's shard, if the parameter is sharded
            key: _shard_state_value(p, value, is_unsharded(p), is_mapped)
            for key, value in saved["state"].get(i, {}).items()
        }
        for p, i in index_by_param.items()
        if is_owned(p)
    }
    state = {i: values for i, values in state.items() if values}
    settings = [
        {**saved_group, "params": [index_by_param[p] for p in group_params]}
        for group_params, saved_group in zip(groups, saved["param_groups"], strict=True)
    ]
    extra_state = {
        key: value for key, value in saved.items() if key not in ("state", "param_groups")
    }
    if is_mapped:
        extra_state = _clone_tensors(extra_state)
    optimizer.load_state_dict({**extra_state, "param_groups": settings, "state": state})


def _shard_state_value(parameter: Tensor, value: Any, is_unsharded: bool, is_mapped: bool) -> Any:
    """Return a value of a parameter's optimizer state as the optimizer is to keep it.

    A tensor of the shape of a sharded parameter becomes a DTensor, unless `is_unsharded`. Tensors
    are copied if `is_mapped`.
    """
    if isinstance(value, DTensor):
        return value
    if not isinstance(value, Tensor):
        return _clone_tensors(value) if is_mapped else value
    if value.shape != parameter.shape or not isinstance(parameter, DTensor) or is_unsharded:
        return value.clone() if is_mapped else value
    # local_shard: a view of the part that this rank has, if it is one block
    shard = local_shard(value, parameter)
    shard = shard.clone() if shard.device == parameter.device else shard.to(parameter.device)
    return DTensor.from_local(
        shard.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _clone_tensors(tree: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, tree)


def stages_to_join(trainer: Any) -> StageNames | None:
    """Return the pipeline stages to gather into one file; None for a folder or no pipeline."""
    in_folder = saves_sharded(trainer.strategy)
    return None if in_folder else getattr(trainer.strategy, "stage_names", None)


def to_checkpoint(
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    live: bool = False,
    stages: StageNames | None = None,
) -> dict[str, Tensor]:
    """Copy weights for a checkpoint, full or sharded like its state_dict; every rank calls it.

    Args:
        state: the checkpoint's state_dict; if it has a DTensor, the checkpoint is sharded.
        weights: the weights by name.
        live: whether shards are returned without a copy; the caller must not change the weights
            before they are written.
        stages: the stages of a pipeline; None without a pipeline.

    Returns:
        copies by name. The full value of a sharded weight is on the first rank of its mesh only,
        and with `stages` all values are on rank 0 only.
    """
    is_sharded = any(isinstance(value, DTensor) for value in state.values())
    if is_sharded:
        return {name: w.detach() if live else w.detach().clone() for name, w in weights.items()}
    values = {}
    for name, weight in weights.items():
        value = (
            gather_to_first_rank(weight) if isinstance(weight, DTensor) else weight.detach().clone()
        )
        if value is not None:
            values[name] = value
    if stages is None:
        return values
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    # the values of all stages on rank 0; {} on other ranks
    return gather_stages({name: value.cpu() for name, value in values.items()}, stages, device)


def update_state_dict(
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    module: nn.Module,
    live: bool = False,
    stages: StageNames | None = None,
) -> None:
    """Replace weights in a checkpoint's state_dict, full or sharded; every rank calls it.

    A shared weight is set under each of its names.

    Args:
        state: the checkpoint's state_dict, which is changed.
        weights: the new weights by name.
        module: the module of the weights.
        live: see `to_checkpoint`.
        stages: see `to_checkpoint`.
    """
    # remove_duplicate=False: a shared parameter is yielded under each of its names
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    aliases = {name: names for names in names_by_id.values() for name in names}
    for name, value in to_checkpoint(state, weights, live, stages).items():
        for alias in aliases.get(name, [name]):
            if alias in state:  # only one rank has the full weights
                state[alias] = value
