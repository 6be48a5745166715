"""Run index: find the runs below a folder, summarize each, and find one by its name.

A run is called by its path, by `task/config/3` (the folder `task/config/version_3`), by the
beginning of such a name, or by `last`. Runs without a record, of an older version of Ravine, are
summarized from their files. Links below the folder of all runs are not followed.

This module needs the standard library only: a thousand runs are listed in less than a second.
"""

import csv
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ravine.errors import UsageError, suggest_names

from ..error_report import program_name
from .record import (
    Record,
    first_logged_step,
    read_record,
    read_regular_file,
    status_of,
)

RUN_MARKERS = {"run.json", "config.yaml", "hparams.yaml", "metrics.csv", "checkpoints"}
MAX_DEPTH = 12  # folders between the folder of all runs and a run
MAX_METRICS_BYTES = 2**21  # of a run without a record, whose best value is looked for in the list
MAX_CURVES_BYTES = 2**28
VERSION_PREFIX = "version_"
STEP_PATTERN = re.compile(r"step=(\d{1,15})")
CLASS_PATTERN = re.compile(r"^model:\s*\n\s+class_path:\s*['\"]?([\w.]{1,200})", re.MULTILINE)


class RunSummary(NamedTuple):
    """What the list shows of a run; None stands for what its folder does not say."""

    name: str  # spam/quick/3
    folder: Path
    verb: str
    status: str
    task: str | None
    steps: int | None
    metric: str | None
    mode: str  # min, or max
    best: float | None
    best_step: int | None
    best_file: Path | None  # the checkpoint with the weights of the best value
    seconds: float | None
    size: int  # bytes of all its files
    started: float  # seconds since 1970
    first_command: list[str] | None  # of a resumed run: the command that started it
    record: Record | None


class FolderFacts(NamedTuple):
    """What a walk through a run's folder finds."""

    size: int
    last_written: float
    first_written: float
    checkpoints: list[Path]


def find_run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs below `root`, without those inside of another run.

    Raises:
        UsageError: `root` is no folder.
    """
    root = root.resolve() if root.is_symlink() else root
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file", "the folder of all runs", flag="--root=runs")
    pending = [(root, 0)]
    while pending:
        folder, depth = pending.pop()
        subfolders, is_run = [], False
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    # RUN_MARKERS: names that only a run's folder has, such as run.json or
                    # checkpoints
                    is_run = is_run or entry.name in RUN_MARKERS
                    if entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                        subfolders.append((Path(entry.path), depth + 1))
        # a folder that may not be read, or was deleted meanwhile
        except OSError:
            continue
        # depth 0 is `root` itself, which is no run even if it holds a file of that name
        if is_run and depth:
            yield folder
        elif depth < MAX_DEPTH:
            pending += subfolders


def run_name_of(folder: Path, root: Path) -> str:
    """Return the short name of a run: `spam/quick/3` for `runs/spam/quick/version_3`."""
    try:
        segments = list(folder.relative_to(root).parts)
    except ValueError:
        try:
            segments = list(folder.resolve().relative_to(root.resolve()).parts)
        except ValueError:
            return folder.as_posix()
    if segments and segments[-1].removeprefix(VERSION_PREFIX).isdecimal():
        segments[-1] = segments[-1].removeprefix(VERSION_PREFIX)
    return "/".join(segments)


def list_runs(root: Path) -> list[RunSummary]:
    """Return all runs below `root`, the newest first."""
    root = root.resolve() if root.is_symlink() else root
    summaries = [summarize(folder, root) for folder in find_run_folders(root)]
    return sorted(summaries, key=lambda run: (-run.started, run.name))


def summarize(folder: Path, root: Path) -> RunSummary:
    """Summarize a run from its record, and from its files where the record says nothing.

    Args:
        folder: the run's folder.
        root: the folder of all runs, which is left out of the run's name.
    """
    # record: the content of run.json, or None. facts: sizes and times of the files.
    record, facts = read_record(folder), inspect_folder(folder)
    known = record or {}
    # `_number` and `_text` return None for a value of another type: the file is not trusted
    steps, seconds, started = (_number(known.get(k)) for k in ("steps", "duration_s", "started"))
    # `running` becomes `killed` if the process no longer exists
    status = status_of(record, facts.last_written)
    task, recorded_best = _text(known.get("task")), mapping(known.get("best"))
    metric, best = _text(recorded_best.get("metric")), _number(recorded_best.get("value"))
    mode = "max" if recorded_best.get("mode") == "max" else "min"
    best_step = _number(recorded_best.get("step"))
    # such a run has not written its best value: look into metrics.csv and config.yaml
    if record is None or (best is None and status in ("killed", "running")):
        # metrics: the number of steps, and the best validation loss with its name and step
        last_step, metric, best, best_step = read_best_loss(folder, first_logged_step(record))
        steps = max((s for s in (steps, last_step, checkpoint_step(facts)) if s), default=steps)
        task = task or task_of_config(folder)
    if record is None:
        started, seconds = facts.first_written, facts.last_written - facts.first_written
    # the recorded duration of a run that has not ended is too small
    elif seconds is None or status in ("killed", "running"):
        seconds = max(0.0, facts.last_written - (started or facts.first_written))
    return RunSummary(
        name=run_name_of(folder, root),
        folder=folder,
        verb=_text(known.get("verb")) or "fit",
        status=status,
        task=task,
        steps=None if steps is None else int(steps),
        metric=metric,
        mode=mode,
        best=best,
        best_step=None if best_step is None else int(best_step),
        best_file=find_best_file(folder, facts, recorded_best, best_step),
        seconds=seconds,
        size=facts.size,
        started=facts.first_written if started is None else started,
        first_command=first_command(record, root),
        record=record,
    )


def find_best_file(
    folder: Path, facts: FolderFacts, recorded_best: dict[str, Any], step: float | None
) -> Path | None:
    """Return the existing checkpoint of the best value, or None.

    It is the file that the record names, or else one of the run's with the step in its name.

    Args:
        folder: the run's folder.
        facts: its files.
        recorded_best: the best value in the record: metric, value, step, file.
        step: the step of the best value.
    """
    name = _text(recorded_best.get("file"))
    # relative to the run's folder, which may have moved, or absolute if it lies elsewhere
    if name is not None and "\0" not in name and os.path.exists(path := folder / name):
        return path
    if step is None:
        return None
    return next((p for p in sorted(facts.checkpoints) if step_in_name(p.name) == step), None)


def step_in_name(name: str) -> int | None:
    """Return the step that a checkpoint's name states, `step=000080.ckpt`."""
    match = STEP_PATTERN.search(name)
    return int(match[1]) if match else None


