"""A module that logs given values, one a step, and a run of it with one callback."""

from pathlib import Path
from typing import Any

import lightning as L
from external_modules.net_in_init import NetInInit

from ravine.cli.trainer import Trainer


class Scripted(NetInInit):
    """Logs what it is told to, a value a step, and shows two texts."""

    def __init__(self, **values: list[float]) -> None:
        super().__init__(batch_size=32)
        self.values, self.at = values, 0

    def training_step(self, batch, batch_idx):
        for name, row in self.values.items():
            self.log(f"train/{name}", row[min(self.at, len(row) - 1)])
        self.at += 1
        return super().training_step(batch, batch_idx)

    def last_samples(self) -> list[dict[str, Any]]:
        return [{"prompt": "O", "text": f" [bold]\x1b[31m\nline {self.at}", "reward": 0.5}] * 9


def fit(
    module: L.LightningModule,
    callback: L.Callback,
    folder: Path,
    steps: int,
    data: L.LightningDataModule | None = None,
    **how: Any,
) -> str:
    options = {"log_every_n_steps": 1, "limit_val_batches": 0, "accelerator": "cpu"} | how
    trainer = Trainer(max_steps=steps, callbacks=[callback], default_root_dir=folder, **options)
    trainer.fit(module, data)
    return str(trainer.log_dir)
