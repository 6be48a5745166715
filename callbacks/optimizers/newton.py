"""Newton's method for a few parameters: multiply the gradient by the inverse Hessian (lecture 8).

    w <- w - lr (H + damping I)^-1 g

The Hessian H is computed by double backward if autograd supports it. It is then exact, also at a
flat minimum. A finite difference of gradients in one direction verifies it, because a hand-written
backward may be a constant to autograd. Otherwise, and on several ranks, column i of H is

    (g(w + h e_i) - g(w - h e_i)) / 2h

This takes two gradients per parameter, all from the same batch. For the loss u^4 it adds 4 h^2 to
the curvature.

The entries of H hide a curvature that is small beside them: 1 + 1e-17 is 1 in float64. So if H has
eigenvalues of very different sizes, the double backward of the last gradient differentiates along
the eigenvectors q instead of the axes, which gives q' H q with all of its digits.

On a quadratic, one step with damping 0 and lr 1 reaches the minimum. On u^4 each step multiplies
the distance to the minimum by 2/3. Each of several ranks gathers the full gradient and solves the
same small system.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ravine.errors import UsageError
from ravine.strategies.dtensor import full_tensor, shard_like, to_local

from .lr_schedules import LRSchedule
from .plan import OptimizerPlan

__all__ = ["Newton", "NewtonOptimizer"]

MAX_PARAMS = 256  # 512 gradients in a step


class NewtonOptimizer(Optimizer):
    """Damped Newton; `step` needs the closure that computes the loss and its gradients.

    Parameters may be sharded over ranks. Example: `NewtonOptimizer(model.parameters())`, then
    `step(closure)`.

    Args:
        params: at most 256 numbers in total; differences in float64 are exact to eight digits.
        lr: the fraction of the Newton step that is taken.
        damping: added to the diagonal of H; a large damping makes this gradient descent.
    """

    needs_full_gradient = (
        True  # read by plans and ZeRO-1: every rank takes the full step and keeps no state
    )

    def __init__(self, params: Iterable[Any], lr: float = 1.0, damping: float = 0.0) -> None:
        """Check the number of parameters."""
        super().__init__(params, {"lr": lr, "damping": damping})
        size = sum(p.numel() for p in self._all_parameters())
        if size > MAX_PARAMS or len(self.param_groups) > 1:
            raise UsageError(
                f"Newton computes two gradients for each number in a step; {size} numbers in "
                f"{len(self.param_groups)} groups are too many",
                [f"one group of at most {MAX_PARAMS} numbers"],
                hint="use torch.optim.LBFGS",
            )

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all n weights by w <- w - lr (H + damping I)^-1 g, and return the loss.

        The closure computes the loss and its gradients. It is called 3 to 5 times if autograd can
        differentiate twice, and up to 2 n + 6 times if H needs differences of gradients.

        Raises:
            UsageError: the system has no unique solution.
        """
        parameters, group = self._all_parameters(), self.param_groups[0]
        start = _flatten(parameters)  # (n), also of sharded parameters
        loss: Any = None

        def compute_gradient(at: Tensor) -> Tensor:  # at the weights `at` (n), which stay set
            nonlocal loss
            _unflatten_into(at, parameters)
            self.zero_grad()
            with torch.enable_grad():
                loss = closure()
            return _flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])

        # the cube root of the precision balances the rounding error and the third derivative
        step_sizes = torch.finfo(start.dtype).eps ** (1 / 3) * start.abs().clamp(min=1)
        with _SecondDerivatives(parameters) as second_derivatives:  # acts on the closure's backward
            compute_gradient(start)
        # (n n), computed in that backward pass; it is checked against differences, because a
        # function of the net may have no or a wrong second derivative
        hessian = second_derivatives.hessian  # None if autograd cannot differentiate twice
        if hessian is None or not _matches_differences(
            hessian, compute_gradient, start, step_sizes
        ):
            # column i: central difference of the gradient along weight i, with step size h
            columns = [
                (compute_gradient(start + offset) - compute_gradient(start - offset)) / (2 * h)
                for offset, h in zip(torch.diag(step_sizes), step_sizes, strict=True)
            ]
            hessian, second_derivatives.is_possible = torch.stack(columns), False
        hessian = (hessian + hessian.T) / 2
        basis = _find_basis(hessian) if second_derivatives.is_possible else None  # (n n)
        if basis is None:
            gradient = compute_gradient(start)
        else:
            with _SecondDerivatives(parameters, basis) as second_derivatives:
                gradient = basis.T @ compute_gradient(start)
            hessian = second_derivatives.hessian
            assert hessian is not None  # the same functions were differentiated twice before
            hessian = (hessian + hessian.T) / 2
        hessian = hessian + group["damping"] * torch.eye(len(start)).to(start)
        solution, solve_info = torch.linalg.solve_ex(hessian, gradient)
        if basis is not None:
            solution = basis @ solution
        if solve_info or (basis is not None and _is_singular(hessian)):
            raise UsageError(
                f"Newton: damping={group['damping']} is too small, because the curvature is zero "
                "in some direction",
                hint="use damping=1e-3",
                flag="--trainer.callbacks.Newton.damping=1e-3",
            )
        _unflatten_into(start - group["lr"] * solution, parameters)
        return loss  # of the last call, at the weights before the step


