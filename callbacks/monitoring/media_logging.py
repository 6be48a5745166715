"""Return the run's folder, and log values and images to the loggers of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import torch
from PIL import Image

from ravine.lightning_compat import collected_metrics


def get_run_dir(trainer: L.Trainer) -> Path | None:
    """Return the run's folder, and create it if it is missing; all ranks must call this."""
    if not (folder := trainer.log_dir):
        return None
    if trainer.is_global_zero:  # a stock Trainer without a logger creates none
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def log_values(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Log values that belong to the state after `step` optimizer steps.

    The loggers get a row of this step at once, also between two log steps. The values are added to
    `trainer.callback_metrics`.
    """
    collected_metrics(trainer).update({name: torch.tensor(v) for name, v in values.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def log_image(trainer: L.Trainer, name: str, image: Image.Image) -> None:
    """Log an image to the loggers on rank 0; do nothing on other ranks.

    The Weights & Biases logger has `log_image`; TensorBoard's writer has `add_image`. Loggers with
    neither, such as CSVLogger, are skipped.
    """
    image = image.convert("RGB")
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    for logger in loggers:
        if callable(getattr(logger, "log_image", None)):
            logger.log_image(name, [image], step=trainer.global_step)
        elif callable(add_image := getattr(logger.experiment, "add_image", None)):
            add_image(name, numpy.asarray(image), trainer.global_step, dataformats="HWC")
