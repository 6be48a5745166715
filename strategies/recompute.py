"""Activation recomputation: keep what goes into a block, compute the rest of it once more.

    full        a block keeps its input alone: memory of one block, a third more FLOPs
    selective   matrix products and attention are kept, all that is cheap between them is not

The numbers do not change, not even in the last bit: dropout is drawn again from where it began, and
running statistics (BatchNorm) see a batch once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
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
    """Let each block of `module` forget and recompute.

    Blocks are the members of a ModuleDict or ModuleList; without any, each Sequential is one.
    """
    if mode == "none":
        return
    if mode not in ("selective", "full"):
        raise ValueError(
            f"recompute is {mode!r}; allowed: none, selective, full; type"
            " --trainer.strategy.recompute=full"
        )
    blocks = stacked(module) or in_sequence(module)
    if not blocks:
        raise ValueError(
            f"recompute={mode}: {type(module).__name__} has no blocks (a ModuleDict or ModuleList"
            " of them, or a Sequential) to recompute one by one; leave it out"
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


def in_sequence(module: nn.Module) -> list[nn.Module]:
    """The outermost Sequentials that hold parameters."""
    if isinstance(module, nn.Sequential) and any(True for _ in module.parameters()):
        return [module]
    return [block for child in module.children() for block in in_sequence(child)]


def _forgetful(block: nn.Module, forward: Callable[..., Any], mode: Mode) -> Callable[..., Any]:
    counting = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    selection = partial(create_selective_checkpoint_contexts, _policy)
    usual: dict[str, Any] = {"context_fn": selection} if mode == "selective" else {}

    def once() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = selection() if usual else (nullcontext(), nullcontext())
        return first, _uncounted(counting, again)

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # what is compiled counts once by itself, and knows no other contexts
        how = {"context_fn": once} if counting and not torch.compiler.is_compiling() else usual
        return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)

    return forgetful


@contextmanager
def _uncounted(norms: list[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Leave running statistics as the first pass has left them."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        with inner:
            yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
