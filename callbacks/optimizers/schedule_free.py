"""Schedule-free optimizers: switch between training weights and evaluation weights.

Such an optimizer has `train()` and `eval()`, which convert the weights from one set to the other.
Rounding makes the conversion inexact. So a copy of the training weights is kept while the module
has the evaluation weights, and validation does not change training. A checkpoint holds the
evaluation weights in `state_dict` and the training weights under `training_weights`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ravine.strategies.checkpoint.state_dict import stages_to_join, to_checkpoint, update_state_dict
from ravine.strategies.dtensor import shard_like, to_local
from ravine.strategies.parallel_module import named_tracked, named_trainable

from .composite import CompositeOptimizer

TRAIN_WEIGHTS_KEY = "training_weights"


def has_train_eval_modes(optimizer: Any) -> bool:
    """Whether an optimizer, or a class of one, has `train()` and `eval()`."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _supports_train_mode(optimizer: Any) -> bool:
    """Call `train()` and return whether it works; a learning-rate search needs training mode.

    The search steps before any hook of the run. A wrapper may define the methods for an inner
    optimizer that lacks them.
    """
    try:
        optimizer.train()
    except (AttributeError, NotImplementedError):
        return False
    return True


class ScheduleFreeWeights:
    """Swap training and evaluation weights for a plan; do nothing for other optimizers."""

    def __init__(self) -> None:
        """Start without an optimizer."""
        self._optimizer: CompositeOptimizer | None = None  # None if no optimizer has the modes
        # a copy of the training weights while the module has the evaluation weights
        self._train_weights: dict[str, Tensor] = {}
        self._saved_train_weights: dict[str, Tensor] = {}

    def attach_optimizer(self, optimizer: CompositeOptimizer) -> None:
        """Find the optimizers with train and eval modes in the composite."""
        schedule_free = [
            member
            for member in optimizer.optimizers
            if has_train_eval_modes(member) and _supports_train_mode(member)
        ]
        optimizer.schedule_free[:] = schedule_free
        self._optimizer, self._train_weights = optimizer if schedule_free else None, {}

    def resume_training(self, module: nn.Module) -> None:
        """Switch back to training weights if the module still has the evaluation weights."""
        if self._train_weights:
            self.use_train_weights(module)

    @torch.no_grad()
    def use_train_weights(self, module: nn.Module) -> None:
        """Copy the training weights, kept in memory or from a checkpoint, into the module."""
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
        """Keep a copy of the training weights and switch the module to evaluation weights."""
        if self._optimizer is not None and not self._train_weights:
            self._train_weights = {
                name: weight.detach().clone() for name, weight in named_trainable(module)
            }
            self._optimizer.eval()

    def add_to_checkpoint(
        self, trainer: Any, module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Put both sets of weights into the checkpoint; every rank calls it."""
        if self._optimizer is None:
            return
        uses_eval_weights = bool(self._train_weights)
        self.use_eval_weights(module)
        stages = getattr(trainer.strategy, "stage_names", None)
        # unsharded, in a sharded checkpoint too
        checkpoint[TRAIN_WEIGHTS_KEY] = to_checkpoint({}, self._train_weights, stages=stages)
        weights, state = dict(named_trainable(module)), checkpoint["state_dict"]
        update_state_dict(state, weights, module, stages=stages_to_join(trainer))
        if not uses_eval_weights:
            self.use_train_weights(module)

    def load_from_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the training weights of a checkpoint until training starts."""
        self._saved_train_weights = checkpoint.get(TRAIN_WEIGHTS_KEY, {})
