"""Filters of `lightning runs`: by task and status, and by ranges of numbers.

--task=LanguageModel --status=done,interrupted      one of the values
--best=..0.5 --steps=1000.. --time=10m..2h --size=1GB..      from, to, or both; both included
"""

import math
from collections.abc import Callable
from typing import Any

from ravine.errors import UsageError

from ..error_report import unknown_name_error
from .index import RunSummary
from .record import STATUSES

TIME_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
SORT_KEYS: dict[str, Callable[[RunSummary], Any]] = {
    "started": lambda run: -run.started,
    "best": lambda run: math.inf if run.best is None else run.best * _sign(run),
    "steps": lambda run: -(run.steps or 0),
    "time": lambda run: -(run.seconds or 0),
    "size": lambda run: -run.size,
    "name": lambda run: run.name,
}
EXAMPLES = {"best": "..0.5", "steps": "100..", "time": "10m..", "size": "1GB.."}
VALUES: dict[str, Callable[[RunSummary], float | None]] = {
    "best": lambda run: run.best,
    "steps": lambda run: run.steps,
    "time": lambda run: run.seconds,
    "size": lambda run: run.size,
}


def _sign(run: RunSummary) -> int:
    return -1 if run.mode == "max" else 1


def apply_filters(runs: list[RunSummary], filters: dict[str, str]) -> list[RunSummary]:
    """Return the runs that satisfy every filter; `filters` maps task, status, best, ... to texts.

    Args:
        runs: the summaries of runs.
        filters: the texts of the flags by name, such as {"steps": "100.."}.

    Raises:
        UsageError: no run has the task, a status does not exist, or a range cannot be read.
    """
    kept = runs
    if "task" in filters:
        # `--task=a,b` gives several names; a dotted path counts by its last part
        wanted = {name.rpartition(".")[2].lower() for name in _words(filters["task"])}
        tasks = sorted({run.task for run in runs if run.task})
        # without any known task an unknown name is no mistake
        for name in wanted - {task.lower() for task in tasks} if tasks else ():
            # the error suggests the nearest of the tasks as a flag, or --task=TASK
            raise unknown_name_error(
                f"no run has the task {name!r}", name, tasks, "--task={}".format, "TASK"
            )
        kept = [run for run in kept if (run.task or "").lower() in wanted]
    if "status" in filters:
        statuses = _words(filters["status"])
        for name in statuses:
            if name not in STATUSES:
                raise unknown_name_error(
                    f"no status is called {name!r}", name, STATUSES, "--status={}".format, "done"
                )
        kept = [run for run in kept if run.status in statuses]
    # best, steps, time and size: each is given as a range, such as ..0.5
    for name, value_of in VALUES.items():
        if name in filters:
            low, high = parse_range(name, filters[name])
            values = ((run, value_of(run)) for run in kept)
            kept = [run for run, value in values if value is not None and low <= value <= high]
    return kept


def sort_runs(runs: list[RunSummary], key: str) -> list[RunSummary]:
    """Return the runs sorted by a column, the newest, best, longest or largest first."""
    if key not in SORT_KEYS:
        raise unknown_name_error(
            f"runs cannot be sorted by {key!r}", key, SORT_KEYS, "--sort={}".format, "started"
        )
    return sorted(runs, key=SORT_KEYS[key])


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_range(name: str, text: str) -> tuple[float, float]:
    """Return the bounds of `100..500`, `100..` or `..500`; units as in `10m` and `1GB`.

    Args:
        name: best, steps, time or size, which decides the units.
        text: the range as typed.
    """
    low, dots, high = text.partition("..")
    try:
        if not dots:
            raise ValueError
        bounds = (
            # a number with its unit, as seconds or bytes; an empty bound is open
            parse_amount(name, low) if low else -math.inf,
            parse_amount(name, high) if high else math.inf,
        )
    except ValueError as error:
        raise UsageError(
            f"--{name}={text} is no range",
            ["from..", "..to", "from..to"],
            flag=f"--{name}={EXAMPLES[name]}",
        ) from error
    return bounds


def parse_amount(name: str, text: str) -> float:
    """Return a number with its unit: seconds for a time, bytes for a size.

    Raises:
        ValueError: it is no number, or the unit is unknown.
    """
    units = {"time": TIME_UNITS, "size": SIZE_UNITS}.get(name, {})
    lowered = text.strip().lower().replace("_", "").replace(",", "")
    for unit in sorted(units, key=len, reverse=True):
        if lowered.endswith(unit) and lowered[: -len(unit)].strip():
            return float(lowered[: -len(unit)]) * units[unit]
    return float(lowered)
