"""Activation recomputation: keep what goes into a block, compute the rest of it once more.

    full        a block keeps its input alone: memory of one block, a third more FLOPs
    selective   matrix products and attention are kept, all that is cheap between them is not

The numbers do not change, not even in the last bit: dropout is drawn again from where it began.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Mode = Literal["none", "selective", "full"]
aten = torch.ops.aten
KEPT = {  # what costs most to compute anew
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(module: nn.Module, mode: Mode) -> None:
    """Let each block of `module` (a member of a ModuleDict or ModuleList) forget and recompute."""
    if mode == "none":
        return
    if mode not in ("selective", "full"):
        raise ValueError(
            f"recompute is {mode!r}; allowed: none, selective, full; type"
            " --trainer.strategy.recompute=full"
        )
    blocks = stacked(module)
    if not blocks:
        raise ValueError(
            f"recompute={mode}: {type(module).__name__} has no blocks (a ModuleDict or ModuleList"
            " of them) to recompute one by one; leave it out"
        )
    for block in blocks:
        if "recomputed" in block.__dict__ and block.__dict__["recomputed"] != mode:
            raise ValueError(
                f"recompute={mode}: the blocks recompute already"
                f" ({block.__dict__['recomputed']}); ask for it once"
            )
        if "recomputed" not in block.__dict__:
            block.forward = _forgetful(block, block.forward, mode)
            block.__dict__["recomputed"] = mode


def stacked(module: nn.Module) -> list[nn.Module]:
    """Members of lists and dicts of modules, the outermost where they are nested."""
    found = []
    for child in module.children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            for member in child.children():
                inner = isinstance(member, nn.ModuleDict | nn.ModuleList)
                found += stacked(member) if inner else [member]
        else:
            found += stacked(child)
    return [block for block in found if any(True for _ in block.parameters())]


def _forgetful(block: nn.Module, forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    contexts: dict[str, Any] = {}
    if mode == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return forgetful


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
