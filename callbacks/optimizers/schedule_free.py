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
    followed,
    local,
    part_of,
    put_into,
    saved_as,
    stages_to_join,
    trainable,
)

from .composite import Composite

KEY = "training_weights"


def has_two_sets(optimizer: Any) -> bool:
    """Whether an optimizer, or a class of one, has `train()` and `eval()`."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _begins(optimizer: Any) -> bool:
    """Whether `train()` works: a learning-rate search, too, steps before the hooks of a run.

    A wrapper may have the methods for the sake of what it wraps, and the wrapped have none.
    """
    try:
        optimizer.train()
    except (AttributeError, NotImplementedError):
        return False
    return True


class TwoSets:
    """What a plan does around training, evaluation and saving; nothing for other optimizers."""

    def __init__(self) -> None:
        """Nothing to do until an optimizer is there."""
        self._optimizer: Composite | None = None  # only if it has the two modes
        self._aside: dict[str, Tensor] = {}  # the training set, while the other one is shown
        self._saved: dict[str, Tensor] = {}

    def use(self, optimizer: Composite) -> None:
        """Look whether any member has the two modes."""
        two = [member for member in optimizer.members if has_two_sets(member) and _begins(member)]
        optimizer.two_sets[:] = two
        self._optimizer, self._aside = optimizer if two else None, {}

    def resume(self, module: nn.Module) -> None:
        """Go on with the training set, if the other one is still shown."""
        if self._aside:
            self.train(module)

    @torch.no_grad()
    def train(self, module: nn.Module) -> None:
        """Put the training set in place, as it was when it was set aside or saved."""
        if self._optimizer is not None:
            self._optimizer.train()
            for name, weight in followed(module, {*self._aside, *self._saved}):
                if name in self._aside:
                    local(weight).copy_(local(self._aside[name]))
                elif name in self._saved:
                    local(weight).copy_(part_of(self._saved[name], weight))
            self._aside, self._saved = {}, {}

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> None:
        """Show the other set."""
        if self._optimizer is not None and not self._aside:
            self._aside = {name: weight.detach().clone() for name, weight in trainable(module)}
            self._optimizer.eval()

    def save(self, trainer: Any, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Both sets into the file; every rank calls it."""
        if self._optimizer is None:
            return
        shown = bool(self._aside)
        self.evaluate(module)
        stages = getattr(trainer.strategy, "stages", None)
        checkpoint[KEY] = saved_as({}, self._aside, stages=stages)  # whole, in a folder too
        weights, state = dict(trainable(module)), checkpoint["state_dict"]
        put_into(state, weights, module, stages=stages_to_join(trainer))
        if not shown:
            self.train(module)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Remember the training set until the weights are in place."""
        self._saved = checkpoint.get(KEY, {})
