"""Clip gradients by their global norm, whatever they are spread over (lecture 8, modifiers).

    norm = sqrt(sum over all gradients of g^2);   g <- g * min(1, max_norm / norm)

A gradient sharded over a mesh is a DTensor: each rank sums its own shard and one reduction over
exactly the sharded axes of the mesh completes the sum. Gradients that live on different meshes
(tensor-parallel matrices beside a norm that is not) are summed mesh by mesh, then together.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import (
    Tensor,
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .patching import patch, unpatch


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, () on their device, the same on every rank."""
    squares: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = None
        if isinstance(gradient, DTensor):
            axes = tuple(i for i, p in enumerate(gradient.placements) if p.is_shard())
            key = (gradient.device_mesh, axes)
        squares.setdefault(key, []).append(local(gradient))
    total = torch.zeros((), device=local(gradients[0]).device)
    for key, shards in squares.items():
        # float32, also for bfloat16 gradients: a sum of squares needs the digits
        norms = torch.stack(_foreach_norm(shards, 2, dtype=torch.float32))
        square = norms.square().sum()
        if key is not None:
            mesh, axes = key
            for axis in axes:
                all_reduce(square, group=mesh.get_group(axis))
        total = total + square
    return total.sqrt()


def clip_by_norm(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global norm is at most max_norm; the norm before."""
    norm = global_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    _foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


class GradientClipping(Callback):
    """Clip before every optimizer step; once, after accumulation, unscaling and reduction.

    Logs `train/grad_norm`, the norm before clipping. Example: `GradientClipping(max_norm=1.0)`.

    Args:
        max_norm: the largest global norm that is let through.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        """Set the bound."""
        if max_norm <= 0:
            raise ValueError(
                f"GradientClipping: max_norm={max_norm} must be positive; set e.g. 1.0"
            )
        self.max_norm = max_norm

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over `configure_gradient_clipping`, which Lightning calls at the right moment."""
        if stage != "fit":
            return
        if trainer.gradient_clip_val is not None:
            raise ValueError(
                f"gradients would be clipped twice: by GradientClipping(max_norm={self.max_norm}) "
                f"and by gradient_clip_val={trainer.gradient_clip_val}; "
                "leave out --trainer.gradient_clip_val"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} steps its own optimizers (manual optimization), where "
                "GradientClipping is never asked; call self.clip_gradients in its training_step"
            )

        def configure_gradient_clipping(
            module: L.LightningModule,
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            self._clip(trainer, module, optimizer)

        patch(trainer, pl_module, "configure_gradient_clipping", configure_gradient_clipping, self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the method back."""
        if stage == "fit":
            unpatch(pl_module, "configure_gradient_clipping", self)

    def _clip(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        norm = clip_by_norm(gradients, self.max_norm)
        if trainer._logger_connector.should_update_logs:  # self.log at every step costs 0.3 ms
            module.log("train/grad_norm", norm)
