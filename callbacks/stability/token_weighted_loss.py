"""GlobalMean: every token counts the same, on whichever rank and in whichever micro-batch it is.

    wanted    Σ over all n·loss / Σ over all n          n terms in a micro-batch of a rank
    a mean    of means instead gives a token of a short answer the weight of several

Each backward pass is weighed by its n as it begins; at the end of the optimizer step, when the sum
is known, the gradients are divided by it once. So nothing is awaited between micro-batches: what is
sent is one number a step.
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


class GlobalMean(Callback):
    """Make the loss a mean over all terms of a step, for a module that says how many a batch has.

    def terms(self, batch): return (batch[1] != -100).sum()   # the loss is a mean over these

    Works on every strategy that averages gradients over ranks, with a stock Trainer too; modules
    without `terms` are left alone, and one process without accumulation has nothing to weigh. The
    loss that is logged is each micro-batch's own. What `training_step` adds to the mean (the
    balance of experts) is weighed like it.
    """

    takes_partial_gradients = True  # with ZeRO-1 a rank has the gradients that it owns

    def __init__(self) -> None:
        """Nothing to choose."""
        self._count_terms: Callable[[Any], Any] | None = None  # None: there is nothing to weigh
        self._num_parts = (
            0  # micro-batches of a step over all ranks, when `_count_terms` was chosen
        )
        self._microbatch_weight = torch.zeros(())  # of this micro-batch
        self._weight_sum: Tensor | None = None  # of this step, on this rank
        self._scale = 0.0  # a power of two, so that it rounds nothing: keeps gradients in range

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Go first: whoever looks at the gradients of a step sees those of the mean."""
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore
        self._weight_sum, self._scale, self._count_terms, self._num_parts = None, 0.0, None, 0
        if hasattr(pl_module, "terms") and not pl_module.automatic_optimization:
            raise UsageError(
                f"{type(pl_module).__name__} has `terms` and steps its own optimizers (manual"
                " optimization), which GlobalMean cannot weigh; leave `terms` away"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count what this rank computes of the batch.

        A schedule may change the number of parts. It is read here: a run that resumes within an
        epoch gets no `on_train_epoch_start` for that epoch.
        """
        num_parts = trainer.world_size * trainer.accumulate_grad_batches
        if num_parts != self._num_parts:
            self._num_parts = num_parts
            self._count_terms = getattr(pl_module, "terms", None) if num_parts > 1 else None
        if self._count_terms is None:
            return
        local_batch = getattr(trainer.strategy, "part", lambda batch: batch)(batch)
        num_terms = self._count_terms(local_batch)
        terms = torch.as_tensor(num_terms, dtype=torch.float32, device=pl_module.device)
        if not self._scale:  # once a run
            mean = float(mean_over_ranks(terms.clone(), trainer))
            self._scale = 2.0 ** math.floor(math.log2(max(mean, 1.0)))
        self._microbatch_weight = terms / self._scale
        if (pipeline := getattr(trainer.strategy, "pipeline", None)) is not None:
            pipeline.weight = (
                self._microbatch_weight
            )  # it goes backward before there is a loss to see

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Weigh what goes backward; the loss itself stays as it is."""
        if self._count_terms is None:
            return
        weight = self._microbatch_weight
        self._weight_sum = weight.clone() if self._weight_sum is None else self._weight_sum + weight
        if getattr(trainer.strategy, "pipeline", None) is None:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Divide by the sum; ranks and micro-batches have been averaged over already."""
        if self._weight_sum is None:
            return
        mean = mean_over_ranks(self._weight_sum, trainer)
        factor = trainer.accumulate_grad_batches / mean.clamp(min=1e-20)  # nothing counted: 0
        self._weight_sum = None
        scale_gradients(
            [p.grad for group in optimizer.param_groups for p in group["params"]], factor
        )


def mean_over_ranks(number: Tensor, trainer: L.Trainer) -> Tensor:
    """The mean over the ranks that see different data, as of gradients.

    Lightning's own `reduce` begins with a barrier, at which the host would wait for the device.
    """
    if trainer.world_size == 1:
        return number
    layout = getattr(trainer.strategy, "layout", None)
    group = dist.group.WORLD if layout is None else layout.data_mesh.get_group()
    dist.all_reduce(number, group=group)
    return number / dist.get_world_size(group)


@torch.no_grad()
def scale_gradients(gradients: list[Tensor | None], factor: Tensor) -> None:
    """Multiply each in place, this rank's part of those that are spread."""
    local_grads = [
        g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None
    ]
    if local_grads:
        _foreach_mul_(local_grads, factor)
