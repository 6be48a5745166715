"""Comparison: what differs between the configurations of runs, beside their metrics and curves.

Writes `curves.png` and `comparison.html`, one file without scripts that needs no other. Every name
and value of the runs is escaped: a run's files are data.
"""

import base64
import html
import json
import os
import shlex
import tempfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from ravine.errors import UsageError

from ..error_report import program_name, unknown_name_error
from . import index
from .index import RunSummary
from .record import read_regular_file, write_atomically

MetricCurves = dict[str, list[tuple[float, float]]]
MAX_RUNS, MAX_PANELS, MAX_POINTS = 12, 12, 2000
MAX_CONFIG_BYTES, MAX_CELL_CHARS = 2**18, 60
IGNORED_KEYS = ("trainer.name", "trainer.default_root_dir", "config", "ckpt_path")
PREFERRED = ("val/loss", "train/loss", "val/accuracy", "test/loss")  # order of the first panels
PICTURE, PAGE = "curves.png", "comparison.html"
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 2rem; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; } td.best { font-weight: bold; } img { max-width: 100%; }
"""


class ComparedRun(NamedTuple):
    """A run with its configuration, flattened to dotted keys, and its curves."""

    summary: RunSummary
    config: dict[str, Any]
    unused_keys: tuple[str, ...]  # beginnings of keys of optimizer plans that do not train
    curves: MetricCurves
    metrics: dict[str, float]  # at the end of the run, those that no curve has


def compare_runs(names: list[str], root: Path, flags: dict[str, str]) -> int:
    """Print what differs between runs, write the picture and the page; return the exit status.

    Args:
        names: the runs as typed: paths, names such as spam/quick/3, or `last`.
        root: the folder of all runs.
        flags: by name without dashes: metrics (a list with commas) and folder (for the files).
    """
    if len(names) < 2:
        newest = [run.name for run in index.list_runs(root)[:2]]
        example = newest if len(newest) == 2 else ["A", "B"]
        raise UsageError(
            f"runs compare needs two runs or more, and {len(names)} was given",
            flag=f"{program_name()} runs compare {' '.join(example)}",
        )
    if len(names) > MAX_RUNS:
        raise UsageError(f"{len(names)} runs are too many for one page", [f"2 to {MAX_RUNS}"])
    # raises an error for a name that no run, or more than one, has
    folders = [index.find_run(name, root, "runs compare") for name in names]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("the same run was given twice", [str(folder) for folder in folders])
    runs = [read_run(folder, root) for folder in folders]
    chosen = choose_metrics(runs, flags.get("metrics"))
    differences = differing_values(runs)
    folder = Path(flags.get("folder", root / "comparison"))
    # a link in place of the default folder could lead the files elsewhere; a named one is meant
    if "folder" not in flags and folder.is_symlink():
        raise UsageError(
            f"{folder} is a symbolic link", "a folder that is named", flag="--folder=NAME"
        )
    picture = draw_curves(runs, chosen)
    print(format_columns(runs, differences))
    write_files(folder, picture, make_page(runs, differences, picture))
    print(f"curves of {', '.join(chosen) or 'no metric'}: {folder / PICTURE}")
    print(f"page: {folder / PAGE}")
    return 0


def read_run(folder: Path, root: Path) -> ComparedRun:
    """Read a run's record, configuration and curves."""
    summary = index.summarize(folder, root)
    curves = index.joined_curves(summary, root)
    # the record has the values that were logged last, not their steps: a curve says more
    recorded = index.mapping((summary.record or {}).get("metrics"))
    metrics = {
        str(name): float(value)
        for name, value in recorded.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not curves.get(name)
    }
    config = read_config(folder / "config.yaml")
    return ComparedRun(summary, dict(flatten(config)), unused_plans(config), curves, metrics)


