"""Causal self-attention in six variants, from the identity to learned q, k and v (lecture 5).

    output = weights (t t) @ values,  weights lower-triangular, rows sum to one

    variant     weights              query   key    value
    identity    identity                            x       the token itself: a bigram model
    mean        1 / (t + 1)          0       0      x       mean of all tokens up to t
    embedding   softmax(q kᵀ / √k)   x       x      x       similarity of the embeddings
    shared_qk   softmax(q kᵀ / √k)   W x     W x    x       similarity in learned channels
    qk          softmax(q kᵀ / √k)   Q x     K x    x       learned queries and keys
    qkv         softmax(q kᵀ / √k)   Q x     K x    V x     learned queries, keys and values

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

AttentionFn = Callable[..., Tensor]  # of query, key, value, dropout, and here also attn_mask
AttentionVariant = Literal["identity", "mean", "embedding", "shared_qk", "qk", "qkv"]

ROPE_BASE = 10_000.0  # as in RoFormer and Llama 2; Llama 3 uses 500,000

PROJECTIONS = ("query", "key", "value")
# The learned projections of each variant; a projection that is not learned is the input itself.
# A new row adds a variant: LEARNED_PROJECTIONS["kv"] = ("key", "value").
LEARNED_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "mean": (),
    "embedding": (),
    "shared_qk": ("query",),
    "qk": ("query", "key"),
    "qkv": ("query", "key", "value"),
}


def check_variant(variant: str) -> None:
    """Raise UsageError for an unknown variant, or for an unknown projection in its row.

    A row is an entry of LEARNED_PROJECTIONS, to which other code may add variants.
    """
    if variant not in LEARNED_PROJECTIONS:
        nearest = (suggest_names(variant, LEARNED_PROJECTIONS) or ["qkv"])[0]
        raise UsageError(
            f"CausalAttention: attention_variant={variant!r} does not exist",
            LEARNED_PROJECTIONS,
            f"use attention_variant={nearest!r}",
            flag=f"--model.attention_variant={nearest}",
        )
    unknown = [name for name in LEARNED_PROJECTIONS[variant] if name not in PROJECTIONS]
    if unknown:
        raise UsageError(
            f"LEARNED_PROJECTIONS[{variant!r}] has the unknown projection {unknown[0]!r}",
            PROJECTIONS,
            f"remove {unknown[0]!r} from it",
        )


def causal_attention_weights(query: Tensor, key: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Causal attention weights softmax(q kᵀ / √k), (b h t t), of queries and keys (b h t k).

    `attn_mask` (true: attend) replaces the causal mask and may be non-square.
    """
    t, k = query.shape[-2:]
    shape = (t, t) if attn_mask is None else attn_mask.shape
    mask = torch.full(shape, -math.inf, dtype=query.dtype, device=query.device)
    mask = mask.triu(1) if attn_mask is None else mask.masked_fill(attn_mask, 0.0)
    return (query / math.sqrt(k) @ key.mT + mask).softmax(-1)


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attn_mask: Tensor | None = None
) -> Tensor:
    """Causal attention computed by its formula; all (b h t k)."""
    return F.dropout(causal_attention_weights(query, key, attn_mask), dropout) @ value


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attn_mask: Tensor | None = None
) -> Tensor:
    """Causal attention by torch's fused kernel, without storing (t t) weights; all (b h t k)."""
    causal = attn_mask is None
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout, is_causal=causal)


def auto_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attn_mask: Tensor | None = None
) -> Tensor:
    """Causal attention by the faster implementation; all (b h t k).

    The backward of torch's CPU kernel is 5.8 times slower in bf16 than in fp32: half of a whole
    training step at t=64. So bf16 on a CPU uses `reference_attention`, all else `sdpa_attention`.
    """
    slow_kernel = value.device.type == "cpu" and value.dtype == torch.bfloat16
    return (reference_attention if slow_kernel else sdpa_attention)(
        query, key, value, dropout, attn_mask
    )


ATTENTION_FNS: dict[str, AttentionFn] = {
    "auto": auto_attention,
    "sdpa": sdpa_attention,
    "eager": reference_attention,
}


def rope_tables(
    context_length: int, head_dim: int, base: float = ROPE_BASE
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary embeddings (RoPE; RoFormer, 2021), both (t k) in float64.

    The channel pair (i, i + k/2) is rotated by the angle t · base^(-2i/k).
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequency)  # (t, k/2)
    sine = angles.sin()
    return torch.cat((angles, angles), -1).cos(), torch.cat((-sine, sine), -1)


def apply_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the channel pairs of x (b h t k) by tables (t k), or (b 1 1 k) for one position a row.

    The product of a query and a key then depends on their relative position only.
    """
    return x * cosine + x.roll(x.shape[-1] // 2, -1) * sine


class RotaryEmbedding(nn.Module):
    """Tables of rotary position embeddings (RoPE), which all layers of a net share.

    Args:
        context_length: longest sequence, in tokens.
        head_dim: channels k of a head, an even number.
        base: the channel pair i is rotated by t · base^(-2i/k).
    """

    cosine: Tensor  # (t k)
    sine: Tensor

    def __init__(self, context_length: int, head_dim: int, base: float = ROPE_BASE) -> None:
        """Compute the tables; they are not saved in a checkpoint."""
        super().__init__()
        cosine, sine = rope_tables(context_length, head_dim, base)
        self.register_buffer("cosine", cosine.float(), persistent=False)
        self.register_buffer("sine", sine.float(), persistent=False)
        self._position_ids: Tensor | None = None
        self._selected_rows: tuple[Tensor, Tensor] | None = None

    @property
    def position_ids_override(self) -> Tensor | None:
        """Positions (t) of the tokens if they are a part of their sequence, else None.

        Context parallelism sets it, and all layers share the selected rows of the tables.
        """
        return self._position_ids

    @position_ids_override.setter
    def position_ids_override(self, position_ids: Tensor | None) -> None:
        """Select the rows of these positions (t); None selects those of whole sequences."""
        self._position_ids = position_ids
        self._selected_rows = (
            None if position_ids is None else (self.cosine[position_ids], self.sine[position_ids])
        )

    def get_rows(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and signed sines of a sequence of this length, both (t k)."""
        if self._selected_rows is not None:
            return self._selected_rows
        return self.cosine[:length], self.sine[:length]


