"""TokenWeightedLoss: tokens of all ranks and micro-batches have the same weight in the loss.

    loss of a step = Σ n·loss / Σ n    over micro-batches of all ranks with n terms each

A mean of means would give a token of a short answer the weight of several tokens. The gradient of
each loss is weighted by its n at the start of the backward pass. At the end of the optimizer step
the sum of n is known, and the gradients are divided by it once. Ranks do not synchronize between
micro-batches; they exchange one number per step.
"""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import UsageError


class TokenWeightedLoss(Callback):
    """Make the loss a mean over all terms of an optimizer step, if the module counts the terms.

        def num_loss_terms(self, batch):
            return (batch[1] != -100).sum()  # the loss is a mean over these

    Works on every strategy that averages gradients over ranks, also with a stock Trainer. Modules
    without `num_loss_terms` are not changed; one process without accumulation needs no weights. The
    logged loss is that of each micro-batch. Terms that `training_step` adds to the mean, such as a
    load balancing loss, get the same weight.
    """

    takes_partial_gradients = True  # with ZeRO-1 a rank has only the gradients that it owns

    def __init__(self) -> None:
        """Create the callback."""
        self._count_terms: Callable[[Any], Any] | None = None  # None: no weights are needed
        # micro-batches of a step over all ranks, for which `_count_terms` was set
        self._num_microbatches = 0
        self._microbatch_weight = torch.zeros(())  # of this micro-batch
        self._weight_sum: Tensor | None = None  # of this step, on this rank
        self._scale = 0.0  # keeps gradients in range; a power of two, so that it rounds nothing

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Run before the other callbacks, so that they get the gradients of the mean."""
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore
        self._weight_sum, self._scale = None, 0.0
        self._count_terms, self._num_microbatches = None, 0
        if hasattr(pl_module, "num_loss_terms") and not pl_module.automatic_optimization:
            name = type(pl_module).__name__
            raise UsageError(
                f"TokenWeightedLoss: {name} has num_loss_terms and steps its own optimizers "
                "(manual optimization), where losses cannot be weighted",
                hint=f"remove num_loss_terms from {name}",
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the weight of the micro-batch: the number of loss terms that this rank computes.

        A GradientAccumulationScheduler may change the number of micro-batches. It is read here,
        because `on_train_epoch_start` is not called in a resumed epoch.
        """
        num_microbatches = trainer.world_size * trainer.accumulate_grad_batches
        if num_microbatches != self._num_microbatches:
            self._num_microbatches = num_microbatches
            self._count_terms = None
            if num_microbatches > 1:  # the mean of a single micro-batch needs no weight
                # the module's method: number of loss terms, such as tokens, of a batch
                self._count_terms = getattr(pl_module, "num_loss_terms", None)
        if self._count_terms is None:
            return
        shard_batch = getattr(trainer.strategy, "shard_batch", None)  # splits sequences over ranks
        num_terms = self._count_terms(batch if shard_batch is None else shard_batch(batch))
        terms = torch.as_tensor(num_terms, dtype=torch.float32, device=pl_module.device)
        if not self._scale:  # once a run: about the mean weight, to keep gradients in range
            # a clone, because the all-reduce is in place
            mean = float(mean_over_ranks(terms.clone(), trainer))
            # a power of 2, because a division by it is exact
            self._scale = 2.0 ** math.floor(math.log2(max(mean, 1.0)))
        self._microbatch_weight = terms / self._scale
        if (pipeline := getattr(trainer.strategy, "pipeline", None)) is not None:
            # a pipeline runs its backward passes before this callback gets a loss
            pipeline.loss_weight = self._microbatch_weight

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Weight the gradient of the loss; the loss itself is not changed."""
        if self._count_terms is None:
            return
        weight = self._microbatch_weight
        self._weight_sum = weight.clone() if self._weight_sum is None else self._weight_sum + weight
        if getattr(trainer.strategy, "pipeline", None) is None:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Divide by the sum of weights; gradients are means over ranks and micro-batches here."""
        if self._weight_sum is None:
            return
        mean = mean_over_ranks(self._weight_sum, trainer)
        factor = trainer.accumulate_grad_batches / mean.clamp(min=1e-20)  # without terms: 0
        self._weight_sum = None
        scale_gradients(
            [p.grad for group in optimizer.param_groups for p in group["params"]], factor
        )


def mean_over_ranks(number: Tensor, trainer: L.Trainer) -> Tensor:
    """Return the mean over data-parallel ranks, as for gradients.

    Lightning's own `reduce` starts with a barrier, at which the host would wait for the device.
    """
    if trainer.world_size == 1:
        return number
    layout = getattr(trainer.strategy, "mesh_layout", None)
    group = dist.group.WORLD if layout is None else layout.data_mesh.get_group()
    dist.all_reduce(number, group=group)
    return number / dist.get_world_size(group)


@torch.no_grad()
def scale_gradients(gradients: list[Tensor | None], factor: Tensor) -> None:
    """Multiply gradients in place; of a sharded gradient, this rank's shard."""
    local_grads = [
        g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None
    ]
    if local_grads:
        _foreach_mul_(local_grads, factor)
