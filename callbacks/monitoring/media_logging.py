"""Where a run is shown: its folder, and pictures into every logger that takes them."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy
from PIL import Image


def get_run_dir(trainer: L.Trainer) -> Path | None:
    """The run's folder, made if it is not there yet; every rank asks."""
    if not (folder := trainer.log_dir):
        return None
    if trainer.is_global_zero:  # a stock trainer without a logger makes none
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def log_image(trainer: L.Trainer, name: str, image: Image.Image) -> None:
    """Give an image to the loggers, on the first rank; the others do nothing.

    Weights & Biases' logger has `log_image`; TensorBoard's writer has `add_image`. A logger that
    has neither, csv among them, keeps numbers only.
    """
    image = image.convert("RGB")
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    for logger in loggers:
        if callable(getattr(logger, "log_image", None)):
            logger.log_image(name, [image], step=trainer.global_step)
        elif callable(add_image := getattr(logger.experiment, "add_image", None)):
            add_image(name, numpy.asarray(image), trainer.global_step, dataformats="HWC")