class CausalAttention(nn.Module):
    """Multi-head causal self-attention in any of the variants, (b t d) -> (b t d).

    `attention_fn` is a replaceable callable: context parallelism sets its own. The number of heads
    is inferred from the projections, so a tensor-parallel slice of them needs no change here.

    With `rope`, `rotary` holds the tables of positions. Layers can share it; by default the layer
    makes its own.
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
        """Create the projections of the variant, one layer each, so that each splits by heads.

        Args:
            d_model: channels d of the input and the output.
            num_heads: attention heads; must divide d_model.
            context_length: longest sequence, for the tables of positions.
            rope: rotate queries and keys by their positions (RoPE).
            qk_norm: normalize queries and keys to unit RMS.
            dropout: dropout probability of the attention weights.
            attn_implementation: "auto", "sdpa" (torch's kernel) or "eager" (the formula).
            variant: which of query, key and value are learned.
            out_proj: whether there is an output projection.
            bias: whether the projections have a bias.
            rope_base: base of the rotation's frequencies.
            norm_eps: added under the root of qk_norm.
            rotary: tables of positions that several layers share; by default new ones.
        """
        super().__init__()
        check_variant(variant)
        self.head_dim, self.dropout = d_model // num_heads, dropout
        self.variant, self.rope, self.qk_norm = variant, rope, qk_norm
        # called with query, key and value (b h t k) and the dropout probability
        self.attention_fn = ATTENTION_FNS[attn_implementation]
        self.norm_eps = norm_eps  # for qk_norm
        for name in PROJECTIONS:
            projection = (
                nn.Linear(d_model, d_model, bias) if name in LEARNED_PROJECTIONS[variant] else None
            )
            self.register_module(name, projection)  # None: the input itself is used
        self.out_proj = nn.Linear(d_model, d_model, bias) if out_proj else nn.Identity()
        self.rotary = None
        if rope:
            self.rotary = rotary or RotaryEmbedding(context_length, self.head_dim, rope_base)

    @property
    def is_fully_learned(self) -> bool:
        """Whether query, key, value and output are learned: then all four can be split by heads."""
        learned = all(getattr(self, name) is not None for name in PROJECTIONS)
        return learned and isinstance(self.out_proj, nn.Linear)

    def forward(
        self, x: Tensor, layer_cache: LayerKVCache | SharedPrefixLayer | None = None
    ) -> Tensor:
        """Attend within x (b t d), and with a `layer_cache` also over its keys and values."""
        query, key, value = self.project_qkv(x, layer_cache)
        dropout = self.dropout if self.training else 0.0
        if self.variant == "identity":
            output = value
        elif layer_cache is None:
            output = self.attention_fn(query, key, value, dropout)
        else:
            output = layer_cache.attend(query, key, value, self.attention_fn, dropout)
        return self.out_proj(output.transpose(1, 2).flatten(2))  # (b t d)

    def project_qkv(
        self, x: Tensor, layer_cache: LayerKVCache | SharedPrefixLayer | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (b t d) to queries, keys and values, all (b h t k).

        A projection that is not learned is x itself. With a `layer_cache`, x may be a part of its
        text, and the cache has the positions.

        Axes: b batch, t time, d model, h heads, k head width; d = h k.
        """
        query = x if self.query is None else self.query(x)
        key = x if self.key is None else self.key(x)
        if self.variant == "shared_qk":
            key = query
        value = x if self.value is None else self.value(x)
        if self.variant == "mean":  # equal scores give equal weights
            query = key = torch.zeros_like(x)
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b h t k)
            for projected in (query, key, value)
        )
        if self.qk_norm:  # without gain: channel gains shared by heads cannot split by heads
            query, key = unit_rms(query, self.norm_eps), unit_rms(key, self.norm_eps)
        if self.rotary is not None:
            # cosine and sine of the angles of each position, for each channel of a head
            if layer_cache is None:
                cosine, sine = self.rotary.get_rows(x.shape[1])  # (t k)
            else:
                positions = layer_cache.positions_of(x.shape[1])  # indices of rows of the tables
                cosine, sine = self.rotary.cosine[positions], self.rotary.sine[positions]
            tables = cosine.to(query), sine.to(query)
            query, key = apply_rope(query, *tables), apply_rope(key, *tables)
        return query, key, value

    def compute_weights(self, x: Tensor) -> Tensor:
        """Return the attention weights (b h t t) of x (b t d), for figures and tests."""
        query, key, _ = self.project_qkv(x)
        if self.variant == "identity":
            b, h, t, _ = query.shape
            return torch.eye(t, dtype=x.dtype, device=x.device).expand(b, h, t, t)
        return causal_attention_weights(query, key)
