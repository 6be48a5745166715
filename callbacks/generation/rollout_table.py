"""RolloutTable: what a policy wrote and what it earned, read while it is trained."""

import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ravine.errors import UsageError

from ..checks.run_checks import before_training
from ..monitoring.media_logging import run_folder
from .predictions import plain

Row = dict[str, Any]


class RolloutTable(L.Callback):
    """Shows samples at the first step, every so many steps, and at the end.

    Trainer(callbacks=[RolloutTable(every=10, count=3)])

    They are printed as a table, added to rollouts.txt in the run's folder, and handed to a logger
    that takes text. A module offers them by a method `samples()`: a list of dicts, each with a
    `text`, perhaps a `prompt`, and numbers.

    Args:
        every: optimizer steps between two tables.
        count: samples in a table.
    """

    def __init__(self, every: int = 25, count: int = 2) -> None:
        """Choose when and how many."""
        for name, value in (("every", every), ("count", count)):
            if value < 1:
                raise UsageError(f"RolloutTable: {name} is {value}; allowed: 1 or more; type 10")
        self.every, self.count = every, count
        self.step, self.shown = 0, -1
        self.folder: Path | None = None
        self.rows: list[Row] = []  # of the last step; a validation after it writes others

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that has no samples."""
        before_training(trainer, pl_module, stage)
        if not callable(getattr(pl_module, "samples", None)):
            raise UsageError(
                f"RolloutTable needs a module with a method samples(), and "
                f"{type(pl_module).__name__} has none; take RolloutTable out of trainer.callbacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the folder, which is asked for on all ranks."""
        self.step, self.folder = trainer.global_step, run_folder(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show those of the step, when it is due."""
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        self.rows = pl_module.samples()[: self.count]  # pyright: ignore[reportCallIssue]
        if stepped and (self.step == 1 or self.step % self.every == 0):
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last ones."""
        if self.rows and self.step != self.shown:
            self._show(trainer, pl_module)

    def _show(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rows = self.rows
        if not trainer.is_global_zero or not rows:
            return
        self.shown = self.step
        words = table(rows, f"written in step {self.step}")
        module.print(words)
        if self.folder:
            with (self.folder / "rollouts.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {self.step} ---\n{listing(rows)}")
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):  # TensorBoard's
                text = listing(rows).replace("\n", "  \n")
                writer.add_text("rollouts", text, self.step)  # type: ignore[union-attr]


def table(rows: list[Row], title: str) -> str:
    """Rows as a table for a screen; the end of the prompt is shown with the text."""
    shown = Table("what it earned", "prompt … text", title=title, show_lines=True)
    for row in rows:
        earned = [f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, int | float)]
        lines = [f"{str(row['prompt'])[-20:]}|{row['text']}" if "prompt" in row else row["text"]]
        text = "\n".join(plain(line) for line in lines[0].split("\n"))
        shown.add_row("\n".join(earned), escape(text))
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    console = Console(file=StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def listing(rows: list[Row]) -> str:
    """Rows as plain text for a file."""
    parts = []
    for row in rows:
        earned = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float))
        parts.append(f"[{earned}]\n{row.get('prompt', '')}|{row['text']}\n")
    return "\n".join(parts)
