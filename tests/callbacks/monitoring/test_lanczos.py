"""Lanczos finds the ends of a spectrum, and a Hessian product is the product with the Hessian."""

import math

import pytest
import torch
from torch import Tensor

from ravine.callbacks.monitoring.lanczos import HessianProduct, find_extreme_eigenvalues


def symmetric(eigenvalues: Tensor) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    rotation, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return (rotation * eigenvalues) @ rotation.T


def test_the_ends_of_a_spectrum_are_found_within_the_tolerance():
    eigenvalues = torch.linspace(-3, 50, 400, dtype=torch.float64)
    matrix = symmetric(eigenvalues)
    found = find_extreme_eigenvalues(lambda v: matrix @ v, torch.randn(400, dtype=torch.float64))
    assert found.has_converged
    assert found.num_products < 100
    assert found.largest == pytest.approx(50, rel=0.01)
    assert found.smallest == pytest.approx(-3, rel=0.01)
    assert abs(found.largest - 50) <= found.largest_error
    residual = matrix @ found.vector - found.largest * found.vector
    assert float(residual.norm()) == pytest.approx(found.largest_error, rel=1e-6)


def test_as_many_products_as_different_eigenvalues_are_enough():
    eigenvalues = torch.tensor([-2.0, 0.0, 7.0], dtype=torch.float64).repeat(20)
    matrix = symmetric(eigenvalues)
    found = find_extreme_eigenvalues(
        lambda v: matrix @ v, torch.randn(60, dtype=torch.float64), tolerance=1e-12
    )
    assert found.num_products == 3
    assert found.largest == pytest.approx(7, abs=1e-12)
    assert found.smallest == pytest.approx(-2, abs=1e-12)


def test_orthogonalization_keeps_a_single_copy_of_a_large_eigenvalue_in_float32():
    """Without it, rounding gives the large eigenvalue several times, and the vectors no norm."""
    eigenvalues = torch.cat((torch.tensor([1e4]), torch.linspace(-1, 1, 199))).double()
    matrix = symmetric(eigenvalues).float()
    found = find_extreme_eigenvalues(
        lambda v: matrix @ v, torch.randn(200), tolerance=1e-7, max_products=150
    )
    assert found.largest == pytest.approx(1e4, rel=1e-5)
    assert found.smallest == pytest.approx(-1, abs=0.01)
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-5)


def test_a_search_that_ends_early_says_so():
    matrix = symmetric(torch.linspace(-1, 1, 300, dtype=torch.float64))
    found = find_extreme_eigenvalues(
        lambda v: matrix @ v, torch.randn(300, dtype=torch.float64), 1e-8, max_products=5
    )
    assert not found.has_converged
    assert found.num_products == 5
    assert 1 - found.largest <= found.largest_error


def test_a_product_that_is_not_finite_gives_nan():
    found = find_extreme_eigenvalues(lambda v: v * math.nan, torch.randn(4))
    assert math.isnan(found.largest)
    assert not found.has_converged


def test_a_hessian_product_is_the_product_with_the_dense_hessian():
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    b = torch.randn((), dtype=torch.float64, requires_grad=True)
    unused = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def loss(w, b):
        return (w.sin().sum() * b).exp() + w.pow(4).sum()

    columns = torch.autograd.functional.hessian(
        lambda x: loss(x[:3], x[3]), torch.cat((w, b[None])).detach()
    )
    vector = torch.randn(6, dtype=torch.float64)
    product = HessianProduct(loss(w, b), [w, b, unused])(vector)
    torch.testing.assert_close(product[:4], columns @ vector[:4])
    assert product[4:].tolist() == [0, 0]


def test_a_linear_loss_has_the_hessian_zero():
    w = torch.randn(3, requires_grad=True)
    assert HessianProduct(w.sum(), [w])(torch.ones(3)).tolist() == [0, 0, 0]