def unused_plans(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the beginnings of keys of the optimizer plans that do not train: all but the last.

    Args:
        config: the configuration, as `config.yaml` has it.
    """
    from ..discovery.registry import entries_of

    callbacks = index.mapping(config.get("trainer")).get("callbacks")
    plans = {entry.name for entry in entries_of("optimizers") if entry.is_plan}
    named = named_classes("trainer.callbacks", callbacks if isinstance(callbacks, list) else [])
    keys = [key for key, name in named if name in plans]
    return tuple(f"{key}." for key in keys[:-1])


def read_config(path: Path) -> dict[str, Any]:
    """Return a configuration; {} if it is missing or malformed."""
    import yaml

    from ..config.presets import check_yaml_size

    text = read_regular_file(path, MAX_CONFIG_BYTES)
    if text is None:
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # raises an error if aliases would make the built value too large for the memory
        check_yaml_size(text, str(path))
        # `loader` is a safe loader: it builds plain values only
        content = yaml.load(text, loader)
        json.dumps(content, default=str)  # rejects recursive anchors
    except (yaml.YAMLError, UsageError, TypeError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def flatten(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a configuration as the command line names them: without init_args.

    A list of classes is addressed by their names: `trainer.callbacks.EMA.decay`.

    Args:
        value: a configuration, or a value in it.
        key: the dotted key of this value; empty for the whole configuration.
    """
    if isinstance(value, dict):
        leaves = []
        for name, child in value.items():
            # init_args holds the arguments of a class; the command line leaves this level out
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            leaves += flatten(child, inner)
        return leaves
    if isinstance(value, list) and any(isinstance(v, dict) and "class_path" in v for v in value):
        keys = [inner for inner, _ in named_classes(key, value)]
        return [
            leaf for inner, child in zip(keys, value, strict=True) for leaf in flatten(child, inner)
        ]
    return [(key, value)]


def named_classes(key: str, values: list[Any]) -> list[tuple[str, str]]:
    """Return the dotted key and the class name of each entry of a list of classes.

    Args:
        key: the dotted key of the list.
        values: the entries, as `config.yaml` has them.
    """
    named: list[tuple[str, str]] = []
    for position, value in enumerate(values):
        class_path = value.get("class_path", "") if isinstance(value, dict) else ""
        name = str(class_path).rpartition(".")[2]
        inner = f"{key}.{name or position}"
        # a second entry of the same class gets its position as well
        is_second = any(inner == earlier for earlier, _ in named)
        named.append((f"{inner}.{position}" if is_second else inner, name))
    return named


def differing_values(runs: list[ComparedRun]) -> dict[str, list[str]]:
    """Return the keys whose values are not the same in all runs, with the values as texts.

    A value of an optimizer plan that does not train, because a later one does, is marked.
    """
    keys = sorted({key for run in runs for key in run.config})
    differences = {}
    for key in keys:
        if key.startswith(IGNORED_KEYS):
            continue
        texts = [config_text(run, key) for run in runs]
        if len(set(texts)) > 1:
            differences[key] = texts
    return differences


def config_text(run: ComparedRun, key: str) -> str:
    """Return the value of a key of a run's configuration, or - without one."""
    if key not in run.config:
        return "-"
    mark = " (does not train)" if key.startswith(run.unused_keys) else ""
    return value_text(run.config[key]) + mark


def value_text(value: Any) -> str:
    """Return a configuration's value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def facts_of(run: ComparedRun) -> dict[str, str]:
    """Return what the top of the table says of a run."""
    from ..commands.runs import format_best, format_size, format_time

    # summary: what the list of runs shows. known: the content of run.json, or {}.
    summary, known = run.summary, run.summary.record or {}
    # parts of run.json; {} where it has no mapping. parent: the run that this one was resumed from.
    git, machine, parent = (index.mapping(known.get(k)) for k in ("git", "machine", "parent"))
    commit = str(git.get("commit", ""))[:12]
    # whether files differed from the commit when the run started
    dirty = " + changes" if commit and git.get("is_dirty") else ""
    return {
        "status": summary.status,
        "task": summary.task or "-",
        "steps": "-" if summary.steps is None else f"{summary.steps:,}",
        "best": format_best(summary) or "-",
        "time": format_time(summary.seconds),
        "size": format_size(summary.size),
        "commit": f"{commit}{dirty}" or "-",
        "device": str(machine.get("device", "-")),
        "resumed from": f"{parent.get('run')} at step {parent.get('step')}" if parent else "-",
    }


def table_sections(
    runs: list[ComparedRun], differences: dict[str, list[str]]
) -> list[tuple[str, dict[str, list[str]]]]:
    """Return the sections of the table: facts, differing configuration, metrics."""
    facts = [facts_of(run) for run in runs]
    rows = {key: [fact[key] for fact in facts] for key in facts[0]}
    rows = {key: texts for key, texts in rows.items() if set(texts) != {"-"}}
    names = sorted({name for run in runs for name in {*run.curves, *run.metrics}})
    last = {name: [last_value_text(run, name) for run in runs] for name in names}
    sections = [("run", rows), ("differs", differences), ("last value", last)]
    if common := values_at_common_steps(runs, names):
        sections.append(("at the last step that all have", common))
    return sections


def last_value_text(run: ComparedRun, name: str) -> str:
    """Return the last value of a metric and its step, or - without one."""
    from ..commands.runs import format_number

    if points := run.curves.get(name):
        step, value = points[-1]
        return f"{format_number(value)} at step {step:.0f}"
    return format_number(run.metrics[name]) if name in run.metrics else "-"


def values_at_common_steps(runs: list[ComparedRun], names: list[str]) -> dict[str, list[str]]:
    """Return the values at the last step that all runs have logged, by metric and step.

    Metrics whose last values have the same step in all runs are left out, because their last values
    can be compared, and so are those without a common step.
    """
    from ..commands.runs import format_number

    rows = {}
    for name in names:
        # a step that was logged twice has its last value
        curves = [dict(run.curves.get(name, ())) for run in runs]
        common = set.intersection(*(set(curve) for curve in curves))
        if common and len({max(curve) for curve in curves}) > 1:
            step = max(common)
            rows[f"{name} at step {step:.0f}"] = [format_number(curve[step]) for curve in curves]
    return rows


def format_columns(runs: list[ComparedRun], differences: dict[str, list[str]]) -> str:
    """Return the table for the terminal: a column for each run.

    Args:
        runs: the compared runs.
        differences: by dotted key of the configuration, a text for each run.
    """
    from ..commands.runs import printable

    lines = [("", *(run.summary.name for run in runs))]
    # rows: by key, a text for each run
    for title, rows in table_sections(runs, differences):
        lines.append((f"[{title}]", *("" for _ in runs)))
        if not rows:
            nothing = "nothing in config.yaml" if title == "differs" else "nothing"
            lines.append((nothing, *("" for _ in runs)))
        lines += [(key, *texts) for key, texts in rows.items()]
    # `printable` replaces control characters, which a run's name could send to the terminal
    cells = [[shorten(printable(text)) for text in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(runs) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def shorten(text: str) -> str:
    """Shorten a cell of the terminal; the page has the whole text."""
    return text if len(text) <= MAX_CELL_CHARS else text[: MAX_CELL_CHARS - 1] + "…"


def choose_metrics(runs: list[ComparedRun], requested: str | None) -> list[str]:
    """Return the metrics to draw: those requested, or those that most runs have, losses first.

    Args:
        runs: the compared runs, with their curves.
        requested: names with commas between them, or None.

    Raises:
        UsageError: no run has a requested metric.
    """
    counts: dict[str, int] = {}
    for run in runs:
        for name, points in run.curves.items():
            # number of runs that have at least one point of the metric
            counts[name] = counts.get(name, 0) + (len(points) > 0)
    if requested is None:

        def rank(name: str) -> tuple[Any, ...]:
            position = PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
            return position, -counts[name], not name.startswith("val"), name

        return sorted(counts, key=rank)[:MAX_PANELS]
    names = [name.strip() for name in requested.split(",") if name.strip()]
    for name in names:
        if name not in counts:
            # this function makes the error: problem, wrong word, known names, the suggested flag,
            # and its value if no known name is near
            raise unknown_name_error(
                f"none of these runs has the metric {name!r}",
                name,
                counts,
                "--metrics={}".format,
                "val/loss",
            )
    return names[:MAX_PANELS]


def draw_curves(runs: list[ComparedRun], metrics: list[str]) -> bytes:
    """Return a PNG with one panel for each metric, and one line for each run.

    Args:
        runs: the compared runs, each with its curves: by metric, points (step, value).
        metrics: the metrics to draw.
    """
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(2, max(1, len(metrics)))
    rows = max(1, -(-len(metrics) // columns))
    figure = Figure(figsize=(6.4 * columns, 3.6 * rows), layout="constrained")
    if not metrics:
        figure.text(0.5, 0.5, "no metric in metrics.csv", ha="center")
    for number, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_xlabel("optimizer step")
        # `plain_label` escapes what matplotlib would read as a formula
        axes.set_title(plain_label(metric))
        for position, run in enumerate(runs):
            curve = run.curves.get(metric, [])
            # keeps at most 2000 finite points
            points = thin(curve)
            if points:
                # a curve of few points would hardly be visible without dots
                marker = "o-" if len(points) <= 30 else "-"
                axes.plot(
                    *zip(*points, strict=True),
                    marker,
                    ms=3,
                    lw=1.2,
                    color=f"C{position % 10}",
                    label=plain_label(run.summary.name),
                )
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    buffer = BytesIO()
    with warnings.catch_warnings():  # a name in a script that the font lacks
        warnings.simplefilter("ignore")
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def plain_label(text: str) -> str:
    """Return a text that matplotlib does not read as a formula, and does not hide."""
    escaped = text.replace("\\", "/").replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS finite points, evenly chosen, with the last."""
    finite = [p for p in points if abs(p[1]) < 1e300]
    stride = -(-len(finite) // MAX_POINTS) or 1
    return finite[::stride] + (finite[-1:] if (len(finite) - 1) % stride else [])


def make_page(runs: list[ComparedRun], differences: dict[str, list[str]], picture: bytes) -> str:
    """Return the page: the table and the picture in one HTML file without scripts.

    Args:
        runs: the compared runs.
        differences: by dotted key of the configuration, a text for each run.
        picture: the curves as PNG.
    """
    head = "".join(f"<th>{html.escape(run.summary.name)}</th>" for run in runs)
    body = []
    titles = {
        "run": "Runs",
        "differs": "Configuration that differs",
        "last value": "Metrics, last value",
    }
    # rows: by key, a text for each run
    for title, rows in table_sections(runs, differences):
        body.append(f"<h2>{titles.get(title, f'Metrics {title}')}</h2>")
        if not rows:
            body.append("<p>nothing</p>")
            continue
        lines = [
            f"<tr><th>{html.escape(key)}</th>"
            + "".join(f"<td>{html.escape(text)}</td>" for text in texts)
            + "</tr>"
            for key, texts in rows.items()
        ]
        body.append(
            f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
        )
    # the picture lies inside the page, so that the page can be copied alone
    image = base64.b64encode(picture).decode("ascii")
    commands = "".join(
        f"<li>{html.escape(run.summary.name)}: <code>{html.escape(command)}</code></li>"
        for run in runs
        if (command := command_text(run))
    )
    title = html.escape(" and ".join(run.summary.name for run in runs))
    # html.escape keeps a run's texts from acting as HTML. CONTENT_POLICY also forbids scripts and
    # loads.
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"{''.join(body)}<h2>Curves</h2>"
        f'<img alt="curves of the metrics" src="data:image/png;base64,{image}">'
        f"<h2>Commands</h2><ul>{commands or '<li>not recorded</li>'}</ul></body></html>\n"
    )


def command_text(run: ComparedRun) -> str:
    """Return the command that made a run; "" if it was not recorded."""
    words = (run.summary.record or {}).get("command")
    return shlex.join(str(word) for word in words) if isinstance(words, list) else ""


def write_files(folder: Path, picture: bytes, page_text: str) -> None:
    """Write the picture and the page; earlier ones of the same folder are replaced.

    Args:
        folder: the output folder, which is created.
        picture: the PNG.
        page_text: the HTML.

    Raises:
        UsageError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A new file replaces the old one at once, so that no reader sees half a picture.
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".tmp-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(picture)
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / PICTURE)
        finally:
            # after os.replace the temporary file no longer exists
            with suppress(OSError):
                os.unlink(temporary)
        # does the same for a text
        write_atomically(folder / PAGE, page_text)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}", flag="--folder=ANOTHER"
        ) from error
