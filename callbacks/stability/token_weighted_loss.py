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
        self._count: Callable[[Any], Any] | None = None  # None: there is nothing to weigh
        self._parts = 0  # micro-batches of a step over all ranks, when `_count` was chosen
        self._weight = torch.zeros(())  # of this micro-batch
        self._sum: Tensor | None = None  # of this step, on this rank
        self._unit = 0.0  # a power of two, so that it rounds nothing: keeps gradients in range

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Go first: whoever looks at the gradients of a step sees those of the mean."""
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore
        self._sum, self._unit, self._count, self._parts = None, 0.0, None, 0
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
        parts = trainer.world_size * trainer.accumulate_grad_batches
        if parts != self._parts:
            self._parts = parts
            self._count = getattr(pl_module, "terms", None) if parts > 1 else None
        if self._count is None:
            return
        mine = getattr(trainer.strategy, "part", lambda batch: batch)(batch)
        found = self._count(mine)
        terms = torch.as_tensor(found, dtype=torch.float32, device=pl_module.device)
        if not self._unit:  # once a run
            mean = float(mean_over_ranks(terms.clone(), trainer))
            self._unit = 2.0 ** math.floor(math.log2(max(mean, 1.0)))
        self._weight = terms / self._unit
        if (pipeline := getattr(trainer.strategy, "pipeline", None)) is not None:
            pipeline.weight = self._weight  # it goes backward before there is a loss to see

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Weigh what goes backward; the loss itself stays as it is."""
        if self._count is None:
            return
        weight = self._weight
        self._sum = weight.clone() if self._sum is None else self._sum + weight
        if getattr(trainer.strategy, "pipeline", None) is None:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Divide by the sum; ranks and micro-batches have been averaged over already."""
        if self._sum is None:
            return
        mean = mean_over_ranks(self._sum, trainer)
        factor = trainer.accumulate_grad_batches / mean.clamp(min=1e-20)  # nothing counted: 0
        self._sum = None
        scale([p.grad for group in optimizer.param_groups for p in group["params"]], factor)


def mean_over_ranks(number: Tensor, trainer: L.Trainer) -> Tensor:
    """The mean over the ranks that see different data, as of gradients.

    Lightning's own `reduce` begins with a barrier, at which the host would wait for the device.
    """
    if trainer.world_size == 1:
        return number
    layout = getattr(trainer.strategy, "layout", None)
    group = dist.group.WORLD if layout is None else layout.data.get_group()
    dist.all_reduce(number, group=group)
    return number / dist.get_world_size(group)


@torch.no_grad()
def scale(gradients: list[Tensor | None], factor: Tensor) -> None:
    """Multiply each in place, this rank's part of those that are spread."""
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
    if parts:
        _foreach_mul_(parts, factor)
