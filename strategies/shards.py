"""Convert between full tensors and shards: helpers for callbacks that work with DTensors.

A sharded parameter is a DTensor. Elementwise arithmetic needs only the local shards, which share
its memory. Files and other layouts need full tensors.
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
    """Return this rank's shard, which shares memory; a plain tensor is returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gather the full tensor; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full value, with the placements of `like`; sends nothing."""
    return local_shard(value, like).to(like.device)  # a value of a sharded file is a DTensor


def full_module(trainer: Any) -> AbstractContextManager[None]:
    """Return a context in which a pipeline's module shows the full net, e.g. to count it."""
    pipeline = getattr(trainer.strategy, "pipeline", None)
    return nullcontext() if pipeline is None else pipeline.full_net()


def has_gradient(trainer: Any, parameter: Tensor) -> bool:
    """Whether the last backward pass on this rank computed a gradient of a parameter.

    With ZeRO-1 `p.grad` may be None, because the gradient was sent to the parameter's owner.
    """
    with_gradient = getattr(trainer.strategy, "params_with_gradient", ())
    return parameter.grad is not None or parameter in with_gradient


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

    The full value of a sharded weight is on the first rank of its mesh only.

    Args:
        state: the checkpoint's state_dict.
        weights: the weights by name.
        live: whether shards are returned without a copy; the caller must not change the weights
            before they are written.
        stages: the stages of a pipeline; the result is then on rank 0 only.
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
    """Replace weights in a checkpoint's state_dict, full or sharded; every rank calls it.

    A shared weight is set under each of its names. See `to_checkpoint` for the arguments.
    """
    owned: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owned.setdefault(id(parameter), []).append(name)
    aliases = {name: names for names in owned.values() for name in names}
    for name, value in to_checkpoint(state, weights, live, stages).items():
        for alias in aliases.get(name, [name]):
            if alias in state:  # only one rank has the full weights
                state[alias] = value
