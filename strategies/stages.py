"""Cutting a net into stages: which blocks stand where, and what is let go.

    blocks 0 1 | 2 3 | 4 5     enter (embedding) at the first stage, leave (norm, head) at the last

Names do not change, so a checkpoint of the stages is one of the net. A tied head keeps its weight
at both ends.
"""

from typing import Any

import torch
from torch import nn

PROTOCOL = ("blocks", "enter", "through", "leave", "ends")


def net_of(module: nn.Module, ranks: int) -> Any:
    """The net inside a module that has what a pipeline needs."""
    for net in module.modules():
        if all(hasattr(net, name) for name in PROTOCOL):
            return net
    raise ValueError(
        f"pp={ranks}: {type(module).__name__} has no net that can be cut into stages: one with"
        f" {', '.join(PROTOCOL)}; type --trainer.strategy zero3, which needs none of it"
    )


def shares(names: list[str], stages: int, what: str) -> list[list[str]]:
    """The blocks of each stage, in order, their numbers differing by one at most."""
    if len(names) < stages:
        raise ValueError(
            f"{what} has {len(names)} blocks, fewer than the {stages} stages; allowed: up to"
            f" {len(names)} stages; type --trainer.strategy.pp={len(names)}"
        )
    sizes = [len(names) // stages + (i < len(names) % stages) for i in range(stages)]
    starts = [sum(sizes[:i]) for i in range(stages)]
    return [names[a : a + n] for a, n in zip(starts, sizes, strict=True)]


def let_go(pipeline: Any) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Drop what other ranks have; name, shape and dtype of what the first and last share."""
    net, module = pipeline.net, pipeline.module
    enter, leave = net.ends()

    def owned(names: list[str]) -> set[nn.Parameter]:
        found = [getattr(net, name) for name in names]
        return {p for each in found if each is not None for p in each.parameters()}

    both = owned(enter) & owned(leave)
    tied = [(n, p.shape, p.dtype) for n, p in module.named_parameters() if p in both]
    kept = {name for stage in pipeline.mine for name in pipeline.blocks[stage]}
    for name in list(net.blocks):
        if name not in kept:
            del net.blocks[name]
    gone = ([] if pipeline.first else enter) + ([] if pipeline.last else leave)
    for name in gone:
        part = getattr(net, name)
        shares = part is not None and any(p in both for p in part.parameters())
        if not (shares and (pipeline.first or pipeline.last)):
            setattr(net, name, None)
    return tied
