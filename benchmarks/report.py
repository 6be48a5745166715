"""The tables of results and of speeds, written from raw rows: no number stands there by hand.

python benchmarks/report.py [README.md docs/measurements.md docs/compatibility.md]

Of each recipe the rows of its present config count, the newest of each seed; what was run with an
older config is history. Of each comparison the newest row counts.
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
    """A row of the table: file of raw rows, label in it, metrics, and what else a row must have.

    A metric `20 steps/fd` may lie within `20 steps`; `a over b` is their quotient.
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
    "MNIST, a classifier": Shown("mnist_classifier", "classifier/mnist", ["test/accuracy"]),
    "MNIST out of noise": Shown(
        "diffusion_quality", "diffusion/mnist_quick", GUIDED, ("judge", "mnist_cnn")
    ),
    "the same, another judge": Shown(
        "diffusion_quality", "diffusion/mnist_quick", GUIDED, ("judge", "batch_norm")
    ),
    "digits out of noise": Shown(
        "diffusion_quality", "diffusion/digits", ["accuracy", "fd over floor"], ("over", "")
    ),
    "digits, no time told": Shown(
        "diffusion_quality", "diffusion/digits", ["fd over floor"], ("over", "diffusion/none")
    ),
    "digits, one step": Shown(
        "diffusion_quality", "diffusion/digits", ["fd over floor"], ("over", "diffusion/one_step")
    ),
    "no letter e: base model": Shown("reinforce_quick", "reinforce/quick", ["base/loss"]),
    "no letter e: v1, e alone": Shown(
        "reinforce_quick", "reinforce/quick", ["v1/e", "v1/vocabulary_of_base"]
    ),
    "no letter e: v6 with KL": Shown(
        "reinforce_quick",
        "reinforce/quick",
        ["v6/e", "v6/vocabulary_of_base", "v6/nearest_jaccard", "v6/distinct_words_of_base"],
    ),
    "an unseen play, all weights": Shown("lora_play", "shakespeare/full_play", ["val/loss"]),
    "an unseen play, LoRA rank 8": Shown("lora_play", "shakespeare/lora", ["val/loss"]),
    "an unseen play, QLoRA": Shown("lora_play", "shakespeare/qlora", ["val/loss"]),
    "SMS Spam": Shown("spam", "spam", ["test/accuracy", "test/f1", "test/auroc"]),
    "SMS Spam, scikit-learn's rival": Shown(
        "spam", "scikit-learn", ["test/accuracy", "test/f1", "test/auroc"]
    ),
}

FASTER = {  # file of raw rows: what a claim of it says (or its rival's name), and the ratio asked
    "diffusion_step": {"": "1.05"},
    "plan_overhead": {"": "1.05"},
    "batch_gather": {},
    "muon_step": {"": "1.03"},
    "lora_step": {"": "1.00"},
    "nf4": {"torchao": "0.1", "bitsandbytes": "3"},
    "generation": {"": "0.1"},
    "rollout": {"": "0.125"},
    "against_trl": {"beta 0.05": "0.556", "beta 0": "0.5"},
    "frechet": {"torchmetrics": "0.333"},
    "bare_loops": {"tiny": "1.15", "": "1.03"},
}


