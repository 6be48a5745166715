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

IGNORED = -100  # target of a position that does not count (torch's convention)
LOGITS = 2**25  # that exist at once: 128 MiB in fp32


def nats(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits (b t v) at targets (b t); IGNORED targets do not count."""
    check_ids("target", targets, logits.shape[-1], IGNORED)
    exact = torch.promote_types(logits.dtype, torch.float32)  # bf16 rounds small improvements away
    logits = rearrange(logits, "b t v -> (b t) v").to(exact)
    return F.cross_entropy(logits, rearrange(targets, "b t -> (b t)"), reduction=reduction)


def chunked_nats(
    x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int, rows: int | None = None
) -> Tensor:
    """Sum of nats of features x (b t d) under a head (v d) at targets (b t).

    Rows of the head beyond the vocabulary are padding; `rows` positions are treated at a time.
    """
    check_ids("target", targets, vocabulary, IGNORED)
    x, targets = rearrange(x, "b t d -> (b t) d"), rearrange(targets, "b t -> (b t)")
    learns = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    rows = rows or max(1, LOGITS // len(weight))
    return _Chunked.apply(x, weight, targets, vocabulary, rows, learns)


def check_ids(what: str, ids: Tensor, vocabulary: int, ignored: int | None = None) -> None:
    """Raise ValueError for an id outside 0 to vocabulary - 1 that is not `ignored`.

    Only on a CPU: reading the result would make the host wait for an accelerator, whose kernels
    assert the bounds themselves.

    Args:
        what: name of the ids in the message: token, target.
        ids: integers of any shape.
        vocabulary: number of different tokens.
        ignored: one id that is allowed besides.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= vocabulary)
    if ignored is not None:
        wrong &= ids != ignored
    if not wrong.any():
        return
    place = wrong.nonzero()[0].tolist()
    found = int(ids[tuple(place)])
    allowed, hint = f"0 to {vocabulary - 1}", "encode the text with the model's tokenizer"
    if ignored is not None:
        allowed += f", and {ignored} for a position that is not learned"
        if found < 0:
            hint = f"mark such positions: {what}s.masked_fill({what}s == {found}, {ignored})"
    raise UsageError(f"{what} {found} at {place} of {list(ids.shape)}; allowed: {allowed}; {hint}")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocabulary: int,
        rows: int,
        learns: list[bool],
    ) -> Tensor:
        # at least fp32: many chunks are added up, and bf16 would lose the small ones
        exact = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=x.device)
        d_x = torch.empty_like(x) if learns[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if learns[1] else None
        for start in range(0, len(x), rows):
            some, target = x[start : start + rows], targets[start : start + rows]
            counted = target != IGNORED
            place = target.where(counted, 0)[:, None]  # gather refuses any other below 0
            logits = F.linear(some, weight)[:, :vocabulary].to(exact)  # (n v)
            spread = logits.logsumexp(-1, keepdim=True)
            total += (spread - logits.gather(1, place))[:, 0].where(counted, 0.0).sum()
            if not any(learns):
                continue
            logits = (logits - spread).exp_()  # softmax, from here on the gradient
            logits.scatter_add_(1, place, torch.full_like(place, -1, dtype=exact))
            logits = (logits * counted[:, None]).to(x.dtype)
            if d_x is not None:
                d_x[start : start + rows] = logits @ weight[:vocabulary].to(x.dtype)
            if d_weight is None:
                continue
            if logits.dtype == exact and not torch.is_autocast_enabled(x.device.type):
                d_weight[:vocabulary].addmm_(logits.mT, some)  # no second matrix of this size
            else:
                d_weight[:vocabulary] += logits.mT @ some
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
