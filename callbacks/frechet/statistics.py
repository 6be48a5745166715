"""Fréchet distance (FID) and kernel distance (KID) between two sets of features, in float64.

    Fréchet   |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½,   means m, covariances C (divisor n - 1)
              tr (C1 C2)^½ = sum of sqrt of the eigenvalues of U C1 Uᵀ,   Uᵀ U = C2
    kernel    mean k(x, x') + mean k(y, y') - 2 mean k(x, y),  x != x', y != y',
              k(x, y) = (x·y / d + 1)³

U C1 Uᵀ is symmetric, so its eigenvalues are real and cheaper to compute than those of C1 C2.
Rank-deficient covariances give tiny eigenvalues of either sign, which count as 0, as in the
numerical rank of a matrix. U belongs to the real data, which do not change, so it is stored. The
Fréchet distance is biased upwards by about c / n, so only distances at equal n can be compared.
The kernel distance is unbiased.
Sources: Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID).

Axes: n images, d features.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError

ROW_BLOCK = 256  # rows of a triangular matrix in one product
KERNEL_ROWS = 1024  # rows of the kernel matrix computed at once: 8 MB per thousand columns


@dataclass
class Moments:
    """Sums of features around a fixed pivot (d), accumulated block by block.

    The pivot makes one pass numerically safe: without it, features of mean 100 and deviation 1
    would lose four digits of their covariance. The last bits depend on the order of the blocks:
    equal blocks in equal order give equal bits.
    """

    pivot: Tensor
    count: int = 0
    shifted_sum: Tensor = field(init=False)  # sum of x - pivot (d)
    outer_sum: Tensor = field(init=False)  # sum of their outer products (d d)

    def __post_init__(self) -> None:
        """Start with sums of zero."""
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
        """Return the mean (d)."""
        return self.pivot + self.shifted_sum / self.count

    def covariance(self) -> Tensor:
        """Return the covariance (d d) with divisor n - 1.

        Raises:
            UsageError: there are fewer than two rows.
        """
        _check_count(self.count)
        outer = torch.outer(self.shifted_sum, self.shifted_sum / self.count)
        return (self.outer_sum - outer) / (self.count - 1)


class Gaussian(NamedTuple):
    """Statistics of a fixed set of features: mean (d), trace of C, and root U (d d) of C."""

    mean: Tensor
    cov_trace: Tensor
    cov_root: Tensor

    @classmethod
    def from_moments(cls, moments: Moments) -> "Gaussian":
        """Compute the upper triangular root by Cholesky, or by eigenvalues if C lacks full rank."""
        covariance = moments.covariance()
        lower, failed = torch.linalg.cholesky_ex(covariance)
        root = lower.T
        if failed:
            values, vectors = torch.linalg.eigh(covariance)
            root = torch.linalg.qr(values.clamp(min=0).sqrt()[:, None] * vectors.T, mode="r").R
        return cls(moments.mean(), covariance.trace(), root.contiguous())


def frechet_distance(moments: Moments, reference: Gaussian) -> Tensor:
    """Return the Fréchet distance, squared as is usual, of a set of features from a reference."""
    covariance = moments.covariance()
    values = torch.linalg.eigvalsh(_conjugate_lower(reference.cov_root, covariance))
    # for a constant feature, rounding gives 1e-16 instead of 0, and the root would be 1e-8
    noise = len(values) * torch.finfo(values.dtype).eps * values.amax()
    trace_root = torch.where(values > noise, values, 0.0).sqrt().sum()
    mean_distance = (moments.mean() - reference.mean).square().sum()
    return mean_distance + covariance.trace() + reference.cov_trace - 2 * trace_root


def _check_count(count: int) -> None:
    if count < 2:
        raise UsageError(
            f"FrechetDistance: the covariance of {count} image{'s' * (count != 1)} is not defined",
            ["2 images or more"],
            hint="use more images",
        )


def _conjugate_lower(root: Tensor, covariance: Tensor) -> Tensor:
    """Compute the lower triangle of U C Uᵀ, which `eigvalsh` reads: half the work of two products.

    U (d d) is zero below the diagonal, so each block of rows needs only the columns from its
    diagonal block to the right.
    """
    starts = range(0, len(root), ROW_BLOCK)
    left = torch.cat([root[s : s + ROW_BLOCK, s:] @ covariance[s:] for s in starts])  # (d d)
    product = torch.zeros_like(covariance)
    for s in starts:
        product[s:, s : s + ROW_BLOCK] = left[s:, s:] @ root[s : s + ROW_BLOCK, s:].T
    return product


def kernel_distance(features: Tensor, reference_features: Tensor) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of two sets of features (n d), (m d)."""
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
    """Sum all kernel values, a few rows at a time, because the matrix may be too large."""
    return torch.stack([_kernel(rows @ y.T, y).sum() for rows in x.split(KERNEL_ROWS)]).sum()
