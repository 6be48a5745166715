"""EMA: an exponential moving average of the weights, which is what is validated and tested.

    after optimizer step n:   average <- average + (1 - d) (weights - average)
                              d = min(decay, (1 + n) / (10 + n))

The rising d forgets the first, random weights; without it a short run would average its own start.
Sharded weights have sharded averages: nothing is gathered but for saving.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from .shards import local, part_of, trainable, whole


class EMA(Callback):
    """Keep an average of the trainable weights; validation, test and prediction use it.

    Checkpoints hold both sets. Example: `EMA(decay=0.999)`.

    Args:
        decay: how much of the average remains at each optimizer step, once warmed up.
        warmup: let the decay rise with the steps.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        """Set the horizon: about 1 / (1 - decay) optimizer steps."""
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay={decay} is outside [0, 1); set e.g. 0.999")
        self.decay = decay
        self.warmup = warmup
        self.steps = 0
        self.average: dict[str, Tensor] = {}  # by parameter name; the raw weights while swapped
        self.swapped = False
        self._weights: dict[str, Tensor] = {}  # of this run: a walk over a net takes longer
        self._saved: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """There is one average a run."""
        return "EMA"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from a checkpoint, or start at the weights as they are: loaded and sharded."""
        self._restore(pl_module)
        self._show(pl_module, average=False)
        if not self.average or self.steps != trainer.global_step:
            self.steps = trainer.global_step
            self.average = {name: p.detach().clone() for name, p in trainable(pl_module)}
        self._weights = dict(trainable(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Move the average after an optimizer step; a micro-batch alone does nothing."""
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
        with torch.no_grad():
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [local(average) for average in self.average.values()],
                [local(self._weights[name]) for name in self.average],
                1 - decay,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the model; the raw weights wait in its place."""
        self._restore(pl_module)
        if self.average:
            self._show(pl_module, average=True)
        elif not trainer.sanity_checking:
            rank_zero_warn("EMA has averaged nothing yet: the raw weights are evaluated")

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the raw weights back."""
        self._show(pl_module, average=False)

    on_test_end = on_predict_end = on_validation_end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """An interrupted validation leaves the raw weights behind as well."""
        self._show(pl_module, average=False)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, so that any layout can read them; called on every rank."""
        return {
            "steps": self.steps,
            "swapped": self.swapped,  # then "average" and the model's weights changed places
            "average": self._saved or {n: whole(t) for n, t in self.average.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the average until the weights it belongs to are in place."""
        self.steps, self.swapped = state_dict["steps"], state_dict["swapped"]
        self._saved = state_dict["average"]

    def _restore(self, module: nn.Module) -> None:
        if not self._saved:
            return
        self.average = {}
        for name, weight in trainable(module):
            if name not in self._saved:
                raise ValueError(
                    f"EMA: the checkpoint has no average of {name}; it was written with other "
                    "trainable parameters; resume it with the callbacks that it was trained with"
                )
            self.average[name] = weight.detach().clone()
            local(self.average[name]).copy_(part_of(self._saved[name], weight))
        self._saved = {}

    @torch.no_grad()
    def _show(self, module: nn.Module, average: bool) -> None:
        if self.swapped == average:
            return
        for name, weight in trainable(module):
            mine, theirs = local(self.average[name]), local(weight)
            held = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(held)
        self.swapped = average
