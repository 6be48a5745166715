"""Write the tables of results and speeds in README and docs/ from the raw rows.

python benchmarks/report.py [README.md docs/measurements.md docs/compatibility.md]

A result uses the newest row of each seed whose config hash equals that of the present config. A
comparison of speeds uses its newest row.
"""

import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from record import config_hash
from versus import interval

HERE = Path(__file__).parent


class Shown(NamedTuple):
    """An entry of the table: file of raw rows, config, metrics, and a key and value of its rows.

    A metric `20 steps/fd` is the entry `fd` of `20 steps`; `a over b` is their quotient.
    """

    file: str
    config: str
    metrics: list[str]
    where: tuple[str, str] | None = None


GUIDED = [
    f"20 steps, w 0.5/{what}" for what in ("accuracy", "fd over floor", "fd over floor_first")
]
SHOWN = {
    "tiny Shakespeare, AdamW": Shown("shakespeare_quick", "shakespeare/quick_adamw", ["val/loss"]),
    "tiny Shakespeare, Muon": Shown("shakespeare_quick", "shakespeare/quick", ["val/loss"]),
    "MNIST classifier": Shown("mnist_classifier", "classifier/mnist", ["test/accuracy"]),
    "MNIST diffusion, class-conditional": Shown(
        "diffusion_quality", "diffusion/mnist_quick", GUIDED, ("judge", "mnist_cnn")
    ),
    "MNIST diffusion, same model, second classifier": Shown(
        "diffusion_quality", "diffusion/mnist_quick", GUIDED, ("judge", "batch_norm")
    ),
    "8x8 digits diffusion, class-conditional": Shown(
        "diffusion_quality", "diffusion/digits", ["accuracy", "fd over floor"], ("over", "")
    ),
    "8x8 digits diffusion, no time input": Shown(
        "diffusion_quality", "diffusion/digits", ["fd over floor"], ("over", "diffusion/attempt2")
    ),
    "8x8 digits diffusion, one step": Shown(
        "diffusion_quality", "diffusion/digits", ["fd over floor"], ("over", "diffusion/attempt1")
    ),
    "text without e (REINFORCE): base model": Shown(
        "reinforce_quick", "reinforce/quick", ["base/loss"]
    ),
    "text without e: reward v1, the letter only": Shown(
        "reinforce_quick", "reinforce/quick", ["v1/e", "v1/vocabulary_of_base"]
    ),
    "text without e: reward v6 with KL": Shown(
        "reinforce_quick",
        "reinforce/quick",
        ["v6/e", "v6/vocabulary_of_base", "v6/nearest_jaccard", "v6/distinct_words_of_base"],
    ),
    "fine-tuning on an unseen play, all weights": Shown(
        "lora_play", "shakespeare/full_finetune", ["val/loss"]
    ),
    "fine-tuning on an unseen play, LoRA rank 8": Shown(
        "lora_play", "shakespeare/lora", ["val/loss"]
    ),
    "fine-tuning on an unseen play, QLoRA": Shown("lora_play", "shakespeare/qlora", ["val/loss"]),
    "SMS Spam": Shown("spam", "spam", ["test/accuracy", "test/f1", "test/auroc"]),
    "SMS Spam, scikit-learn baseline": Shown(
        "spam", "scikit-learn", ["test/accuracy", "test/f1", "test/auroc"]
    ),
}

LABELS = {  # metric: its name in the table, where the last part of its key is not clear
    "val/loss": "val/loss",
    "base/loss": "val/loss",
    "test/f1": "F1",
    "test/auroc": "AUROC",
    "fd over floor": "FD ratio",
    "fd over floor_first": "FD ratio to the first 1,000",
    "e": "fraction of e",
    "vocabulary_of_base": "real words relative to base model",
    "nearest_jaccard": "Jaccard distance to nearest sample",
    "distinct_words_of_base": "distinct words relative to base model",
}

SPEEDS = (  # files of raw rows, in the order of the table
    *("diffusion_step", "plan_overhead", "batch_gather", "muon_step", "lora_step", "nf4"),
    *("generation", "rollout", "against_trl", "frechet", "bare_loops"),
)
TITLES = {  # plain names of measurements whose rows have other ones
    "a million NF4 weights made float again": "dequantization of a million NF4 weights",
    "Frechet's distance out of 2048 means and covariances": "Fréchet distance from the means and "
    "covariances of 2048 features",
}


def read_shown_rows(shown: Shown) -> list[dict[str, Any]]:
    """The newest row of each seed that was run with the present config."""
    config, path = shown.config, HERE / "rows" / f"{shown.file}.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["config"] == config]
    if shown.where:
        key, value = shown.where
        rows = [row for row in rows if row.get(key) == value]
    present = HERE.parent / "configs" / f"{config}.yaml"
    if present.exists():
        now = config_hash(config)
        rows = [row for row in rows if row["config_hash"] == now]
    return list({row["seed"]: row for row in rows}.values())