def _find_basis(hessian: Tensor) -> Tensor | None:
    """Return the eigenvectors of H (n n), as columns, if its entries lack digits of a curvature.

    That is so if an eigenvalue is below the root of the precision, relative to the largest one.
    """
    if not bool(hessian.isfinite().all()):
        return None
    eigenvalues, basis = torch.linalg.eigh(hessian)
    sizes = eigenvalues.abs()
    is_flat = sizes.min() < torch.finfo(hessian.dtype).eps ** 0.5 * sizes.max()
    return basis if bool(is_flat) else None


def _is_singular(hessian: Tensor) -> bool:
    """Whether a curvature of H (n n), in its eigenvectors, is the rounding error of zero."""
    curvatures = hessian.diagonal().abs()
    return bool(curvatures.min() <= torch.finfo(hessian.dtype).eps ** 2 * curvatures.max())


class _SecondDerivatives(TorchFunctionMode):
    """Context in which each `Tensor.backward` also computes the Hessian of its tensor.

    With a basis Q (n n) of orthogonal columns it is Q' H Q.
    """

    def __init__(self, parameters: list[Tensor], basis: Tensor | None = None) -> None:
        super().__init__()
        self.parameters, self.basis = parameters, basis
        self.hessian: Tensor | None = None  # (n n), the sum over all backward calls
        self.is_possible = not any(isinstance(p, DTensor) for p in parameters)
        if dist.is_initialized() and dist.get_world_size() > 1:  # only gradients are averaged
            self.is_possible = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward and self.is_possible:
            try:
                hessian = self._differentiate(args[0])
            except RuntimeError:  # a kernel without a second derivative
                self.is_possible, self.hessian = False, None
            else:
                self.hessian = hessian if self.hessian is None else self.hessian + hessian
        return func(*args, **kwargs)

    @torch.enable_grad()
    def _differentiate(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        slope = _flatten_gradients(gradients, self.parameters)  # (n)
        if not slope.requires_grad:
            return slope.new_zeros(len(slope), len(slope))
        components = slope if self.basis is None else [slope @ q for q in self.basis.T]
        rows = [
            torch.autograd.grad(component, self.parameters, retain_graph=True, allow_unused=True)
            for component in components
        ]
        products = torch.stack([_flatten_gradients(row, self.parameters) for row in rows]).detach()
        return products if self.basis is None else products @ self.basis  # (n n)


def _flatten_gradients(gradients: Sequence[Tensor | None], parameters: list[Tensor]) -> Tensor:
    """Concatenate gradients into one vector (n), with zeros for missing gradients."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def _matches_differences(
    hessian: Tensor,
    compute_gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    step_sizes: Tensor,
) -> bool:
    """Whether H (n n) agrees with finite differences of the gradient in one direction.

    Both agree to 1 %, or the error falls below half when the step is halved, as at a flat minimum.

    Args:
        hessian: H, from double backward.
        compute_gradient: returns the gradient (n) at given weights (n).
        start: the weights (n) of H.
        step_sizes: step of a difference for each weight (n).
    """
    # relative rounding error of a difference with a step of eps^(1/3)
    precision = torch.finfo(start.dtype).eps ** (2 / 3)
    generator = torch.Generator().manual_seed(0)
    # one random direction: plus or minus the step of each weight
    direction = torch.randn(len(start), generator=generator).sign().to(start) * step_sizes
    errors: list[Tensor] = []
    for fraction in (1.0, 0.5):
        step = fraction * direction
        above, below = compute_gradient(start + step), compute_gradient(start - step)
        difference = (above - below) / (2 * fraction)
        rounding = 10 * precision * (above.abs() + below.abs()).max()
        errors.append((hessian @ direction - difference).norm())
        if errors[-1] <= 0.01 * difference.norm() + rounding * step_sizes.max():
            return True
    return bool(errors[1] < 0.5 * errors[0])


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Concatenate all values (n) of tensors that may be sharded; every rank calls it."""
    return torch.cat([full_tensor(tensor).reshape(-1) for tensor in tensors])


def _unflatten_into(numbers: Tensor, parameters: list[Tensor]) -> None:
    """Copy the values (n) into the parameters, or into this rank's shards of them."""
    for p, values in zip(parameters, numbers.split([p.numel() for p in parameters]), strict=True):
        to_local(p).copy_(shard_like(values.view(p.shape), p))


class Newton(OptimizerPlan):
    """Train all parameters with Newton's method: `--trainer.callbacks+=Newton`.

    Args:
        lr: the fraction of the Newton step that is taken.
        damping: added to the diagonal of the Hessian.
        schedule: the learning-rate schedule.
    """

    def __init__(
        self, lr: float = 1.0, damping: float = 1e-3, schedule: LRSchedule | None = None
    ) -> None:
        """Create a plan whose only rule takes all parameters."""
        super().__init__(partial(NewtonOptimizer, lr=lr, damping=damping), schedule=schedule)
