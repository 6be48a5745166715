"""PredictionTable: what `lightning predict` says of each example, as a CSV file and a table."""

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ravine.errors import UsageError

from ..checks.run_checks import before_training
from ..monitoring.media_logging import run_folder

LONGEST = 300  # characters of a cell shown; the file has them all
Row = dict[str, Any]


class PredictionTable(L.Callback):
    """Writes predictions.csv in the run's folder if `predict_step` returns rows, and shows some.

    class Judge(L.LightningModule):
        columns = ("message", "label")
        def predict_step(self, batch, index): return [(text, "spam") for text in batch]

    A row is a tuple, named by the module's `columns`, or a dict, which names itself.

    Args:
        shown: rows printed; the file has them all.
    """

    def __init__(self, shown: int = 20) -> None:
        """Begin without rows."""
        self.shown = shown
        self.rows: list[Row] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a prediction that the module cannot make."""
        before_training(trainer, pl_module, stage)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Collect rows; anything else that `predict_step` may return is left alone."""
        names = getattr(pl_module, "columns", None)
        for row in outputs if isinstance(outputs, list) else ():
            if isinstance(row, dict):
                self.rows.append(row)
            elif isinstance(row, tuple) and names is not None:
                if len(row) != len(names):
                    raise UsageError(
                        f"PredictionTable: predict_step of {type(pl_module).__name__} gave a row "
                        f"of {len(row)} values, and its `columns` are {len(names)}: "
                        f"{', '.join(names)}; give each row one value a column"
                    )
                self.rows.append(dict(zip(names, row, strict=True)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the rows of all ranks into the order of the data, write and show them."""
        folder, rows = run_folder(trainer), self.rows
        if dist.is_initialized():
            shares: list[list[Row]] = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(shares, rows)
            rows = [row for turn in zip_longest(*shares) for row in turn if row is not None]
        self.rows = []
        if trainer.is_global_zero and rows:
            show(rows[: self.shown])
            if folder:
                path = folder / "predictions.csv"
                write(rows, path)
                print(f"{len(rows)} rows in {path}")


def write(rows: list[Row], path: Path) -> None:
    """Write rows as CSV, a column for each key."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(dict.fromkeys(k for row in rows for k in row)))
        table.writeheader()
        table.writerows(rows)


def show(rows: list[Row]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0])
    for row in rows:
        words = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
        table.add_row(*(escape(plain(word)) for word in words))
    Console().print(table)


def plain(word: str) -> str:
    """A cell that neither fills the screen nor commands the terminal."""
    short = word if len(word) <= LONGEST else word[: LONGEST - 1] + "…"
    return "".join(c if c.isprintable() else "�" for c in short)
