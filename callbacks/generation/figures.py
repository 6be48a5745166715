"""SaveFigures: save the figures of a trained module as PNG files and pass them to the loggers."""

from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from ravine.errors import UsageError

from ..checks.run_checks import add_run_checks
from ..monitoring.media_logging import get_run_dir, log_image


class SaveFigures(L.Callback):
    """Saves the module's `make_figures(datamodule)` as PNG files at the end of a fit.

    Example: `Trainer(callbacks=[SaveFigures()])`. The files are in the run's folder and are named
    after the config and the figure, such as bigram_bigrams.png.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without a method `make_figures`."""
        add_run_checks(trainer, pl_module, stage)
        if not callable(getattr(pl_module, "make_figures", None)):
            raise UsageError(
                f"SaveFigures: {type(pl_module).__name__} has no method make_figures",
                ["a module with a method make_figures(datamodule)"],
                hint="remove SaveFigures() from Trainer(callbacks=...)",
            )

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Draw the figures once with the current weights, and discard them."""
        module: Any = pl_module
        for figure in module.make_figures(getattr(trainer, "datamodule", None)).values():
            if trainer.is_global_zero:
                figure.savefig(BytesIO(), format="png")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on all ranks, because a sharded net needs all of them; rank 0 writes the files."""
        module: Any = pl_module
        figures = module.make_figures(getattr(trainer, "datamodule", None))
        folder = get_run_dir(trainer) or Path()
        config = folder.parent.name or "run"
        if not trainer.is_global_zero:
            return
        for name, figure in figures.items():
            file = folder / f"{config}_{name}.png"
            figure.savefig(file)
            with Image.open(file) as image:
                log_image(trainer, name, image)
