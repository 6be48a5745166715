"""Causal attention with heads: each token gathers from those before it (lecture 5).

    softmax(q kᵀ / √k, over the past) v

Axes: b batch, t time, d model, h heads, k head width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def explicit(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention as the formula says it; all (b h t k)."""
    t, k = query.shape[-2:]
    mask = torch.full((t, t), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    weights = (query / math.sqrt(k) @ key.mT + mask).softmax(-1)  # (b h t t)
    return F.dropout(weights, dropout) @ value


def sdpa(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """The same by torch's fused kernel, which never stores the (t t) weights; all (b h t k)."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


def auto(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """The faster of the two; all (b h t k).

    torch's CPU kernel goes backward 5.8 times slower in bf16 than in fp32: half of a whole
    training step at t=64. So bf16 on a CPU takes the formula, everything else the kernel.
    """
    slow_kernel = value.device.type == "cpu" and value.dtype == torch.bfloat16
    return (explicit if slow_kernel else sdpa)(query, key, value, dropout)


ATTENTIONS: dict[str, Attend] = {"auto": auto, "sdpa": sdpa, "explicit": explicit}


def rotation(context: int, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary positions (RoFormer, 2021), both (t k) in float64.

    The channel pair (i, i + k/2) turns by t · base^(-2i/k).
    """
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequency)  # (t, k/2)
    sine = angles.sin()
    return torch.cat((angles, angles), -1).cos(), torch.cat((-sine, sine), -1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channel pairs of x (b h t k); tables (t k).

    Then a query times a key depends on how far apart they are, and on nothing else about time.
    """
    return x * cosine + x.roll(x.shape[-1] // 2, -1) * sine


class CausalAttention(nn.Module):
    """Multi-head causal self-attention, (b t d) -> (b t d).

    `attend` is a slot: context parallelism or a cache puts another callable there. How many heads
    live here is read from the projections, so that a tensor-parallel slice of them just works.
    """

    cosine: Tensor  # (t k), with rope only
    sine: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        rope: bool = True,
        qk_norm: bool = True,
        dropout: float = 0.0,
        attention: str = "auto",
    ) -> None:
        """Make the four bias-free projections, kept apart so that each splits by heads."""
        super().__init__()
        self.head_width, self.qk_norm, self.dropout = width // heads, qk_norm, dropout
        self.attend = ATTENTIONS[attention]
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rope = rope
        if rope:
            cosine, sine = rotation(context, self.head_width)
            self.register_buffer("cosine", cosine.float(), persistent=False)
            self.register_buffer("sine", sine.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x (b t d)."""
        query, key, value = (
            rearrange(project(x), "b t (h k) -> b h t k", k=self.head_width)
            for project in (self.query, self.key, self.value)
        )
        if self.qk_norm:  # without gain: a gain per channel, shared by heads, would not split
            query, key = F.rms_norm(query, query.shape[-1:]), F.rms_norm(key, key.shape[-1:])
        if self.rope:
            tables = self.cosine[: x.shape[1]].to(query), self.sine[: x.shape[1]].to(query)
            query, key = rotate(query, *tables), rotate(key, *tables)
        dropout = self.dropout if self.training else 0.0
        return self.out(rearrange(self.attend(query, key, value, dropout), "b h t k -> b t (h k)"))
