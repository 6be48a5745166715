"""Activation checkpointing: recompute the activations of a block in the backward pass.

    full        saves only the input of a block: memory of one block, a third more FLOPs
    selective   saves the outputs of matrix products and attention, recomputes cheap operations

Results are equal bit for bit. The recomputation restores the random state, so dropout masks are the
same. Buffers that a forward changes (BatchNorm, spectral_norm) have their old values in the
recomputation, and are updated once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ravine.errors import UsageError

from . import context_parallel  # noqa: F401  (registers ravine::ring_attention)

CheckpointingMode = Literal["none", "selective", "full"]
BufferRef = tuple[Any, str]  # a module and the name of its buffer
aten = torch.ops.aten
_is_suspended = ContextVar("activation_checkpointing_is_suspended", default=False)
SAVED_OPS = {  # the operations that are most expensive to recompute
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.ravine.ring_attention.default,
}


def apply_activation_checkpointing(module: nn.Module, mode: CheckpointingMode) -> None:
    """Apply activation checkpointing to each block of `module`.

    Blocks are the members of a ModuleDict or ModuleList. If there are none, each Sequential is a
    block.

    Raises:
        UsageError: the mode is unknown, there are no blocks, or they use another mode already.
    """
    if mode == "none":
        return
    if mode not in ("selective", "full"):
        raise UsageError(
            f"activation_checkpointing is {mode!r}",
            ["none", "selective", "full"],
            'use "full"',
            flag="--trainer.strategy.activation_checkpointing=full",
        )
    blocks = find_blocks(module) or find_sequentials(module)
    if not blocks:
        raise UsageError(
            f"activation_checkpointing={mode}: {type(module).__name__} has no blocks to recompute "
            "one by one",
            ["networks with a ModuleList or ModuleDict of blocks, or a Sequential"],
            "remove activation_checkpointing",
        )
    for block in blocks:
        # from __dict__, because a wrapper's __getattr__ may return attributes of the wrapped module
        previous_mode = block.__dict__.get("checkpointing_mode")
        if previous_mode not in (None, mode):
            raise UsageError(
                f"activation_checkpointing={mode}: the blocks already use activation "
                f"checkpointing with mode {previous_mode}",
                ["an argument of the strategy, or the callback ActivationCheckpointing"],
                "remove one of the two",
            )
        if previous_mode is None:
            block.forward = _checkpointed_forward(block, block.forward, mode)
            block.__dict__["checkpointing_mode"] = mode


def remove_activation_checkpointing(module: nn.Module) -> None:
    """Undo `apply_activation_checkpointing`: all blocks keep their activations again."""
    for block in module.modules():
        if block.__dict__.pop("checkpointing_mode", None) is not None:
            block.forward = block.__dict__["forward"].plain_forward


def uses_activation_checkpointing(module: nn.Module) -> bool:
    """Return whether blocks of `module` recompute their activations."""
    return any("checkpointing_mode" in block.__dict__ for block in module.modules())


@contextmanager
def suspend_activation_checkpointing() -> Iterator[None]:
    """Keep all activations of forward passes in the context, as several backward passes need."""
    token = _is_suspended.set(True)
    try:
        yield
    finally:
        _is_suspended.reset(token)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the members of lists and dicts of modules; if nested, the outermost."""
    blocks = []
    for child in module.children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            for member in child.children():
                is_container = isinstance(member, nn.ModuleDict | nn.ModuleList)
                blocks += find_blocks(member) if is_container else [member]
        else:
            blocks += find_blocks(child)
    return [block for block in blocks if any(True for _ in block.parameters())]


def find_sequentials(module: nn.Module) -> list[nn.Module]:
    """Return the outermost Sequentials that hold parameters."""
    if isinstance(module, nn.Sequential) and any(True for _ in module.parameters()):
        return [module]
    return [block for child in module.children() for block in find_sequentials(child)]


def _checkpointed_forward(
    block: nn.Module, forward: Callable[..., Any], mode: CheckpointingMode
) -> Callable[..., Any]:
    """Return a replacement of a block's forward that recomputes activations in the backward pass.

    In the recomputation, buffers that the forward changes have the values from before the forward.
    """
    # _selective_policy: keeps the results of matrix products, convolutions and attention
    selective_contexts = partial(create_selective_checkpoint_contexts, _selective_policy)
    checkpoint_kwargs: dict[str, Any] = (
        {"context_fn": selective_contexts} if mode == "selective" else {}
    )
    # buffers that a forward changes, by `block.training`; found in the first forward
    changing_buffers: dict[bool, list[BufferRef]] = {}

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        """Run the forward; with gradients enabled save only what the mode saves."""
        if not torch.is_grad_enabled() or _is_suspended.get():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiled recomputation excludes buffer updates
            return checkpoint(forward, *args, use_reentrant=False, **checkpoint_kwargs, **kwargs)
        # buffers as pairs (module, name); in the first forward all buffers of the block
        known_buffers = changing_buffers.get(block.training)
        buffer_refs = _buffer_refs(block) if known_buffers is None else known_buffers
        saved_buffers = [(m, name, m._buffers[name].detach().clone()) for m, name in buffer_refs]
        versions = [module._buffers[name]._version for module, name in buffer_refs]

        def make_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            """Return the contexts of the forward and of its recomputation."""
            if mode == "selective":
                forward_context, recompute_context = selective_contexts()
            else:
                forward_context, recompute_context = nullcontext(), nullcontext()
            # _restore_buffers: sets the saved values, and after the recomputation the current ones
            return forward_context, _restore_buffers(saved_buffers, recompute_context)

        call_kwargs = {"context_fn": make_contexts} if buffer_refs else checkpoint_kwargs
        output = checkpoint(forward, *args, use_reentrant=False, **call_kwargs, **kwargs)
        if known_buffers is None:
            changed_buffers = [
                (module, name, old_value)
                for (module, name, old_value), version in zip(saved_buffers, versions, strict=True)
                # _has_changed: compares the version counter and the values
                if _has_changed(module._buffers[name], old_value, version)
            ]
            saved_buffers[:] = changed_buffers  # in place: the recomputation reads this list
            changing_buffers[block.training] = [(m, name) for m, name, _ in changed_buffers]
        return output

    checkpointed.plain_forward = forward  # type: ignore[attr-defined]
    return checkpointed


def _buffer_refs(block: nn.Module) -> list[BufferRef]:
    return [(m, n) for m in block.modules() for n, b in m._buffers.items() if b is not None]


def _has_changed(buffer: Tensor, old_value: Tensor, version: int) -> bool:
    # BatchNorm kernels update buffers without incrementing the version counter
    return buffer._version != version or not torch.equal(buffer, old_value)


@contextmanager
def _restore_buffers(
    saved_buffers: list[Any], inner: AbstractContextManager[Any]
) -> Iterator[None]:
    """Set buffers to their values before the first forward, and restore them on exit."""
    current_buffers = [module._buffers[name] for module, name, _ in saved_buffers]
    for module, name, saved in saved_buffers:
        module._buffers[name] = saved.clone()
    try:
        with inner:
            yield
    finally:
        for (module, name, _), buffer in zip(saved_buffers, current_buffers, strict=True):
            module._buffers[name] = buffer


def _selective_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
