"""Recompute: activation recomputation as a line of a config, on any strategy."""

from typing import Literal

import lightning as L

from ravine.strategies.activation_checkpointing import apply_activation_checkpointing

from .base import Transform


class Recompute(Transform):
    """Let each block keep its input alone and compute the rest again when going backward.

    lightning fit --config gpt2/124m --trainer.callbacks+=Recompute

    Args:
        mode: full keeps the least and costs a third more; selective keeps matrix products.
    """

    phase = "recompute"
    without_values = True

    def __init__(self, mode: Literal["selective", "full"] = "full") -> None:
        """Choose."""
        self.mode: Literal["selective", "full"] = mode

    def identity(self) -> str:
        """The mode."""
        return self.mode

    def transform(self, module: L.LightningModule) -> None:
        """Wrap the forward of each block."""
        apply_activation_checkpointing(module, self.mode)
