"""Lightning's BaseFinetuning (BackboneFinetuning) with networks built late, and in a resumed run.

It freezes layers in `setup`, when a network that `configure_model` builds does not exist yet: here
it freezes after `configure_model`, before optimizers are made. A resumed run builds the network
frozen again: what was unfrozen by the time of the checkpoint is unfrozen after it is restored.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden

from ravine.lightning_compat import replace_method, restore_method

from ..transforms.base import register_transform, unregister_transform

KEY = "trainable_parameters"


def find_finetuning_callbacks(trainer: Any) -> list[BaseFinetuning]:
    """The trainer's callbacks that unfreeze layers."""
    return [callback for callback in trainer.callbacks if isinstance(callback, BaseFinetuning)]


def postpone_freezing(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Postpone their freezing until after `configure_model`, for a module that has one."""
    callbacks = find_finetuning_callbacks(trainer)
    if not callbacks or not is_overridden("configure_model", module):
        return

    def freeze(built: L.LightningModule) -> None:
        for callback in callbacks:
            type(callback).freeze_before_training(callback, built)

    for callback in callbacks:
        replace_method(callback, "freeze_before_training", lambda built: None)
    unregister_transform(module, "freeze")  # of a fit before this one
    register_transform(trainer, module, "freeze", freeze, callbacks[0], without_values=True)


def restore_freezing(trainer: L.Trainer) -> None:
    """Restore the method."""
    for callback in find_finetuning_callbacks(trainer):
        restore_method(callback, "freeze_before_training")


def save_trainable(trainer: L.Trainer, module: L.LightningModule, checkpoint: Any) -> None:
    """Save which parameters train, where it may change in a run."""
    if find_finetuning_callbacks(trainer):
        named = module.named_parameters()
        checkpoint[KEY] = [name for name, parameter in named if parameter.requires_grad]


def unfreeze_params(module: L.LightningModule, names: list[str]) -> None:
    """Make these parameters trainable."""
    named = dict(module.named_parameters())
    for name in names:
        if name in named and named[name].is_floating_point():
            named[name].requires_grad_(True)
