"""A mixture of experts equals its formula and routes each sequence separately."""

import pytest
import torch
from torch.nn import functional as F

from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.model_stats import count_parameters
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.nn.moe import (
    MixtureOfExperts,
    compute_expert_slots,
    compute_load_balancing_loss,
)


def by_hand(mixture, x):
    """Token by token, without a limit."""
    router_probs = (x @ mixture.router.weight.T).softmax(-1)
    answer = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
        best = router_probs[b, t].topk(2)
        for p, e in zip(best.values / best.values.sum(), best.indices, strict=True):
            hidden = F.relu(x[b, t] @ mixture.experts.up[e]).square()
            answer[b, t] += p * (hidden @ mixture.experts.down[e])
    return answer


def test_with_enough_capacity_the_output_is_the_weighted_sum_of_two_experts():
    mixture, x = MixtureOfExperts(6, 4, capacity_factor=2.0).double(), torch.randn(3, 5, 6).double()
    assert torch.allclose(mixture(x), by_hand(mixture, x), atol=1e-7)


def test_a_sequence_does_not_depend_on_the_others_of_its_batch():
    mixture, x = MixtureOfExperts(6, 8, capacity_factor=1.0), torch.randn(4, 16, 6)
    alone = torch.cat([mixture(each[None]) for each in x])
    assert torch.allclose(mixture(x), alone, atol=1e-6)


def test_an_expert_takes_at_most_its_capacity_in_order():
    mixture = MixtureOfExperts(6, 4, capacity_factor=1.0)
    with torch.no_grad():
        mixture.router.weight.zero_()  # all chances equal: every token chooses the same two
    x = torch.randn(1, 8, 6)
    answer = mixture(x)
    assert (answer[0, :4].abs().sum(-1) > 0).all()  # 1.0 * 2 * 8 / 4 places each
    assert (answer[0, 4:] == 0).all()
    assert mixture.experts.up.grad is None


def test_positions_count_the_earlier_tokens_of_the_expert():
    chosen = F.one_hot(torch.tensor([[[0, 1], [1, 0], [1, 2]]]), 3)
    assert compute_expert_slots(chosen).tolist() == [[[0, 0], [1, 1], [2, 0]]]


def test_the_load_balancing_loss_is_one_for_equal_loads_and_larger_otherwise():
    even = F.one_hot(torch.tensor([[[0, 1], [2, 3]]]), 4)
    assert compute_load_balancing_loss(torch.full((1, 2, 4), 0.25), even) == 1.0
    crowded = F.one_hot(torch.tensor([[[0, 1], [0, 1]]]), 4)
    skewed = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 2, 4)
    assert compute_load_balancing_loss(skewed, crowded) == 2.0


def test_an_expert_without_a_token_has_a_zero_gradient():
    mixture, x = MixtureOfExperts(6, 8), torch.randn(1, 2, 6)
    mixture(x).sum().backward()
    busy = (mixture.experts.up.grad.abs().sum((1, 2)) > 0).sum()
    assert busy <= 4


def test_the_formula_counts_the_experts_too():
    net = Transformer(10, 8, num_layers=2, d_model=16, num_heads=2, num_experts=8)
    shape = {"num_layers": 2, "d_model": 16, "num_experts": 8}
    assert sum(p.numel() for p in net.parameters()) == sum(
        count_parameters(10, 8, **shape).values()
    )


def test_too_few_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts=1 is too small; allowed: 2 or more"):
        LanguageModel(5, 8, num_experts=1)
