"""The command runs: list, show, compare and clean the folders that runs have written."""

import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from ravine.errors import UsageError

from ..error_report import program_name, unknown_name_error
from ..run_folders import filters, index, record
from ..run_folders.index import RunSummary

ACTIONS = ("show", "compare", "clean")
FILTER_FLAGS = ("task", "status", "best", "steps", "time", "size")
LIST_FLAGS = (*FILTER_FLAGS, "sort", "limit", "root", "json")
SWITCHES = ("json", "yes")  # flags without a value
EXAMPLE_VALUES = {  # of flags without a value
    **{"sort": "started", "limit": "20", "root": "runs", "status": "done", "steps": "100.."},
    **{"time": "10m..2h", "size": "1GB..", "best": "..0.5", "task": "LanguageModel"},
    **{"folder": "comparison", "metrics": "val/loss"},
}
ACTION_FLAGS = {
    "show": ("root", "json"),
    "compare": ("root", "folder", "metrics"),
    "clean": (*FILTER_FLAGS, "root", "yes"),
}


def run_argv(argv: list[str]) -> int:
    """List the runs, or show, compare or clean those that are named; return the exit status.

    Args:
        argv: "runs", then show, compare or clean or none of them, names of runs, and flags.
    """
    words = argv[1:]
    action = next((word for word in words[:1] if word in ACTIONS), None)
    words = words[1:] if action else words
    # names of runs, and values of flags by name; an error for a flag that the action lacks
    names, flags = parse_words(words, ACTION_FLAGS[action] if action else LIST_FLAGS, action)
    root = Path(flags.pop("root", "runs"))
    if action == "show":
        return show_runs(names or ["last"], root, "json" in flags)
    if action == "compare":
        # imported here, so that a list of runs does not wait for modules it does not use
        from ..run_folders import comparison

        return comparison.compare_runs(names, root, flags)
    if action == "clean":
        from ..run_folders import cleaning

        return cleaning.clean_runs(names, root, flags)
    return list_runs(names, root, flags)


def parse_words(
    words: list[str], allowed: tuple[str, ...], action: str | None
) -> tuple[list[str], dict[str, str]]:
    """Separate the names of runs from the flags, `--key=value` or `--key value`.

    Args:
        words: the names and flags.
        allowed: the names of the flags that the action has.
        action: show, compare or clean; None for the list.
    """
    names: list[str] = []
    flags: dict[str, str] = {}
    remaining = iter(words)
    command = " ".join(["runs", *([action] if action else [])])
    for word in remaining:
        if not word.startswith("-"):
            names.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name not in allowed:
            # SWITCHES: flags without a value, such as --json. The error suggests the nearest flag.
            raise unknown_name_error(
                f"{command} has no flag --{name}",
                name,
                allowed,
                lambda near, text=value: f"--{near}" if near in SWITCHES else f"--{near}={text}",
                allowed[0],
                f"{program_name()} runs --help",
            )
        if not equals and name not in SWITCHES:
            # the form `--key value`: the next word is the value
            value = next(remaining, None)
            if value is None:
                flag = f"--{name}={EXAMPLE_VALUES.get(name, 'last')}"
                raise UsageError(f"--{name} has no value", flag=flag)
        flags[name] = value
    return names, flags


def list_runs(names: list[str], root: Path, flags: dict[str, str]) -> int:
    """Print a table of the runs whose names begin with one of `names`, or of all runs.

    Args:
        names: beginnings of names.
        root: the folder of all runs.
        flags: sort, limit, json, and filters such as status.
    """
    # all runs below `root`, the newest first, of which names and filters select some
    runs = select_runs(index.list_runs(root), names, root, flags)
    if "sort" in flags:
        runs = filters.sort_runs(runs, flags["sort"])
    total = len(runs)
    if "limit" in flags:
        if not flags["limit"].isdecimal() or int(flags["limit"]) < 1:
            raise UsageError(f"--limit={flags['limit']}", ["1 or more"], flag="--limit=20")
        runs = runs[: int(flags["limit"])]
    if "json" in flags:
        print(json.dumps([as_json(run) for run in runs], indent=1))
        return 0
    if not runs:
        # with a condition other runs may exist, so no command for a first run is shown
        condition = " that fits the filters" if flags or names else ""
        print(f"no run{condition} under {root}")
        if not condition:
            print(f"next: {program_name()} fit --config shakespeare/quick")
        return 0
    print(format_table(runs))
    shown = f"the first {len(runs)} of {total} runs" if len(runs) < total else f"{total} run"
    plural = "s" if len(runs) == total and total != 1 else ""
    print(f"{shown}{plural} under {root}, {format_size(sum(run.size for run in runs))}")
    return 0


def select_runs(
    runs: list[RunSummary], names: list[str], root: Path, flags: dict[str, str]
) -> list[RunSummary]:
    """Return the runs whose names begin with one of `names` and that satisfy the filters.

    Args:
        runs: all runs.
        names: beginnings of names; [] for all runs.
        root: the folder of all runs.
        flags: of the command; those in FILTER_FLAGS, such as status, select runs.
    """
    chosen = runs
    if names:
        kept: dict[Path, RunSummary] = {}
        for name in names:
            # the runs whose names are `name` or begin with it
            matching = _runs_called(runs, name, root)
            if not matching:
                all_names = {run.name for run in runs}
                # names without a version, such as spam/quick, are suggested too
                parents = {n.rpartition("/")[0] for n in all_names} - {""}
                # suggests the nearest name in the command `runs NAME`
                raise unknown_name_error(
                    f"no run under {root} is called {name!r}, and no name begins with it",
                    name,
                    sorted(all_names | parents),
                    f"{program_name()} runs {{}}".format,
                    "",
                    f"{program_name()} runs",
                )
            kept |= {run.folder: run for run in matching}
        # in the order of `runs`, each once
        chosen = [run for run in runs if run.folder in kept]
    return filters.apply_filters(chosen, {k: v for k, v in flags.items() if k in FILTER_FLAGS})


