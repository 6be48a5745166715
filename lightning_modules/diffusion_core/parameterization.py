"""Parameterizations (prediction types) of a diffusion net, and their conversion to x0.

    x = α x0 + σ ε     the noisy image;  a, s = α, σ over r,  r² = α² + σ²

    x0        the image
    eps       the noise ε
    v         a ε - s x0         near ε at low noise, near -x0 at high noise
    velocity  ε - x0             dx/dt of flow matching

For a known x each target is linear in x0, so a conversion between them is exact. An error of the
output is `x0_error_gain` times as large in x0. For data with another standard deviation d the
target uses x0/d; v is then the prediction of EDM's net (negated: c_out = -σ d / r).

Axes: b batch, c y x images; α and σ are (b 1 1 1), or numbers.
"""

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["x0", "eps", "v", "velocity"]
LossWeighting = Literal["uniform", "min_snr", "edm"]


def predict_x0(
    prediction_type: PredictionType, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Convert the net's output to x0, (b c y x)."""
    if prediction_type == "x0":
        return output
    if prediction_type == "eps":
        return (x - sigma * output) / alpha
    if prediction_type == "velocity":
        return (x - sigma * output) / (alpha + sigma)
    total_variance = alpha**2 + sigma**2
    return (alpha * x - sigma * total_variance**0.5 * output) / total_variance


def compute_target(
    prediction_type: PredictionType, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Training target for an image and its noise, (b c y x)."""
    if prediction_type == "x0":
        return x0
    if prediction_type == "eps":
        return eps
    if prediction_type == "velocity":
        return eps - x0
    return (alpha * eps - sigma * x0) / (alpha**2 + sigma**2) ** 0.5


def x0_error_gain(prediction_type: PredictionType, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Ratio of an error in x0 to the error of the net's output."""
    if prediction_type == "x0":
        return torch.ones_like(sigma)
    if prediction_type == "eps":
        return sigma / alpha
    if prediction_type == "velocity":
        return sigma / (alpha + sigma)
    return sigma / (alpha**2 + sigma**2) ** 0.5


def compute_loss_weight(
    weighting: LossWeighting, prediction_type: PredictionType, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Weight of the squared error of the net's output in the loss.

    uniform   1: mean squared error of the output
    min_snr   min(α²/σ², 5) on the squared error of x0    (Hang et al. 2023)
    edm       (α² + σ²) / σ² on the squared error of x0   (Karras et al. 2022)
    """
    if weighting == "uniform":
        return torch.ones_like(sigma)
    x0_weight = (alpha / sigma) ** 2
    x0_weight = x0_weight.clamp(max=5) if weighting == "min_snr" else 1 + x0_weight
    return x0_weight * x0_error_gain(prediction_type, alpha, sigma) ** 2
