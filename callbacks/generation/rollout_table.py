"""RolloutTable: print generated texts of a policy and their rewards during training."""

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

from ..base import OptimizerStepCallback
from ..checks.run_checks import add_run_checks
from ..monitoring.media_logging import get_run_dir
from .predictions import sanitize

RolloutRow = dict[str, Any]


class RolloutTable(OptimizerStepCallback):
    """Prints generated texts and rewards at the first step, at an interval, and at the end.

    Example: `Trainer(callbacks=[RolloutTable(every_n_steps=10, num_samples=3)])`. They are printed
    as a table, appended to rollouts.txt in the run's folder, and passed to a logger that takes
    text. The module's `last_samples()` returns a list of dicts, each with a `text`, an optional
    `prompt`, and numbers.

    Args:
        every_n_steps: optimizer steps between two tables.
        num_samples: number of samples in a table.
    """

    def __init__(self, every_n_steps: int = 25, num_samples: int = 2) -> None:
        """Set the interval and the number of samples."""
        for name, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value < 1:
                raise UsageError(
                    f"RolloutTable: {name}={value} is too small",
                    ["1 or more"],
                    hint=f"use {name}=10",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}=10",
                )
        self.every_n_steps, self.num_samples = every_n_steps, num_samples
        self.last_shown_step = -1
        self.folder: Path | None = None
        self.rows: list[RolloutRow] = []  # of the last training step, not of a validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without a method `last_samples`."""
        add_run_checks(trainer, pl_module, stage)
        if not callable(getattr(pl_module, "last_samples", None)):
            raise UsageError(
                f"RolloutTable: {type(pl_module).__name__} has no method last_samples",
                ["a module with a method last_samples()"],
                hint="remove RolloutTable() from Trainer(callbacks=...)",
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the run's folder, for which all ranks must call `get_run_dir`."""
        super().on_train_start(trainer, pl_module)
        self.folder = get_run_dir(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the samples of the micro-batch."""
        self.rows = pl_module.last_samples()[: self.num_samples]  # pyright: ignore[reportCallIssue]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Print the samples if a table is due."""
        if self.step == 1 or self.step % self.every_n_steps == 0:
            self._print_rollouts(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last samples, unless they were printed already."""
        if self.rows and self.step != self.last_shown_step:
            self._print_rollouts(trainer, pl_module)

    def _print_rollouts(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rows = self.rows
        if not trainer.is_global_zero or not rows:
            return
        self.last_shown_step = self.step
        text_table = format_rollout_table(rows, f"samples of step {self.step}")
        module.print(text_table)
        if self.folder:
            with (self.folder / "rollouts.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {self.step} ---\n{format_rollout_text(rows)}")
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if hasattr(writer, "add_text"):  # of TensorBoard
                text = format_rollout_text(rows).replace("\n", "  \n")
                writer.add_text("rollouts", text, self.step)  # type: ignore[union-attr]


def format_rollout_table(rows: list[RolloutRow], title: str) -> str:
    """Format rows as a table for a terminal; the end of the prompt precedes the text."""
    rich_table = Table("scores", "prompt … text", title=title, show_lines=True)
    for row in rows:
        scores = [f"{k} {v:.3g}" for k, v in row.items() if isinstance(v, int | float)]
        lines = [f"{str(row['prompt'])[-20:]}|{row['text']}" if "prompt" in row else row["text"]]
        text = "\n".join(sanitize(line) for line in lines[0].split("\n"))
        rich_table.add_row("\n".join(scores), escape(text))
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    console = Console(file=StringIO(), width=width)
    console.print(rich_table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def format_rollout_text(rows: list[RolloutRow]) -> str:
    """Format rows as plain text for a file."""
    entries = []
    for row in rows:
        scores = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float))
        entries.append(f"[{scores}]\n{row.get('prompt', '')}|{row['text']}\n")
    return "\n".join(entries)