def _runs_called(runs: list[RunSummary], name: str, root: Path) -> list[RunSummary]:
    if name == "last":
        return runs[:1]
    if path := index.run_at_path(name):
        return [run for run in runs if run.folder.resolve() == path.resolve()]
    wanted = index.short_name(name, root)
    return [r for r in runs if r.name == wanted] or [r for r in runs if r.name.startswith(wanted)]


def show_runs(names: list[str], root: Path, as_json_text: bool) -> int:
    """Print the record of each named run."""
    for name in names:
        folder = index.find_run(name, root, "runs show")
        run = index.summarize(folder, root)
        if as_json_text:
            print(json.dumps(as_json(run) | {"record": run.record}, indent=1))
            continue
        rows = describe_run(run)
        width = max(len(key) for key, _ in rows)
        for key, text in rows:
            print(f"{printable(key):<{width}}  {printable(text)}")
    return 0


def describe_run(run: RunSummary) -> list[tuple[str, str]]:
    """Return what a run's folder says of it, as pairs of a title and a text."""
    # the content of run.json; {} for a run without one
    known: dict[str, Any] = run.record or {}
    # parts of run.json; {} where the file has no mapping
    git, machine, parent, versions, metrics = (
        index.mapping(known.get(key)) for key in ("git", "machine", "parent", "versions", "metrics")
    )
    commit = str(git.get("commit", ""))[:12]
    changed = git.get("num_changed_files") if git.get("is_dirty") else 0
    # DIFF_FILE: changes.diff, the uncommitted changes at the start of the run
    changes = f", {changed} changed files: {record.DIFF_FILE}" if changed else ""
    command = known.get("command")
    words = command if isinstance(command, list) else []
    rows = [
        ("run", run.name),
        ("folder", str(run.folder)),
        ("command", shlex.join(str(word) for word in words)),
        ("first command", shlex.join(run.first_command or ())),
        ("status", f"{run.status} {known.get('error') or ''}".strip()),
        ("task", run.task or ""),
        ("steps", "" if run.steps is None else f"{run.steps:,}"),
        ("best", format_best(run)),
        ("best file", str(run.best_file or "")),
        ("time", format_time(run.seconds)),
        ("started", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started))),
        ("size", format_size(run.size)),
        ("resumed", f"from {parent.get('run')} at step {parent.get('step')}" if parent else ""),
        ("commit", f"{commit}{changes}" if commit else ""),
        ("machine", ", ".join(f"{key} {value}" for key, value in machine.items())),
        ("versions", ", ".join(f"{key} {value}" for key, value in versions.items())),
    ]
    if run.record is None:
        rows.append(("record", "none: an older version of Ravine has made it"))
    rows += [(str(name), format_number(value)) for name, value in sorted(metrics.items())]
    rows += [("evaluated", text) for text in index.list_evaluations(run.folder)]
    return [(key, text) for key, text in rows if text]


def as_json(run: RunSummary) -> dict[str, Any]:
    """Return a summary as plain values."""
    best_file = None if run.best_file is None else str(run.best_file)
    values = run._asdict() | {"folder": str(run.folder), "best_file": best_file}
    return {key: value for key, value in values.items() if key != "record"}


def format_table(runs: list[RunSummary]) -> str:
    """Return the table of the list; the metric's name stands beside each best value."""
    head = ("run", "status", "task", "steps", "best", "time", "size", "started")
    rows = [
        (
            run.name if run.verb == "fit" else f"{run.name} ({run.verb})",
            run.status,
            run.task or "-",
            "-" if run.steps is None else f"{run.steps:,}",
            format_best(run) or "-",
            format_time(run.seconds),
            format_size(run.size),
            format_age(run.started),
        )
        for run in runs
    ]
    # `printable` replaces characters that could control the terminal
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    # columns of numbers are aligned at the right
    is_right = (False, False, False, True, False, True, True, True)
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        ).rstrip()
        for row in cells
    ]
    width = shutil.get_terminal_size().columns
    return "\n".join([lines[0], "-" * min(max(map(len, lines)), max(width, 20)), *lines[1:]])


def printable(text: str) -> str:
    """Replace the characters of a file that could control the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def format_best(run: RunSummary) -> str:
    """Return the monitored metric, its best value and the step of that value."""
    if run.best is None:
        return ""
    step = "" if run.best_step is None else f" at step {run.best_step}"
    return f"{run.metric} {format_number(run.best)}{step}"


def format_number(value: Any) -> str:
    """Return a number with four significant digits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4g}" if is_number else str(value)


def format_time(seconds: float | None) -> str:
    """Return a duration: 42 s, 7:05, 3:07:05."""
    if seconds is None:
        return "-"
    total = int(seconds)
    if total < 60:
        return f"{total} s"
    hours, remainder = divmod(total, 3600)
    minutes, left = divmod(remainder, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def format_size(size: float) -> str:
    """Return a number of bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def format_age(started: float) -> str:
    """Return how long ago a run has started."""
    seconds = max(0.0, time.time() - started)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "now" if seconds < 5 else f"{int(seconds)} s ago"
