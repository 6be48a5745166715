"""Closed forms of SGD: the formulas of one variable, limits of stability, known floors."""

import math

import pytest
import torch

from ravine.datamodules.regression import generate_line
from ravine.lightning_modules.objectives.minimizers import find_minimizer
from ravine.lightning_modules.objectives.sgd_theory import (
    LeastSquares,
    compute_moments,
    mean_square_limit,
    noise_floor,
    transition_matrix,
)


@pytest.fixture(scope="module")
def line() -> LeastSquares:
    x, y = generate_line(200, 1.0, 0.2, seed=0)
    ones = torch.ones(1, dtype=torch.float64)
    w = find_minimizer(x[:, None], y, "half_squared", 0, 0, ones)
    assert w is not None
    return compute_moments(x[:, None], y, w, 1.0)


def scalar_floor(moments: LeastSquares, lr: float, batch: int) -> float:
    """(m2 / 2) lr V/B / (2 m2 - lr (m2^2 + (m4 - m2^2) / B))."""
    m2, m4, v = (
        float(m) for m in (moments.hessian, moments.fourth_moment, moments.gradient_covariance)
    )
    return m2 / 2 * lr * v / batch / (2 * m2 - lr * (m2**2 + (m4 - m2**2) / batch))


@pytest.mark.parametrize(
    ("lr", "batch", "floor"),
    [
        (0.5, 1, 1.725e-3),
        (0.1, 1, 3.043e-4),
        (0.05, 1, 1.500e-4),
        (0.01, 1, 2.965e-5),
        (0.005, 1, 1.480e-5),
        (0.05, 10, 1.491e-5),
        (0.5, 100, 1.603e-5),
        (0.05, 100, 1.490e-6),
    ],
)
def test_the_noise_floor_is_the_closed_form_of_one_variable(line, lr, batch, floor):
    assert noise_floor(line, lr, batch).item() == pytest.approx(scalar_floor(line, lr, batch))
    assert noise_floor(line, lr, batch).item() == pytest.approx(floor, rel=5e-4)


def test_equal_ratios_of_step_and_batch_have_equal_floors_within_eight_percent(line):
    floors = [noise_floor(line, lr, b).item() for lr, b in ((0.005, 1), (0.05, 10), (0.5, 100))]
    assert 1.07 < max(floors) / min(floors) < 1.09


def test_the_gap_is_proportional_to_the_step_and_the_radius_to_its_root(line):
    """The lecture says that the radius is proportional to the step."""
    ratio = noise_floor(line, 0.1, 1).item() / noise_floor(line, 0.01, 1).item()
    assert ratio == pytest.approx(10.27, abs=0.01)
    assert math.sqrt(ratio) == pytest.approx(3.2, abs=0.01)


def test_the_mean_square_limits_are_those_of_the_lecture(line):
    """3.4885 for one sample a step, 5.948 for ten; 6.454 in the mean."""
    assert mean_square_limit(line, 1) == pytest.approx(3.4885, abs=1e-4)
    assert mean_square_limit(line, 10) == pytest.approx(5.948, abs=1e-3)
    assert 2 / line.hessian.item() == pytest.approx(6.454, abs=1e-3)
    m2, m4 = line.hessian.item(), line.fourth_moment.item()
    assert mean_square_limit(line, 1) == pytest.approx(2 * m2 / m4)
    assert noise_floor(line, 3.48, 1).isfinite()
    assert noise_floor(line, 3.50, 1).item() == math.inf


def test_the_transition_of_several_variables_is_the_mean_over_samples():
    """E[(I - lr xx') S (I - lr xx')] by a sum over samples, for one draw in each step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(20, generator=generator, dtype=torch.float64)
    moments = compute_moments(x, y, torch.zeros(3, dtype=torch.float64), 1.0)
    start = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    start = start @ start.T
    eye = torch.eye(3, dtype=torch.float64)
    factors = eye - 0.1 * torch.einsum("ni,nj->nij", x, x)
    expected = (factors @ start @ factors.transpose(1, 2)).mean(0)
    result = transition_matrix(moments, 0.1, 1) @ start.flatten()
    assert torch.allclose(result.view(3, 3), expected)


def expected_gaps(moments: LeastSquares, rates: list[float], start: float) -> list[float]:
    """The expected gap before each step, by the recursion of one variable with E[e] in it."""
    m2, m4, v = (
        float(m) for m in (moments.hessian, moments.fourth_moment, moments.gradient_covariance)
    )
    square, gaps = start**2, [m2 / 2 * start**2]
    for lr in rates:
        square = (1 - 2 * lr * m2 + lr**2 * m4) * square + lr**2 * v
        gaps.append(m2 / 2 * square)
    return gaps


def test_the_power_one_needs_a_rate_above_half_of_the_inverse_curvature(line):
    """At 0.2 the gap falls as k^(-0.124); at 1 / m2 it is V / (2 m2 k). Doubling k shows it."""
    m2, v, n = line.hessian.item(), line.gradient_covariance.item(), 120_000
    slow = expected_gaps(line, [0.2 / (k + 1) for k in range(2 * n)], 1.0143)
    assert slow[2 * n] / slow[n] == pytest.approx(2 ** (-2 * 0.2 * m2), abs=2e-3)
    assert slow[2 * n] > 30 * noise_floor(line, 0.2, 1).item()  # worse than the constant step
    best = expected_gaps(line, [1 / m2 / (k + 1) for k in range(n)], 1.0143)
    assert best[n] == pytest.approx(v / (2 * m2 * n), rel=0.02)
    power = expected_gaps(line, [0.2 / (k + 1) ** 0.6 for k in range(n)], 1.0143)
    assert power[n] == pytest.approx(0.2 / n**0.6 * v / 4, rel=0.06)


def test_a_geometric_schedule_freezes(line):
    gaps = expected_gaps(line, [0.2 * 0.999**k for k in range(40_000)], 1.0143)
    assert gaps[10_000] == pytest.approx(4.80e-6, rel=0.01)
    assert gaps[40_000] == pytest.approx(4.78e-6, rel=0.01)


def test_without_noise_the_mean_square_error_falls_by_its_factor_each_step():
    """Figure 2.5, data of seed 222: the factor is 0.9360 at lr 0.1 and 0.7191 at 0.5."""
    x, y = generate_line(200, 1.0, 0.0, seed=222)
    moments = compute_moments(x[:, None], y, torch.ones(1, dtype=torch.float64), 1.0)
    assert moments.gradient_covariance.item() < 1e-30
    factors = [transition_matrix(moments, lr, 1).item() for lr in (0.1, 0.5)]
    assert factors == pytest.approx([0.9360, 0.7191], abs=5e-5)


def test_the_mean_of_all_sample_gradients_is_the_full_gradient():
    x, y = generate_line(200, 1.0, 0.2, seed=0)
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (full,) = torch.autograd.grad(((x * w - y) ** 2).mean() / 2, w)
    rows = [torch.autograd.grad((a * w - b) ** 2 / 2, w)[0] for a, b in zip(x, y, strict=True)]
    assert torch.stack(rows).mean().item() == pytest.approx(full.item(), abs=1e-15)
