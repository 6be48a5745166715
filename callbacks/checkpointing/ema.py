"""EMA: keep an exponential moving average of the weights, used for validation and testing.

    after optimizer step n:   average <- average + (1 - d) (weights - average)
                              d = min(decay, (1 + n) / (10 + n))

The rising d reduces the share of the first, random weights, which would otherwise dominate the
average of a short run. Sharded weights have sharded averages, which are gathered only for saving.
A checkpoint stores the average as the model's weights, because the average is validated. The raw
weights are stored in a separate entry.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.strategies.checkpoint.checkpoint_error import CheckpointError
from ravine.strategies.checkpoint.state_dict import stages_to_join, to_checkpoint, update_state_dict
from ravine.strategies.checkpoint.validation import dtype_kind_mismatches
from ravine.strategies.dtensor import shard_like, to_local
from ravine.strategies.parallel_module import named_tracked, named_trainable

from ..base import OptimizerStepCallback, find_callbacks
from ..checks.run_checks import add_run_checks
from ..optimizers.composite import CompositeOptimizer
from ..optimizers.schedule_free import has_train_eval_modes


@torch.no_grad()
def use_raw_weights(module: nn.Module, raw: dict[str, Tensor]) -> None:
    """Replace the average by the raw weights of a checkpoint, for a run without EMA."""
    for name, weight in named_trainable(module):
        if name in raw:
            to_local(weight).copy_(shard_like(raw[name], weight))


class EMA(OptimizerStepCallback):
    """Keep an average (EMA) of the trainable weights, and use it for everything but training.

    Validation, samples, checkpoints and the model after `fit` have the average. Example:
    `EMA(decay=0.999)`.

    Args:
        decay: fraction of the average that remains at each optimizer step, after the warmup.
        warmup: let the decay rise with the number of steps.
    """

    acts_on_training = True  # a resume without this callback changes the training
    takes_partial_gradients = True  # with ZeRO-1 a rank has only the gradients that it owns

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        """Set the decay; the average spans about 1 / (1 - decay) optimizer steps."""
        if not 0 <= decay < 1:
            raise UsageError(
                f"EMA: decay={decay} is outside [0, 1)",
                ["0 or more, below 1"],
                hint="use decay=0.999",
                flag="--trainer.callbacks.decay=0.999",
            )
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.averaged: dict[
            str, Tensor
        ] = {}  # the raw or averaged weights that are not in the model
        self.using_average = False  # whether the model holds the average
        self._tracked_weights: dict[str, Tensor] = {}  # cached: iterating over a net takes longer
        self._frozen_params: list[Tensor] = []  # parameters that may be unfrozen later
        self._saved_raw: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second average for the evaluation: another EMA, or that of an optimizer."""
        add_run_checks(trainer, pl_module, stage)
        averages = find_callbacks(trainer, EMA)
        if len(averages) > 1:
            decays = " and ".join(f"EMA(decay={ema.decay})" for ema in averages)
            raise UsageError(
                f"EMA: a run can have one average of the weights, and there are {decays}",
                hint="remove one EMA() from Trainer(callbacks=...)",
            )
        for callback in find_callbacks(trainer, L.Callback):
            list_schedule_free: Any = getattr(callback, "schedule_free_optimizers", None)
            if stage == "fit" and list_schedule_free is not None:
                check_single_average(list_schedule_free())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an optimizer with its own average, with or without an OptimizerPlan."""
        for optimizer in trainer.optimizers:
            members = (
                optimizer.optimizers if isinstance(optimizer, CompositeOptimizer) else [optimizer]
            )
            check_single_average([type(m).__name__ for m in members if has_train_eval_modes(m)])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue the average of a checkpoint, or start at the loaded and sharded weights."""
        super().on_train_start(trainer, pl_module)
        self._load_average(pl_module)
        self._swap(pl_module, use_average=False)
        if not self.averaged or self.num_updates != trainer.global_step:
            self.num_updates = trainer.global_step
            self.averaged = {name: p.detach().clone() for name, p in named_trainable(pl_module)}
        self._track_weights(pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Start to average unfrozen weights, at their values before their first step."""
        if any(parameter.requires_grad for parameter in self._frozen_params):
            self._track_weights(pl_module)

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Update the average."""
        self.num_updates = self.step
        decay = (
            min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
            if self.warmup
            else self.decay
        )
        with torch.no_grad():
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [to_local(average) for average in self.averaged.values()],
                [to_local(self._tracked_weights[name]) for name in self.averaged],
                1 - decay,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the model, and keep the raw weights in `averaged`."""
        self._load_average(pl_module)
        if self.averaged:
            self._swap(pl_module, use_average=True)
        elif not trainer.sanity_checking:
            rank_zero_warn("EMA has no average yet: the raw weights are evaluated")

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the raw weights; deferred so that post-validation callbacks see the average."""
        self._swap(pl_module, use_average=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model, also if a run resumed at its end trained no batch."""
        self._load_average(pl_module)
        self._swap(pl_module, use_average=bool(self.averaged))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the model's weights, and the raw weights; called on every rank."""
        self._load_average(pl_module)
        if self.averaged:
            self._track_weights(pl_module)
            live = dict(named_tracked(pl_module, self.averaged))
            raw, average = (self.averaged, live) if self.using_average else (live, self.averaged)
            state = checkpoint["state_dict"]
            stages = stages_to_join(trainer)
            update_state_dict(state, average, pl_module, live=True, stages=stages)
            raw = to_checkpoint(state, raw, live=True, stages=stages)
            checkpoint["ema"] = {"num_updates": self.num_updates, "raw": raw}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the raw weights until the average has been loaded as the model's weights."""
        if (saved := checkpoint.get("ema")) is not None:
            if problem := _find_average_problem(saved):
                raise CheckpointError(
                    f"EMA: the average in the checkpoint cannot be used: {problem}",
                    hint="pass another ckpt_path, or load only its weights with Pretrained(path)",
                    flag="--ckpt_path=FILE, or --trainer.callbacks+=Pretrained "
                    "--trainer.callbacks.path=FILE",
                )
            self.num_updates, self._saved_raw, self.using_average = (
                saved["num_updates"],
                saved["raw"],
                True,
            )

    def _load_average(self, module: nn.Module) -> None:
        if not self._saved_raw:
            return
        self.averaged = {}
        for name, weight in named_tracked(module, self._saved_raw):
            if name not in self._saved_raw:
                raise UsageError(
                    f"EMA: the checkpoint has no average of {name}, because it was written with "
                    "other trainable parameters",
                    hint="use the callbacks of the run that wrote the checkpoint",
                )
            raw = self._saved_raw[name]
            if raw.shape != weight.shape or dtype_kind_mismatches({name: weight}, {name: raw}):
                raise CheckpointError(
                    f"EMA: the raw weight {name} is {raw.dtype} of shape {list(raw.shape)} in the "
                    f"checkpoint, and {weight.dtype} of shape {list(weight.shape)} in this model",
                    hint="pass another ckpt_path",
                    flag="--ckpt_path=FILE",
                )
            self.averaged[name] = weight.detach().clone()
            to_local(self.averaged[name]).copy_(shard_like(self._saved_raw[name], weight))
        self._saved_raw = {}

    def _track_weights(self, module: nn.Module) -> None:
        """Average every trainable weight; the average of a new one starts at its current value."""
        self._tracked_weights = dict(named_tracked(module, self.averaged))
        for name, weight in self._tracked_weights.items():
            if name not in self.averaged:
                self.averaged[name] = weight.detach().clone()
        self._frozen_params = [p for p in module.parameters() if not p.requires_grad]

    @torch.no_grad()
    def _swap(self, module: nn.Module, use_average: bool) -> None:
        if self.using_average == use_average:
            return
        self._track_weights(module)
        for name, weight in self._tracked_weights.items():
            stored, current = to_local(self.averaged[name]), to_local(weight)
            previous = current.clone()
            current.copy_(stored)
            stored.copy_(previous)
        self.using_average = use_average


def _find_average_problem(saved: Any) -> str:
    """Return the problem of an average in a checkpoint; empty if there is none."""
    if not isinstance(saved, dict) or not isinstance(saved.get("raw"), dict) or not saved["raw"]:
        return "it has no raw weights"
    if type(saved.get("num_updates")) is not int:
        return f"its number of updates is {saved.get('num_updates')!r}"
    non_tensors = [name for name, value in saved["raw"].items() if not isinstance(value, Tensor)]
    return f"{non_tensors[0]} is not a tensor" if non_tensors else ""


def check_single_average(names: list[str]) -> None:
    """Raise UsageError if an optimizer keeps separate weights for evaluation."""
    if names:
        raise UsageError(
            f"EMA: the optimizer {names[0]} keeps its own average of the weights for evaluation",
            ["one average: of EMA or of the optimizer"],
            hint="remove EMA() from Trainer(callbacks=...), or use an optimizer such as AdamW",
        )
