"""A tensor and this rank's part of it: the four steps between the two.

A parameter spread over a mesh is a DTensor. Arithmetic by number needs only the parts, which share
its memory; files and other layouts need the whole.
"""

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ravine.lightning_compat import saves_sharded

from .checkpoint.state_dict import StageNames, gather_stages
from .dtensor import gather_to_first_rank, local_shard
from .parallel_module import fsdp_units


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All parts together; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole value, sharded as `like` is; nothing is sent."""
    return local_shard(value, like).to(like.device)  # read in parts: sharded already


def full_module(trainer: Any) -> AbstractContextManager[None]:
    """In a pipeline, all of the net in the module for a moment, to count or to choose by."""
    pipeline = getattr(trainer.strategy, "pipeline", None)
    return nullcontext() if pipeline is None else pipeline.full_net()


def has_gradient(trainer: Any, parameter: Tensor) -> bool:
    """Whether the last backward pass has reached a parameter, on this rank.

    With ZeRO-1 the gradient may have been sent to the rank that owns the parameter.
    """
    with_gradient = getattr(trainer.strategy, "arrived", ())
    return parameter.grad is not None or parameter in with_gradient


def named_trainable(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters that move, as shards where they are sharded.

    A forward may have left whole copies in the place of shards: they would hide a change of those.
    """
    for unit in fsdp_units(module):
        unit.reshard()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            yield name, parameter


def named_tracked(module: nn.Module, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, and those of the given names even if they are frozen now."""
    trainable_names = {name for name, _ in named_trainable(module)}
    for name, parameter in module.named_parameters():
        if name in trainable_names or (name in names and parameter.is_floating_point()):
            yield name, parameter


def stages_to_join(trainer: Any) -> StageNames | None:
    """The stages of a pipeline whose weights one file holds; None without one, or for a folder."""
    in_folder = saves_sharded(trainer.strategy)
    return None if in_folder else getattr(trainer.strategy, "stages", None)


def to_checkpoint(
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    live: bool = False,
    stages: StageNames | None = None,
) -> dict[str, Tensor]:
    """Copy weights for a checkpoint, whole or sharded as its state_dict is; every rank calls it.

    The whole value of a sharded weight is on the first rank of its mesh only.

    Args:
        state: the checkpoint's state_dict.
        weights: by name.
        live: whether shards may be the weights themselves, if these do not change until they are
            written.
        stages: of a pipeline, each of which has other weights; the result is on rank 0 only.
    """
    if any(isinstance(value, DTensor) for value in state.values()):
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
    return gather_stages({name: value.cpu() for name, value in values.items()}, stages, device)


def update_state_dict(
    state: dict[str, Tensor],
    weights: dict[str, Tensor],
    module: nn.Module,
    live: bool = False,
    stages: StageNames | None = None,
) -> None:
    """Put values into a checkpoint's state_dict, whole or sharded as it is; every rank calls it.

    A weight that layers share stands there under each of its names, and gets one value. See
    `to_checkpoint` for the arguments.
    """
    owned: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owned.setdefault(id(parameter), []).append(name)
    aliases = {name: names for names in owned.values() for name in names}
    for name, value in to_checkpoint(state, weights, live, stages).items():
        for alias in aliases.get(name, [name]):
            if alias in state:  # one rank alone holds whole weights
                state[alias] = value
