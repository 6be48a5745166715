"""Claims of lecture 10: optimizer steps against the batch size (after Shallue et al., 2019)."""

import pytest
import torch

from ravine.datamodules import RegressionDataModule
from ravine.lightning_modules.objectives.minimizers import find_minimizer
from ravine.lightning_modules.objectives.sgd_theory import (
    compute_moments,
    expected_gap,
    transition_matrix,
)

# batch size, best rate and expected steps to the gap 1e-4 on the line of lecture 2
BEST_RATES = [
    (1, 0.0304, 517),
    (2, 0.059, 259),
    (4, 0.115, 130),
    (8, 0.227, 65),
    (16, 0.421, 33),
    (32, 0.747, 17),
    (64, 1.43, 8),
    (128, 2.17, 4),
    (256, 2.86, 2),
    (1024, 2.75, 2),
]


def count_expected_steps(lr: float, batch_size: int, target: float = 1e-4) -> float:
    """Return the first step with an expected gap of at most the target; inf beyond 1,000."""
    data = RegressionDataModule()
    data.setup("fit")
    x, y = data.x, data.y[0]
    minimizer = find_minimizer(x, y, "half_squared", 0.0, 0.0, torch.ones(1), 1)
    assert minimizer is not None
    moments = compute_moments(x, y, minimizer, 1.0)
    matrix = transition_matrix(moments, lr, batch_size)
    noise = lr**2 * moments.gradient_covariance.flatten() / batch_size
    second_moment = minimizer**2  # of the error at the start 0
    for k in range(1000):
        if float(expected_gap(moments, second_moment.view(1, 1))) <= target:
            return k
        second_moment = matrix @ second_moment + noise
    return float("inf")


def test_steps_fall_as_the_inverse_of_the_batch_size_and_then_stay():
    """Steps times batch size is 512 to 544 up to B = 128; from B = 256 on there are two steps."""
    for batch_size, lr, steps in BEST_RATES:
        assert count_expected_steps(lr, batch_size) == pytest.approx(steps, abs=1), batch_size
        if batch_size <= 128:
            assert 512 <= steps * batch_size <= 544


@pytest.mark.parametrize(("batch_size", "lr", "steps"), BEST_RATES[::3])
def test_other_rates_need_no_fewer_steps(batch_size, lr, steps):
    for factor in (0.7, 0.85, 1.2, 1.5):
        assert count_expected_steps(factor * lr, batch_size) >= steps
