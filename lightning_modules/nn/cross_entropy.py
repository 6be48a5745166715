"""Cross-entropy in nats, with a chunked version that never stores the logits of a whole batch.

    loss = Σ logsumexp(z) - z[target],  z = x Wᵀ          gradient of z: softmax(z) - onehot(target)

With 50,304 tokens the logits of 64 x 1,024 positions take 13 GB in fp32, and their gradient takes
as much. The chunked version processes a few rows at a time: it computes their logits, their loss
and the gradients of x and W at once. Nothing is computed twice, and the largest tensor kept is the
gradient of W.

Axes: b batch, t time, n positions, d model, v vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ravine.datamodules.text import IGNORE_INDEX
from ravine.errors import UsageError

MAX_LOGITS = 2**25  # at once: 128 MiB in fp32


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits (b t v) at targets (b t); targets `IGNORE_INDEX` are not counted."""
    check_ids("target", targets, logits.shape[-1], IGNORE_INDEX)
    accum_dtype = torch.promote_types(
        logits.dtype, torch.float32
    )  # bf16 would round small differences away
    logits = rearrange(logits, "b t v -> (b t) v").to(accum_dtype)
    return F.cross_entropy(logits, rearrange(targets, "b t -> (b t)"), reduction=reduction)


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_size: int | None = None
) -> Tensor:
    """Summed cross-entropy in chunks, of features x (b t d), head weights (v d), targets (b t).

    Rows of the head beyond `vocab_size` are padding. Each chunk has `chunk_size` positions.
    """
    check_ids("target", targets, vocab_size, IGNORE_INDEX)
    x, targets = rearrange(x, "b t d -> (b t) d"), rearrange(targets, "b t -> (b t)")
    needs_grad = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    chunk_size = chunk_size or max(1, MAX_LOGITS // len(weight))
    return _ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, chunk_size, needs_grad)


def check_ids(name: str, ids: Tensor, vocab_size: int, ignore_index: int | None = None) -> None:
    """Raise UsageError for an id outside 0 to vocab_size - 1 that is not `ignore_index`.

    The check runs on a CPU only: reading the result of a GPU would make the host wait. The kernels
    of a GPU assert the bounds themselves.

    Args:
        name: name of the ids in the message: token, target.
        ids: integers of any shape.
        vocab_size: number of different tokens.
        ignore_index: an additional id that is allowed.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_invalid = (ids < 0) | (ids >= vocab_size)
    if ignore_index is not None:
        is_invalid &= ids != ignore_index
    if not is_invalid.any():
        return
    index = is_invalid.nonzero()[0].tolist()  # of the first one
    invalid_id = int(ids[tuple(index)])
    allowed, hint = [f"0 to {vocab_size - 1}"], "encode the text with the model's tokenizer"
    if ignore_index is not None:
        allowed.append(f"{ignore_index} for a position without loss")
        if invalid_id < 0:
            hint = f"use {name}s.masked_fill({name}s == {invalid_id}, {ignore_index})"
    raise UsageError(
        f"{name} {invalid_id} at index {index} of shape {list(ids.shape)} is out of range",
        allowed,
        hint,
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of a head, with gradients that are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk_size: int,
        needs_grad: list[bool],
    ) -> Tensor:
        """Return the summed cross-entropy, and save the gradients of x and weight for backward.

        The gradients are computed here, so that only the logits of one chunk exist at a time.
        `backward` multiplies them by the gradient of the result.

        Args:
            ctx: context of autograd.
            x: features (n d).
            weight: head weights (rows d); rows beyond `vocab_size` are padding.
            targets: token ids (n), or IGNORE_INDEX for a position without loss.
            vocab_size: number v of different tokens.
            chunk_size: positions whose logits are computed at once.
            needs_grad: whether x and weight need a gradient.
        """
        # of the sums and d_weight; bf16 would lose small terms in a sum of many chunks
        accum_dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=accum_dtype, device=x.device)
        x_needs_grad, weight_needs_grad = needs_grad
        d_x = torch.empty_like(x) if x_needs_grad else None
        d_weight = torch.zeros_like(weight, dtype=accum_dtype) if weight_needs_grad else None
        for start in range(0, len(x), chunk_size):
            x_chunk, target = x[start : start + chunk_size], targets[start : start + chunk_size]
            is_counted = target != IGNORE_INDEX
            target_index = target.where(is_counted, 0)[:, None]  # gather raises below 0
            logits = F.linear(x_chunk, weight)[:, :vocab_size].to(accum_dtype)  # (n v)
            logsumexp = logits.logsumexp(-1, keepdim=True)
            total += (logsumexp - logits.gather(1, target_index))[:, 0].where(is_counted, 0.0).sum()
            if not any(needs_grad):
                continue
            logits = (logits - logsumexp).exp_()  # softmax, the first term of the gradient
            minus_one = torch.full_like(target_index, -1, dtype=accum_dtype)
            logits.scatter_add_(1, target_index, minus_one)  # - onehot(target)
            # the gradient of the logits, under the same name: the logits are freed at once
            logits = (logits * is_counted[:, None]).to(x.dtype)
            if d_x is not None:
                d_x[start : start + chunk_size] = logits @ weight[:vocab_size].to(x.dtype)
            if d_weight is None:
                continue
            # addmm_ needs equal dtypes, and no second matrix of the size of d_weight
            if logits.dtype == accum_dtype and not torch.is_autocast_enabled(x.device.type):
                d_weight[:vocab_size].addmm_(logits.mT, x_chunk)
            else:
                d_weight[:vocab_size] += logits.mT @ x_chunk
        ctx.save_for_backward(d_x, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # Without retain_graph the saved gradients are used only once and are scaled in place.
        # torch's compiler calls the same function for its donated buffers.
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        scale = torch.mul if again else Tensor.mul_
        d_x, d_weight = (g if g is None else scale(g, gradients[0]) for g in ctx.saved_tensors)
        return d_x, d_weight, None, None, None, None
