"""ZeRO-1: every rank has all weights, and the optimizer state of its share of them.

    gradients averaged on all ranks -> each steps the parameters it owns -> they are handed round

Any optimizer will do, since all skip a parameter without a gradient: those of others are hidden
from it for the length of a step. Parameters are owned whole, so one that treats matrices as
matrices (Muon) does its work once in the job, and not once a rank.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .collectives import all_gather_single


def owners(parameters: list[Tensor], ranks: int) -> dict[Tensor, int]:
    """The rank that owns each parameter: the largest first, each to whoever has least so far."""
    load, owner = [0] * ranks, {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):  # stable: alike on all ranks
        rank = min(range(ranks), key=load.__getitem__)
        owner[parameter] = rank
        load[rank] += parameter.numel()
    return owner


def share_steps(optimizer: Optimizer, group: ProcessGroup) -> dict[Tensor, int]:
    """Let each rank of `group` step its own parameters only, and send the result to the others."""
    if getattr(optimizer, "gathers", False):  # Newton: there is no state to share
        return {}
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} computes the gradient of all parameters several times a"
            " step, which ranks cannot share; type --trainer.strategy ddp"
        )
    parameters = [p for each in optimizer.param_groups for p in each["params"]]
    owner = owners(parameters, dist.get_world_size(group))
    rank, whole_step = dist.get_rank(group), optimizer.step
    foreign = [p for p in parameters if owner[p] != rank]

    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for p in foreign]
        for p in foreign:
            p.grad = None
        whole_step()
        for p, gradient in zip(foreign, gradients, strict=True):
            p.grad = gradient
        hand_round(owner, group)
        return loss

    if hasattr(whole_step, "_wrapped_by_lr_sched"):  # or a schedule would warn that we came later
        step.__dict__["_wrapped_by_lr_sched"] = True
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return owner


@torch.no_grad()
def hand_round(owner: dict[Tensor, int], group: ProcessGroup) -> None:
    """Give every rank the values of the owners: one all-gather for each dtype."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for dtype in {p.dtype: None for p in owner}:
        own: list[list[Tensor]] = [[] for _ in range(ranks)]
        for p, each in owner.items():
            if p.dtype == dtype and p.requires_grad:
                own[each].append(p.to_local() if isinstance(p, DTensor) else p)
        most = max(sum(p.numel() for p in part) for part in own)
        if most == 0:
            continue
        device = next(p for part in own for p in part).device
        send = torch.zeros(most, dtype=dtype, device=device)
        _fill(send, own[rank])
        received = send.new_empty(ranks * most)
        all_gather_single(received, send, group=group)
        for each, flat in enumerate(received.view(ranks, most)):
            if each != rank:
                _spill(flat, own[each])


def _fill(flat: Tensor, parts: list[Tensor]) -> None:
    if parts:
        joined = torch.cat([part.reshape(-1) for part in parts])
        flat[: len(joined)] = joined


def _spill(flat: Tensor, parts: list[Tensor]) -> None:
    for part, values in zip(parts, flat.split_with_sizes(_sizes(flat, parts)), strict=False):
        part.copy_(values.view(part.shape))


def _sizes(flat: Tensor, parts: list[Tensor]) -> list[int]:
    sizes = [part.numel() for part in parts]
    return [*sizes, len(flat) - sum(sizes)]