def figure(row: dict[str, Any], metric: str) -> float:
    """A metric of a row, named as in `Shown`."""
    above, _, below = metric.partition(" over ")
    if below:
        return figure(row, above) / row[below]
    first, _, rest = metric.partition("/")
    return row[metric] if metric in row else row[first][rest]


def label(metric: str) -> str:
    """The name of a metric in the table."""
    name = metric if metric in LABELS else metric.rpartition("/")[2]
    return LABELS.get(name, name)


def format_mean(values: list[float], digits: int) -> str:
    """Mean ± standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table() -> str:
    """The table of results, in the order of SHOWN; entries without rows are left out."""
    lines = ["| task | command | result | seconds | seeds | machine |", "|---|---|---|---|---|---|"]
    for name, shown in SHOWN.items():
        rows = read_shown_rows(shown)
        if not rows:
            continue
        results = ", ".join(
            f"{label(metric)} = {format_mean([figure(row, metric) for row in rows], 3)}"
            for metric in shown.metrics
        )
        script = f"`benchmarks/{shown.file}.py`"
        command = f"`fit --config {shown.config}`" if "words" in rows[0] else script
        timed = [row["seconds"] for row in rows if row["seconds"] is not None]
        seconds = format_mean(timed, 0) if timed else ""
        machine = rows[-1]["machine"]
        lines.append(f"| {name} | {command} | {results} | {seconds} | {len(rows)} | {machine} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as text: three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def speeds() -> str:
    """A line for each comparison, in the order of SPEEDS: of its last run with a steady control."""
    lines = [
        "| measurement | compared with | Ravine | other | ratio | 95 % interval | A/A "
        "| machine | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in SPEEDS:
        path = HERE / "rows" / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        prefix = "a training step on 2 ranks: " if file == "bare_loops" else ""
        for row in {row["what"]: row for row in rows if row.get("ratios")}.values():
            median = {name: statistics.median(spent) for name, spent in row["seconds"].items()}
            title = prefix + (TITLES.get(row["what"]) or row["what"])
            for other, ratio in row["ratios"].items():
                pair = row["seconds"]["ours"], row["seconds"][other]
                paired = len(pair[0]) == len(pair[1])  # measured in turns
                between = "{:.3f} to {:.3f}".format(*interval(*pair)) if paired else ""
                named = f"{other} {row[other]}" if other in row else other
                lines.append(
                    f"| [{title}](../benchmarks/{file}.py) | {named} "
                    f"| {duration(median['ours'])} | {duration(median[other])} | **{ratio:.3f}** "
                    f"| {between} | {row['A/A']:.3f} | {row['machine']} | {row['commit']} |"
                )
    return "\n".join(lines)


def loops() -> str:
    """A line for each network: a step in a bare loop, under Lightning's Trainer and under Ravine's.

    Only rows whose ways were all measured in turns in one run are shown.
    """
    lines = [
        "| measurement | bare | stock | Ravine | Ravine without the fast loop | stock / bare "
        "| Ravine / bare | 95 % interval | A/A | machine | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in newest("trainer_overhead", "what"):
        seconds = row.get("seconds", {})
        if not {"bare", "stock", "ours", "ours without fast loop"} <= seconds.keys():
            continue  # these ways were not measured in turns with each other
        median = {name: statistics.median(spent) for name, spent in seconds.items()}
        names = ("bare", "stock", "ours", "ours without fast loop")
        times = " | ".join(duration(median[name]) for name in names)
        stock_ratio, own_ratio, between = "", "", "control not within 3 %"
        if row["ratios"]:
            stock_ratio = f"{median['stock'] / median['bare']:.3f}"
            own_ratio = f"**{median['ours'] / median['bare']:.3f}**"
            between = "{:.3f} to {:.3f}".format(*interval(seconds["ours"], seconds["bare"]))
        lines.append(
            f"| [{row['what']}](../benchmarks/trainer_overhead.py) | {times} | {stock_ratio} "
            f"| {own_ratio} | {between} | {row['A/A']:.3f} | {row['machine']} "
            f"| {row['commit']} |"
        )
    return "\n".join(lines)


def newest(file: str, *keys: str) -> list[dict[str, Any]]:
    """The newest row for each combination of values of the keys, sorted by them."""
    path = HERE / "rows" / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {tuple(str(row.get(key)) for key in keys): row for row in rows}
    return [found[key] for key in sorted(found)]


def fuzzing() -> str:
    """A line for each reader of untrusted files."""
    faults = ("ran", "touched", "hung", "grew", "crashed", "raised")
    lines = [
        "| reader | inputs | past the first check | rejected | faults | longest | memory "
        "| commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in newest("fuzz", "reader"):
        lines.append(
            f"| {row['reader']} | {row['inputs']:,} | {row['passed_first_check']:,} "
            f"| {row['refused']:,} | {sum(row[each] for each in faults)} "
            f"| {row['worst_seconds']:.2g} s | {row['worst_mib']} MiB | {row['commit']} |"
        )
    return "\n".join(lines)


def counted(title: str, rows: list[dict[str, Any]], key: str) -> list[str]:
    """A line for each outcome, the most frequent one first."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    counts = Counter(row[key] for row in rows).most_common()
    return [f"| {title} ({len(rows)}) | {word} | {n} | {commits} |" for word, n in counts]


