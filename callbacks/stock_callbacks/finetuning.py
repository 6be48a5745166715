"""Support BaseFinetuning (BackboneFinetuning) with `configure_model` and in a resumed run.

BaseFinetuning freezes layers in `setup`, when a network that `configure_model` builds does not
exist yet. Here it freezes after `configure_model`, before the optimizers are created. A resumed run
builds a frozen network again. Parameters that the checkpoint lists as trainable are unfrozen after
it is restored.
"""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden

from ravine.lightning_compat import replace_method, restore_method

from ..base import find_callbacks
from ..transforms.base import register_transform, unregister_transform

TRAINABLE_KEY = "trainable_parameters"


def find_finetuning_callbacks(trainer: Any) -> list[BaseFinetuning]:
    """Return the trainer's callbacks that unfreeze layers."""
    return find_callbacks(trainer, BaseFinetuning)


def postpone_freezing(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Postpone freezing until after `configure_model`, for a module that overrides it."""
    callbacks = find_finetuning_callbacks(trainer)
    if not callbacks or not is_overridden("configure_model", module):
        return

    def freeze(built: L.LightningModule) -> None:
        for callback in callbacks:
            type(callback).freeze_before_training(callback, built)

    for callback in callbacks:
        replace_method(callback, "freeze_before_training", lambda built: None)
    unregister_transform(module, "freeze")  # of an earlier fit
    register_transform(trainer, module, "freeze", freeze, callbacks[0], accepts_meta_params=True)


def restore_freezing(trainer: L.Trainer) -> None:
    """Restore `freeze_before_training` of the callbacks."""
    for callback in find_finetuning_callbacks(trainer):
        restore_method(callback, "freeze_before_training")


def save_trainable(trainer: L.Trainer, module: L.LightningModule, checkpoint: Any) -> None:
    """Save the names of the trainable parameters, if a callback may change them in a run."""
    if find_finetuning_callbacks(trainer):
        named = module.named_parameters()
        checkpoint[TRAINABLE_KEY] = [name for name, parameter in named if parameter.requires_grad]


def unfreeze_params(module: L.LightningModule, names: list[str]) -> None:
    """Make the floating-point parameters of these names trainable."""
    named = dict(module.named_parameters())
    for name in names:
        if name in named and named[name].is_floating_point():
            named[name].requires_grad_(True)
