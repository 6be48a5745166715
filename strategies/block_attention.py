"""Blockwise attention: attention over a block of keys, with the log-sum-exp to combine blocks.

    s = q kᵀ / √k      lse = log Σ exp(s)      out = exp(s - lse) v

The results over two blocks of keys give the attention over both:

    lse = logaddexp(lse₁, lse₂)      out = exp(lse₁ - lse) out₁ + exp(lse₂ - lse) out₂

The backward of a block takes out and lse over *all* keys. So exp(s - lse) are the attention weights
over all keys, and the gradients of blocks are summed.

No kernel here stores the (t t) scores:

    device   dtype        kernel
    CPU      fp32, fp64   flash; half precision is converted to fp32
    CUDA     bf16, fp16   flash
    CUDA     fp32         memory-efficient
    any      any          chunks of queries with bounded scores, if no kernel supports the tensors

Axes: b batch, t time, h heads, k head width. Query, key, value, out and gradients are (b h t k),
lse is (b h t). The lengths of queries and keys may differ, unless `causal`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_efficient_attention,
    can_use_flash_attention,
)

aten: Any = torch.ops.aten
MAX_SCORES = 2**20  # most scores of a chunk: 4 MiB in fp32
LSE_ALIGNMENT = 32  # the memory-efficient kernel needs the length of lse as a multiple of this


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which blocks are summed: fp32 for half precision, else `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Compute attention over a block of keys, and the log-sum-exp of its scores.

    Axes: b batch, h heads, t queries, s keys, k channels of a head.

    Args:
        query: (b h t k).
        key: (b h s k); with `causal` s = t.
        value: (b h s k).
        causal: whether the keys after a query are masked.

    Returns:
        out (b h t k), and lse (b h t) in `accumulation_dtype`.
    """
    # kernel: "flash" or "efficient" on a GPU, "cpu", or "chunks" if torch has none for them
    kernel = _select_kernel(query, key, value, causal)
    options = {"dropout_p": 0.0, "is_causal": causal}
    # the first two results of each kernel are out and lse; others are for dropout
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(query, key, value, **options)[:2]
    if kernel == "efficient":
        out, lse = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_bias=None, compute_log_sumexp=True, **options
        )[:2]
        return out, lse[..., : query.shape[2]]  # without the kernel's padding
    # accumulation_dtype: fp32 for half precision, else the dtype itself
    if query.dtype != accumulation_dtype(query.dtype):
        query, key, value = query.float(), key.float(), value.float()
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **options)
    return _attention_in_chunks(query, key, value, causal)


