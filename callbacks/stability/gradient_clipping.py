"""Clip gradients by global norm (clip_grad_norm_) or value, sharded or not (lecture 8, modifiers).

    norm = sqrt(sum over all gradients of g^2);   g <- g * min(1, max_norm / norm)
    or, for each element,                         g <- min(max(g, -max_value), max_value)

A gradient that is sharded over a mesh is a DTensor: each rank sums its own shard, and an all-reduce
over the sharded axes of the mesh completes the sum. Gradients on different meshes (for example
tensor-parallel matrices beside replicated norm weights) are summed per mesh, then added.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import (
    Tensor,
    _foreach_clamp_max_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_clamp_min_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed import ProcessGroup, all_reduce, get_process_group_ranks
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.lightning_compat import log_step_values, should_update_logs
from ravine.strategies.dtensor import to_local

from ..base import find_callbacks
from ..checks.run_checks import add_run_checks
from ..hook_overrides import override_hook, restore_hook
from .nan_guard import NonFiniteError, SkippedSteps

GRADIENT_NORM = "train/grad_norm"  # name of the metric


def global_norm(
    gradients: Sequence[Tensor],
    pipeline: Any = None,
    excluded: Sequence[Tensor] = (),
    owned: tuple[ProcessGroup, Tensor] | None = None,
) -> Tensor:
    """Return the global norm of all gradients, shape (), on their device, equal on every rank.

    It is float64 if a gradient is, else float32; 0 if there are no gradients. Gradients that are
    sharded alike (DTensor) are summed together, with one all-reduce for each sharded mesh axis.

    Args:
        gradients: those of this rank; called on all ranks.
        pipeline: the strategy's pipeline, if its stages have different gradients. `group` has the
            ranks of all stages.
        excluded: gradients that another pipeline stage counts.
        owned: with ZeRO-1, where a rank has only the gradients that it owns: the process group of
            the owners, and a parameter of the widest dtype. Gradients that are sharded over ranks
            of that group (experts) have no single owner.
    """
    if not gradients and pipeline is None and owned is None:
        return torch.zeros(())
    owner_group = None
    # a rank may have no gradient; this tensor tells it device and dtype
    if owned is not None:
        owner_group, reference = owned
    elif gradients:
        reference = gradients[0]
    else:
        assert pipeline is not None
        reference = next(pipeline.module.parameters())
    is_double = any(t.dtype in (torch.float64, torch.complex128) for t in [*gradients, reference])
    dtype = torch.float64 if is_double else torch.float32
    shards_by_layout: dict[Any, list[Tensor]] = {}  # None: not sharded
    for gradient in gradients:
        if any(gradient is other for other in excluded):
            continue
        layout = None
        if isinstance(gradient, DTensor):
            axes = tuple(i for i, p in enumerate(gradient.placements) if not p.is_replicate())
            layout = (gradient.device_mesh, axes)
        # `_as_real`: this rank's shard, with complex numbers as pairs of real ones
        shards_by_layout.setdefault(layout, []).append(_as_real(gradient))
    total = torch.zeros((), dtype=dtype, device=to_local(reference).device)
    total_without_owner = torch.zeros_like(total)  # equal on all ranks of the group of owners
    for layout, shards in shards_by_layout.items():
        # float32 also for bfloat16 gradients, because a sum of squares needs the precision
        norms = torch.stack(_foreach_norm(shards, 2, dtype=dtype))
        square = norms.square().sum()
        if layout is not None:
            mesh, axes = layout
            mesh_groups = [mesh.get_group(axis) for axis in axes]
            for mesh_group in mesh_groups:
                all_reduce(square, group=mesh_group)
            if owner_group is not None and _shares_ranks(mesh_groups, owner_group):
                total_without_owner = total_without_owner + square
                continue
        total = total + square
    if pipeline is not None:
        all_reduce(total, group=pipeline.group)
    if owner_group is not None:
        all_reduce(total, group=owner_group)
    return (total + total_without_owner).sqrt()


def norm_arguments(trainer: L.Trainer, parameters: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """Return the arguments of `global_norm` after the gradients, for a trainer's strategy.

    None means that there is no gradient, on any rank. `parameters` are those of an optimizer.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    pipeline = getattr(trainer.strategy, "pipeline", None)
    owner_group = getattr(trainer.strategy, "zero1_group", None)
    if not gradients and pipeline is None and owner_group is None:
        return None
    excluded: list[Tensor] = []
    if pipeline is not None:  # parameters that several stages have are counted once
        excluded = [p.grad for p in pipeline.duplicated_params() if p.grad is not None]
    owned = None
    if owner_group is not None:
        wide_params = [p for p in parameters if p.dtype in (torch.float64, torch.complex128)]
        owned = (owner_group, (wide_params or parameters)[0])
    return pipeline, excluded, owned


