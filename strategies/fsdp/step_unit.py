"""Shard the small children of a LightningModule as one FSDP unit, gathered around each step.

Training does not call the forward of a LightningModule, so no forward encloses its children. A
thousand tiny layers in a list would be a thousand units, with three messages each. Here they are
the members of one module whose forward is the step itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ravine.errors import RunError

_disable_compile: Any = torch.compiler.disable  # its type annotation does not allow methods


class StepUnit(nn.Module):
    """Modules that are gathered together, during a step or a call outside of a step."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        """Register hooks that gather for calls of single members."""
        super().__init__()
        self.members = nn.ModuleList(members)
        self.is_running = False
        for member in members:
            member.register_forward_pre_hook(self._gather_before_call)
            member.register_forward_hook(self._free_after_call)

    def forward(self, step: Callable[..., Any], *args: Any) -> Any:
        """Run a step with all members gathered."""
        self.is_running = True
        try:
            return step(*args)
        finally:
            self.is_running = False

    def _gather_before_call(self, member: nn.Module, inputs: Any) -> None:
        if not self.is_running:
            self._gather_members(member)

    def _free_after_call(self, member: nn.Module, inputs: Any, outputs: Any) -> None:
        if not self.is_running:
            self._free_members()

    @_disable_compile
    def _gather_members(self, member: nn.Module) -> None:
        """Gather all members before a call of one outside of a step: sampling, user code.

        Raises:
            RunError: gradients are enabled.
        """
        is_in_backward = torch._C._current_graph_task_id() >= 0
        if is_in_backward:  # activation checkpointing recomputes the call
            return
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.members.parameters()):
            raise RunError(
                f"{type(member).__name__} is called with gradients outside of training_step, "
                "where its shards cannot be gathered for the backward pass",
                ["calls in training_step", "calls under torch.no_grad()"],
                'use Trainer(strategy="ddp")',
                flag="--trainer.strategy=ddp",
            )
        # FSDP2 gathers the members only in the forward of this unit, which is the step
        cast(FSDPModule, self).unshard()

    @_disable_compile
    def _free_members(self) -> None:
        """Reshard the members after a call outside of a step."""
        if torch._C._current_graph_task_id() < 0:
            cast(FSDPModule, self).reshard()
