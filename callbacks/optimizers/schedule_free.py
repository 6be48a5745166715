"""Optimizers with two sets of weights, such as schedule-free ones: train one, evaluate the other.

Such an optimizer has `train()` and `eval()`, which move the weights from one set to the other, and
rounding makes the way back inexact. So the training set is kept aside while the other one is shown:
validation leaves no trace, and a checkpoint holds the set to evaluate as the model's weights and
the training set beside it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ravine.strategies.shards import (
    named_tracked,
    named_trainable,
    shard_like,
    stages_to_join,
    to_checkpoint,
    to_local,
    update_state_dict,
)

from .composite import Composite

KEY = "training_weights"


def has_train_eval_modes(optimizer: Any) -> bool:
    """Whether an optimizer, or a class of one, has `train()` and `eval()`."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _supports_train_mode(optimizer: Any) -> bool:
    """Whether `train()` works: a learning-rate search, too, steps before the hooks of a run.

    A wrapper may have the methods for the sake of what it wraps, and the wrapped have none.
    """
    try:
        optimizer.train()
    except (AttributeError, NotImplementedError):
        return False
    return True


class ScheduleFreeWeights:
    """What a plan does around training, evaluation and saving; nothing for other optimizers."""

    def __init__(self) -> None:
        """Nothing to do until an optimizer is there."""
        self._optimizer: Composite | None = None  # only if it has the two modes
        self._train_weights: dict[
            str, Tensor
        ] = {}  # the training set, while the other one is shown
        self._saved_train_weights: dict[str, Tensor] = {}

    def attach_optimizer(self, optimizer: Composite) -> None:
        """Look whether any member has the two modes."""
        schedule_free = [
            member
            for member in optimizer.members
            if has_train_eval_modes(member) and _supports_train_mode(member)
        ]
        optimizer.two_sets[:] = schedule_free
        self._optimizer, self._train_weights = optimizer if schedule_free else None, {}

    def resume_training(self, module: nn.Module) -> None:
        """Go on with the training set, if the other one is still shown."""
        if self._train_weights:
            self.use_train_weights(module)

    @torch.no_grad()
    def use_train_weights(self, module: nn.Module) -> None:
        """Put the training set in place, as it was when it was set aside or saved."""
        if self._optimizer is not None:
            self._optimizer.train()
            for name, weight in named_tracked(
                module, {*self._train_weights, *self._saved_train_weights}
            ):
                if name in self._train_weights:
                    to_local(weight).copy_(to_local(self._train_weights[name]))
                elif name in self._saved_train_weights:
                    to_local(weight).copy_(shard_like(self._saved_train_weights[name], weight))
            self._train_weights, self._saved_train_weights = {}, {}

    @torch.no_grad()
    def use_eval_weights(self, module: nn.Module) -> None:
        """Show the other set."""
        if self._optimizer is not None and not self._train_weights:
            self._train_weights = {
                name: weight.detach().clone() for name, weight in named_trainable(module)
            }
            self._optimizer.eval()

    def add_to_checkpoint(
        self, trainer: Any, module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Both sets into the file; every rank calls it."""
        if self._optimizer is None:
            return
        uses_eval_weights = bool(self._train_weights)
        self.use_eval_weights(module)
        stages = getattr(trainer.strategy, "stages", None)
        checkpoint[KEY] = to_checkpoint(
            {}, self._train_weights, stages=stages
        )  # whole, in a folder too
        weights, state = dict(named_trainable(module)), checkpoint["state_dict"]
        update_state_dict(state, weights, module, stages=stages_to_join(trainer))
        if not uses_eval_weights:
            self.use_train_weights(module)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Remember the training set until the weights are in place."""
        self._saved_train_weights = checkpoint.get(KEY, {})
