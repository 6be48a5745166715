"""Muon: step along the orthogonalized momentum, its polar factor (lecture 8; Jordan, 2024).

    M <- M + (1 - mu) (G - M)          momentum
    N  = G + mu (M - G)                Nesterov momentum; N = M without it
    O  = U V^T for N = U S V^T         orthogonalized by matrix products: singular values become 1
    W <- (1 - lr decay) W - lr scale O

The spectral norm of a step is lr times the scale; see SCALES.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from ravine.errors import UsageError
from ravine.strategies.bfloat16 import has_fast_bfloat16
from ravine.strategies.dtensor import to_local

from .distributed_matrix_op import apply_to_full_matrices
from .elementwise import check_not_sparse
from .lr_schedules import LRSchedule
from .parameter_rules import DecayFilter, OptimizerFactory, ParamRule
from .plan import OptimizerPlan

__all__ = ["Muon", "MuonOptimizer"]

Scale = Literal["spectral", "spectral_clamped", "rms"]
Coefficients = Literal["newton_schulz", "polar_express"]
IterationDtype = Literal["auto", "bfloat16", "float32", "float64"]

# Scale of the step for a matrix with `rows` outputs and `columns` inputs.
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(rows / columns),  # output RMS changes by lr
    "spectral_clamped": lambda rows, columns: math.sqrt(max(1, rows / columns)),  # Jordan, torch
    # update RMS of AdamW, so that its lr can be reused
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}

# Safety factor on the norm by which X is divided first, then a, b, c of each iteration
# X <- a X + (b A + c A^2) X with A = X X^T. The five steps of Polar Express (Amsel et al., 2025)
# are one sequence: the iteration diverges with another number of steps or another last step.
ITERATIONS: dict[str, tuple[float, list[tuple[float, float, float]]]] = {
    "newton_schulz": (1.0, [(3.4445, -4.7750, 2.0315)] * 5),
    "polar_express": (
        1.02,
        [
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ],
    ),
}


def orthogonalize(
    matrices: Tensor, coefficients: Coefficients = "polar_express", eps: float = 1e-7
) -> Tensor:
    """Return the approximate polar factors of matrices (..., r, c) in their dtype; 0 stays 0."""
    safety, steps = ITERATIONS[coefficients]
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices  # rows <= columns, so that A = X X^T is small
    norm = x.norm() if x.ndim == 2 else x.norm(dim=(-2, -1), keepdim=True)
    x = x / (safety * norm).clamp(min=eps)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in steps:
        square = x @ x.mT
        square = product(square, square, square, beta=b, alpha=c)
        x = product(x, square, x, beta=a)
    return x.mT if tall else x


def should_batch(matrix: Tensor) -> bool:
    """Whether one batched call for many matrices (r, c) is faster than one call for each.

    On an accelerator kernel launches dominate. On a CPU the decision follows this ratio of the
    batched time to the time of a loop (one thread, process time):

        bf16    0.2 at 64 x 64, 0.55 at 128 x 128, 1.06 at 256 x 1024
        fp32    0.7 at 64 x 64, 1.05 at 128 x 128
    """
    if matrix.device.type != "cpu":
        return True
    return min(matrix.shape) <= (128 if matrix.dtype == torch.bfloat16 else 64)


def orthogonalize_batch(
    matrices: Tensor, coefficients: Coefficients = "polar_express", num_blocks: int = 1
) -> Tensor:
    """Orthogonalize n matrices or kernels (n, rows, ...), each of their row blocks separately.

    The axes after `rows` are flattened. The rows of each matrix form `num_blocks` blocks.
    """
    rows = matrices.shape[1] // num_blocks
    blocks = matrices.reshape(len(matrices) * num_blocks, rows, -1)  # (n num_blocks, r, c)
    if should_batch(blocks[0]):
        return orthogonalize(blocks, coefficients).reshape(matrices.shape)
    outputs = torch.empty_like(blocks)
    for block, result in zip(blocks, outputs, strict=True):
        result.copy_(orthogonalize(block, coefficients))
    return outputs.reshape(matrices.shape)


class MuonOptimizer(Optimizer):
    """Muon for matrices and convolution kernels: sharded (FSDP2), replicated or on one device.

    With `coefficients="newton_schulz"` and `iteration_dtype="bfloat16"` the result is bitwise equal
    to torch.optim.Muon. Example: `MuonOptimizer(matrices, lr=0.02, weight_decay=0.1)`.

    Args:
        params: matrices; the first axis is the outputs.
        lr: step size; the spectral norm of the change of W is lr times the scale.
        momentum: mu, the decay factor of the old momentum.
        nesterov: use Nesterov momentum.
        scale: how the step depends on the shape; a row of SCALES.
        coefficients: the iteration that orthogonalizes; a row of ITERATIONS.
        iteration_dtype: auto is bfloat16 if the device computes in it, else float32.
        weight_decay: lambda in W <- (1 - lr lambda) W.
        num_blocks: number of row blocks that are separate matrices; 3 for a joint q, k, v
            projection.
    """

    matrices_only = True  # read by the rules of a plan
    supports_dtensor = True
    replica_group: ProcessGroup | None = None  # ranks that hold the same weights; the plan sets it

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Scale = "spectral_clamped",
        coefficients: Coefficients = "polar_express",
        iteration_dtype: IterationDtype = "auto",
        weight_decay: float = 0.0,
        num_blocks: int = 1,
    ) -> None:
        """Check the arguments and that every parameter is a real matrix.

        Args:
            params: matrices or convolution kernels, or param groups; the first axis is the outputs.
            lr: step size.
            momentum: decay factor of the old momentum.
            nesterov: use Nesterov momentum.
            scale: how the step depends on the shape; a row of SCALES.
            coefficients: the iteration that orthogonalizes; a row of ITERATIONS.
            iteration_dtype: auto is bfloat16 if the device computes in it, else float32.
            weight_decay: lambda in W <- (1 - lr lambda) W.
            num_blocks: number of row blocks that are separate matrices.
        """
        # SCALES and ITERATIONS: tables by name
        for argument, value, allowed in (
            ("scale", scale, SCALES),
            ("coefficients", coefficients, ITERATIONS),
        ):
            if value not in allowed:
                raise UsageError(
                    f"Muon: {argument}={value!r} does not exist",
                    allowed,
                    hint=f"use {argument}={next(iter(allowed))!r}",
                    flag=f"--trainer.callbacks.Muon.{argument}={next(iter(allowed))}",
                )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale": scale,
            "coefficients": coefficients,
            "iteration_dtype": iteration_dtype,
            "weight_decay": weight_decay,
            "num_blocks": num_blocks,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.is_complex():
                    raise UsageError(
                        f"Muon does not support {p.dtype}, the dtype of a parameter of shape "
                        f"{tuple(p.shape)}",
                        ["matrices of real numbers"],
                        hint="use AdamW for this parameter",
                    )
                if p.ndim < 2 or p.shape[0] % group["num_blocks"]:
                    raise UsageError(
                        f"Muon does not support a parameter of shape {tuple(p.shape)} with "
                        f"num_blocks={group['num_blocks']}",
                        ["matrices whose number of rows is divisible by num_blocks"],
                        hint="use AdamW for this parameter",
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient; a closure computes the loss, returned here.

        Matrices of equal shape, dtype, device and layout on a mesh are batched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # by (shape, dtype, device, layout); the layout is None if a tensor is not sharded
            params_by_layout: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    check_not_sparse(self, p)
                    layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
                    params_by_layout.setdefault((p.shape, p.dtype, p.device, layout), []).append(p)
            for matrices in params_by_layout.values():
                self._update(group, matrices)
        return loss

    def _update(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        """Update matrices of equal shape and layout in place by the formula of Muon.

        Momentum is elementwise, on this rank's shards. Orthogonalization needs full matrices.
        """
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [to_local(self.state[p]["momentum_buffer"]) for p in matrices]
        gradients = [to_local(p.grad) for p in matrices if p.grad is not None]
        _foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        update = momenta
        if group["nesterov"]:
            update = _foreach_lerp(gradients, momenta, group["momentum"])
        dtype = resolve_iteration_dtype(group["iteration_dtype"], update[0].device)
        # (n, rows of the shard, ...); one copy both stacks and casts
        stack = update[0].new_empty((len(update), *update[0].shape), dtype=dtype)
        _foreach_copy_(list(stack), list(update))
        # replaces each full matrix by its polar factor, that is, all singular values by 1
        orthogonalize_stack = partial(
            orthogonalize_batch, coefficients=group["coefficients"], num_blocks=group["num_blocks"]
        )
        directions = apply_to_full_matrices(
            orthogonalize_stack, stack, like=matrices[0], replica_group=self.replica_group
        )
        rows = matrices[0].shape[0] // group["num_blocks"]
        # a factor that depends on rows and columns of a matrix; a kernel's axes are flattened
        scale = SCALES[group["scale"]](rows, math.prod(matrices[0].shape[1:]))
        weights = [to_local(p) for p in matrices]
        if weights[0].device.type != "cpu":  # a fused kernel needs equal dtypes; the CPU has none
            directions = directions.to(weights[0].dtype)
        _foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        _foreach_add_(weights, list(directions), alpha=-group["lr"] * scale)


def resolve_iteration_dtype(name: IterationDtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the iteration; `auto` avoids bfloat16 on CPUs that emulate it slowly."""
    if name != "auto":
        return getattr(torch, name)
    is_emulated = device.type == "cpu" and not has_fast_bfloat16("cpu")
    return torch.float32 if is_emulated else torch.bfloat16


