"""Expert parallelism: each rank keeps some experts; all-to-all dispatches and combines tokens.

    rank 0  e0 e1 e2 e3  -all-to-all->  e0 e1 of both ranks  -forward, all-to-all-> e0 e1 e2 e3
    rank 1  e0 e1 e2 e3                 e2 e3 of both ranks                         e0 e1 e2 e3

The axis `ep` is a part of `dp_shard`: these ranks have different tokens and, without `ep`, the same
experts. It applies to each module called `experts`. The first axis of its parameters are the
experts, and its forward maps (E n d) to (E n d). Every rank has the same capacity n for each
expert, so all messages have one size, whether a slot is used or not.

Axes: E experts, n slots of an expert, d width.
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


def find_experts(module: nn.Module) -> list[nn.Module]:
    """Return the modules called `experts`."""
    return [m for name, m in module.named_modules() if name.rpartition(".")[2] == "experts"]


def shard_experts(module: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Shard all experts over the ranks of `mesh`, and return the changed modules.

    Their forward then sends tokens to the ranks of the experts, and gets the outputs back.

    Args:
        module: the LightningModule; an experts module is a submodule called `experts`, whose
            parameters have the experts as first axis.
        mesh: the ranks that keep different experts (axis ep).

    Raises:
        UsageError: there are no experts, or the ranks do not divide their number.
    """
    expert_modules = find_experts(module)
    if not expert_modules:
        flag = "--trainer.strategy=zero3"
        # the module has this argument: the error recommends it
        if "num_experts" in (getattr(module, "hparams", None) or {}):
            flag = f"--model.num_experts=8, or {flag}"
        raise UsageError(
            f"ep={mesh.size()}: {type(module).__name__} has no mixture of experts",
            ["networks with a module `experts`, whose parameters have the experts as first axis"],
            'use Trainer(strategy="zero3")',
            flag=flag,
        )
    for experts in expert_modules:
        num_experts = next(experts.parameters()).shape[0]
        if num_experts % mesh.size():
            divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            nearest = max(n for n in divisors if n <= mesh.size())
            raise UsageError(
                f"ep={mesh.size()} does not divide the {num_experts} experts",
                divisors,
                f"use MeshStrategy(ep={nearest})",
                flag=f"--trainer.strategy.ep={nearest}",
            )
        for name, parameter in list(experts.named_parameters()):
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            experts.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))
        # the new forward exchanges tokens with the other ranks of the mesh
        experts.forward = _all_to_all_forward(experts, experts.forward, mesh.get_group())
    return expert_modules


def _all_to_all_forward(
    experts: nn.Module, forward: Callable[[Tensor], Tensor], group: ProcessGroup
) -> Callable[[Tensor], Tensor]:
    """Return a replacement of the forward of experts that are sharded over a group.

    Axes: E all experts, e experts of a rank, n slots of an expert, d channels, r ranks.

    Args:
        experts: the module of this rank's experts.
        forward: its forward, which maps (E n d) to (E n d).
        group: the ranks that keep different experts.
    """
    num_ranks = dist.get_world_size(group)

    def dispatch_forward(x: Tensor) -> Tensor:
        """Map the slots of this rank for all experts (E n d) to their outputs (E n d)."""
        num_experts, n, d = x.shape
        num_slots = n  # without padding
        if not torch.is_grad_enabled():  # in evaluation ranks may have batches of unequal size
            max_slots = torch.tensor(n, device=x.device)
            dist.all_reduce(max_slots, dist.ReduceOp.MAX, group=group)
            n = int(max_slots)
            x = pad(x, (0, 0, 0, n - num_slots))
        num_local_experts = num_experts // num_ranks
        # (r e n d): the slots of each rank r for the local experts e
        # _AllToAll: sends a part of the first axis to each rank; its backward does the reverse
        received = _AllToAll.apply(x, group).view(num_ranks, num_local_experts, n, d)
        local_inputs = received.transpose(0, 1).reshape(num_local_experts, num_ranks * n, d)
        sharded_params = dict(experts._parameters)
        local_params: Any = {
            k: p.to_local() if isinstance(p, DTensor) else p for k, p in sharded_params.items()
        }
        experts._parameters.update(local_params)  # the module's forward does not handle DTensors
        try:
            outputs = forward(local_inputs)
        finally:
            experts._parameters.update(sharded_params)
        # (e (r n) d) -> (r e n d): the outputs for each rank r
        outputs = outputs.view(num_local_experts, num_ranks, n, d).transpose(0, 1)
        outputs = outputs.reshape(num_experts, n, d)
        return _AllToAll.apply(outputs, group)[:, :num_slots]

    return dispatch_forward


class _AllToAll(torch.autograd.Function):
    """All-to-all of equal parts along the first axis; the backward is another all-to-all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()  # gloo gives wrong values for other layouts
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _AllToAll.apply(gradients[0], ctx.group), None


@torch.no_grad()
def reduce_expert_gradients(
    expert_modules: list[nn.Module], replicas: DeviceMesh, num_data_ranks: int
) -> None:
    """Average the gradients of experts over all data ranks, in place.

    The backward of the all-to-all has already summed the gradients over the ranks of `ep`.

    Args:
        expert_modules: the result of `shard_experts`.
        replicas: the ranks that keep the same experts as this rank.
        num_data_ranks: number of ranks with different tokens: those of `ep` and of `replicas`.
    """
    parameters = [p for experts in expert_modules for p in experts.parameters()]
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient: Any = parameter.grad
        local_grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if replicas.size() > 1:
            # in place: local_grad shares the memory of the gradient
            dist.all_reduce(local_grad, group=replicas.get_group())
        local_grad /= num_data_ranks
