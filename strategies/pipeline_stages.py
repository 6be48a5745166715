"""Pipeline stages: partition the blocks of a net, and drop the modules of other ranks.

    blocks 0 1 | 2 3 | 4 5     embedding at the first stage, norm and head at the last

Parameter names do not change, so the stages' checkpoints together are a checkpoint of the net. A
tied head keeps its weight on the first and the last rank. A dropped module leaves a placeholder
without memory. Code that needs the full net uses the context `full_net`, which shows the
placeholders. For example, a rule for the last linear layer must not match the last one of a stage.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import UsageError

from .fsdp.original_parameters import iter_nested_optimizers

PIPELINE_ATTRS = ("blocks", "embed_tokens", "run_blocks", "compute_logits", "stage_modules")


def find_pipeline_net(module: nn.Module, num_ranks: int) -> Any:
    """Return the submodule that has the attributes of PIPELINE_ATTRS."""
    for net in module.modules():
        if all(hasattr(net, name) for name in PIPELINE_ATTRS):
            return net
    raise UsageError(
        f"pp={num_ranks}: {type(module).__name__} has no network that can be split into pipeline "
        "stages",
        [f"networks with {', '.join(PIPELINE_ATTRS)}"],
        'use Trainer(strategy="zero3")',
        flag="--trainer.strategy=zero3",
    )


def partition_blocks(
    block_names: list[str], num_stages: int, owner_name: str, num_ranks: int
) -> list[list[str]]:
    """Return the block names of each stage, in order; stage sizes differ by at most one.

    Args:
        block_names: names of all blocks, in order.
        num_stages: number of stages, a multiple of `num_ranks`.
        owner_name: the class of the module, for the error.
        num_ranks: number of ranks of the pipeline.

    Raises:
        UsageError: there are fewer blocks than stages.
    """
    if len(block_names) < num_stages:
        has_too_many_ranks = len(block_names) < num_ranks
        name = "pp" if has_too_many_ranks else "pipeline_schedule"
        # 1f1b has one stage on each rank, the interleaved schedule has two
        value = len(block_names) if has_too_many_ranks else "1f1b"
        raise UsageError(
            f"{owner_name} has {len(block_names)} blocks, fewer than the {num_stages} pipeline "
            f"stages ({num_stages // num_ranks} on each of {num_ranks} ranks)",
            [f"up to {len(block_names)} stages"],
            f"use MeshStrategy({name}={value!r})",
            flag=f"--trainer.strategy.{name}={value}",
        )
    min_size, num_larger = divmod(len(block_names), num_stages)
    sizes = [min_size + (i < num_larger) for i in range(num_stages)]
    starts = [sum(sizes[:i]) for i in range(num_stages)]
    return [block_names[a : a + n] for a, n in zip(starts, sizes, strict=True)]


def drop_other_stages(pipeline: Any) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Remove the modules of other ranks from the net, and keep placeholders of them.

    The placeholders are stored in `pipeline.block_placeholders` and `pipeline.end_placeholders`.

    Args:
        pipeline: a Pipeline whose stages are assigned.

    Returns:
        name, shape and dtype of each parameter that the first and the last stage share.
    """
    net, module = pipeline.net, pipeline.module
    # names of the modules before the blocks (embedding) and after them (norm, head)
    first_names, last_names = net.stage_modules()

    def params_of(module_names: list[str]) -> set[nn.Parameter]:
        submodules = [getattr(net, name) for name in module_names]
        return {
            p for submodule in submodules if submodule is not None for p in submodule.parameters()
        }

    placeholders_by_param: dict[nn.Parameter, nn.Parameter] = {}  # one for a tied parameter
    shared_params = params_of(first_names) & params_of(last_names)
    tied_specs = [(n, p.shape, p.dtype) for n, p in module.named_parameters() if p in shared_params]
    local_block_names = {
        name for stage in pipeline.local_stages for name in pipeline.blocks_by_stage[stage]
    }
    # submodules of kept blocks, which dropped blocks may share (rotary tables)
    local_modules = {
        submodule for name in local_block_names for submodule in net.blocks[name].modules()
    }
    for name in list(net.blocks):
        if name not in local_block_names:
            # the module with parameters that need no memory, but have their shape and dtype
            pipeline.block_placeholders[name] = meta_placeholder(
                net.blocks[name], placeholders_by_param, local_modules
            )
            del net.blocks[name]
    absent_end_names = ([] if pipeline.is_first else first_names) + (
        [] if pipeline.is_last else last_names
    )
    for name in absent_end_names:
        end_module = getattr(net, name)
        is_tied = end_module is not None and any(
            p in shared_params for p in end_module.parameters()
        )
        # the first and the last rank both keep a module with a tied parameter
        if end_module is not None and not (is_tied and (pipeline.is_first or pipeline.is_last)):
            pipeline.end_placeholders[name] = meta_placeholder(end_module, placeholders_by_param)
            # None: the stages of this rank do not call it
            setattr(net, name, None)
    return tied_specs


def meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy of the net on the meta device, which infers shapes without memory."""
    meta_tensors = {id(t): t.detach().to("meta") for t in (*net.parameters(), *net.buffers())}
    copied = copy.deepcopy(net, meta_tensors)
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # e.g. of activation checkpointing: shapes are equal
    return copied


def meta_placeholder(
    module: nn.Module,
    placeholders_by_param: dict[nn.Parameter, nn.Parameter],
    unchanged_modules: Collection[nn.Module] = (),
) -> nn.Module:
    """Replace the parameters of a module by expanded scalars of the same shape, in place.

    Such a parameter has the shape, dtype and device of the replaced one, and needs the memory of
    one number. Buffers are moved to the meta device.

    Args:
        module: the module that is changed and returned.
        placeholders_by_param: placeholders made by earlier calls; new ones are added. So a tied
            parameter gets one placeholder.
        unchanged_modules: submodules that blocks of this rank also use.
    """
    for submodule in module.modules():
        if submodule in unchanged_modules:
            continue
        for name, p in submodule._parameters.items():
            if p is not None and p not in placeholders_by_param:
                empty = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
                placeholders_by_param[p] = nn.Parameter(empty, p.requires_grad)
                # CompositeOptimizer leaves out parameters with this attribute
                placeholders_by_param[p].is_remote = True  # type: ignore[attr-defined]
            submodule._parameters[name] = None if p is None else placeholders_by_param[p]
        for name, buffer in submodule._buffers.items():
            submodule._buffers[name] = None if buffer is None else buffer.to("meta")
    return module


@contextmanager
def full_net(pipeline: Any) -> Iterator[None]:
    """Show the full net in the context, with placeholders for modules of other ranks.

    A Pipeline has removed these modules from its net, and keeps the placeholders. The placeholder
    parameters have the attribute `is_remote`. Contexts may be nested.
    """
    if pipeline.shows_full_net:
        yield
        return
    # the blocks of this rank, by name
    net, local_blocks = pipeline.net, dict(pipeline.net.blocks)
    # assigned as a whole, to have the blocks in the order of the full net
    net.blocks._modules = {
        name: local_blocks.get(name) or pipeline.block_placeholders[name]
        for name in pipeline.block_names
    }
    for name, end_module in pipeline.end_placeholders.items():
        setattr(net, name, end_module)
    pipeline.shows_full_net = True
    try:
        yield
    finally:
        pipeline.shows_full_net = False
        net.blocks._modules = local_blocks
        for name in pipeline.end_placeholders:
            setattr(net, name, None)


def split_param_groups(pipeline: Any, optimizer: Optimizer) -> list[list[int]] | None:
    """Drop the placeholders from the param groups of an optimizer that was built for the full net.

    The groups stay, also if no parameter of this rank is left in them.

    Returns:
        the parameters of each group before, as indices of `named_parameters()` of the full net;
        None if no placeholder is in a group: the optimizer was built for this stage.
    """
    with full_net(pipeline):
        indices = {p: i for i, (_, p) in enumerate(pipeline.module.named_parameters())}
    groups = [group["params"] for group in optimizer.param_groups]
    if not any(hasattr(p, "is_remote") for params in groups for p in params):
        return None
    group_indices = [[indices[p] for p in params] for params in groups]
    if hasattr(optimizer, "drop_remote_params"):  # of CompositeOptimizer
        cast(Any, optimizer).drop_remote_params()
        return group_indices
    for nested in iter_nested_optimizers(optimizer):
        for group in nested.param_groups:
            group["params"] = [p for p in group["params"] if not hasattr(p, "is_remote")]
        for p in [p for p in nested.state if hasattr(p, "is_remote")]:
            del nested.state[p]
    return group_indices


class PipelineStageModule(nn.Module):
    """One stage as a module for torch's PipelineStage; the net keeps its names and hooks."""

    def __init__(self, pipeline: Any, stage: int) -> None:
        """Store the stage; the pipeline is not registered as a submodule."""
        super().__init__()
        self.__dict__["pipeline"], self.stage = pipeline, stage

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage by a call of the net, so that the net's hooks run."""
        pipeline = self.__dict__["pipeline"]
        with pipeline.step_context(), pipeline._override_forward(pipeline._stage_fn(self.stage)):
            return pipeline.net(x)


class CapturedInput(Exception):
    """Ends training_step at the call of the net, and holds the net's input."""

    def __init__(self, inputs: Tensor) -> None:
        """Store the input of the net."""
        super().__init__()
        self.inputs = inputs


class PrecomputedGradLoss(torch.autograd.Function):
    """A loss with precomputed gradients: its backward scales and accumulates them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, parameters: list[Tensor], grads: list[Any]) -> Tensor:
        """Store the parameters and their precomputed gradients; return the loss."""
        ctx.parameters, ctx.grads = parameters, grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        """Scale and accumulate the precomputed gradients."""
        for p, grad in zip(ctx.parameters, ctx.grads, strict=True):
            if grad is None:
                continue
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(gradients[0])
            p.grad = grad if p.grad is None else p.grad + grad
        return None, None, None