class Muon(OptimizerPlan):
    """Train hidden matrices and convolutions with Muon, all other parameters with `aux_optimizer`.

    Example: `Muon(lr=0.02, aux_optimizer=partial(AdamW, lr=3e-3))`, or `--trainer.callbacks+=Muon`.

    Args:
        lr: learning rate of the matrices; see MuonOptimizer for all arguments of Muon.
        aux_optimizer: the optimizer of embeddings, heads, norms and biases; by default AdamW at
            3e-3.
        momentum: mu, the decay factor of the old momentum.
        nesterov: use Nesterov momentum.
        scale: how the step depends on the shape.
        coefficients: the iteration that orthogonalizes.
        iteration_dtype: the dtype of the iteration.
        weight_decay: weight decay of the matrices.
        decay: which tensors of each rule get their optimizer's weight decay.
        schedule: the schedule of both learning rates.
        print_groups: list the parameters of each rule.
    """

    def __init__(
        self,
        lr: float = 0.02,
        aux_optimizer: OptimizerFactory | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: Scale = "spectral_clamped",
        coefficients: Coefficients = "polar_express",
        iteration_dtype: IterationDtype = "auto",
        weight_decay: float = 0.0,
        decay: DecayFilter = "matrices",
        schedule: LRSchedule | None = None,
        print_groups: bool = False,
    ) -> None:
        """Create a plan with two rules: Muon for hidden matrices and convolutions, and the rest.

        Args:
            lr: learning rate of the matrices.
            aux_optimizer: optimizer of all other parameters; None for AdamW at 3e-3.
            momentum: argument of MuonOptimizer, as are the next five.
            nesterov: use Nesterov momentum.
            scale: how the step depends on the shape.
            coefficients: the iteration that orthogonalizes.
            iteration_dtype: the dtype of the iteration.
            weight_decay: weight decay of the matrices.
            decay: which tensors of each rule get their optimizer's weight decay.
            schedule: the schedule of both learning rates.
            print_groups: list the parameters of each rule.
        """
        # an optimizer factory: the plan calls it with the parameters of the rule
        muon = partial(
            MuonOptimizer,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            scale=scale,
            coefficients=coefficients,
            iteration_dtype=iteration_dtype,
            weight_decay=weight_decay,
        )
        rules = [
            ParamRule(["hidden_matrix", "convolution"], optimizer=muon),
            # without a kind, it takes all other parameters
            ParamRule(optimizer=aux_optimizer or partial(AdamW, lr=3e-3, betas=(0.9, 0.99))),
        ]
        super().__init__(decay=decay, schedule=schedule, rules=rules, print_groups=print_groups)
