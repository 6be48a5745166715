"""Weights and optimizer states between a spread net and a checkpoint, whole or in parts.

Parameters are numbered by their place in `named_parameters()` on every layout, so a state saved
with any grouping, on any mesh or on none, finds its parameter again.
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

from ..dtensor import collect, keeper, local_part, to_first
from . import sharded
from .atomic_io import CheckpointError
from .validation import kind_mismatches

SHOWN = 5  # tensors named in a message
Owned = Callable[[Tensor], bool]
Sizes = dict[str, tuple[int, ...]]


class Stages(NamedTuple):
    """A net that is cut into stages: the names of all parameters, and the ranks that have them."""

    names: list[str]
    group: ProcessGroup


def numbers(module: nn.Module, stages: Stages | None) -> dict[Tensor, int]:
    """Each parameter's place in `named_parameters()` of the whole net."""
    named = dict(module.named_parameters())
    names = list(named) if stages is None else stages.names
    return {named[name]: i for i, name in enumerate(names) if name in named}


def weights(module: nn.Module, parts: bool, stages: Stages | None) -> dict[str, Any]:
    """The module's state_dict: this rank's parts, or all on rank 0 and nothing elsewhere.

    A tensor with several names is collected once, and is in the result under each of them.
    """
    state = get_model_state_dict(module, options=StateDictOptions(cpu_offload=parts))
    first_names = _first_names(module, state)
    if parts:
        return {name: state[first_names.get(name, name)] for name in state}
    keepers, found = _keepers(stages), {}
    for name, value in state.items():
        if name not in first_names:
            found[name] = _kept(value, keepers)
    stand = {name: first_names.get(name, name) for name in state}
    if stages is not None and dist.get_rank() in keepers:
        own, found, stand = (found, stand), {}, {}
        for tensors, names in to_first(own, stages.group, _device(module)):
            found |= {name: value for name, value in tensors.items() if name not in found}
            stand |= {name: first for name, first in names.items() if name not in stand}
    return {name: found[first] for name, first in stand.items()} if dist.get_rank() == 0 else {}


def join_stages(tensors: dict[str, Tensor], stages: Stages, device: torch.device) -> dict[str, Any]:
    """The tensors that the first ranks of all stages hold, on rank 0; every rank calls it."""
    found: dict[str, Any] = {}
    if dist.get_rank() in _keepers(stages):
        for each in to_first(tensors, stages.group, device):
            found |= {name: value for name, value in each.items() if name not in found}
    return found


