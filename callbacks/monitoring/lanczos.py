"""Lanczos: extreme eigenvalues of a symmetric matrix that is known by its products with vectors.

    a_j = v_j' A v_j
    b_j v_{j+1} = A v_j - a_j v_j - b_{j-1} v_{j-1}
    T = tridiagonal(b, a, b),   T s = theta s,   |A u - theta u| = b_m |s_m|  with u = sum_j s_j v_j

The eigenvalues theta of T approximate those of A, the extreme ones first. Rounding makes the
vectors v lose their orthogonality, so each new one is orthogonalized against all earlier ones,
twice. The vectors keep the dtype of the start; T is solved in float64.

`HessianProduct` is the matrix of a training loss: its second derivatives. Each product is one
backward pass through the graph of the gradient (Pearlmutter, 1994).

Axes: n parameters, m products.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_RELATIVE_SIZE = 0.01  # eigenvalues below this fraction of the largest have an absolute error


class ExtremeEigenvalues(NamedTuple):
    """Extreme eigenvalues of a matrix, and the bounds of their errors.

    Attributes:
        smallest: the most negative eigenvalue.
        largest: the most positive eigenvalue.
        smallest_error: an eigenvalue is at most this far from `smallest`.
        largest_error: an eigenvalue is at most this far from `largest`.
        num_products: products with the matrix.
        has_converged: whether both errors are within the tolerance.
        vector: unit eigenvector (n) of the eigenvalue with the larger absolute value.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    num_products: int
    has_converged: bool
    vector: Tensor


def find_extreme_eigenvalues(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float = 0.01,
    max_products: int = 100,
) -> ExtremeEigenvalues:
    """Return the extreme eigenvalues of a symmetric matrix.

    A matrix with r different eigenvalues needs at most r products. A product that is not finite
    gives NaN.

    Args:
        multiply: maps a vector (n) to its product (n) with the matrix.
        start: first vector (n); a random one has a part in each eigenspace.
        tolerance: allowed error, relative to the eigenvalue, or to 1 % of the largest one if that
            is more.
        max_products: number of products after which the search stops.
    """
    basis = [start / start.norm()]  # orthonormal vectors (n)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    precision = torch.finfo(start.dtype).eps
    while True:
        product = multiply(basis[-1])
        diagonal.append(float(product.dot(basis[-1])))
        if not math.isfinite(diagonal[-1]):
            nan = math.nan
            return ExtremeEigenvalues(nan, nan, nan, nan, len(basis), False, basis[-1])
        for _ in range(2):
            for vector in basis:
                product = product - product.dot(vector) * vector
        norm = float(product.norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        sub = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix += torch.diag(sub, 1) + torch.diag(sub, -1)
        values, vectors = torch.linalg.eigh(matrix)  # ascending
        scale = float(values.abs().max())
        # an invariant subspace: the errors are those of rounding
        is_invariant = norm <= 10 * precision * scale or len(basis) == len(start)
        errors = torch.zeros(2) if is_invariant else norm * vectors[-1, [0, -1]].abs()
        allowed = tolerance * values[[0, -1]].abs().clamp(min=MIN_RELATIVE_SIZE * scale)
        has_converged = bool((errors <= allowed).all())
        if has_converged or len(basis) >= max_products:
            index = int(values.abs().argmax())
            weights = vectors[:, index].to(start)
            vector = torch.stack([w * v for w, v in zip(weights, basis, strict=True)]).sum(0)
            return ExtremeEigenvalues(
                smallest=float(values[0]),
                largest=float(values[-1]),
                smallest_error=float(errors[0]),
                largest_error=float(errors[1]),
                num_products=len(basis),
                has_converged=has_converged,
                vector=vector,
            )
        off_diagonal.append(norm)
        basis.append(product / norm)


class HessianProduct:
    """Products of the Hessian of a loss with vectors, all from one graph of the gradient.

    The graph holds the random numbers of the loss, such as dropout masks, so that all products
    belong to one function.

    Args:
        loss: scalar loss, with its graph.
        parameters: the variables; n numbers in total.

    Raises:
        RuntimeError: an operation of the loss has no derivative.
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Compute the gradient with its graph."""
        self.parameters = list(parameters)
        self.gradients = torch.autograd.grad(
            loss, self.parameters, create_graph=True, allow_unused=True
        )

    def __call__(self, vector: Tensor) -> Tensor:
        """Return H v (n) for a vector v (n).

        Raises:
            RuntimeError: an operation of the loss has no second derivative.
        """
        directions = vector.split([p.numel() for p in self.parameters])
        # a gradient without a graph is constant: its rows of H are zero
        pairs = [
            (gradient, direction.view_as(gradient).to(gradient.dtype))
            for gradient, direction in zip(self.gradients, directions, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(vector)
        outputs, weights = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            outputs, self.parameters, weights, retain_graph=True, allow_unused=True
        )
        return flatten_like(products, self.parameters)


def flatten_like(tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors with the shapes of the parameters: (n); None stands for zeros."""
    return torch.cat(
        [
            (torch.zeros_like(p) if t is None else t.detach()).reshape(-1)
            for t, p in zip(tensors, parameters, strict=True)
        ]
    )
