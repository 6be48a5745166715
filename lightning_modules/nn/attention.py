"""The ladder of causal attention: six ways for a token to gather from those before it (lecture 5).

    answer = weights (t t), lower-triangular, rows summing to one, times values

    rung      weights              query   key    value
    last      the identity                        x       a token knows itself alone: bigrams
    average   1 / (t + 1)          0       0      x       all that came before, indiscriminately
    raw       softmax(q kᵀ / √k)   x       x      x       what resembles it
    shared    the same             W x     W x    x       what resembles it in learned channels
    qk        the same             Q x     K x    x       what it asks for
    qkv       the same             Q x     K x    V x     and hears from it what matters

Axes: b batch, t time, d model, h heads, k head width.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ravine.errors import UsageError, suggest_names

from ..generation.kv_cache import LayerKVCache
from ..generation.shared_prefix import SharedPrefixLayer
from .norm import unit_rms

AttentionFn = Callable[..., Tensor]  # of query, key, value, dropout; ours also of who sees whom
AttentionVariant = Literal["last", "average", "raw", "shared", "qk", "qkv"]

ROPE_BASE = 10_000.0  # of RoFormer and Llama 2; Llama 3 has 500,000

PROJECTIONS = ("query", "key", "value")
# The projections that each rung learns; the rest of them are the input itself. Another row is
# another variant: LEARNED["kv"] = ("key", "value").
LEARNED: dict[str, tuple[str, ...]] = {
    "last": (),
    "average": (),
    "raw": (),
    "shared": ("query",),
    "qk": ("query", "key"),
    "qkv": ("query", "key", "value"),
}


def check_variant(variant: str) -> None:
    """Raise UsageError for a rung that is not in `LEARNED`, or whose row names no projections."""
    if variant not in LEARNED:
        raise UsageError(
            f"rung={variant!r} is no attention variant",
            LEARNED,
            f"use rung={(suggest_names(variant, LEARNED) or ['qkv'])[0]!r}",
        )
    unknown = [name for name in LEARNED[variant] if name not in PROJECTIONS]
    if unknown:
        raise UsageError(
            f"LEARNED[{variant!r}] has the projection {unknown[0]!r}",
            PROJECTIONS,
            f"remove {unknown[0]!r} from it",
        )


def causal_attention_weights(query: Tensor, key: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √k) over the past, (b h t t), of queries and keys (b h t k).

    Where `attn_mask` is given it says, true or false, who sees whom, and may not be square.
    """
    t, k = query.shape[-2:]
    shape = (t, t) if attn_mask is None else attn_mask.shape
    mask = torch.full(shape, -math.inf, dtype=query.dtype, device=query.device)
    mask = mask.triu(1) if attn_mask is None else mask.masked_fill(attn_mask, 0.0)
    return (query / math.sqrt(k) @ key.mT + mask).softmax(-1)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attn_mask: Tensor | None = None
) -> Tensor:
    """Causal attention as the formula says it; all (b h t k)."""
    return F.dropout(causal_attention_weights(query, key, attn_mask), dropout) @ value


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attn_mask: Tensor | None = None
) -> Tensor:
    """The same by torch's fused kernel, which never stores the (t t) weights; all (b h t k)."""
    causal = attn_mask is None
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout, is_causal=causal)


def auto_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attn_mask: Tensor | None = None
) -> Tensor:
    """The faster of the two; all (b h t k).

    torch's CPU kernel goes backward 5.8 times slower in bf16 than in fp32: half of a whole
    training step at t=64. So bf16 on a CPU takes the formula, everything else the kernel.
    """
    slow_kernel = value.device.type == "cpu" and value.dtype == torch.bfloat16
    return (reference_attention if slow_kernel else sdpa_attention)(
        query, key, value, dropout, attn_mask
    )


ATTENTION_FNS: dict[str, AttentionFn] = {
    "auto": auto_attention,
    "sdpa": sdpa_attention,
    "explicit": reference_attention,
}


def rope_tables(
    context_length: int, head_dim: int, base: float = ROPE_BASE
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary positions (RoFormer, 2021), both (t k) in float64.

    The channel pair (i, i + k/2) turns by t · base^(-2i/k).
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)  # (t, k/2)
    sine = angles.sin()
    return torch.cat((angles, angles), -1).cos(), torch.cat((-sine, sine), -1)