def rows_of(shown: Shown) -> list[dict[str, Any]]:
    """The newest row of each seed, of the present config."""
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
    """A metric of a row, as `Shown` has it."""
    above, _, below = metric.partition(" over ")
    if below:
        return figure(row, above) / row[below]
    first, _, rest = metric.partition("/")
    return row[metric] if metric in row else row[first][rest]


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table() -> str:
    """The rows that exist, in the order of SHOWN."""
    lines = ["| task | command | result | seconds | seeds | machine |", "|---|---|---|---|---|---|"]
    for name, shown in SHOWN.items():
        rows = rows_of(shown)
        if not rows:
            continue
        results = ", ".join(
            f"{m if m == 'val/loss' else m.rpartition('/')[2]} "
            f"{spread([figure(row, m) for row in rows], 3)}"
            for m in shown.metrics
        )
        script = f"`benchmarks/{shown.file}.py`"
        command = f"`fit --config {shown.config}`" if "words" in rows[0] else script
        timed = [row["seconds"] for row in rows if row["seconds"] is not None]
        seconds = spread(timed, 0) if timed else ""
        machine = rows[-1]["machine"]
        lines.append(f"| {name} | {command} | {results} | {seconds} | {len(rows)} | {machine} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def speeds() -> str:
    """A line for each rival of each comparison, in the order of FASTER."""
    lines = [
        "| what | rival | time of ours | of the rival | ratio | 95 % of the median | asked | A/A "
        "| machine | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for file, asked in FASTER.items():
        path = HERE / "rows" / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        prefix = "a step on 2 ranks beside a loop by hand: " if file == "bare_loops" else ""
        for row in {row["what"]: row for row in rows if "ratios" in row}.values():
            median = {name: statistics.median(spent) for name, spent in row["seconds"].items()}
            for rival, ratio in row["ratios"].items():
                bound = next(
                    (b for part, b in asked.items() if part in f"{row['what']} {rival}"), ""
                )
                pair = row["seconds"]["ours"], row["seconds"][rival]
                paired = len(pair[0]) == len(pair[1])  # measured in turns
                between = "{:.3f} to {:.3f}".format(*interval(*pair)) if paired else ""
                named = f"{rival} {row[rival]}" if rival in row else rival
                lines.append(
                    f"| [{prefix}{row['what']}](../benchmarks/{file}.py) | {named} "
                    f"| {duration(median['ours'])} | {duration(median[rival])} | **{ratio:.3f}** "
                    f"| {between} | {bound} "
                    f"| {row['A/A']:.3f} | {row['machine']} | {row['commit']} |"
                )
    return "\n".join(lines)


def loops() -> str:
    """A line for each net: a step in a bare loop, under Lightning's Trainer and under ours.

    All were measured in one run, in turns. `1.05` was asked of a step of some 60 ms.
    """
    lines = [
        "| what | bare | stock | ours | ours without the fast loop | stock / bare | ours / bare "
        "| 95 % of the median | A/A | machine | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in newest("trainer_overhead", "what"):
        seconds = row.get("seconds", {})
        if not {"bare", "stock", "ours", "ours without fast loop"} <= seconds.keys():
            continue  # of ways that were not measured in turns with each other
        median = {name: statistics.median(spent) for name, spent in seconds.items()}
        names = ("bare", "stock", "ours", "ours without fast loop")
        times = " | ".join(duration(median[name]) for name in names)
        ratios = [median[name] / median["bare"] for name in ("stock", "ours")]
        between = "{:.3f} to {:.3f}".format(*interval(seconds["ours"], seconds["bare"]))
        steady = "" if row["ratios"] else " (not steady)"
        lines.append(
            f"| [{row['what']}](../benchmarks/trainer_overhead.py) | {times} | {ratios[0]:.3f} "
            f"| **{ratios[1]:.3f}** | {between} | {row['A/A']:.3f}{steady} | {row['machine']} "
            f"| {row['commit']} |"
        )
    return "\n".join(lines)


def newest(file: str, *keys: str) -> list[dict[str, Any]]:
    """The newest row of each value of the keys, in their order."""
    path = HERE / "rows" / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {tuple(str(row.get(key)) for key in keys): row for row in rows}
    return [found[key] for key in sorted(found)]


def fuzzing() -> str:
    """A line a reader of outside files."""
    faults = ("ran", "touched", "hung", "grew", "crashed", "raised")
    lines = [
        "| reader | inputs | past first check | refused | faults | longest | memory | commit |",
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
    """A line for each verdict, the most frequent one first."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    counts = Counter(row[key] for row in rows).most_common()
    return [f"| {title} ({len(rows)}) | {word} | {n} | {commits} |" for word, n in counts]


def verdicts() -> str:
    """How often each verdict was found in each trial."""
    optimizers = newest("other_optimizers", "class")
    lines = ["| what was tried | outcome | how many | commit |", "|---|---|---|---|"]
    for title, trains in (("optimizers that train in plain Lightning", True), ("others", False)):
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
    lines += counted("runs cut and resumed twice", newest("resume_cover", *axes), "outcome")
    return "\n".join(lines)


def peaks() -> str:
    """A line for each size and layout: what a step must hold, and its peak."""
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
        "| 124 M parameters | layout | ranks | share | peak | 1.3 shares + 32 | commit |",
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
    """Renew the tables that the page has room for, between <!-- name --> and <!-- /name -->."""
    text = page.read_text(encoding="utf-8")
    rooms = {name: (f"<!-- {name} -->", f"<!-- /{name} -->") for name in TABLES}
    found = [
        name for name, (begin, end) in rooms.items() if text.count(begin) == text.count(end) == 1
    ]
    if not found:
        sys.exit(
            f"{page} has no room for a table: a line <!-- results --> and one <!-- /results -->"
        )
    for name in found:
        before, rest = text.split(rooms[name][0])
        after = rest.split(rooms[name][1])[1]
        text = f"{before}{rooms[name][0]}\n{TABLES[name]()}\n{rooms[name][1]}{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    docs = HERE.parent / "docs"
    pages = [HERE.parent / "README.md"]
    pages += [docs / f"{name}.md" for name in ("measurements", "compatibility", "parallelism")]
    for given in [Path(word) for word in sys.argv[1:]] or pages:
        write(given)
