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
        """Set the decay; the average spans about 1 / (1 - decay) optimizer steps.

        Args:
            decay: fraction of the average that remains at each optimizer step.
            warmup: start at a lower decay, min(decay, (1 + n) / (10 + n)) after n steps.
        """
        if not 0 <= decay < 1:
            raise UsageError(
                f"EMA: decay={decay} is outside [0, 1)",
                ["0 or more, below 1"],
                hint="use decay=0.999",
                flag=f"--trainer.callbacks.{type(self).__name__}.decay=0.999",
            )
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.using_average = False  # whether the model holds the average
        # the average, or the raw weights while the model holds the average
        self.weights_outside_model: dict[str, Tensor] = {}
        # the model's weights by name; cached, because iterating over the module takes longer
        self._tracked_weights: dict[str, Tensor] = {}
        self._frozen_params: list[Tensor] = []  # parameters that may be unfrozen later
        # raw weights of a checkpoint, from `on_load_checkpoint` until `_load_average`
        self._raw_from_checkpoint: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second average for the evaluation: another EMA, or that of an optimizer."""
        add_run_checks(trainer, pl_module, stage)
        if getattr(pl_module, "steps_per_batch", 1) > 1:
            raise UsageError(
                f"EMA averages the weights once a batch, and a batch of {type(pl_module).__name__} "
                f"has {pl_module.steps_per_batch} optimizer steps",
                ["steps_per_batch=1"],
                hint="use steps_per_batch=1, or remove EMA() from Trainer(callbacks=...)",
            )
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
        if not self.weights_outside_model or self.num_updates != trainer.global_step:
            self.num_updates = trainer.global_step
            self.weights_outside_model = {
                name: p.detach().clone() for name, p in named_trainable(pl_module)
            }
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
        """Move the average toward the model's weights; called after each optimizer step."""
        self.num_updates = self.step  # the base class counts the optimizer steps
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = self.weights_outside_model  # the model holds the raw weights in training
        with torch.no_grad():  # average <- average + (1 - decay) (weight - average)
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [to_local(average) for average in averages.values()],
                [to_local(self._tracked_weights[name]) for name in averages],
                1 - decay,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the model, and the raw weights into `weights_outside_model`."""
        self._load_average(pl_module)
        if self.weights_outside_model:
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
        self._swap(pl_module, use_average=bool(self.weights_outside_model))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the model's weights, and the raw weights under `ema`.

        Lightning calls it on every rank, with its own `state_dict` in the checkpoint. Sharded
        weights are gathered for a file, with those of all pipeline stages.
        """
        self._load_average(pl_module)
        if self.weights_outside_model:
            self._track_weights(pl_module)  # includes weights that were unfrozen just now
            # assumes that the model holds the raw weights; swapped below if it holds the average
            average = self.weights_outside_model
            raw = dict(named_tracked(pl_module, average))  # the model's weights
            if self.using_average:
                raw, average = average, raw
            state = checkpoint["state_dict"]
            # pipeline stages to gather into one file; None without a pipeline or in a sharded file
            stages = stages_to_join(trainer)
            # `update_state_dict` replaces the weights in the checkpoint by the average, and
            # `to_checkpoint` converts the raw weights to the format of the file.
            # live: shards are not copied, because no step changes them before they are written
            update_state_dict(state, average, pl_module, live=True, stages=stages)
            raw = to_checkpoint(state, raw, live=True, stages=stages)
            checkpoint["ema"] = {"num_updates": self.num_updates, "raw": raw}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the raw weights of the checkpoint for `_load_average`.

        The checkpoint's `state_dict`, which becomes the model's weights, has the average.
        """
        if (saved := checkpoint.get("ema")) is not None:
            if problem := _find_average_problem(saved):
                raise CheckpointError(
                    f"EMA: the average in the checkpoint cannot be used: {problem}",
                    hint="pass another ckpt_path, or load only its weights with Pretrained(path)",
                    flag="--ckpt_path=FILE, or --trainer.callbacks+=Pretrained "
                    "--trainer.callbacks.path=FILE",
                )
            self.num_updates = saved["num_updates"]
            self._raw_from_checkpoint = saved["raw"]
            self.using_average = True

    def _load_average(self, module: nn.Module) -> None:
        """Copy the raw weights of a loaded checkpoint to `weights_outside_model`, sharded.

        The model holds the average then, because a checkpoint stores it as the model's weights.
        Do nothing if no checkpoint was loaded since the last call.

        Raises:
            UsageError: a trainable weight of the module has no raw weight in the checkpoint.
            CheckpointError: shape or kind of dtype of a raw weight differs.
        """
        if not self._raw_from_checkpoint:
            return
        self.weights_outside_model = {}
        # trainable weights, and frozen ones that have a raw weight
        for name, weight in named_tracked(module, self._raw_from_checkpoint):
            if name not in self._raw_from_checkpoint:
                raise UsageError(
                    f"EMA: the checkpoint has no average of {name}, because it was written with "
                    "other trainable parameters",
                    hint="use the callbacks of the run that wrote the checkpoint",
                )
            raw = self._raw_from_checkpoint[name]
            if raw.shape != weight.shape or dtype_kind_mismatches({name: weight}, {name: raw}):
                raise CheckpointError(
                    f"EMA: the raw weight {name} is {raw.dtype} of shape {list(raw.shape)} in the "
                    f"checkpoint, and {weight.dtype} of shape {list(weight.shape)} in this model",
                    hint="pass another ckpt_path",
                    flag="--ckpt_path=FILE",
                )
            self.weights_outside_model[name] = weight.detach().clone()  # dtype, device and shards
            # `raw` may be a full tensor: `shard_like` takes the part of this rank
            to_local(self.weights_outside_model[name]).copy_(shard_like(raw, weight))
        self._raw_from_checkpoint = {}

    def _track_weights(self, module: nn.Module) -> None:
        """Average every trainable weight; the average of a new one starts at its current value."""
        self._tracked_weights = dict(named_tracked(module, self.weights_outside_model))
        for name, weight in self._tracked_weights.items():
            if name not in self.weights_outside_model:
                self.weights_outside_model[name] = weight.detach().clone()
        self._frozen_params = [p for p in module.parameters() if not p.requires_grad]

    @torch.no_grad()
    def _swap(self, module: nn.Module, use_average: bool) -> None:
        """Exchange the model's weights and `weights_outside_model`, unless already as asked."""
        if self.using_average == use_average:
            return
        self._track_weights(module)
        for name, weight in self._tracked_weights.items():
            stored, current = to_local(self.weights_outside_model[name]), to_local(weight)
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