def first_command(record: Record | None, root: Path) -> list[str] | None:
    """Return the command that started a resumed run, before all resumptions; None otherwise.

    Args:
        record: the record of the run.
        root: the folder of all runs; a parent elsewhere is not read.
    """
    earliest, seen = record, set[Path]()
    while earliest is not None:
        history = earliest.get("history")
        # a run that went on in its folder: the first entry is the record of its beginning
        if isinstance(history, list) and history and isinstance(history[0], dict):
            earliest = history[0]
        folder = parent_folder(mapping(earliest.get("parent")), root)
        parent_record = None if folder is None or folder in seen else read_record(folder)
        if folder is None or parent_record is None:
            break
        seen.add(folder)
        earliest = parent_record
    if earliest is None or earliest is record or not isinstance(earliest.get("command"), list):
        return None
    return [str(word) for word in earliest["command"]]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e300 else None


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping of a record; {} for any other value."""
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value else None


def inspect_folder(folder: Path) -> FolderFacts:
    """Sum the sizes of all files of a run, and find the times of its first and its last file."""
    size, last, first, checkpoints = 0, 0.0, float("inf"), []
    pending = [str(folder)]
    while pending:
        top = pending.pop()
        with suppress(OSError), os.scandir(top) as entries:
            for entry in entries:
                # a checkpoint is a file, or the folder of a sharded one
                if entry.name.endswith(".ckpt"):
                    checkpoints.append(Path(entry.path))
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    continue
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        size += status.st_size
                        last, first = max(last, status.st_mtime), min(first, status.st_mtime)
    # no file was found: use the time of the folder itself
    if not last:
        with suppress(OSError):
            last = first = folder.lstat().st_mtime
    return FolderFacts(size, last, min(first, last), checkpoints)


def checkpoint_step(facts: FolderFacts) -> int | None:
    """Return the largest step in the names of a run's checkpoints."""
    steps = [step_in_name(path.name) for path in facts.checkpoints]
    return max((step for step in steps if step is not None), default=None)


def task_of_config(folder: Path) -> str | None:
    """Return the class of the model that `config.yaml` names, found without a YAML parser."""
    text = read_regular_file(folder / "config.yaml", 2**20)
    match = CLASS_PATTERN.search(text or "")
    return match[1].rpartition(".")[2] if match else None


