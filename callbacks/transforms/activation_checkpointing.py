"""Activation checkpointing callback: recompute activations in backward, with any strategy."""

from typing import Literal

import lightning as L

from ravine.strategies.activation_checkpointing import apply_activation_checkpointing

from .base import Transform


class ActivationCheckpointing(Transform):
    """Activation checkpointing: each block keeps its input and recomputes the rest in backward.

        lightning fit --config gpt2/124m --trainer.callbacks+=ActivationCheckpointing

    Args:
        mode: `full` keeps the least memory and costs a third more compute; `selective` also keeps
            the results of matrix products.
    """

    phase = "recompute"
    accepts_meta_params = True

    def __init__(self, mode: Literal["selective", "full"] = "full") -> None:
        """Store the mode."""
        self.mode: Literal["selective", "full"] = mode

    def config_key(self) -> str:
        """Return the mode."""
        return self.mode

    def transform(self, module: L.LightningModule) -> None:
        """Apply activation checkpointing to each block."""
        apply_activation_checkpointing(module, self.mode)
