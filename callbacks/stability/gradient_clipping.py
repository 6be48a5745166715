"""Clip gradients by their global norm, whatever they are spread over (lecture 8, modifiers).

    norm = sqrt(sum over all gradients of g^2);   g <- g * min(1, max_norm / norm)
    or, each number by itself,                    g <- min(max(g, -max_value), max_value)

A gradient sharded over a mesh is a DTensor: each rank sums its own shard and one reduction over
exactly the sharded axes of the mesh completes the sum. Gradients that live on different meshes
(tensor-parallel matrices beside a norm that is not) are summed mesh by mesh, then together.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import (
    Tensor,
    _foreach_clamp_max_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_clamp_min_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.lightning_compat import should_update_logs
from ravine.strategies.shards import to_local

from ..checks.run_checks import add_run_checks
from ..hooks import override_hook, restore_hook
from .nan_guard import NonFiniteError, SkippedSteps


def global_norm(
    gradients: Sequence[Tensor],
    pipeline: Any = None,
    excluded: Sequence[Tensor] = (),
    owned: tuple[ProcessGroup, Tensor] | None = None,
) -> Tensor:
    """The norm of all gradients together, () on their device, the same on every rank.

    In float64 if a gradient is, else in float32; 0 if there are none. In a pipeline each stage has
    its own gradients; another stage counts those in `excluded`. With ZeRO-1 each rank has the
    gradients that it owns: `owned` is the group of ranks, and a parameter of the widest dtype.
    """
    if not gradients and pipeline is None and owned is None:
        return torch.zeros(())
    reference = (
        gradients[0] if gradients else next(pipeline.module.parameters()) if pipeline else None
    )
    reference = reference if owned is None else owned[1]
    assert reference is not None
    exact = any(g.dtype in (torch.float64, torch.complex128) for g in [*gradients, reference])
    dtype = torch.float64 if exact else torch.float32
    gradients = [g for g in gradients if not any(g is other for other in excluded)]
    squares: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = None
        if isinstance(gradient, DTensor):
            axes = tuple(i for i, p in enumerate(gradient.placements) if not p.is_replicate())
            key = (gradient.device_mesh, axes)
        squares.setdefault(key, []).append(_as_real(gradient))
    total = torch.zeros((), dtype=dtype, device=to_local(reference).device)
    for key, shards in squares.items():
        # float32, also for bfloat16 gradients: a sum of squares needs the digits
        norms = torch.stack(_foreach_norm(shards, 2, dtype=dtype))
        square = norms.square().sum()
        if key is not None:
            mesh, axes = key
            for axis in axes:
                all_reduce(square, group=mesh.get_group(axis))
        total = total + square
    if pipeline is not None:
        all_reduce(total, group=pipeline.group)
    if owned is not None:
        all_reduce(total, group=owned[0])
    return total.sqrt()


def _as_real(gradient: Tensor) -> Tensor:
    """This rank's numbers of a gradient; a complex one shows its two parts, of the same memory.

    Of a sparse gradient they are the rows that it has, each once: it must be coalesced.
    """
    local_gradient = to_local(gradient)
    local_gradient = local_gradient._values() if local_gradient.is_sparse else local_gradient
    return torch.view_as_real(local_gradient) if local_gradient.is_complex() else local_gradient


def clip_by_norm(gradients: Sequence[Tensor], max_norm: float, *norm_args: Any) -> Tensor:
    """Scale gradients in place so that their global norm is at most max_norm; the norm before.

    `norm_args` are the further arguments of `global_norm`.
    """
    norm = global_norm(gradients, *norm_args)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        local_gradients = [to_local(gradient) for gradient in gradients]
        _foreach_mul_(
            [
                local_gradient._values() if local_gradient.is_sparse else local_gradient
                for local_gradient in local_gradients
            ],
            scale,
        )
    return norm


def clip_by_value(gradients: Sequence[Tensor], max_value: float, *norm_args: Any) -> Tensor:
    """Clamp every number in place; the global norm before, with `norm_args` as its arguments."""
    norm = global_norm(gradients, *norm_args)
    if local_gradients := [_as_real(gradient) for gradient in gradients]:
        _foreach_clamp_max_(local_gradients, max_value)
        _foreach_clamp_min_(local_gradients, -max_value)
    return norm


class GradientClipping(Callback):
    """Clip once an optimizer step: after accumulation, unscaling and reduction over ranks.

    Logs `train/grad_norm` (before clipping) and `train/clipped`, the share of steps since the last
    log line in which something was clipped. Example: `GradientClipping(max_norm=1.0)`.

    Args:
        max_norm: the largest global norm that is let through; 1.0 if nothing is given.
        max_value: instead, the largest absolute value of each number.
        patience: a step whose norm is not finite is left out, and the run stops when so many
            follow each other; 0 looks at nothing. By default 10 on a CPU, and 0 on an accelerator,
            where looking at a number makes the host wait in every step.
    """

    acts_on_training = True  # a resume without it is another run
    takes_partial_gradients = True  # with ZeRO-1 a rank has the gradients that it owns

    def __init__(
        self,
        max_norm: float | None = None,
        max_value: float | None = None,
        patience: int | None = None,
    ) -> None:
        """Set the bound."""
        if max_norm is not None and max_value is not None:
            raise UsageError(
                f"GradientClipping: max_norm={max_norm} and max_value={max_value}; set one of them"
            )
        for name, bound in (("max_norm", max_norm), ("max_value", max_value)):
            if bound is not None and not bound > 0:
                raise UsageError(
                    f"GradientClipping: {name}={bound} must be positive; set e.g. {name}=1.0"
                )
        self.max_norm = 1.0 if max_norm is None and max_value is None else max_norm
        self.max_value = max_value
        if patience is not None and patience < 0:
            raise UsageError(
                f"GradientClipping: patience={patience} is negative; set 0 to look at nothing"
            )
        self.patience = patience
        self.left_out = SkippedSteps()
        self._saved_counts: dict[str, int] = {}  # of a checkpoint
        self._norm: Tensor | None = None  # of this step, until it is logged
        self._num_clipped, self._num_steps = torch.zeros(()), 0  # since the last log line

    def __str__(self) -> str:
        """The callback in a line, for messages."""
        name = "max_value" if self.max_norm is None else "max_norm"
        return f"GradientClipping({name}={getattr(self, name)})"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over `configure_gradient_clipping`, which Lightning calls at the right moment.

        Of several the last one counts: a flag on the command line comes after a config's.
        """
        add_run_checks(trainer, pl_module, stage)
        if stage != "fit":
            return
        clippings = [c for c in trainer.callbacks if isinstance(c, GradientClipping)]  # pyright: ignore[reportAttributeAccessIssue]
        if self is not clippings[-1]:
            if trainer.is_global_zero:
                line = f"{self} is not used: {clippings[-1]} stands after it"
                Console().print(line, soft_wrap=True)
            return
        if trainer.gradient_clip_val is not None:
            raise UsageError(
                f"gradients would be clipped twice: by {self} and by gradient_clip_val="
                f"{trainer.gradient_clip_val}; leave out --trainer.gradient_clip_val"
            )
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"{type(pl_module).__name__} steps its own optimizers (manual optimization), where "
                "GradientClipping is never asked; call self.clip_gradients in its training_step"
            )

        def configure_gradient_clipping(
            module: L.LightningModule,
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            self._clip(trainer, optimizer)

        configure_gradient_clipping.takes_partial_gradients = True  # type: ignore[attr-defined]
        override_hook(
            trainer, pl_module, "configure_gradient_clipping", configure_gradient_clipping, self
        )

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """What it logs."""
        return {"train/grad_norm", "train/clipped", "train/skipped"}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the counts for the next log line and for the patience."""
        counts = {"clipped": float(self._num_clipped), "steps": self._num_steps}
        checkpoint["gradient_clipping"] = counts | {"left_out": dict(vars(self.left_out))}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the counts."""
        if counts := checkpoint.get("gradient_clipping"):
            self._num_clipped, self._num_steps = torch.tensor(counts["clipped"]), counts["steps"]
            self._saved_counts = counts["left_out"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps of this fit, from where a checkpoint left them."""
        self.left_out = SkippedSteps()
        vars(self.left_out).update(self._saved_counts)
        self._saved_counts = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run whose last steps were all left out has failed."""
        self.left_out.check_last_steps(trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the method back."""
        if stage == "fit":
            restore_hook(pl_module, "configure_gradient_clipping", self)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log, but only what will be written: `self.log` costs 0.3 ms."""
        if self._norm is not None and should_update_logs(trainer):
            pl_module.log("train/grad_norm", self._norm)
            pl_module.log("train/clipped", self._num_clipped / self._num_steps)
            if self.left_out.total:
                pl_module.log("train/skipped", float(self.left_out.total))
            self._num_clipped, self._num_steps = torch.zeros_like(self._num_clipped), 0
        self._norm = None

    def _clip(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:  # an index that came twice has two rows, of which only the sum counts
            if p.grad is not None and p.grad.is_sparse and not p.grad.is_coalesced():
                p.grad = p.grad.coalesce()
        gradients = [p.grad for p in parameters if p.grad is not None]
        pipeline = getattr(trainer.strategy, "pipeline", None)
        group = getattr(trainer.strategy, "gradient_group", None)
        if not gradients and pipeline is None and group is None:
            return
        duplicated: list[Tensor] = []
        if pipeline is not None:
            duplicated = [p.grad for p in pipeline.duplicated_params() if p.grad is not None]
        wide_params = [p for p in parameters if p.dtype in (torch.float64, torch.complex128)]
        norm_args = (
            pipeline,
            duplicated,
            None if group is None else (group, (wide_params or parameters)[0]),
        )
        if self.max_norm is not None:
            self._norm = norm = clip_by_norm(gradients, self.max_norm, *norm_args)
            clipped = norm > self.max_norm
        else:
            self._norm = norm = clip_by_value(gradients, self.max_value or 0.0, *norm_args)
            clipped = global_norm(gradients, *norm_args) < norm
        self._num_clipped, self._num_steps = clipped + self._num_clipped, self._num_steps + 1
        default_patience = 10 if norm.device.type == "cpu" else 0
        patience = default_patience if self.patience is None else self.patience
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # skips such steps by itself
        if patience and scaler is None:
            self._skip_step(bool(norm.isfinite()), parameters, patience, trainer.global_step)

    def _skip_step(
        self, is_finite: bool, parameters: list[Tensor], patience: int, step: int
    ) -> None:
        self.left_out.count(is_finite)
        if is_finite:
            return
        if self.left_out.in_a_row >= patience:
            raise NonFiniteError(
                f"the gradient was not finite in {patience} optimizer steps in a row, up to step "
                f"{step}; set a lower lr, or add the callback NaNGuard to see where it begins"
            )
        if self.left_out.in_a_row == 1:  # one line for all that follow
            rank_zero_warn(f"optimizer step {step} is left out: its gradient is not finite")
        for p in parameters:
            p.grad = None  # then no optimizer moves anything