def attention_with_lse_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value for a block of keys.

    Axes: b batch, h heads, t queries, s keys, k channels of a head.

    Args:
        d_out: gradient of the attention over all keys (b h t k).
        query: (b h t k).
        key: (b h s k), the block; with `causal` s = t.
        value: (b h s k), the block.
        out: attention over all keys (b h t k).
        lse: log-sum-exp over all keys (b h t).
        causal: whether the keys after a query are masked.
    """
    # the kernel whose forward has computed `out`: "flash", "efficient", "cpu" or "chunks"
    kernel = _select_kernel(query, key, value, causal)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()  # a sum gives strides of 0
    if kernel == "flash":
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # unused: dropout is 0
        return aten._scaled_dot_product_flash_attention_backward(
            *(d_out, query, key, value, out, lse.contiguous()),
            cum_seq_q=None,
            cum_seq_k=None,
            max_q=query.shape[2],
            max_k=key.shape[2],
            dropout_p=0.0,
            is_causal=causal,
            philox_seed=seed,
            philox_offset=seed.new_zeros(()),
        )
    if kernel == "efficient":
        seed = torch.zeros((), dtype=torch.long, device=query.device)  # unused: dropout is 0
        # The kernel expects rows of lse of a multiple of LSE_ALIGNMENT elements. With infinity the
        # added rows have weights exp(s - lse) of 0.
        lse = F.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=torch.inf).contiguous()
        return aten._scaled_dot_product_efficient_attention_backward(
            *(d_out, query, key, value, None, out, lse),  # None: no bias
            philox_seed=seed,
            philox_offset=seed,
            dropout_p=0.0,
            grad_input_mask=[True, True, True, False],  # of query, key, value and bias
            is_causal=causal,
        )[:3]
    # accumulation_dtype: fp32 for half precision, else the dtype itself
    if query.dtype != accumulation_dtype(query.dtype):
        query, key, value = query.float(), key.float(), value.float()
        d_out, out = d_out.float(), out.float()
    tensors = (d_out, query, key, value, out, lse)
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, dropout_p=0.0, is_causal=causal
        )
    return _attention_backward_in_chunks(*tensors, causal)


def _select_kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> str:
    """Return the name of the kernel for these tensors: cpu, flash, efficient or chunks."""
    if query.device.type == "cpu":
        return "cpu"
    if query.device.type == "cuda" and query.dtype != torch.float64:
        tensors = SDPAParams(query, key, value, None, 0.0, causal, False)
        is_aligned = query.shape[-1] % 8 == 0  # torch pads other widths before it calls the kernel
        if query.dtype != torch.float32 and is_aligned and can_use_flash_attention(tensors):
            return "flash"
        if can_use_efficient_attention(tensors):
            return "efficient"
    return "chunks"


def _attention_scores(query: Tensor, key: Tensor, start: int | None) -> Tensor:
    """Compute q kᵀ / √k; with `start`, the time of the first query, mask later keys."""
    scores = (query @ key.mT).mul_(query.shape[-1] ** -0.5)
    if start is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores.masked_fill_(future.triu_(start + 1), -torch.inf)
    return scores


def _query_slices(query: Tensor, key: Tensor) -> list[slice]:
    """Return slices of queries that have at most MAX_SCORES scores each."""
    rows = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    return [slice(start, start + rows) for start in range(0, query.shape[2], rows)]


def _attention_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3])
    with torch.autocast(query.device.type, enabled=False):
        for rows in _query_slices(query, key):
            visible = slice(rows.stop if causal else None)
            scores = _attention_scores(
                query[:, :, rows], key[:, :, visible], rows.start if causal else None
            )
            chunk_lse = scores.logsumexp(-1)
            lse[:, :, rows] = chunk_lse
            out[:, :, rows] = scores.sub_(chunk_lse[..., None]).exp_() @ value[:, :, visible]
    return out, lse


def _attention_backward_in_chunks(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value from one chunk of queries at a time.

    Arguments as in `attention_with_lse_backward`. The attention weights are p = exp(q kᵀ/√k - lse),
    and the gradient of a score is p (d_p - Σ p d_p), where the sum equals Σ d_out out.
    """
    d_query, d_key, d_value = (
        torch.empty_like(query),
        torch.zeros_like(key),
        torch.zeros_like(value),
    )
    # autocast would compute the products in half precision
    with torch.autocast(query.device.type, enabled=False):
        # rows: slice of the queries whose scores fit into the memory of a chunk
        for rows in _query_slices(query, key):
            # slice of the keys: with `causal` up to the last query of the chunk
            visible = slice(rows.stop if causal else None)
            q, d = query[:, :, rows], d_out[:, :, rows]
            # the last argument is the index of the first query, for the causal mask
            scores = _attention_scores(q, key[:, :, visible], rows.start if causal else None)
            weights = scores.sub_(lse[:, :, rows, None]).exp_()
            d_value[:, :, visible] += weights.mT @ d
            weighted_sum = (d * out[:, :, rows]).sum(-1, keepdim=True)
            d_scores = (d @ value[:, :, visible].mT).sub_(weighted_sum).mul_(weights)
            d_scores.mul_(q.shape[-1] ** -0.5)
            d_query[:, :, rows] = d_scores @ key[:, :, visible]
            d_key[:, :, visible] += d_scores.mT @ q
    return d_query, d_key, d_value
