"""Minimizers of linear models in closed form or to the precision of float64.

    squared losses     a linear system, with l2 on its diagonal
    squared + l1       scikit-learn's coordinate descent finds the signs; the system of the nonzero
                       weights then gives their values
    smooth losses      Newton's method with halved steps, until a step is rounding error
    absolute, hinge    a linear program, solved by scipy (HiGHS)

A problem without a minimizer, such as the logistic loss of separable data, has none here too: the
functions then return None.

Axes: n samples, d weights, k classes.
"""

import warnings

import numpy
import torch
from torch import Tensor

from .losses import CURVATURES, LOSSES

MAX_NEWTON_STEPS = 200
STEP_PRECISION = 1e-12  # relative to the largest weight: the last Newton step
SMALLEST_FRACTION = 1e-10  # of a Newton step


def find_minimizer(
    x: Tensor, y: Tensor, loss: str, l1: float, l2: float, penalized: Tensor, num_classes: int = 1
) -> Tensor | None:
    """Return the weights (d), for softmax (d k) flattened, that minimize the objective, or None.

    Args:
        x: features (n d), float64.
        y: labels (n).
        loss: a name of `LOSSES`.
        l1: weight of |w|_1; only squared losses have a minimizer here with it.
        l2: weight of |w|^2 / 2.
        penalized: 1 for weights with a penalty, 0 for the intercept (d).
        num_classes: k of softmax; 1 otherwise.
    """
    # CURVATURES: the second derivative of the squared losses, by name
    if l1:
        return _minimize_lasso(x, y, loss, l1) if loss in CURVATURES and not l2 else None
    if loss in CURVATURES:
        curvature = CURVATURES[loss]
        if not l2:
            # by orthogonalization of x, which loses fewer digits than x'x
            return torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
        hessian = curvature * x.T @ x / len(y) + l2 * torch.diag(penalized)
        return torch.linalg.solve(hessian, curvature * x.T @ y / len(y))
    if loss in ("absolute", "hinge"):
        return None if l2 else _minimize_linear_program(x, y, loss)
    return _minimize_smooth(x, y, loss, l2, penalized, num_classes)


def _minimize_lasso(x: Tensor, y: Tensor, loss: str, l1: float) -> Tensor | None:
    """Minimize c / (2 n) |x w - y|^2 + l1 |w|_1, where c is the curvature of the loss.

    The sign of each nonzero weight is known from coordinate descent. With these signs s the
    condition of a minimum is a linear system: c x'(x w - y) / n = -l1 s on the nonzero weights.
    """
    from sklearn.linear_model import Lasso  # takes 0.3 s, and only an l1 penalty needs it

    curvature = CURVATURES[loss]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning about the tolerance, which no step can reach
        model = Lasso(alpha=l1 / curvature, fit_intercept=False, tol=1e-12, max_iter=100_000)
        signs = torch.from_numpy(numpy.sign(model.fit(x.numpy(), y.numpy()).coef_))
    support = signs != 0
    weights = torch.zeros(x.shape[1], dtype=x.dtype)
    if not support.any():
        return weights
    columns = x[:, support]  # (n nonzero)
    right = columns.T @ y - l1 * len(y) / curvature * signs[support]
    weights[support] = torch.linalg.solve(columns.T @ columns, right)
    return weights if bool((weights.sign() == signs).all()) else None


def _minimize_smooth(
    x: Tensor, y: Tensor, loss: str, l2: float, penalized: Tensor, num_classes: int
) -> Tensor | None:
    """Minimize a twice differentiable convex loss by Newton's method; None if it does not end."""
    shape = (x.shape[1],) if num_classes == 1 else (x.shape[1], num_classes)

    def objective(weights: Tensor) -> Tensor:
        w = weights.view(shape)
        penalty = (penalized.view(-1, *[1] * (w.ndim - 1)) * w**2).sum() * l2 / 2
        return LOSSES[loss](x @ w, y).mean() + penalty

    weights = torch.zeros(x.shape[1] * num_classes, dtype=x.dtype)
    for _ in range(MAX_NEWTON_STEPS):
        gradient = torch.func.grad(objective)(weights)
        hessian = torch.func.jacrev(torch.func.grad(objective))(weights)
        # equal shifts of all class scores change nothing, so the system may be singular
        step = torch.linalg.lstsq(hessian, gradient[:, None], driver="gelsd").solution[:, 0]
        scale = max(1.0, float(weights.abs().max()))
        # the step and not the gradient: on separable data each step is about 1, without an end
        if float(step.abs().max()) <= STEP_PRECISION * scale:
            return weights - step
        value, size = float(objective(weights)), 1.0
        while size > SMALLEST_FRACTION and not float(objective(weights - size * step)) < value:
            size /= 2
        # no smaller value in float64: a minimum if the step is small, too
        if size <= SMALLEST_FRACTION:
            return weights if float(step.abs().max()) <= 1e-6 * scale else None
        weights = weights - size * step
    return None


def _minimize_linear_program(x: Tensor, y: Tensor, loss: str) -> Tensor | None:
    """Minimize the mean absolute or hinge loss, a linear program in the weights and n slacks.

    absolute: slack_i >= |x_i'w - y_i|;   hinge: slack_i >= 1 - y_i x_i'w and slack_i >= 0.
    """
    from scipy.optimize import linprog  # scikit-learn depends on it

    features, labels = x.numpy(), y.numpy()
    n, d = features.shape
    cost = numpy.concatenate((numpy.zeros(d), numpy.full(n, 1 / n)))
    identity = numpy.eye(n)
    if loss == "absolute":
        upper = numpy.block([[features, -identity], [-features, -identity]])
        bounds = numpy.concatenate((labels, -labels))
    else:
        upper = numpy.hstack((-labels[:, None] * features, -identity))
        bounds = -numpy.ones(n)
    slack_bounds = [(None, None)] * d + [(0, None)] * n  # weights of any sign, slacks from 0
    result = linprog(cost, A_ub=upper, b_ub=bounds, bounds=slack_bounds, method="highs")
    return torch.from_numpy(result.x[:d].copy()) if result.success else None