def apply_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channel pairs of x (b h t k); tables (t k) or, a time for each row, (b 1 1 k).

    Then a query times a key depends on how far apart they are, and on nothing else about time.
    """
    return x * cosine + x.roll(x.shape[-1] // 2, -1) * sine


class RotaryEmbedding(nn.Module):
    """The tables of rotary positions, kept once for all layers of a net.

    Args:
        context_length: longest sequence, in tokens.
        head_dim: channels k of a head, an even number.
        base: the channel pair i turns by t · base^(-2i/k).
    """

    cosine: Tensor  # (t k)
    sine: Tensor

    def __init__(self, context_length: int, head_dim: int, base: float = ROPE_BASE) -> None:
        """Tabulate them; a checkpoint does not hold them."""
        super().__init__()
        cosine, sine = rope_tables(context_length, head_dim, base)
        self.register_buffer("cosine", cosine.float(), persistent=False)
        self.register_buffer("sine", sine.float(), persistent=False)
        self._position_ids: Tensor | None = None
        self._selected_rows: tuple[Tensor, Tensor] | None = None

    @property
    def times(self) -> Tensor | None:
        """Positions (t) of the tokens where they are a part of their sequence, else None.

        Context parallelism sets it, and all layers share the rows that are computed then.
        """
        return self._position_ids

    @times.setter
    def times(self, position_ids: Tensor | None) -> None:
        """Take the rows of these positions (t), or with None those of whole sequences again."""
        self._position_ids = position_ids
        self._selected_rows = (
            None if position_ids is None else (self.cosine[position_ids], self.sine[position_ids])
        )

    def get_rows(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of the tokens of a sequence, both (t k)."""
        if self._selected_rows is not None:
            return self._selected_rows
        return self.cosine[:length], self.sine[:length]


class CausalAttention(nn.Module):
    """Multi-head causal self-attention, (b t d) -> (b t d), on any rung of the ladder.

    `attend` is a slot: context parallelism puts another callable there. How many heads live here
    is read from the projections, so that a tensor-parallel slice of them just works.

    With `rope` the tables of positions are `rotary`, which layers can share; by default they are
    made here.
    """

    query: nn.Module | None
    key: nn.Module | None
    value: nn.Module | None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        context_length: int,
        rope: bool = True,
        qk_norm: bool = True,
        dropout: float = 0.0,
        attn_implementation: str = "auto",
        variant: AttentionVariant = "qkv",
        out_proj: bool = True,
        bias: bool = False,
        rope_base: float = ROPE_BASE,
        norm_eps: float | None = None,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        """Make the projections of the rung, kept apart so that each splits by heads."""
        super().__init__()
        check_variant(variant)
        self.head_dim, self.qk_norm, self.dropout = d_model // num_heads, qk_norm, dropout
        self.attend, self.variant, self.rope = ATTENTION_FNS[attn_implementation], variant, rope
        self.norm_eps = norm_eps  # of qk_norm
        for name in PROJECTIONS:
            projection = nn.Linear(d_model, d_model, bias) if name in LEARNED[variant] else None
            self.register_module(name, projection)
        self.out = nn.Linear(d_model, d_model, bias) if out_proj else nn.Identity()
        self.rotary = None
        if rope:
            self.rotary = rotary or RotaryEmbedding(context_length, self.head_dim, rope_base)

    @property
    def is_fully_learned(self) -> bool:
        """Whether query, key, value and output are learned, so that all four split by heads."""
        learned = all(getattr(self, name) is not None for name in PROJECTIONS)
        return learned and isinstance(self.out, nn.Linear)

    def forward(
        self, x: Tensor, layer_cache: LayerKVCache | SharedPrefixLayer | None = None
    ) -> Tensor:
        """Attend within x (b t d); with a past, over what it remembers of earlier calls too."""
        query, key, value = self.project_qkv(x, layer_cache)
        dropout = self.dropout if self.training else 0.0
        if self.variant == "last":
            output = value
        elif layer_cache is None:
            output = self.attend(query, key, value, dropout)
        else:
            output = layer_cache.attend(query, key, value, self.attend, dropout)
        return self.out(output.transpose(1, 2).flatten(2))  # (b t d)

    def project_qkv(
        self, x: Tensor, layer_cache: LayerKVCache | SharedPrefixLayer | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (b t d), all (b h t k)."""
        query = x if self.query is None else self.query(x)
        key = query if self.variant == "shared" else x if self.key is None else self.key(x)
        value = x if self.value is None else self.value(x)
        if self.variant == "average":  # equal scores are equal weights
            query = key = torch.zeros_like(x)
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b h t k)
            for projected in (query, key, value)
        )
        if self.qk_norm:  # without gain: a gain per channel, shared by heads, would not split
            query, key = unit_rms(query, self.norm_eps), unit_rms(key, self.norm_eps)
        if self.rotary is not None:
            cosine, sine = self.rotary.get_rows(x.shape[1])
            if layer_cache is not None:
                positions = layer_cache.positions_of(x.shape[1])
                cosine, sine = self.rotary.cosine[positions], self.rotary.sine[positions]
            tables = cosine.to(query), sine.to(query)
            query, key = apply_rope(query, *tables), apply_rope(key, *tables)
        return query, key, value

    def compute_weights(self, x: Tensor) -> Tensor:
        """What each token of x (b t d) takes from which: (b h t t), for eyes and tests."""
        query, key, _ = self.project_qkv(x)
        if self.variant == "last":
            b, h, t, _ = query.shape
            return torch.eye(t, dtype=x.dtype, device=x.device).expand(b, h, t, t)
        return causal_attention_weights(query, key)
