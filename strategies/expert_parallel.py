"""Expert parallelism: each rank keeps some of the experts; tokens travel to them and back.

    rank 0  e0 e1 e2 e3  -all-to-all->  e0 e1 of both ranks  -work, all-to-all->  e0 e1 e2 e3
    rank 1  e0 e1 e2 e3                 e2 e3 of both ranks                       e0 e1 e2 e3

The axis is borrowed from `dp_shard`: those ranks have different tokens and, without it, the same
experts. A module called `experts`, whose parameters have the experts as their first axis and whose
forward maps (E n d) to (E n d), takes part. An expert has as many places on every rank, so all
messages are of one size, whether a place is taken or not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import pad

from ravine.errors import UsageError


def mixtures(module: nn.Module) -> list[nn.Module]:
    """The modules called `experts`."""
    return [m for name, m in module.named_modules() if name.rpartition(".")[2] == "experts"]


def spread_experts(module: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Leave each rank of `mesh` its share of the experts; the modules that were changed."""
    found = mixtures(module)
    if not found:
        takes = "experts" in (getattr(module, "hparams", None) or {})
        fix = "type --model.experts=8, or" if takes else "give it one, or type"
        raise UsageError(
            f"ep={mesh.size()}: {type(module).__name__} has no mixture of experts (a module called"
            f" `experts`, with the experts as the first axis of its parameters); {fix}"
            " --trainer.strategy zero3"
        )
    for experts in found:
        count = next(experts.parameters()).shape[0]
        if count % mesh.size():
            fitting = [n for n in range(1, count + 1) if count % n == 0]
            nearest = max(n for n in fitting if n <= mesh.size())
            raise UsageError(
                f"ep={mesh.size()} does not divide the {count} experts; allowed:"
                f" {', '.join(map(str, fitting))}; type --trainer.strategy.ep={nearest}"
            )
        for name, parameter in list(experts.named_parameters()):
            part = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            experts.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
        experts.forward = _travelling(experts, experts.forward, mesh.get_group())
    return found


def _travelling(
    experts: nn.Module, forward: Callable[[Tensor], Tensor], group: ProcessGroup
) -> Callable[[Tensor], Tensor]:
    ranks = dist.get_world_size(group)

    def travelling(x: Tensor) -> Tensor:
        e, n, d = x.shape
        given = n
        if not torch.is_grad_enabled():  # in an evaluation ranks may have unequal batches
            most = torch.tensor(n, device=x.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            n = int(most)
            x = pad(x, (0, 0, 0, n - given))
        sent = _Exchange.apply(x, group).view(ranks, e // ranks, n, d)  # of each rank, for mine
        mail = sent.transpose(0, 1).reshape(e // ranks, ranks * n, d)
        whole = dict(experts._parameters)
        parts: Any = {k: p.to_local() if isinstance(p, DTensor) else p for k, p in whole.items()}
        experts._parameters.update(parts)  # the module knows nothing of meshes
        try:
            answers = forward(mail)
        finally:
            experts._parameters.update(whole)
        answers = answers.view(e // ranks, ranks, n, d).transpose(0, 1).reshape(e, n, d)
        return _Exchange.apply(answers, group)[:, :given]

    return travelling


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts along the first axis; its gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()  # gloo writes wrong numbers into anything else
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _Exchange.apply(gradients[0], ctx.group), None


@torch.no_grad()
def settle_experts(found: list[nn.Module], replicas: DeviceMesh, data: int) -> None:
    """Average the gradients of experts over `data` ranks.

    What came from the ranks of one exchange is summed up already, by the way back of their tokens;
    `replicas` are the ranks that keep the same experts.
    """
    for parameter in (p for experts in found for p in experts.parameters() if p.grad is not None):
        gradient: Any = parameter.grad
        part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if replicas.size() > 1:
            dist.all_reduce(part, group=replicas.get_group())
        part /= data