def verdicts() -> str:
    """The number of times that each trial had each outcome."""
    optimizers = newest("other_optimizers", "class")
    lines = ["| trial | outcome | count | commit |", "|---|---|---|---|"]
    for title, trains in (
        ("optimizers that train in plain Lightning", True),
        ("optimizers that fail in plain Lightning", False),
    ):
        some = [row for row in optimizers if bool(row.get("trains")) == trains]
        lines += counted(title, some, "verdict")
    lines += counted("optimizers, ddp 2", newest("other_optimizers_ranks", "class"), "verdict")
    shards = newest("other_optimizers_shards", "class")
    lines += counted("optimizers, zero3 2", shards, "verdict")
    pairs = newest("other_modules", "module", "callback")
    lines += counted("modules x callbacks", pairs, "verdict")
    layouts = newest("other_modules_layouts", "module", "callback", "layout")
    lines += counted("modules on ddp, zero2 and zero3", layouts, "verdict")
    axes = ("callbacks", "task", "loader", "precision", "accumulate", "strategy", "seed")
    lines += counted("runs interrupted and resumed twice", newest("resume_cover", *axes), "outcome")
    words = ("changed", "several", "added", "refused")
    changes = [
        {"outcome": word, "commit": row["commit"]}
        for row in newest("config_changes", "preset")
        for word in words
        for _ in range(row.get(word, 0))
    ]
    lines += counted("pairs of a preset and a change by one flag", changes, "outcome")
    presets = newest("resume_presets", "preset", "seed")
    lines += counted("presets resumed by the command that they print", presets, "outcome")
    return "\n".join(lines)


def peaks() -> str:
    """A line for each size and layout: the memory that a step must hold, and its peak."""
    lines = [
        "| parameters | layout | P | G | S | A | must hold | peak | ratio | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = newest("step_memory", "size", "layout", "precision")
    for row in sorted(rows, key=lambda row: int(row["size"].rstrip("M"))):
        name = row["layout"] + ("" if row["precision"] == "32-true" else f", {row['precision']}")
        numbers = " | ".join(f"{row[key]:.0f}" for key in ("P", "G", "S", "A", "must_hold", "peak"))
        lines.append(
            f"| {row['size']} | {name} | {numbers} | {row['ratio']:.2f} | {row['commit']} |"
        )
    return "\n".join(lines)


def starts() -> str:
    """A line for the start of each layout, and for each kind of checkpoint."""
    lines = [
        "| 124 M parameters | layout | ranks | share | peak | limit (1.3 x share + 32) | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in newest("start_memory", "layout", "ranks", "size", "start"):
        name = f"start, {row['start']}" if "start" in row else "start"
        lines.append(
            f"| {name} | {row['layout']} | {row['ranks']} | {row['share']:.0f} "
            f"| {row['tensors']:.0f} | {row['bound']:.0f} | {row['commit']} |"
        )
    for row in newest("checkpoint_memory", "what", "layout", "ranks", "size"):
        lines.append(
            f"| {row['what']} | {row['layout']} | {row['ranks']} | {row['share']:.0f} "
            f"| {row['peak']:.0f} | {row['limit']:.0f} | {row['commit']} |"
        )
    return "\n".join(lines)


TABLES = {
    "results": table,
    "speeds": speeds,
    "loops": loops,
    "fuzzing": fuzzing,
    "verdicts": verdicts,
    "peaks": peaks,
    "starts": starts,
}


def write(page: Path) -> None:
    """Write the tables whose markers, <!-- name --> and <!-- /name -->, the page has."""
    text = page.read_text(encoding="utf-8")
    markers = {name: (f"<!-- {name} -->", f"<!-- /{name} -->") for name in TABLES}
    found = [
        name for name, (begin, end) in markers.items() if text.count(begin) == text.count(end) == 1
    ]
    if not found:
        sys.exit(f"{page} has no markers of a table; add <!-- results --> and <!-- /results -->")
    for name in found:
        before, rest = text.split(markers[name][0])
        after = rest.split(markers[name][1])[1]
        text = f"{before}{markers[name][0]}\n{TABLES[name]()}\n{markers[name][1]}{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    docs = HERE.parent / "docs"
    pages = [HERE.parent / "README.md"]
    pages += [docs / f"{name}.md" for name in ("measurements", "compatibility", "parallelism")]
    for given in [Path(word) for word in sys.argv[1:]] or pages:
        write(given)
