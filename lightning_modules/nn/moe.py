"""A mixture of experts: each token is sent to two of eight MLPs (GShard, 2020; Switch, 2021).

    p = softmax(W x)                          the router, fp32
    y = Σ over the two largest p:  p_e / (p_1 + p_2) · expert_e(x)
    balance = E Σ_e f_e P_e                   f: share of the choices, P: mean p; 1 if all are equal

Each sequence is a group of its own. An expert takes at most `capacity 2t/E` tokens of it, in their
order; those beyond pass by on the residual stream. So what becomes of a token depends on its own
sequence alone, not on how a batch is spread over ranks or micro-batches.

Axes: b batch, t time, d model, E experts, c places of an expert in a sequence, k choices.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ravine.errors import UsageError

CHOICES = 2


class Experts(nn.Module):
    """E MLPs side by side, each applied to its own tokens: (E n d) -> (E n d).

    The first axis of both parameters is E; a strategy may keep some of the experts on each rank.
    """

    def __init__(self, width: int, experts: int, d_ff: int | None = None) -> None:
        """As E linear layers start; d_ff hidden channels each, by default 4d."""
        super().__init__()
        d_ff = d_ff or 4 * width
        self.up = nn.Parameter(torch.empty(experts, width, d_ff))
        self.down = nn.Parameter(torch.empty(experts, d_ff, width))
        for matrices in (self.up, self.down):
            bound = 1 / math.sqrt(matrices.shape[1])
            nn.init.uniform_(matrices, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """relu(x up)² down."""
        return F.relu(x @ self.up).square() @ self.down


class MixtureOfExperts(nn.Module):
    """In the place of a block's MLP, (b t d) -> (b t d)."""

    full_precision = ("router",)  # under mixed precision too: near ties decide the choices

    def __init__(
        self, width: int, experts: int = 8, capacity: float = 2.0, d_ff: int | None = None
    ) -> None:
        """Make the router and the experts; capacity 1 leaves no room for an uneven choice."""
        super().__init__()
        if experts < CHOICES:
            raise UsageError(
                f"experts is {experts}; allowed: {CHOICES} or more; type --model.experts=8"
            )
        self.capacity, self.count = capacity, experts
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(width, experts, d_ff)
        self.balance = torch.zeros(())  # of the latest call, part of the loss

    def forward(self, x: Tensor) -> Tensor:
        """Send each token of x (b t d) to two experts, and add what they say, weighted."""
        b, t, _ = x.shape
        with torch.autocast(x.device.type, enabled=False):  # near ties decide where a token goes
            scores = self.router(x.to(self.router.weight.dtype))
        chances = scores.float().softmax(-1)  # (b t E)
        weights, choices = chances.topk(CHOICES, -1)  # (b t k)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = F.one_hot(choices, self.count)  # (b t k E)
        self.balance = balance(chances, chosen)
        room = min(t, math.ceil(self.capacity * CHOICES * t / self.count))
        place = places(chosen)  # (b t k)
        taken = place < room
        slot = choices * room + place.clamp(max=room - 1)  # (b t k) of E * c
        slot = rearrange(slot, "b t k -> b (t k)")[..., None].expand(-1, -1, x.shape[-1])
        sent = x[:, :, None] * taken[..., None]  # (b t k d)
        sent = rearrange(sent, "b t k d -> b (t k) d")
        mail = x.new_zeros(b, self.count * room, x.shape[-1]).scatter_add(1, slot, sent)
        mail = rearrange(mail, "b (e c) d -> e (b c) d", e=self.count)
        answers = rearrange(self.experts(mail), "e (b c) d -> b (e c) d", b=b)
        back = rearrange(answers.gather(1, slot), "b (t k) d -> b t k d", k=CHOICES)
        return (back * (weights * taken)[..., None].to(x.dtype)).sum(2)


def places(chosen: Tensor) -> Tensor:
    """How many came before, of a sequence's choices (b t k E), to the same expert: (b t k)."""
    order = rearrange(chosen, "b t k e -> b (t k) e")
    before = order.cumsum(1) - order
    return rearrange((before * order).sum(-1), "b (t k) -> b t k", k=chosen.shape[2])


def balance(chances: Tensor, chosen: Tensor) -> Tensor:
    """E Σ f P of each sequence, the mean over sequences, of (b t E) and (b t k E)."""
    experts = chances.shape[-1]
    share = chosen.float().sum(2).mean(1) / chosen.shape[2]  # (b E)
    return experts * (share * chances.mean(1)).sum(-1).mean()


def balance_of(net: nn.Module) -> Tensor | Literal[0]:
    """The mean over a net's mixtures, after a forward pass; 0 if it has none."""
    found = [m.balance for m in net.modules() if isinstance(m, MixtureOfExperts)]
    return torch.stack(found).mean() if found else 0
