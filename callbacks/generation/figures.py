"""Figures: what a trained module can show of itself, as PNG files and in the logger."""

from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from ravine.errors import UsageError

from ..checks.run_checks import add_run_checks
from ..monitoring.media_logging import get_run_dir, log_image


class Figures(L.Callback):
    """Draws the task's `figures(datamodule)` at the end of a fit: seed_last_bigrams.png.

    Trainer(callbacks=[Figures()])

    They lie in the run's folder; the first part of a name is the config's.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that draws nothing."""
        add_run_checks(trainer, pl_module, stage)
        if not callable(getattr(pl_module, "figures", None)):
            raise UsageError(
                f"Figures needs a module with a method figures(), and {type(pl_module).__name__} "
                "has none; take Figures out of trainer.callbacks"
            )

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Draw once with the weights as they are; the pictures are thrown away."""
        module: Any = pl_module
        for figure in module.figures(getattr(trainer, "datamodule", None)).values():
            if trainer.is_global_zero:
                figure.savefig(BytesIO(), format="png")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on all ranks, since a sharded net needs all of them; the first one writes."""
        module: Any = pl_module
        figures = module.figures(getattr(trainer, "datamodule", None))
        folder = get_run_dir(trainer) or Path()
        config = folder.parent.name or "run"
        if not trainer.is_global_zero:
            return
        for name, figure in figures.items():
            file = folder / f"{config}_{name}.png"
            figure.savefig(file)
            with Image.open(file) as image:
                log_image(trainer, name, image)
