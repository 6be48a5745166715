"""Mixture of experts (MoE): each token is routed to two of eight MLPs (GShard, 2020; Switch, 2021).

    p = softmax(W x)                          the router, fp32
    y = Σ over the two largest p:  p_e / (p_1 + p_2) · expert_e(x)
    load balancing loss = E Σ_e f_e P_e       f: fraction of choices, P: mean p; 1 if uniform

Each sequence is a group of its own. An expert processes at most `capacity_factor 2t/E` tokens of a
sequence, in their order. Tokens beyond this capacity skip the expert and keep the residual stream.
So the result for a token depends on its own sequence only, not on the split of a batch into ranks
or micro-batches.

Axes: b batch, t time, d model, E experts, c slots of an expert in a sequence, k choices.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ravine.errors import UsageError

TOP_K = 2


class Experts(nn.Module):
    """E MLPs with stacked weights, each applied to its own tokens: (E n d) -> (E n d).

    The first axis of both parameters is E; expert parallelism may keep some of the experts on each
    rank.
    """

    only_matmul_weights = True  # needs no fp32 copies when gathered in half precision
    stacked_matrices = ("up", "down")  # read by `initialize`

    def __init__(self, d_model: int, num_experts: int, d_ff: int | None = None) -> None:
        """Initialize as E linear layers; d_ff hidden channels in each, by default 4d."""
        super().__init__()
        d_ff = d_ff or 4 * d_model
        self.up = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.down = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        for matrices in (self.up, self.down):
            bound = 1 / math.sqrt(matrices.shape[1])
            nn.init.uniform_(matrices, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(x up)² down."""
        return F.relu(x @ self.up).square() @ self.down


class MixtureOfExperts(nn.Module):
    """Top-2 mixture of experts in place of a block's MLP, (b t d) -> (b t d)."""

    full_precision = ("router",)  # in mixed precision, too: rounding could change the top-2

    def __init__(
        self,
        d_model: int,
        num_experts: int = 8,
        capacity_factor: float = 2.0,
        d_ff: int | None = None,
    ) -> None:
        """Create the router and the experts.

        Args:
            d_model: channels d of a token.
            num_experts: number E of experts.
            capacity_factor: an expert processes at most this times its even share of the tokens;
                with 1, any uneven routing drops tokens.
            d_ff: hidden channels of each expert, by default 4d.
        """
        super().__init__()
        if num_experts < TOP_K:
            raise UsageError(
                f"MixtureOfExperts: num_experts={num_experts} is too small",
                [f"{TOP_K} or more"],
                "use num_experts=8",
                flag="--model.num_experts=8",
            )
        self.capacity_factor, self.num_experts = capacity_factor, num_experts
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.experts = Experts(d_model, num_experts, d_ff)
        self.load_balancing_loss = torch.zeros(())  # of the last call; added to the training loss

    def forward(self, x: Tensor) -> Tensor:
        """Route each token of x (b t d) to its top-2 experts; return the weighted output sum.

        Each expert has `capacity` slots (c) for the tokens of a sequence, in one tensor of E * c
        slots: tokens are added to their slots, the experts run, and the outputs are read back.

        Axes: b batch, t time, d model, E experts (e in the patterns), k choices of a token (2).
        """
        b, t, _ = x.shape
        with torch.autocast(x.device.type, enabled=False):  # rounding could change the top-2
            router_logits = self.router(x.to(self.router.weight.dtype))
        router_probs = router_logits.float().softmax(-1)  # (b t E)
        weights, expert_indices = router_probs.topk(TOP_K, -1)  # (b t k)
        weights = weights / weights.sum(-1, keepdim=True)
        expert_onehot = F.one_hot(expert_indices, self.num_experts)  # (b t k E)
        self.load_balancing_loss = compute_load_balancing_loss(router_probs, expert_onehot)
        capacity = min(t, math.ceil(self.capacity_factor * TOP_K * t / self.num_experts))
        # (b t k) how many earlier choices of the sequence went to the same expert
        slot_in_expert = compute_expert_slots(expert_onehot)
        is_kept = slot_in_expert < capacity  # tokens beyond the capacity skip the expert
        slot = expert_indices * capacity + slot_in_expert.clamp(max=capacity - 1)  # of E * capacity
        slot = rearrange(slot, "b t k -> b (t k)")[..., None].expand(-1, -1, x.shape[-1])
        tokens = x[:, :, None] * is_kept[..., None]  # (b t k d)
        tokens = rearrange(tokens, "b t k d -> b (t k) d")
        # a skipped token is 0 here, so it changes nothing in the last slot, which it shares
        dispatched = x.new_zeros(b, self.num_experts * capacity, x.shape[-1]).scatter_add(
            1, slot, tokens
        )
        # each expert gets its slots of all sequences
        dispatched = rearrange(dispatched, "b (e c) d -> e (b c) d", e=self.num_experts)
        expert_outputs = rearrange(self.experts(dispatched), "e (b c) d -> b (e c) d", b=b)
        combined = rearrange(expert_outputs.gather(1, slot), "b (t k) d -> b t k d", k=TOP_K)
        return (combined * (weights * is_kept)[..., None].to(x.dtype)).sum(2)


def compute_expert_slots(expert_onehot: Tensor) -> Tensor:
    """Slot (b t k) of each choice: the number of earlier choices of the same expert; (b t k E)."""
    order = rearrange(expert_onehot, "b t k e -> b (t k) e")
    before = order.cumsum(1) - order
    return rearrange((before * order).sum(-1), "b (t k) -> b t k", k=expert_onehot.shape[2])


def compute_load_balancing_loss(router_probs: Tensor, expert_onehot: Tensor) -> Tensor:
    """Load balancing loss E Σ f P, the mean over sequences, of (b t E) and (b t k E)."""
    num_experts = router_probs.shape[-1]
    fraction = expert_onehot.float().sum(2).mean(1) / expert_onehot.shape[2]  # (b E)
    return num_experts * (fraction * router_probs.mean(1)).sum(-1).mean()


def mean_load_balancing_loss(net: nn.Module) -> Tensor | Literal[0]:
    """Mean load balancing loss of a net's MoE layers after a forward pass; 0 if it has none."""
    losses = [m.load_balancing_loss for m in net.modules() if isinstance(m, MixtureOfExperts)]
    return torch.stack(losses).mean() if losses else 0
