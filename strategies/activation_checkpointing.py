"""Activation recomputation: keep what goes into a block, compute the rest of it once more.

    full        a block keeps its input alone: memory of one block, a third more FLOPs
    selective   matrix products and attention are kept, all that is cheap between them is not

The numbers do not change, not even in the last bit: dropout is drawn again from where it began, and
buffers that a pass changes (BatchNorm, spectral_norm) are those of the first pass, and change once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from . import context_parallel as ring  # noqa: F401  (registers ravine::ring_attention)

Mode = Literal["none", "selective", "full"]
Place = tuple[Any, str]  # a module and the name of its buffer
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
    torch.ops.ravine.ring_attention.default,
}


def recompute(module: nn.Module, mode: Mode) -> None:
    """Let each block of `module` forget and recompute.

    Blocks are the members of a ModuleDict or ModuleList; without any, each Sequential is one.
    """
    if mode == "none":
        return
    if mode not in ("selective", "full"):
        raise UsageError(
            f"recompute is {mode!r}; allowed: none, selective, full; type"
            " --trainer.strategy.recompute=full"
        )
    blocks = stacked(module) or in_sequence(module)
    if not blocks:
        raise UsageError(
            f"recompute={mode}: {type(module).__name__} has no blocks (a ModuleDict or ModuleList"
            " of them, or a Sequential) to recompute one by one; leave it out"
        )
    for block in blocks:
        if "recomputed" in block.__dict__ and block.__dict__["recomputed"] != mode:
            raise UsageError(
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
    selection = partial(create_selective_checkpoint_contexts, _policy)
    usual: dict[str, Any] = {"context_fn": selection} if mode == "selective" else {}
    moving: dict[bool, list[Place]] = {}  # buffers that a pass changes, by mode: the first shows

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # changes are no part of what is compiled to run again
            return checkpoint(forward, *args, use_reentrant=False, **usual, **kwargs)
        known = moving.get(block.training)
        places = _places(block) if known is None else known
        kept = [(m, name, m._buffers[name].detach().clone()) for m, name in places]
        versions = [module._buffers[name]._version for module, name in places]

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            first, again = selection() if usual else (nullcontext(), nullcontext())
            return first, _back_then(kept, again)

        how = {"context_fn": contexts} if places else usual
        answer = checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)
        if known is None:
            pairs = zip(list(kept), versions, strict=True)
            kept[:] = [(m, n, was) for (m, n, was), v in pairs if _moved(m._buffers[n], was, v)]
            moving[block.training] = [(m, name) for m, name, _ in kept]
        return answer

    return forgetful


def _places(block: nn.Module) -> list[Place]:
    return [(m, n) for m in block.modules() for n, b in m._buffers.items() if b is not None]


def _moved(buffer: Tensor, before: Tensor, version: int) -> bool:
    return buffer._version != version or not torch.equal(buffer, before)  # norms leave no trace


@contextmanager
def _back_then(kept: list[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Buffers as the first pass found them; afterwards, as it has left them."""
    now = [module._buffers[name] for module, name, _ in kept]
    for module, name, before in kept:
        module._buffers[name] = before.clone()
    try:
        with inner:
            yield
    finally:
        for (module, name, _), buffer in zip(kept, now, strict=True):
            module._buffers[name] = buffer


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
