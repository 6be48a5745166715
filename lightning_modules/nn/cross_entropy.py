"""Cross-entropy in nats, also where the logits of a batch would be too large to exist.

    loss = Σ logsumexp(z) - z[target],  z = x Wᵀ          gradient of z: softmax(z) - onehot(target)

With 50,304 tokens the logits of 64 x 1,024 positions take 13 GB in fp32, and their gradient as
much. Here some rows at a time go all the way: logits, loss, and at once the gradients of x and W.
Nothing is computed twice, and the largest thing kept is the gradient of W.

Axes: b batch, t time, n positions, d model, v vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ravine.errors import UsageError

IGNORE_INDEX = -100  # target of a position that does not count (torch's convention)
MAX_LOGITS = 2**25  # that exist at once: 128 MiB in fp32


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits (b t v) at targets (b t); IGNORED targets do not count."""
    check_ids("target", targets, logits.shape[-1], IGNORE_INDEX)
    accum_dtype = torch.promote_types(
        logits.dtype, torch.float32
    )  # bf16 rounds small improvements away
    logits = rearrange(logits, "b t v -> (b t) v").to(accum_dtype)
    return F.cross_entropy(logits, rearrange(targets, "b t -> (b t)"), reduction=reduction)


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_size: int | None = None
) -> Tensor:
    """Sum of nats of features x (b t d) under a head (v d) at targets (b t).

    Rows of the head beyond the vocabulary are padding; `chunk_size` positions are treated at a
    time.
    """
    check_ids("target", targets, vocab_size, IGNORE_INDEX)
    x, targets = rearrange(x, "b t d -> (b t) d"), rearrange(targets, "b t -> (b t)")
    needs_grad = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    chunk_size = chunk_size or max(1, MAX_LOGITS // len(weight))
    return _ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, chunk_size, needs_grad)


def check_ids(name: str, ids: Tensor, vocab_size: int, ignore_index: int | None = None) -> None:
    """Raise ValueError for an id outside 0 to vocabulary - 1 that is not `ignore_index`.

    Only on a CPU: reading the result would make the host wait for an accelerator, whose kernels
    assert the bounds themselves.

    Args:
        name: name of the ids in the message: token, target.
        ids: integers of any shape.
        vocab_size: number of different tokens.
        ignore_index: one id that is allowed besides.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_invalid = (ids < 0) | (ids >= vocab_size)
    if ignore_index is not None:
        is_invalid &= ids != ignore_index
    if not is_invalid.any():
        return
    index = is_invalid.nonzero()[0].tolist()
    invalid_id = int(ids[tuple(index)])
    allowed, hint = f"0 to {vocab_size - 1}", "encode the text with the model's tokenizer"
    if ignore_index is not None:
        allowed += f", and {ignore_index} for a position that is not learned"
        if invalid_id < 0:
            hint = (
                f"mark such positions: {name}s.masked_fill({name}s == {invalid_id}, {ignore_index})"
            )
    raise UsageError(
        f"{name} {invalid_id} at {index} of {list(ids.shape)}; allowed: {allowed}; {hint}"
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
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
        # at least fp32: many chunks are added up, and bf16 would lose the small ones
        accum_dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=accum_dtype, device=x.device)
        d_x = torch.empty_like(x) if needs_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=accum_dtype) if needs_grad[1] else None
        for start in range(0, len(x), chunk_size):
            x_chunk, target = x[start : start + chunk_size], targets[start : start + chunk_size]
            is_counted = target != IGNORE_INDEX
            target_index = target.where(is_counted, 0)[:, None]  # gather refuses any other below 0
            logits = F.linear(x_chunk, weight)[:, :vocab_size].to(accum_dtype)  # (n v)
            logsumexp = logits.logsumexp(-1, keepdim=True)
            total += (logsumexp - logits.gather(1, target_index))[:, 0].where(is_counted, 0.0).sum()
            if not any(needs_grad):
                continue
            logits = (logits - logsumexp).exp_()  # softmax, from here on the gradient
            logits.scatter_add_(
                1, target_index, torch.full_like(target_index, -1, dtype=accum_dtype)
            )
            logits = (logits * is_counted[:, None]).to(x.dtype)
            if d_x is not None:
                d_x[start : start + chunk_size] = logits @ weight[:vocab_size].to(x.dtype)
            if d_weight is None:
                continue
            if logits.dtype == accum_dtype and not torch.is_autocast_enabled(x.device.type):
                d_weight[:vocab_size].addmm_(logits.mT, x_chunk)  # no second matrix of this size
            else:
                d_weight[:vocab_size] += logits.mT @ x_chunk
        ctx.save_for_backward(d_x, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # Without retain_graph nobody reads the saved gradients again: no second copy of them is
        # made. torch's compiler asks the same question for its donated buffers.
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        scale = torch.mul if again else Tensor.mul_
        d_x, d_weight = (g if g is None else scale(g, gradients[0]) for g in ctx.saved_tensors)
        return d_x, d_weight, None, None, None, None
