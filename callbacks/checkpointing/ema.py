"""EMA: an exponential moving average of the weights, which is what is validated and tested.

    after optimizer step n:   average <- average + (1 - d) (weights - average)
                              d = min(decay, (1 + n) / (10 + n))

The rising d forgets the first, random weights; without it a short run would average its own start.
Sharded weights have sharded averages: nothing is gathered but for saving. A checkpoint holds the
average as the model's weights, so that whoever reads it gets what was validated, and the raw
weights beside it.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.strategies.checkpoint.checkpoint_error import CheckpointError
from ravine.strategies.checkpoint.validation import kind_mismatches
from ravine.strategies.shards import (
    followed,
    local,
    part_of,
    put_into,
    saved_as,
    stages_to_join,
    trainable,
)

from ..checks.run_checks import before_training
from ..optimizers.composite import Composite
from ..optimizers.schedule_free import has_two_sets


@torch.no_grad()
def use_raw_weights(module: nn.Module, raw: dict[str, Tensor]) -> None:
    """Put the raw weights of a checkpoint in the place of the average, for a run without one."""
    for name, weight in trainable(module):
        if name in raw:
            local(weight).copy_(part_of(raw[name], weight))


class EMA(Callback):
    """Keep an average of the trainable weights, and use it for everything but training.

    Validation, samples, checkpoints and the model that `fit` leaves have the average. Example:
    `EMA(decay=0.999)`.

    Args:
        decay: how much of the average remains at each optimizer step, once warmed up.
        warmup: let the decay rise with the steps.
    """

    acts_on_training = True  # a resume without it is another run
    takes_partial_gradients = True  # with ZeRO-1 a rank has the gradients that it owns

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        """Set the horizon: about 1 / (1 - decay) optimizer steps."""
        if not 0 <= decay < 1:
            raise UsageError(f"EMA: decay={decay} is outside [0, 1); set e.g. 0.999")
        self.decay = decay
        self.warmup = warmup
        self.steps = 0
        self.other: dict[str, Tensor] = {}  # the set of weights that the model does not hold
        self.swapped = False  # the model holds the average
        self._weights: dict[str, Tensor] = {}  # of this run: a walk over a net takes longer
        self._frozen: list[Tensor] = []  # parameters that may be unfrozen later
        self._saved: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second owner of the weights that are evaluated."""
        before_training(trainer, pl_module, stage)
        both = [c for c in trainer.callbacks if isinstance(c, EMA)]  # pyright: ignore[reportAttributeAccessIssue]
        if len(both) > 1:
            decays = " and ".join(f"EMA(decay={ema.decay})" for ema in both)
            raise UsageError(f"one average a run: there are {decays}; leave one of them out")
        for other in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            two: Any = getattr(other, "optimizers_with_two_sets", None)
            if stage == "fit" and two is not None:
                refuse_two_sets(two())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an optimizer that has an average of its own, with or without a plan."""
        for each in trainer.optimizers:
            members = each.members if isinstance(each, Composite) else [each]
            refuse_two_sets([type(m).__name__ for m in members if has_two_sets(m)])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from a checkpoint, or start at the weights as they are: loaded and sharded."""
        self._restore(pl_module)
        self._show(pl_module, average=False)
        if not self.other or self.steps != trainer.global_step:
            self.steps = trainer.global_step
            self.other = {name: p.detach().clone() for name, p in trainable(pl_module)}
        self._take_over(pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Begin to average what was unfrozen since, at its value before its first step."""
        if any(parameter.requires_grad for parameter in self._frozen):
            self._take_over(pl_module)

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
                [local(average) for average in self.other.values()],
                [local(self._weights[name]) for name in self.other],
                1 - decay,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the model; the raw weights wait in its place."""
        self._restore(pl_module)
        if self.other:
            self._show(pl_module, average=True)
        elif not trainer.sanity_checking:
            rank_zero_warn("EMA has averaged nothing yet: the raw weights are evaluated")

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train on with the raw weights; until now a sample or a file could still be made."""
        self._show(pl_module, average=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average; a run that was resumed at its end has trained no batch."""
        self._restore(pl_module)
        self._show(pl_module, average=bool(self.other))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average as the model's weights, the raw ones beside it; called on every rank."""
        self._restore(pl_module)
        if self.other:
            self._take_over(pl_module)
            live = dict(followed(pl_module, self.other))
            raw, average = (self.other, live) if self.swapped else (live, self.other)
            state = checkpoint["state_dict"]
            stages = stages_to_join(trainer)
            put_into(state, average, pl_module, live=True, stages=stages)
            raw = saved_as(state, raw, live=True, stages=stages)
            checkpoint["ema"] = {"steps": self.steps, "raw": raw}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the raw weights until the average is in place, as the model's weights."""
        if (saved := checkpoint.get("ema")) is not None:
            if wrong := _odd(saved):
                raise CheckpointError(
                    f"the average in the checkpoint cannot be used: {wrong}; choose another "
                    "checkpoint: --ckpt_path FILE, or use its weights alone: Pretrained(path)"
                )
            self.steps, self._saved, self.swapped = saved["steps"], saved["raw"], True

    def _restore(self, module: nn.Module) -> None:
        if not self._saved:
            return
        self.other = {}
        for name, weight in followed(module, self._saved):
            if name not in self._saved:
                raise UsageError(
                    f"EMA: the checkpoint does not know {name}; it was written with other "
                    "trainable parameters; resume it with the callbacks that it was trained with"
                )
            raw = self._saved[name]
            if raw.shape != weight.shape or kind_mismatches({name: weight}, {name: raw}):
                raise CheckpointError(
                    f"EMA: the raw weight {name} of the checkpoint is {raw.dtype} of shape "
                    f"{list(raw.shape)}, and here {weight.dtype} of {list(weight.shape)}; choose "
                    "another checkpoint: --ckpt_path FILE"
                )
            self.other[name] = weight.detach().clone()
            local(self.other[name]).copy_(part_of(self._saved[name], weight))
        self._saved = {}

    def _take_over(self, module: nn.Module) -> None:
        """Average every weight that moves now; one that is new starts at its current value."""
        self._weights = dict(followed(module, self.other))
        for name, weight in self._weights.items():
            if name not in self.other:
                self.other[name] = weight.detach().clone()
        self._frozen = [p for p in module.parameters() if not p.requires_grad]

    @torch.no_grad()
    def _show(self, module: nn.Module, average: bool) -> None:
        if self.swapped == average:
            return
        self._take_over(module)
        for name, weight in self._weights.items():
            mine, theirs = local(self.other[name]), local(weight)
            held = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(held)
        self.swapped = average


def _odd(saved: Any) -> str:
    """What is wrong with an average as a checkpoint keeps it; empty if nothing is."""
    if not isinstance(saved, dict) or not isinstance(saved.get("raw"), dict) or not saved["raw"]:
        return "it has no raw weights"
    if type(saved.get("steps")) is not int:
        return f"its number of steps is {saved.get('steps')!r}"
    odd = [name for name, value in saved["raw"].items() if not isinstance(value, Tensor)]
    return f"{odd[0]} is no tensor" if odd else ""


def refuse_two_sets(names: list[str]) -> None:
    """ValueError if an optimizer keeps separate weights for evaluation."""
    if names:
        raise UsageError(
            f"EMA and {names[0]} would both decide which weights are evaluated: {names[0]} keeps "
            "an average of its own; allowed: one of the two; take EMA out of trainer.callbacks, or "
            "choose an optimizer such as AdamW"
        )
