"""PredictionTable: write the predictions of `lightning predict` to a CSV file, and print some."""

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

from ..checks.run_checks import add_run_checks
from ..monitoring.media_logging import get_run_dir

MAX_CELL_CHARS = 300  # characters of a cell that are printed; the file has all
PredictionRow = dict[str, Any]


class PredictionTable(L.Callback):
    """Writes predictions.csv in the run's folder if `predict_step` returns rows, and prints some.

        class SpamClassifier(L.LightningModule):
            prediction_columns = ("message", "label")
            def predict_step(self, batch, index): return [(text, "spam") for text in batch]

    A row is a dict, or a tuple whose column names are the module's `prediction_columns`.

    Args:
        max_rows: number of rows to print; the file has all rows.
    """

    def __init__(self, max_rows: int = 20) -> None:
        """Start without rows."""
        self.max_rows = max_rows
        self.rows: list[PredictionRow] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add RunChecks, which raises if the module cannot predict."""
        add_run_checks(trainer, pl_module, stage)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Collect the rows that `predict_step` returned; ignore other return values.

        A row is a dict, or a tuple whose column names are the module's `prediction_columns`.
        """
        names = getattr(pl_module, "prediction_columns", None)
        for row in outputs if isinstance(outputs, list) else ():
            if isinstance(row, dict):
                self.rows.append(row)
            elif isinstance(row, tuple) and names is not None:
                if len(row) != len(names):
                    raise UsageError(
                        f"PredictionTable: {type(pl_module).__name__}.predict_step returns a row "
                        f"of {len(row)} values for {len(names)} prediction_columns: "
                        f"{', '.join(names)}",
                        hint=f"return {len(names)} values in each row",
                    )
                self.rows.append(dict(zip(names, row, strict=True)))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the rows of all ranks in the order of the data; write and print them."""
        folder, rows = get_run_dir(trainer), self.rows
        if dist.is_initialized():
            rows_per_rank: list[list[PredictionRow]] = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(rows_per_rank, rows)
            rows = [row for turn in zip_longest(*rows_per_rank) for row in turn if row is not None]
        self.rows = []
        if trainer.is_global_zero and rows:
            print_table(rows[: self.max_rows])
            if folder:
                path = folder / "predictions.csv"
                write_csv(rows, path)
                print(f"{len(rows)} rows in {path}")


def write_csv(rows: list[PredictionRow], path: Path) -> None:
    """Write rows as CSV, a column for each key."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(dict.fromkeys(k for row in rows for k in row)))
        table.writeheader()
        table.writerows(rows)


def print_table(rows: list[PredictionRow]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0])
    for row in rows:
        cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
        table.add_row(*(escape(sanitize(cell)) for cell in cells))
    Console().print(table)


def sanitize(text: str) -> str:
    """Shorten a cell, and replace characters that could control the terminal."""
    short = text if len(text) <= MAX_CELL_CHARS else text[: MAX_CELL_CHARS - 1] + "…"
    return "".join(c if c.isprintable() else "�" for c in short)
