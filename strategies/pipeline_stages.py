"""Cutting a net into stages: which blocks stand where, and what is let go.

    blocks 0 1 | 2 3 | 4 5     enter (embedding) at the first stage, leave (norm, head) at the last

Names do not change, so a checkpoint of the stages is one of the net. A tied head keeps its weight
at both ends. What is let go leaves a stand-in without numbers, for whoever must see the whole net:
the last linear map of a stage is not the net's.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ravine.errors import UsageError

PROTOCOL = ("blocks", "enter", "through", "leave", "ends")


def net_of(module: nn.Module, ranks: int) -> Any:
    """The net inside a module that has what a pipeline needs."""
    for net in module.modules():
        if all(hasattr(net, name) for name in PROTOCOL):
            return net
    raise UsageError(
        f"pp={ranks}: {type(module).__name__} has no net that can be cut into stages: one with"
        f" {', '.join(PROTOCOL)}; type --trainer.strategy zero3, which needs none of it"
    )


def shares(names: list[str], stages: int, what: str, ranks: int) -> list[list[str]]:
    """The blocks of each stage, in order, their numbers differing by one at most."""
    if len(names) < stages:
        fix = f"pp={len(names)}" if len(names) < ranks else "schedule=1f1b"
        raise UsageError(
            f"{what} has {len(names)} blocks, fewer than the {stages} stages ({stages // ranks} on"
            f" each of {ranks} ranks); allowed: up to {len(names)} stages; type"
            f" --trainer.strategy.{fix}"
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

    known: dict[nn.Parameter, nn.Parameter] = {}
    both = owned(enter) & owned(leave)
    tied = [(n, p.shape, p.dtype) for n, p in module.named_parameters() if p in both]
    kept = {name for stage in pipeline.mine for name in pipeline.blocks[stage]}
    here = {part for name in kept for part in net.blocks[name].modules()}  # like shared tables
    for name in list(net.blocks):
        if name not in kept:
            pipeline.absent[name] = stand_in(net.blocks[name], known, here)
            del net.blocks[name]
    gone = ([] if pipeline.first else enter) + ([] if pipeline.last else leave)
    for name in gone:
        part = getattr(net, name)
        shares = part is not None and any(p in both for p in part.parameters())
        if part is not None and not (shares and (pipeline.first or pipeline.last)):
            pipeline.ends[name] = stand_in(part, known)
            setattr(net, name, None)
    return tied


def ghost(net: nn.Module) -> nn.Module:
    """A copy of the net without numbers, which takes no memory: it tells shapes only."""
    known = {id(t): t.detach().to("meta") for t in (*net.parameters(), *net.buffers())}
    made = copy.deepcopy(net, known)
    for module in made.modules():
        module.__dict__.pop("forward", None)  # of the net itself: recomputation changes no shape
    return made


def stand_in(
    module: nn.Module,
    known: dict[nn.Parameter, nn.Parameter],
    here: Collection[nn.Module] = (),
) -> nn.Module:
    """The same module, each parameter one number in the shape of all; `known` keeps ties.

    Modules that blocks of this rank also use (`here`) are not changed.
    """
    for part in (each for each in module.modules() if each not in here):
        for name, p in part._parameters.items():
            if p is not None and p not in known:
                like = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
                known[p] = nn.Parameter(like, p.requires_grad)
                known[p].elsewhere = True  # type: ignore[attr-defined]
            part._parameters[name] = None if p is None else known[p]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to("meta")
    return module


@contextmanager
def whole(pipeline: Any) -> Iterator[None]:
    """Show the whole net for a moment, stand-ins (`elsewhere`) where another rank has the part."""
    net, blocks = pipeline.net, dict(pipeline.net.blocks)
    net.blocks._modules = {n: blocks.get(n) or pipeline.absent[n] for n in pipeline.order}
    for name, part in pipeline.ends.items():
        setattr(net, name, part)
    try:
        yield
    finally:
        net.blocks._modules = blocks
        for name in pipeline.ends:
            setattr(net, name, None)


class Stage(nn.Module):
    """One stage as torch wants it; the net stays where it was, with its names and its hooks."""

    def __init__(self, pipeline: Any, stage: int) -> None:
        """Remember which; a pipeline is no part of it."""
        super().__init__()
        self.__dict__["pipeline"], self.stage = pipeline, stage

    def forward(self, x: Tensor) -> Tensor:
        """Go through the stage, as the net does."""
        pipeline = self.__dict__["pipeline"]
        with pipeline.context(), pipeline._answering(pipeline._of(self.stage)):
            return pipeline.net(x)


class Asked(Exception):
    """The net has been called: with these inputs."""

    def __init__(self, inputs: Tensor) -> None:
        """Carry them to whoever wanted to know."""
        super().__init__()
        self.inputs = inputs


class HandOut(torch.autograd.Function):
    """A loss whose gradients are there already: its backward scales them and adds them up."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameters: list[Tensor], made: list[Any]) -> Tensor:
        """Remember what was made for whom."""
        ctx.parameters, ctx.made = parameters, made
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        """Hand it out."""
        for p, made in zip(ctx.parameters, ctx.made, strict=True):
            if made is None:
                continue
            (made.to_local() if isinstance(made, DTensor) else made).mul_(gradients[0])
            p.grad = made if p.grad is None else p.grad + made
        return None, None, None
