"""Pictures into the logs: every logger that takes images is given them, each by its own method."""

from typing import Any

import lightning as L
import numpy
from PIL import Image


def show(trainer: L.Trainer, name: str, image: Image.Image) -> None:
    """Give an image to the loggers, on the first rank; the others do nothing.

    Weights & Biases' logger has `log_image`; TensorBoard's writer has `add_image`. A logger that
    has neither, csv among them, keeps numbers only.
    """
    image = image.convert("RGB")
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    for logger in loggers:
        if callable(getattr(logger, "log_image", None)):
            logger.log_image(name, [image], step=trainer.global_step)
        elif callable(take := getattr(logger.experiment, "add_image", None)):
            take(name, numpy.asarray(image), trainer.global_step, dataformats="HWC")
