"""Rows of `metrics.csv` that a continued run keeps: those up to the step of its checkpoint.

Lightning's CSVLogger deletes the file of an earlier run in the same folder.
"""

import csv
import os
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from .index import MAX_CURVES_BYTES
from .record import FIRST_LOGGED_STEP, read_regular_file

EARLIER_FILE = ".metrics.csv.earlier"  # the rows while the new file is not yet written


def open_experiment(folder: Path, kept_steps: int | None, create: Callable[[], Any]) -> Any:
    """Create the writer of `metrics.csv`, and give it the rows of the first `kept_steps` steps.

    Args:
        folder: the run's folder.
        kept_steps: number of optimizer steps whose rows stay; None starts an empty file.
        create: creates Lightning's writer, which removes the file.
    """
    path, earlier = folder / "metrics.csv", folder / EARLIER_FILE
    text = ""
    if kept_steps is not None:
        if path.is_file() and not path.is_symlink():
            # under this name the file survives `create`, and a crash in between
            os.replace(path, earlier)
        # None for a link, or for a file that is missing or too large
        text = read_regular_file(earlier, MAX_CURVES_BYTES) or ""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")
        experiment = create()
    if text:
        # the names of the columns, and the rows of the first `kept_steps` steps
        names, kept = rows_up_to(text, kept_steps or 0)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(kept)
        # Lightning's writer appends rows only if it knows the columns of the file
        experiment.metrics_keys = names
    earlier.unlink(missing_ok=True)
    return experiment


def rows_up_to(text: str, num_steps: int) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows that `num_steps` optimizer steps have logged."""
    reader = csv.DictReader(StringIO(text, newline=""))
    names = sorted(name for name in reader.fieldnames or () if name)
    kept = []
    for row in reader:
        try:
            step = float(row.get("step") or "nan")
        except ValueError:
            continue
        if step < num_steps + FIRST_LOGGED_STEP and None not in row:
            kept.append({name: row.get(name) or "" for name in names})
    return names, kept
