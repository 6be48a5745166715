"""Claims of lecture 3: steepest direction, low precision, order of products, vector-Jacobian."""

import pytest
import torch

from ravine.lightning_modules import Objective


def test_the_steepest_unit_direction_is_against_the_gradient():
    """No unit direction has a smaller slope than -|g|, and -g/|g| has it; L = |w|^2 / 2."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    module = Objective("quadratic", start=start.tolist())
    gradient = module.compute_gradients(start[None, None])[0, 0]
    assert torch.equal(gradient, start)
    directions = torch.randn(100_000, 7, generator=generator, dtype=torch.float64)
    directions = torch.cat((directions, -gradient[None]))
    directions = directions / directions.norm(dim=1, keepdim=True)
    step = 1e-6
    values = module.evaluate_points((start + step * directions)[:, None])[:, 0]
    slopes = (values - module.evaluate_points(start[None, None])[0, 0]) / step
    assert slopes.argmin() == len(directions) - 1
    assert slopes[-1].item() == pytest.approx(-gradient.norm().item(), rel=1e-5)
    assert slopes[:-1].min() < -0.95 * gradient.norm()


def accumulate(value: float, times: int, dtype: torch.dtype, addend: torch.dtype) -> float:
    total = torch.zeros((), dtype=dtype)
    for _ in range(times):
        total = total + torch.tensor(value, dtype=addend).to(dtype)
    return total.item()


def test_low_precision_sums_are_wrong_or_stall():
    """1000 x 0.0100001; a float16 sum of 0.01 stalls at 32, a bfloat16 sum at 4."""
    f16, f32, bf16 = torch.float16, torch.float32, torch.bfloat16
    assert accumulate(0.0100001, 1000, f32, f32) == pytest.approx(10.0002, abs=1e-4)
    assert accumulate(0.0100001, 1000, f16, f16) == pytest.approx(9.9531, abs=1e-4)
    assert accumulate(0.0100001, 1000, f32, f16) == pytest.approx(10.0021, abs=1e-4)
    assert accumulate(0.0100001, 1000, bf16, bf16) == 4.0
    assert accumulate(0.01, 2798, f16, f16) == accumulate(0.01, 2900, f16, f16) == 32.0
    assert accumulate(0.01, 2797, f16, f16) < 32.0


def test_the_order_of_a_product_of_matrices_changes_its_cost():
    m, n, p, q = 512, 512, 8, 512
    left, right = m * n * p + m * p * q, n * p * q + m * n * q
    assert (left, right) == (4_194_304, 136_314_880)
    assert right / left == 32.5
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=generator) for s in ((m, n), (n, p), (p, q)))
    difference = ((a @ b) @ c - a @ (b @ c)).abs().max().item()
    assert 0 < difference < 1e-2  # and not 0.0, as printed


def test_backward_of_a_vector_is_a_vector_jacobian_product():
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (w**2).backward(torch.tensor([10.0, 20.0, 30.0]))
    assert w.grad is not None
    assert w.grad.tolist() == [20, 80, 180]
    jacobian = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    w = torch.zeros(2, requires_grad=True)
    (jacobian @ w).backward(torch.tensor([1.0, 0.0]))
    assert w.grad is not None
    assert w.grad.tolist() == [1, 2]  # J'v, and not Jv = (1, 3)