def optimizer_gradient_norm(trainer: L.Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the global norm of the gradients of an optimizer's parameters, shape ().

    It is exact for gradients that are sharded, split over a pipeline or owned by ranks (ZeRO-1).
    Called on all ranks, before the optimizer step. None without a gradient, and with Lightning's
    FSDPStrategy, whose gradients are parts of flat vectors.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm_args = norm_arguments(trainer, parameters)
    if norm_args is None:
        return None
    with torch.no_grad():
        # the rows of an index that occurs twice in a sparse gradient are summed first
        gradients = [
            p.grad.coalesce() if p.grad.is_sparse else p.grad
            for p in parameters
            if p.grad is not None
        ]
        return global_norm(gradients, *norm_args)


def _shares_ranks(groups: Sequence[ProcessGroup], other: ProcessGroup) -> bool:
    """Whether any of the groups has more than one rank in common with another group."""
    ranks = set(get_process_group_ranks(other))
    return any(len(ranks & set(get_process_group_ranks(group))) > 1 for group in groups)


def _as_real(gradient: Tensor) -> Tensor:
    """Return this rank's elements of a gradient; a complex one as a real view of its memory.

    A sparse gradient must be coalesced: its elements are its stored rows, each of them once.
    """
    local_gradient = to_local(gradient)
    local_gradient = local_gradient._values() if local_gradient.is_sparse else local_gradient
    return torch.view_as_real(local_gradient) if local_gradient.is_complex() else local_gradient


def _member_gradients(trainer: L.Trainer) -> list[list[Tensor]]:
    """Return the gradients of each member, if the module trains several members of a sweep."""
    list_members: Any = getattr(trainer.lightning_module, "member_parameters", None)
    members: list[list[Tensor]] = list_members() if list_members is not None else []
    gradients = [[p.grad for p in member if p.grad is not None] for member in members]
    return [member for member in gradients if member] if len(members) > 1 else []


def clip_by_norm(gradients: Sequence[Tensor], max_norm: float, *norm_args: Any) -> Tensor:
    """Scale gradients in place to a global norm of at most max_norm; return the norm before.

    `norm_args` are the further arguments of `global_norm`.
    """
    norm = global_norm(gradients, *norm_args)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    local_gradients = [to_local(gradient) for gradient in gradients]
    # of a sparse gradient, the memory of its stored rows
    memories = [grad._values() if grad.is_sparse else grad for grad in local_gradients]
    if memories:
        _foreach_mul_(memories, scale)
    return norm


def clip_by_value(gradients: Sequence[Tensor], max_value: float, *norm_args: Any) -> Tensor:
    """Clamp every element in place; return the global norm before, computed with `norm_args`."""
    norm = global_norm(gradients, *norm_args)
    if local_gradients := [_as_real(gradient) for gradient in gradients]:
        _foreach_clamp_max_(local_gradients, max_value)
        _foreach_clamp_min_(local_gradients, -max_value)
    return norm


class GradientClipping(Callback):
    """Clip gradients once per optimizer step, after accumulation, unscaling and reduction.

    Logs `train/grad_norm` (before clipping) and `train/frac_steps_clipped`, the fraction of
    clipped steps since the last log line. The members of a sweep (`member_parameters`) are clipped
    each by its own norm, and the largest norm is logged. Example: `GradientClipping(max_norm=1.0)`.

    Args:
        max_norm: largest global norm; 1.0 if neither bound is given.
        max_value: largest absolute value of each element, instead of max_norm.
        patience: a step whose norm is not finite is skipped; the run stops after this number of
            them in a row. 0 disables the check. By default 10 on a CPU, and 0 on an accelerator,
            where a read of the norm makes the host wait in every step.
    """

    acts_on_training = True  # a resume without this callback changes the training
    takes_partial_gradients = True  # with ZeRO-1 a rank has only the gradients that it owns

    def __init__(
        self,
        max_norm: float | None = None,
        max_value: float | None = None,
        patience: int | None = None,
    ) -> None:
        """Check and set the bound and the patience.

        Args:
            max_norm: largest global norm; 1.0 if neither bound is given.
            max_value: largest absolute value of each element, instead of max_norm.
            patience: number of steps in a row with a norm that is not finite, after which the run
                stops; 0 for no check. None for 10 on a CPU, and 0 on an accelerator.
        """
        if max_norm is not None and max_value is not None:
            raise UsageError(
                f"GradientClipping: max_norm={max_norm} and max_value={max_value} exclude each "
                "other",
                ["max_norm or max_value"],
                hint="remove max_value",
                flag=f"--trainer.callbacks.{type(self).__name__}.max_value=null",
            )
        for name, bound in (("max_norm", max_norm), ("max_value", max_value)):
            if bound is not None and not bound > 0:
                raise UsageError(
                    f"GradientClipping: {name}={bound} is not positive",
                    ["above 0"],
                    hint=f"use {name}=1.0",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}=1.0",
                )
        self.max_norm = 1.0 if max_norm is None and max_value is None else max_norm
        self.max_value = max_value
        if patience is not None and patience < 0:
            raise UsageError(
                f"GradientClipping: patience={patience} is negative",
                ["0 (no check) or more"],
                hint="use patience=0",
                flag=f"--trainer.callbacks.{type(self).__name__}.patience=0",
            )
        self.patience = patience
        self.skipped_steps = SkippedSteps()
        self._saved_counts: dict[str, int] = {}  # of a checkpoint
        self._norm: Tensor | None = None  # of this step, until it is logged
        # counts since the last log line; a tensor needs no read by the host
        self._num_clipped, self._num_steps = torch.zeros(()), 0

    def __str__(self) -> str:
        """Return the callback with its bound, for messages."""
        name = "max_value" if self.max_norm is None else "max_norm"
        return f"GradientClipping({name}={getattr(self, name)})"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace `configure_gradient_clipping`, which Lightning calls before the optimizer step.

        Only the last GradientClipping is used: one of a command-line flag follows one of a config.
        """
        # adds the callback that tries validation and checkpointing before the first step
        add_run_checks(trainer, pl_module, stage)
        if stage != "fit":
            return
        clippings = find_callbacks(trainer, GradientClipping)  # in the order of the trainer
        if self is not clippings[-1]:
            if trainer.is_global_zero:
                line = f"{self} is not used, because {clippings[-1]} comes after it"
                Console().print(line, soft_wrap=True)
            return
        if trainer.gradient_clip_val is not None:
            raise UsageError(
                f"gradients would be clipped twice: by {self} and by gradient_clip_val="
                f"{trainer.gradient_clip_val}",
                ["one of the two"],
                hint="remove gradient_clip_val from Trainer",
                flag="--trainer.gradient_clip_val=null",
            )
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"GradientClipping: {type(pl_module).__name__} steps its own optimizers (manual "
                "optimization), where no callback can clip",
                hint="call self.clip_gradients in its training_step, and remove "
                "GradientClipping() from Trainer(callbacks=...)",
            )

        # Lightning calls this function instead of the module's method
        def configure_gradient_clipping(
            module: L.LightningModule,
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            self._clip(trainer, optimizer)

        # ZeRO-1 asks for this: a rank may have only the gradients that it owns
        configure_gradient_clipping.takes_partial_gradients = True  # type: ignore[attr-defined]
        # replaces the method of this instance until `teardown`
        override_hook(
            trainer, pl_module, "configure_gradient_clipping", configure_gradient_clipping, self
        )

    def logged_metrics(self, trainer: L.Trainer) -> set[str]:
        """Return the names of the logged metrics."""
        return {GRADIENT_NORM, "train/frac_steps_clipped", "train/num_skipped_steps"}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the counts for the next log line and for the patience."""
        counts = {"num_clipped": float(self._num_clipped), "num_steps": self._num_steps}
        checkpoint["gradient_clipping"] = counts | {"skipped_steps": dict(vars(self.skipped_steps))}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the counts."""
        if counts := checkpoint.get("gradient_clipping"):
            self._num_clipped, self._num_steps = (
                torch.tensor(counts["num_clipped"]),
                counts["num_steps"],
            )
            self._saved_counts = counts["skipped_steps"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the counts of this fit, or continue those of a checkpoint."""
        self.skipped_steps = SkippedSteps()
        vars(self.skipped_steps).update(self._saved_counts)
        self._saved_counts = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise NonFiniteError if the last steps of the run were all skipped."""
        self.skipped_steps.check_last_steps(trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore `configure_gradient_clipping`."""
        if stage == "fit":
            restore_hook(pl_module, "configure_gradient_clipping", self)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log in the steps whose values are written."""
        if self._norm is not None and should_update_logs(trainer):
            values = {
                GRADIENT_NORM: self._norm,
                "train/frac_steps_clipped": self._num_clipped / self._num_steps,
            }
            if self.skipped_steps.num_skipped:
                values["train/num_skipped_steps"] = float(self.skipped_steps.num_skipped)
            log_step_values(trainer, values)
            self._num_clipped, self._num_steps = torch.zeros_like(self._num_clipped), 0
        self._norm = None

    def _clip(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        """Clip the gradients of the optimizer's parameters in place, and count the step.

        The norm is stored for the log. A step whose norm is not finite is skipped, if `patience`
        says so.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:  # sum the rows of an index that occurs twice in a sparse gradient
            if p.grad is not None and p.grad.is_sparse and not p.grad.is_coalesced():
                p.grad = p.grad.coalesce()
        norm_args = norm_arguments(trainer, parameters)
        if norm_args is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        # both functions return the norm before the clipping
        if self.max_norm is not None and (members := _member_gradients(trainer)):
            # the members of a sweep are separate runs: each has its own norm
            norms = [clip_by_norm(member, self.max_norm, *norm_args) for member in members]
            norm = torch.stack(norms).max()
            is_clipped = norm > self.max_norm
        elif self.max_norm is not None:
            norm = clip_by_norm(gradients, self.max_norm, *norm_args)
            is_clipped = norm > self.max_norm
        else:
            norm = clip_by_value(gradients, self.max_value or 0.0, *norm_args)
            is_clipped = global_norm(gradients, *norm_args) < norm  # the norm became smaller
        self._norm = norm
        self._num_clipped = is_clipped + self._num_clipped  # a tensor: no read by the host
        self._num_steps += 1
        default_patience = 10 if norm.device.type == "cpu" else 0
        patience = default_patience if self.patience is None else self.patience
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # skips such steps by itself
        if patience and scaler is None:
            self._skip_if_not_finite(norm, parameters, patience, trainer.global_step)

    def _skip_if_not_finite(
        self, norm: Tensor, parameters: list[Tensor], patience: int, step: int
    ) -> None:
        """Count the step; if the norm is not finite, remove the gradients, so that it is skipped.

        Raises:
            NonFiniteError: this is skipped step number `patience` in a row.
        """
        is_finite = bool(norm.isfinite())  # the host waits for the device here
        self.skipped_steps.count(is_finite)  # a finite step resets the number in a row
        if is_finite:
            return
        if self.skipped_steps.num_consecutive >= patience:
            raise NonFiniteError(
                f"the gradient was not finite in {patience} optimizer steps in a row, up to step "
                f"{step}",
                hint="use a lower learning rate, or add NaNGuard() to Trainer(callbacks=...) to "
                "find the first tensor",
                flag="--trainer.callbacks+=NaNGuard",
            )
        if self.skipped_steps.num_consecutive == 1:  # one warning for a series of skipped steps
            rank_zero_warn(f"optimizer step {step} is skipped: its gradient is not finite")
        for p in parameters:
            p.grad = None  # optimizers skip parameters without a gradient
