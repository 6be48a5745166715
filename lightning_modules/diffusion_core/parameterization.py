"""What the net may be asked for, and how each answer becomes an estimate of the image x0.

    x = α x0 + σ ε     the noisy image;  a, s = α, σ over r,  r² = α² + σ²

    x0        itself
    eps       the noise ε
    v         a ε - s x0         near ε where noise is weak, near -x0 where it is strong
    velocity  ε - x0             dx/dt of flow matching

All are linear in x0 once x is known, so a change from one to the other is exact, and an error of
the answer is `gain` times as large in x0. With data of another spread d, x0/d is what is asked for,
and v is then what EDM's net predicts (negated: c_out = -σ d / r).

Axes: b batch, c y x images; levels are (b 1 1 1), or numbers.
"""

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["x0", "eps", "v", "velocity"]
Weight = Literal["uniform", "min_snr", "edm"]


def to_x0(kind: Prediction, answer: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The image that the net's answer means, (b c y x)."""
    if kind == "x0":
        return answer
    if kind == "eps":
        return (x - sigma * answer) / alpha
    if kind == "velocity":
        return (x - sigma * answer) / (alpha + sigma)
    square = alpha**2 + sigma**2
    return (alpha * x - sigma * square**0.5 * answer) / square


def from_x0(kind: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The right answer for an image and its noise, (b c y x)."""
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "velocity":
        return eps - x0
    return (alpha * eps - sigma * x0) / (alpha**2 + sigma**2) ** 0.5


def gain(kind: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """How many times an error of the answer an error of x0 is."""
    if kind == "x0":
        return torch.ones_like(sigma)
    if kind == "eps":
        return sigma / alpha
    if kind == "velocity":
        return sigma / (alpha + sigma)
    return sigma / (alpha**2 + sigma**2) ** 0.5


def weight(how: Weight, kind: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """By what the squared error of the answer is multiplied.

    uniform   1: whatever is asked for, its mean squared error
    min_snr   min(α²/σ², 5) on the squared error of x0    (Hang et al. 2023)
    edm       (α² + σ²) / σ² on the same                  (Karras et al. 2022)
    """
    if how == "uniform":
        return torch.ones_like(sigma)
    of_x0 = (alpha / sigma) ** 2
    of_x0 = of_x0.clamp(max=5) if how == "min_snr" else 1 + of_x0
    return of_x0 * gain(kind, alpha, sigma) ** 2
