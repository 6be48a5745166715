"""OptimizerStepCallback, find_callbacks and require_validation: what several callbacks need."""

from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ravine.errors import UsageError

CallbackType = TypeVar("CallbackType", bound=L.Callback)


class OptimizerStepCallback(L.Callback):
    """Base of callbacks with a hook that is called once for each optimizer step.

        class PrintStep(OptimizerStepCallback):
            def on_optimizer_step_end(self, trainer, pl_module, outputs, batch):
                pl_module.print(self.step)

    Lightning calls `on_train_batch_end` after each micro-batch. With accumulation, an optimizer
    step has several; with manual optimization, `global_step` may rise by more than 1.
    """

    step = 0  # optimizer steps of the run so far

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the optimizer step at which the run starts."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Call `on_optimizer_step_end` if the micro-batch ended an optimizer step."""
        previous_step, self.step = self.step, trainer.global_step
        if self.step != previous_step:
            self.on_optimizer_step_end(trainer, pl_module, outputs, batch)

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Act after an optimizer step; `self.step` counts it already.

        Args:
            outputs: result of the training step on the last micro-batch.
            batch: that micro-batch.
        """


def find_callbacks(trainer: Any, callback_type: type[CallbackType]) -> list[CallbackType]:
    """Return the trainer's callbacks of a class or of its subclasses, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, callback_type)]


def require_validation(trainer: L.Trainer, callback_name: str, stage: str) -> None:
    """Raise UsageError for a fit without validation data, validation step or validation batches."""
    if stage == "fit" and not trainer.enable_validation:
        raise UsageError(
            f"{callback_name} acts at each validation, and this fit has none",
            [
                "a datamodule with val_dataloader, a module with validation_step and "
                "limit_val_batches above 0"
            ],
            hint=f"pass limit_val_batches=1.0 to Trainer, or remove {callback_name} from its "
            "callbacks",
            flag="--trainer.limit_val_batches=1.0, or for images --data.val_fraction=0.05",
        )
