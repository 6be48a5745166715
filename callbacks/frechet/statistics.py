"""How far apart two sets of features are: Fréchet's distance and the kernel distance, in float64.

    Fréchet   |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½,   means m, covariances C (divisor n - 1)
              tr (C1 C2)^½ = sum of sqrt of the eigenvalues of U C1 Uᵀ,   Uᵀ U = C2
    kernel    mean k(x, x') + mean k(y, y') - 2 mean k(x, y),  x != x', y != y',
              k(x, y) = (x·y / d + 1)³

U C1 Uᵀ is symmetric, so its eigenvalues are real and cheaper than those of C1 C2; rank-deficient
covariances give tiny ones of either sign, which count as 0, as in the rank of a matrix. U is of
the real data, which do not change: it is kept. The Fréchet distance is biased upwards by about
c / n, so only distances at equal n can be compared; the kernel distance is not.
Sources: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID).

Axes: n images, d features.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError

ROW_BLOCK = 256  # rows of a triangular matrix multiplied at once
KERNEL_ROWS = 1024  # of the kernel matrix at once: 8 MB a thousand columns


@dataclass
class Moments:
    """Sums of features around a fixed pivot (d), added up block by block, in the order given.

    One pass is enough, and safe: without the pivot, features of mean 100 and deviation 1 would
    lose four digits of their covariance. The order of blocks decides the last bits, hence whoever
    wants equal bits adds equal blocks in equal order.
    """

    pivot: Tensor
    count: int = 0
    shifted_sum: Tensor = field(init=False)  # sum of x - pivot (d)
    outer_sum: Tensor = field(init=False)  # sum of their outer products (d d)

    def __post_init__(self) -> None:
        """Start at nothing."""
        self.pivot = self.pivot.double()
        d = len(self.pivot)
        self.shifted_sum, self.outer_sum = self.pivot.new_zeros(d), self.pivot.new_zeros(d, d)

    def add(self, features: Tensor) -> None:
        """Add a block (n d) of any float type."""
        x = features.to(self.pivot) - self.pivot
        self.count += len(x)
        self.shifted_sum += x.sum(0)
        self.outer_sum += x.T @ x

    def mean(self) -> Tensor:
        """Mean (d)."""
        return self.pivot + self.shifted_sum / self.count

    def covariance(self) -> Tensor:
        """Covariance (d d) with divisor n - 1.

        Raises:
            ValueError: for fewer than two rows.
        """
        _check_count(self.count)
        outer = torch.outer(self.shifted_sum, self.shifted_sum / self.count)
        return (self.outer_sum - outer) / (self.count - 1)


class Gaussian(NamedTuple):
    """What is kept of a set that does not change: mean (d), trace of C, and its root U (d d)."""

    mean: Tensor
    trace: Tensor
    root: Tensor

    @classmethod
    def from_moments(cls, moments: Moments) -> "Gaussian":
        """The upper triangular root, by Cholesky, or by eigenvalues where C has not full rank."""
        covariance = moments.covariance()
        lower, failed = torch.linalg.cholesky_ex(covariance)
        root = lower.T
        if failed:
            values, vectors = torch.linalg.eigh(covariance)
            root = torch.linalg.qr(values.clamp(min=0).sqrt()[:, None] * vectors.T, mode="r").R
        return cls(moments.mean(), covariance.trace(), root.contiguous())


def frechet_distance(moments: Moments, reference: Gaussian) -> Tensor:
    """Fréchet's distance, squared as is usual, of a set of features from one whose root is kept."""
    covariance = moments.covariance()
    values = torch.linalg.eigvalsh(_conjugate_lower(reference.root, covariance))
    # of a feature that never changes, rounding leaves 1e-16 in place of 0, whose root is 1e-8
    noise = len(values) * torch.finfo(values.dtype).eps * values.amax()
    trace_root = torch.where(values > noise, values, 0.0).sqrt().sum()
    mean_distance = (moments.mean() - reference.mean).square().sum()
    return mean_distance + covariance.trace() + reference.trace - 2 * trace_root


def _check_count(count: int) -> None:
    if count < 2:
        raise UsageError(
            f"a distance of {count} images is not defined; allowed: 2 or more; give more"
        )


def _conjugate_lower(root: Tensor, covariance: Tensor) -> Tensor:
    """U C Uᵀ below and on the diagonal, all that `eigvalsh` reads: half the work of two products.

    U (d d) is zero below the diagonal, so each block of rows needs only what is right of it.
    """
    starts = range(0, len(root), ROW_BLOCK)
    left = torch.cat([root[s : s + ROW_BLOCK, s:] @ covariance[s:] for s in starts])  # (d d)
    product = torch.zeros_like(covariance)
    for s in starts:
        product[s:, s : s + ROW_BLOCK] = left[s:, s:] @ root[s : s + ROW_BLOCK, s:].T
    return product


def kernel_distance(features: Tensor, reference_features: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of all features (n d) and all others (m d), unbiased."""
    x, y = features.double(), reference_features.double()
    n, m = len(x), len(y)
    _check_count(n)
    _check_count(m)
    mean_xx = _kernel_sum(x, x) - _kernel(x.square().sum(1), x).sum()
    mean_yy = _kernel_sum(y, y) - _kernel(y.square().sum(1), y).sum()
    mean_xy = _kernel_sum(x, y) / (n * m)
    return mean_xx / (n * (n - 1)) + mean_yy / (m * (m - 1)) - 2 * mean_xy


def _kernel(products: Tensor, like: Tensor) -> Tensor:
    return (products / like.shape[1] + 1).pow(3)


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Sum of all kernel values, a few rows at a time: the matrix itself may be too large."""
    return torch.stack([_kernel(rows @ y.T, y).sum() for rows in x.split(KERNEL_ROWS)]).sum()
