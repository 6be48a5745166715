"""Samples: what a generative model makes, looked at after each validation."""

from pathlib import Path
from typing import Any

import lightning as L


class Samples(L.Callback):
    """Calls the task's `generate` at each validation; the last sample is printed at the end.

    Trainer(callbacks=[Samples({"prompt": "ROMEO:", "max_new_tokens": 300})])

    Args:
        arguments: of `generate`; its own defaults if not given.
    """

    def __init__(self, arguments: dict[str, Any] | None = None) -> None:
        """Keep the arguments."""
        self.arguments = arguments or {}
        self.last: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that generates nothing."""
        if not callable(getattr(pl_module, "generate", None)):
            raise ValueError(
                f"Samples needs a module with a method generate(), and {type(pl_module).__name__} "
                "has none; take Samples out of trainer.callbacks"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a sample to samples.txt; all ranks generate, as a sharded net needs all of them."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.last = str(pl_module.generate(**self.arguments))  # pyright: ignore
        folder = trainer.log_dir
        if trainer.is_global_zero and folder:
            with (Path(folder) / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {trainer.global_step} ---\n{self.last}\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last one."""
        if self.last is not None:
            pl_module.print(f"--- a sample after step {trainer.global_step} ---\n{self.last}")