def _first_names(module: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """For each further name of a tensor, its first name."""
    first: dict[int, str] = {}
    further = {}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        if name in state and (known := first.setdefault(id(tensor), name)) != name:
            further[name] = known
    return further


def _keepers(stages: Stages | None) -> list[int]:
    """The ranks on which whole tensors are collected: the first rank of each stage."""
    if stages is None:
        return [0]
    count, world = dist.get_world_size(stages.group), dist.get_world_size()
    return [stage * world // count for stage in range(count)]


def _kept(value: Any, keepers: list[int]) -> Any:
    """A whole value on the CPU of the keeper; None on the other ranks."""
    if isinstance(value, DTensor):
        return collect(value) if keeper(value.device_mesh) in keepers else None
    if dist.get_rank() not in keepers:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _device(module: nn.Module) -> torch.device:
    """The device on which the ranks of the job send and receive."""
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def _from_all(value: Any, group: ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def optimizer_state(
    module: nn.Module,
    optimizer: Optimizer,
    parts: bool,
    owners: ProcessGroup | None,
    stages: Stages | None,
    owned: Owned = lambda parameter: True,
) -> dict[str, Any]:
    """The optimizer's state_dict: this rank's parts, or all on rank 0.

    Where parameters have owners (ZeRO-1, optimizers that need whole tensors), `owners` are the
    ranks that keep the state of different parameters; `owned` is false for those of other ranks.
    """
    place = numbers(module, stages)
    saved = optimizer.state_dict()
    ids = {}
    for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        ids |= {i: place[p] for i, p in zip(group["params"], ours["params"], strict=True)}
        group["params"] = [ids[i] for i in group["params"]]
    state = {ids[i]: values for i, values in saved["state"].items()}
    rank = dist.get_rank()
    if stages is not None:
        groups = _from_all([group["params"] for group in saved["param_groups"]], stages.group)
        for i, group in enumerate(saved["param_groups"]):
            group["params"] = sorted({number for each in groups for number in each[i]})
    if not parts:
        keepers = holders = _keepers(stages)
        ranks = [] if owners is None else dist.get_process_group_ranks(owners)
        if ranks:  # each of them has the state of other parameters
            holders = [first + each - ranks[0] for first in keepers for each in ranks]

        def here(tensor: Tensor) -> Tensor:
            return _kept(tensor, holders)  # every rank of its mesh takes part

        state = tree_map_only(Tensor, here, state)
        if "members" in saved:  # further state of optimizers, the same on every rank
            saved["members"] = tree_map_only(Tensor, here, saved["members"])
        device = _device(module)
        if ranks and rank not in keepers:  # what is sharded is on the keepers already
            state = {place[p]: state[place[p]] for p in place if place[p] in state and owned(p)}
        if owners is not None and ranks[0] in keepers:
            state = _merged(to_first(state, owners, device))
        if stages is not None and rank in keepers:
            state = _merged(to_first(state, stages.group, device))
    saved["state"] = {i: state[i] for i in sorted(state)}
    return saved if parts or rank == 0 else {}


def _merged(states: list[dict[int, Any]]) -> dict[int, Any]:
    return {i: values for some in states for i, values in some.items()}


def load(
    module: nn.Module,
    optimizers: list[Optimizer],
    checkpoint: dict[str, Any],
    owned: Owned,
    stages: Stages | None,
    whole: Owned = lambda parameter: False,
) -> None:
    """Set weights and optimizers from a checkpoint of whole tensors.

    The state of a parameter that is `whole` is on the rank that owns the parameter.
    """
    state, ours = checkpoint["state_dict"], module.state_dict()
    if stages is not None:
        state = {name: value for name, value in state.items() if name in ours}
    refuse_other_kinds(module, ours, state)
    spread = {name: _set(ours.get(name), value) for name, value in state.items()}
    module.load_state_dict(spread, strict=module.strict_loading)  # type: ignore[arg-type]
    states = checkpoint.get("optimizer_states", []) if optimizers else []
    _refuse_too_few(optimizers, states)
    place = numbers(module, stages) if stages else None
    for optimizer, state in zip(optimizers, states, strict=True):
        _load_optimizer(optimizer, state, owned, place, whole, mapped=True)


@torch.no_grad()
def _set(ours: Any, value: Any) -> Any:
    """The value to load: a whole tensor, or the sharded one after its part was copied.

    Of a whole tensor in a mapped file only the part is read, and no other copy is made.
    """
    if isinstance(ours, DTensor) and isinstance(value, Tensor) and not isinstance(value, DTensor):
        ours.to_local().copy_(local_part(value, ours))
        return ours
    return value


def load_parts(
    module: nn.Module,
    optimizers: list[Optimizer],
    path: Path,
    owned: Owned,
    stages: Stages | None,
    whole: Owned = lambda parameter: False,
) -> dict[str, Any]:
    """Set weights and optimizers from a folder, of which each rank reads its parts."""
    checkpoint = sharded.read_meta(path)
    place = numbers(module, stages)
    parameters = {number: p for p, number in place.items() if owned(p)}
    named = dict(module.named_parameters())
    found = dict(sharded.entries(path))
    kinds = {str(at[1]): e.properties.dtype for at, e in found.items() if at[0] == "state_dict"}
    refuse_other_kinds(module, module.state_dict(), kinds)
    tensors: dict[sharded.Place, Tensor] = {
        ("state_dict", name): value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and ("state_dict", name) in found
    }
    for at, entry in found.items():
        if at[0] == "optimizer_states":
            if optimizers and at[2] != "state":
                tensors[at] = sharded.like(entry, None)
            elif optimizers and at[3] in parameters:
                parameter = parameters[int(at[3])]
                tensors[at] = sharded.like(entry, None if whole(parameter) else parameter)
        elif at[0] != "state_dict" and (stages is None or at[-1] in named):
            tensors[at] = sharded.like(entry, named.get(str(at[-1])))
    sharded.read(path, tensors)
    for at, tensor in tensors.items():
        sharded.put(checkpoint, at, tensor)
    states = checkpoint.pop("optimizer_states", []) if optimizers else []
    _refuse_too_few(optimizers, states)
    for optimizer, state in zip(optimizers, states, strict=True):
        _load_optimizer(optimizer, state, owned, place if stages else None, whole)
    return checkpoint


def sizes(state: dict[str, Any]) -> Sizes:
    """The size of each tensor of a state_dict."""
    return {name: tuple(t.shape) for name, t in state.items() if isinstance(t, Tensor)}


def sizes_in(path: Path) -> Sizes:
    """The size of each weight in a folder."""
    return {str(at[1]): tuple(e.size) for at, e in sharded.entries(path) if at[0] == "state_dict"}


def apart(ours: Sizes, theirs: Sizes, strict: bool) -> str:
    """In what the weights of a checkpoint differ from a net's; empty if they fit.

    Args:
        ours: those of the whole net, the same on every rank, so that all refuse or none
        theirs: the checkpoint's
        strict: whether one may not have what the other has not
    """
    wrong = [
        f"{name} is {ours[name]} here and {theirs[name]} there"
        for name in ours.keys() & theirs.keys()
        if ours[name] != theirs[name]
    ]
    if strict:
        wrong += [f"{name} is only here" for name in ours.keys() - theirs.keys()]
        wrong += [f"{name} is only there" for name in theirs.keys() - ours.keys()]
    more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return "; ".join(sorted(wrong)[:SHOWN] + more)


def refuse_others(module: nn.Module, ours: Sizes, theirs: Sizes) -> None:
    """Refuse weights of another architecture before one of them is set."""
    if wrong := apart(ours, theirs, module.strict_loading):  # type: ignore[arg-type]
        raise CheckpointError(
            f"the checkpoint's weights do not fit this {type(module).__name__}: {wrong}; build the"
            " model as the run did, or choose another checkpoint"
        )


def refuse_other_kinds(
    module: nn.Module, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    """Refuse whole or complex numbers for real ones, which would be cast without a word."""
    if wrong := kind_mismatches(ours, theirs):
        raise CheckpointError(
            f"the checkpoint's weights are no weights of this {type(module).__name__}: {wrong};"
            " choose another checkpoint"
        )


def _refuse_too_few(optimizers: list[Optimizer], saved: list[Any]) -> None:
    if len(optimizers) != len(saved):
        raise CheckpointError(
            f"the checkpoint has the states of {len(saved)} optimizers, and there are"
            f" {len(optimizers)}; build them as the run did, or choose another checkpoint"
        )


def _load_optimizer(
    optimizer: Optimizer,
    saved: dict[str, Any],
    owned: Owned,
    place: dict[Tensor, int] | None,
    whole: Owned,
    mapped: bool = False,
) -> None:
    """Load state tensors; those shaped like their parameter are spread like it.

    Groups keep their order from layout to layout; a stage has some of each, found by its `place`.
    Tensors of a `mapped` file are copied: they must not outlive the loading.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    theirs = [group["params"] for group in saved["param_groups"]]
    if len(groups) != len(theirs):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(theirs)} groups of parameters and this one"
            f" {len(groups)}: build it as the run did, or begin anew without --ckpt_path"
        )
    parameters = [p for ours in groups for p in ours]
    ids = [i for there in theirs for i in there]
    if place is not None:
        ids = [place[p] for p in parameters]

    def spread(parameter: Tensor, value: Any) -> Any:
        if isinstance(value, DTensor):
            return value
        if not isinstance(value, Tensor):
            return _copied(value) if mapped else value
        if value.shape != parameter.shape or not isinstance(parameter, DTensor) or whole(parameter):
            return value.clone() if mapped else value
        part = local_part(value, parameter)
        part = part.clone() if part.device == parameter.device else part.to(parameter.device)
        return DTensor.from_local(
            part.contiguous(),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    numbered = dict(zip(parameters, ids, strict=True))
    state = {
        i: {key: spread(p, value) for key, value in saved["state"].get(i, {}).items()}
        for p, i in numbered.items()
        if owned(p)
    }
    state = {i: values for i, values in state.items() if values}
    settings = [
        {**there, "params": [numbered[p] for p in ours]}
        for ours, there in zip(groups, saved["param_groups"], strict=True)
    ]
    further = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    if mapped:
        further = _copied(further)
    optimizer.load_state_dict({**further, "param_groups": settings, "state": state})


def _copied(tree: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, tree)