def read_best_loss(
    folder: Path, first_step: int = 0
) -> tuple[int | None, str | None, float | None, int | None]:
    """Return the steps in `metrics.csv`; name, smallest value and step of a validation loss.

    `first_step` is the number of the first optimizer step in the file.
    """
    text = read_regular_file(folder / "metrics.csv", MAX_METRICS_BYTES)
    if not text:
        return None, None, None, None
    lines = text.splitlines()
    columns = lines[0].split(",")
    # such as val/loss; the first of them is used
    names = [n for n in columns if n.startswith("val") and n.endswith("loss")]
    step_column = columns.index("step") if "step" in columns else None
    column = columns.index(names[0]) if names else None
    best, best_step, last_step = None, None, None
    for line in lines[1:]:
        cells = line.split(",")
        # a line that is being written, or was cut off
        if len(cells) != len(columns):
            continue
        with suppress(ValueError):
            if step_column is not None and cells[step_column].isdecimal():
                last_step = int(cells[step_column][:15]) + 1 - first_step
            if column is not None and cells[column]:
                value = float(cells[column])
                # value == value is False for NaN
                if value == value and (best is None or value < best):
                    best, best_step = value, last_step
    return last_step, names[0] if best is not None else None, best, best_step


def read_curves(
    folder: Path, max_bytes: int = MAX_CURVES_BYTES
) -> dict[str, list[tuple[float, float]]]:
    """Return each metric of `metrics.csv` as points (step, value), sorted by step.

    Steps are counted from 1, also those of a run whose loggers have counted them from 0.

    Args:
        folder: the run's folder.
        max_bytes: a larger file is not read, and gives no curves.
    """
    text = read_regular_file(folder / "metrics.csv", max_bytes)
    curves: dict[str, list[tuple[float, float]]] = {}
    if not text:
        return curves
    shift = 1 - first_logged_step(read_record(folder))
    # a row has the values of one step by column; most cells of a row are empty
    for row in csv.DictReader(text.splitlines()):
        with suppress(TypeError, ValueError):
            # a row without a step raises ValueError here, and is left out
            step = float(row.get("step") or "") + shift
            for name, cell in row.items():
                if cell and name not in ("step", "epoch", None) and isinstance(cell, str):
                    with suppress(ValueError):
                        curves.setdefault(name, []).append((step, float(cell)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def joined_curves(run: RunSummary, root: Path) -> dict[str, list[tuple[float, float]]]:
    """Return the curves of a run, before its first step those of the runs it was resumed from.

    Only runs below `root` are read, whatever the record says.

    Args:
        run: the summary of the run, with its record.
        root: the folder of all runs.
    """
    # `seen` ends the loop if records name each other as parents
    curves, seen, current = read_curves(run.folder), {run.folder.resolve()}, run.record
    limit = float("inf")
    while current is not None and isinstance(parent := current.get("parent"), dict):
        # parent: the run that `current` was resumed from, and the step of the checkpoint.
        # `parent_folder` is None for a run that is not below `root`.
        step, folder = _number(parent.get("step")), parent_folder(parent, root)
        if step is None or folder is None or folder.resolve() in seen:
            break
        seen.add(folder.resolve())
        # what an earlier run logged after the resumed step does not belong to this run
        limit = min(limit, step)
        for name, points in read_curves(folder).items():
            later = curves.get(name, [])
            # first step of this metric in the later runs: no step is drawn twice
            start = min((s for s, _ in later), default=float("inf"))
            end = min(start, limit + 1)
            curves[name] = [point for point in points if point[0] < end] + later
        current = read_record(folder)
    return curves


def parent_folder(parent: dict[str, Any], root: Path) -> Path | None:
    """Return the folder of the run that a record names as its parent, if it lies below `root`."""
    text = _text(parent.get("run"))
    if text is None or "\0" in text:
        return None
    top, folder = root.resolve(), Path(root, text)
    resolved = folder.resolve()
    is_below = resolved.is_relative_to(top) and resolved != top and resolved.is_dir()
    return folder if is_below else None


def find_run(text: str, root: Path, flag: str = "runs") -> Path:
    """Return the folder of the run called `text`.

    Args:
        text: a path, `task/config/3`, the beginning of one name alone, or `last`.
        root: the folder of all runs.
        flag: the beginning of the suggested command.

    Raises:
        UsageError: no run, or more than one, has that name.
    """
    # the run's folder if `text` is a path to it or to one of its files, else None
    if path := run_at_path(text):
        return path
    # by short name: spam/quick/3 stands for the folder spam/quick/version_3
    runs = {run_name_of(folder, root): folder for folder in find_run_folders(root)}
    if not runs:
        raise UsageError(
            f"there is no run under {root}",
            hint="train one, or name the folder of the runs by --root=FOLDER",
            flag=f"{program_name()} fit --config spam",
        )
    if text == "last":
        return max(runs.values(), key=_start_time)
    # `text` without the root and without `version_`
    wanted = short_name(text, root)
    if wanted in runs:
        return runs[wanted]
    matching = sorted(name for name in runs if wanted and name.startswith(wanted))
    if len(matching) == 1:
        return runs[matching[0]]
    if matching:
        shown = [*matching[:8], *([f"and {len(matching) - 8} more"] if len(matching) > 8 else [])]
        # a class of its own, because `split_run_request` passes it on but no other error
        raise AmbiguousRunError(
            f"{len(matching)} runs begin with {text!r}",
            shown,
            flag=f"{flag} {matching[0]}",
            label="these",
        )
    newest_first = sorted(runs, key=lambda name: -_start_time(runs[name]))
    nearest = suggest_names(wanted, runs) or newest_first[:3]
    raise UsageError(
        f"no run is called {text!r}", nearest, flag=f"{flag} {nearest[0]}", label="nearest"
    )


def split_run_request(request: str, root: Path) -> tuple[Path, bool] | None:
    """Return the run that `--ckpt_path` names, and whether its best checkpoint is meant.

    None is returned for the path of a checkpoint, for a URL, and for a name that is no run's.
    `task/config/3` and `task/config/3/last` are the newest checkpoint; `task/config/3/best` is the
    best one.

    Args:
        request: the text of `--ckpt_path`.
        root: the folder of all runs.

    Raises:
        UsageError: several runs begin with that name.
    """
    # names that Ravine or Lightning gives a meaning of its own
    is_keyword = request in ("auto", "last", "best", "hpc", "registry", "null")
    if not request or is_keyword or "://" in request or request.endswith(".ckpt"):
        return None
    # An existing path is a checkpoint, unless it is a run's folder. A sharded checkpoint is a
    # folder too, but has no folder `checkpoints`.
    if os.path.exists(request) and not (
        os.path.isdir(request) and os.path.isdir(os.path.join(request, "checkpoints"))
    ):
        return None
    name, _, kind = request.rstrip("/").rpartition("/")
    if kind not in ("best", "last") or not name:
        name, kind = request, "last"
    try:
        return find_run(name, root, "--ckpt_path"), kind == "best"
    except AmbiguousRunError:
        raise
    # no run has that name: the caller treats the text as a path
    except UsageError:
        return None


class AmbiguousRunError(UsageError):
    """More than one run begins with a name."""


def run_at_path(text: str) -> Path | None:
    """Return the folder of a run that is given as a path to it or to one of its files."""
    if not text or "\0" in text:
        return None
    path = Path(text)
    is_file = path.is_file() or path.suffix == ".ckpt"  # a checkpoint in segments is a folder
    candidates = (path.parent, path.parent.parent) if is_file else (path,)
    return next((f for f in candidates if path.exists() and is_run_folder(f)), None)


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder has a file of a run."""
    return folder.is_dir() and any((folder / name).exists() for name in RUN_MARKERS)


def short_name(text: str, root: Path) -> str:
    """Return a name as `run_name_of` writes it: without the root, and without `version_`."""
    with suppress(ValueError):
        text = Path(text).relative_to(root).as_posix()
    head, slash, tail = text.rstrip("/").rpartition("/")
    return f"{head}{slash}{tail.removeprefix(VERSION_PREFIX)}"


def list_evaluations(folder: Path) -> list[str]:
    """Return a line for each evaluation in a run's folder: its command and its metrics."""
    evaluations = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                continue
            known = read_record(entry.path)
            if known is None or known["verb"] == "fit":
                continue
            metrics = known.get("metrics")
            pairs = metrics.items() if isinstance(metrics, dict) else ()
            numbers = [f"{name} {value:.4g}" for name, value in pairs if _number(value) is not None]
            evaluations.append((_number(known.get("started")) or 0, entry.name, ", ".join(numbers)))
    return [f"{name}: {text}" if text else name for _, name, text in sorted(evaluations)]


def _start_time(folder: Path) -> float:
    started = _number((read_record(folder) or {}).get("started"))
    return inspect_folder(folder).first_written if started is None else started
