"""A callback: NewCallback.

lightning fit --config spam/quick --trainer.callbacks+=new_callback.NewCallback

It logs one number. Lightning calls the other hooks of a callback by their names, too:
https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html#hooks
"""

from typing import Any

import lightning as L
import torch

from ravine.errors import UsageError


class NewCallback(L.Callback):
    """Log the root mean square of all weights as `train/weight_rms`.

    Args:
        every_n_steps: number of optimizer steps between two values.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        """Check and store the arguments."""
        if every_n_steps < 1:
            raise UsageError(
                f"NewCallback: every_n_steps={every_n_steps} is below 1", hint="use 50"
            )
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the value at every n-th optimizer step."""
        if trainer.global_step % self.every_n_steps:
            return
        with torch.no_grad():
            weights = [p for p in pl_module.parameters() if p.requires_grad]
            # the root of the mean square over all trained weights
            total = torch.stack([w.float().square().sum() for w in weights]).sum()
            count = sum(w.numel() for w in weights)
        pl_module.log("train/weight_rms", (total / count).sqrt())
