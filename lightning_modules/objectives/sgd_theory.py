"""Closed forms of SGD on least squares: expected gap of a constant step, limits of stability.

With e = w - w*, H = c mean(x x') and independent draws of B samples with replacement, the second
moment S = E[e e'] follows a linear recursion:

    S <- S - lr (H S + S H) + lr^2 ((1/B) mean(c^2 x x' S x x') + (1 - 1/B) H S H + V / B)

where V = c^2 mean(r^2 x x') is the covariance of a sample's gradient at w*, r its residual, and c
the curvature of the loss (1 for half_squared, 2 for squared). Its fixed point gives the noise
floor, tr(H S) / 2. For one variable with m2 = mean x^2 and m4 = mean x^4 the floor is

    (m2 / 2) lr V/B / (2 m2 - lr (m2^2 + (m4 - m2^2) / B))

Axes: n samples, d variables.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LeastSquares(NamedTuple):
    """Moments of a least-squares problem at its minimizer."""

    hessian: Tensor  # H (d d)
    fourth_moment: Tensor  # mean of c^2 (x x') kron (x x'), (d*d d*d)
    gradient_covariance: Tensor  # V (d d)


def compute_moments(x: Tensor, y: Tensor, minimizer: Tensor, curvature: float) -> LeastSquares:
    """Compute the moments of features x (n d) and labels y (n) at the minimizer (d)."""
    residuals = x @ minimizer - y  # (n)
    outer = torch.einsum("ni,nj->nij", x, x).flatten(1)  # (n d*d)
    d = x.shape[1]
    # (n d d d d) summed over n: entry (i j, k l) of (x x') kron (x x') is x_i x_k x_j x_l
    products = torch.einsum("ni,nk,nj,nl->ijkl", x, x, x, x) / len(y)
    covariance = (residuals**2) @ outer / len(y)
    return LeastSquares(
        hessian=curvature * x.T @ x / len(y),
        fourth_moment=curvature**2 * products.reshape(d * d, d * d),
        gradient_covariance=curvature**2 * covariance.view(d, d),
    )


def transition_matrix(moments: LeastSquares, lr: float, batch_size: int) -> Tensor:
    """Return the matrix (d*d d*d) by which one step multiplies E[e e'], without the noise V.

    SGD is stable in mean square if its largest absolute eigenvalue is below 1.
    """
    hessian = moments.hessian
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    linear = torch.kron(hessian, identity) + torch.kron(identity, hessian)
    square = torch.kron(hessian, hessian)
    noise = moments.fourth_moment / batch_size + (1 - 1 / batch_size) * square
    return torch.kron(identity, identity) - lr * linear + lr**2 * noise


def expected_gap(moments: LeastSquares, second_moment: Tensor) -> Tensor:
    """Return the expected gap tr(H S) / 2 of second moments S (... d d)."""
    return (moments.hessian * second_moment).sum((-2, -1)) / 2


def noise_floor(moments: LeastSquares, lr: float, batch_size: int) -> Tensor:
    """Return the expected gap () in which SGD with a constant rate ends; inf if it diverges."""
    matrix = transition_matrix(moments, lr, batch_size)
    if float(torch.linalg.eigvals(matrix).abs().max()) >= 1:
        return torch.tensor(float("inf"), dtype=matrix.dtype)
    noise = lr**2 * moments.gradient_covariance.flatten() / batch_size
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    second_moment = torch.linalg.solve(identity - matrix, noise)
    return expected_gap(moments, second_moment.view_as(moments.hessian))


def mean_square_limit(moments: LeastSquares, batch_size: int) -> float:
    """Return the largest rate for which SGD is stable in mean square, by bisection.

    For one variable: 2 m2 / (m2^2 + (m4 - m2^2) / B), which is 2 m2 / m4 for B = 1.
    """
    low, high = 0.0, 2 / float(torch.linalg.eigvalsh(moments.hessian).max())  # stable in the mean
    for _ in range(60):
        middle = (low + high) / 2
        matrix = transition_matrix(moments, middle, batch_size)
        stable = float(torch.linalg.eigvals(matrix).abs().max()) < 1
        low, high = (middle, high) if stable else (low, middle)
    return low
