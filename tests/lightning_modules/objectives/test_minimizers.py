"""Minimizers: the optimality condition of each loss holds at them; scikit-learn agrees."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ravine.datamodules.regression import generate_line, load_table
from ravine.lightning_modules.objectives.losses import (
    LOSSES,
    max_l1_penalty,
    soft_threshold,
)
from ravine.lightning_modules.objectives.minimizers import find_minimizer


def minimize(
    x: Tensor, y: Tensor, loss: str, l1: float = 0, l2: float = 0, classes: int = 1
) -> Tensor:
    result = find_minimizer(x, y, loss, l1, l2, torch.ones(x.shape[1], dtype=x.dtype), classes)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("source", "loss", "l2", "classes"),
    [
        ("diabetes", "half_squared", 0.0, 1),
        ("diabetes", "squared", 0.3, 1),
        ("diabetes", "huber", 0.0, 1),
        ("breast_cancer", "logistic", 0.01, 1),
        ("wine", "softmax", 0.01, 3),
    ],
)
def test_the_gradient_of_a_smooth_objective_is_rounding_error(source, loss, l2, classes):
    x, y, _ = load_table(source, standardize=True)
    w = minimize(x, y, loss, l2=l2, classes=classes).requires_grad_()
    weights = w.view(x.shape[1], classes) if classes > 1 else w
    objective = LOSSES[loss](x @ weights, y).mean() + l2 / 2 * (w**2).sum()
    (gradient,) = torch.autograd.grad(objective, w)
    assert gradient.abs().max() < 1e-11 * x.abs().max() * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize(("source", "loss"), [("diabetes", "absolute"), ("breast_cancer", "hinge")])
def test_no_direction_improves_a_piecewise_linear_loss(source, loss):
    x, y, _ = load_table(source, standardize=True)
    w = minimize(x, y, loss)
    best = LOSSES[loss](x @ w, y).mean()
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            other = w + scale * torch.randn_like(w)
            assert LOSSES[loss](x @ other, y).mean() >= best - 1e-12


def test_lasso_on_diabetes_has_the_nonzeros_of_the_lecture():
    """0, 1, 2, 5, 8 at 1.01, .99, .5, .1, .01 of the smallest penalty that gives w = 0."""
    x, y, _ = load_table("diabetes", standardize=True)
    largest = max_l1_penalty(x, y, curvature=2.0)
    assert largest.item() == pytest.approx(90.32006, abs=1e-5)
    counts = []
    for fraction in (1.01, 0.99, 0.5, 0.1, 0.01):
        l1 = fraction * float(largest)
        w = minimize(x, y, "squared", l1=l1)
        counts.append(int((w != 0).sum()))
        slope = 2 * x.T @ (x @ w - y) / len(y)  # -l1 sign(w), or within l1 where w = 0
        assert torch.allclose(slope[w != 0], -l1 * w[w != 0].sign(), atol=1e-9)
        assert (slope[w == 0].abs() <= l1 + 1e-9).all()
    assert counts == [0, 1, 2, 5, 8]


def test_fewer_nonzeros_with_a_larger_penalty_is_not_always_so():
    """At 0.0023 of the largest penalty, a smaller one gives 9 nonzeros instead of 10."""
    x, y, _ = load_table("diabetes", standardize=True)
    largest = float(max_l1_penalty(x, y, curvature=2.0))
    counts = [
        int((minimize(x, y, "squared", l1=f * largest) != 0).sum())
        for f in torch.linspace(0.003, 0.0015, 16).tolist()
    ]
    assert any(after < before for before, after in pairwise(counts))


def test_lasso_with_orthogonal_columns_is_soft_thresholding_by_half_the_penalty():
    """X'X = n I: the minimizer of |Xw - y|^2 / n + l1 |w|_1 is soft(X'y / n, l1 / 2)."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(50, 8, generator=generator, dtype=torch.float64))
    x = q * 50**0.5
    y = torch.randn(50, generator=generator, dtype=torch.float64)
    expected = soft_threshold(x.T @ y / 50, 0.2 / 2)
    assert torch.allclose(minimize(x, y, "squared", l1=0.2), expected, atol=1e-14)
    assert 0 < int((expected != 0).sum()) < 8


def test_linear_regression_on_diabetes_has_the_known_error():
    """Mean squared error 2859.69635, R^2 0.5177484 and variance 5929.885 with an intercept."""
    x, y, _ = load_table("diabetes", standardize=True)
    x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), 1)
    error = float(LOSSES["squared"](x @ minimize(x, y, "squared"), y).mean())
    variance = float(y.var(correction=0))
    assert error == pytest.approx(2859.69635, abs=1e-5)
    assert variance == pytest.approx(5929.885, abs=1e-3)
    assert 1 - error / variance == pytest.approx(0.5177484, abs=1e-7)


def test_separable_data_have_no_minimizer_of_the_logistic_loss():
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    assert find_minimizer(x, x[:, 0].sign(), "logistic", 0, 0, ones) is None
    assert find_minimizer(x, x[:, 0].sign(), "logistic", 0, 0.1, ones) is not None


def test_the_minimizer_of_the_line_is_the_one_of_the_lecture():
    x, y = generate_line(200, 1.0, 0.2, seed=0)
    w = minimize(x[:, None], y, "half_squared")
    assert w.item() == pytest.approx(1.0142993704575556, abs=2e-15)
    assert (x**2).mean().item() == pytest.approx(0.30987960, abs=1e-8)
    assert (x**4).mean().item() == pytest.approx(0.1776561, abs=1e-7)
    residual = x * w - y
    assert ((residual * x) ** 2).mean().item() == pytest.approx(0.01182473, abs=1e-8)
    assert (residual**2).mean().item() / 2 == pytest.approx(0.02263731, abs=1e-8)
    x, y = generate_line(200, 1.0, 0.2, seed=1)
    assert ((x * w - y) ** 2).mean().item() / 2 == pytest.approx(0.02078606, abs=1e-8)
