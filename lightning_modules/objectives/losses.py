"""Losses of linear models on one sample, and the finite sum that they form (lectures 2 and 4).

    half_squared   (p - y)^2 / 2           lecture 2
    squared        (p - y)^2               lecture 4; its gradient is twice that of half_squared
    absolute       |p - y|
    huber          (p - y)^2 / 2 for |p - y| <= 1, else |p - y| - 1/2
    logistic       log(1 + exp(-y p))      y = +1 or -1; binary_cross_entropy_with_logits wants 0, 1
    hinge          max(0, 1 - y p)         y = +1 or -1
    softmax        -log softmax(p)_y       p has a score for each class, y is a class from 0

p = x'w is the prediction for the features x of a sample. The objective of a problem is the mean of
the losses of all samples plus l1 |w|_1 + (l2 / 2) |w|^2.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["half_squared", "squared", "absolute", "huber", "logistic", "hinge", "softmax"]
SIGN_LOSSES = ("logistic", "hinge")  # their labels are +1 and -1
CURVATURES = {"half_squared": 1.0, "squared": 2.0}  # second derivative in p


def half_squared(predictions: Tensor, labels: Tensor) -> Tensor:
    """Half of the squared error, for each sample."""
    return (predictions - labels).square() / 2  # without the Python of the operator **


def squared(predictions: Tensor, labels: Tensor) -> Tensor:
    """Squared error, for each sample."""
    return (predictions - labels).square()


def absolute(predictions: Tensor, labels: Tensor) -> Tensor:
    """Absolute error, for each sample."""
    return (predictions - labels).abs()


def huber(predictions: Tensor, labels: Tensor) -> Tensor:
    """Huber loss: half of the squared error up to an error of 1, linear beyond."""
    return F.huber_loss(predictions, labels, reduction="none")


def logistic(predictions: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of labels +1 and -1."""
    return F.softplus(-labels * predictions)


def hinge(predictions: Tensor, labels: Tensor) -> Tensor:
    """Hinge loss of labels +1 and -1."""
    return (1 - labels * predictions).clamp(min=0)


def softmax(predictions: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of class scores (... classes) with class numbers (...)."""
    classes = labels.long().expand(predictions.shape[:-1])  # (...)
    chosen = predictions.gather(-1, classes.unsqueeze(-1)).squeeze(-1)  # (...)
    return predictions.logsumexp(-1) - chosen


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "half_squared": half_squared,
    "squared": squared,
    "absolute": absolute,
    "huber": huber,
    "logistic": logistic,
    "hinge": hinge,
    "softmax": softmax,
}


def soft_threshold(values: Tensor, threshold: float | Tensor) -> Tensor:
    """Proximal step of threshold |w|_1: move each number toward 0 by the threshold, and stop at 0.

    prox(v) = sign(v) max(|v| - threshold, 0) = argmin_w (w - v)^2 / 2 + threshold |w|
    """
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def max_l1_penalty(x: Tensor, y: Tensor, curvature: float) -> Tensor:
    """Smallest l1 for which w = 0 minimizes the squared loss: max |curvature X'y| / n.

    Args:
        x: features (n d).
        y: labels (n).
        curvature: 1 for half_squared, 2 for squared.
    """
    return (curvature * torch.mv(x.T, y) / len(y)).abs().max()
