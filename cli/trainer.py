"""Trainer: Lightning's own, with a run folder, exact resume and safe checkpoints as its defaults."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


class Trainer(L.Trainer):
    """`lightning.Trainer` with Ravine's defaults; every argument of the stock one still works."""

    def __init__(
        self,
        *,
        name: str | None = None,
        logger: bool | Logger | Iterable[Logger] = True,
        callbacks: list[Callback] | Callback | None = None,
        default_root_dir: str | Path = "runs",
        num_sanity_val_steps: int = 0,
        log_every_n_steps: int = 50,
        **kwargs: Any,
    ) -> None:
        """Set up the run; the folder is made when it starts.

        Args:
            name: name of the run, a folder below default_root_dir; the model's class if not given
            logger: true for CSV and TensorBoard in the run folder
            callbacks: added to the default ones
            default_root_dir: where the folders of all runs stand
            num_sanity_val_steps: validation batches tried before training
            log_every_n_steps: optimizer steps between two log lines
            kwargs: those of lightning.Trainer
        """
        self._name = name
        self._folder: str | None = None
        self._default_loggers = logger is True
        super().__init__(
            logger=False if logger is True else logger,
            callbacks=callbacks,
            default_root_dir=default_root_dir,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            **kwargs,
        )

    @property
    def log_dir(self) -> str | None:
        """Folder of this run, made when first asked for on all ranks of a running trainer."""
        if self._folder is None and self.lightning_module is not None and not self.fast_dev_run:
            self._folder = self.strategy.broadcast(self._claim() if self.is_global_zero else "")
            root, version = os.path.split(self._folder)
            if self._default_loggers:
                place = {"save_dir": root, "name": "", "version": version}
                self.loggers = [CSVLogger(**place), TensorBoardLogger(**place)]
            for callback in self.checkpoint_callbacks:
                if getattr(callback, "dirpath", "") is None:
                    callback.dirpath = os.path.join(self._folder, "checkpoints")  # type: ignore
        return self._folder

    def _claim(self) -> str:
        """Make the next free version folder; two runs started together get two of them."""
        name = self._name or type(self.lightning_module).__name__.lower()
        root = Path(self.default_root_dir, name)
        taken = [int(p.name[8:]) for p in root.glob("version_*") if p.name[8:].isdigit()]
        number = max(taken, default=-1) + 1
        while True:
            try:
                Path(root, f"version_{number}").mkdir(parents=True)
                return str(root / f"version_{number}")
            except FileExistsError:
                number += 1
