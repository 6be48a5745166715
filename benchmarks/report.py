"""The tables of results and of speeds, written from raw rows: no number stands there by hand.

python benchmarks/report.py [README.md docs/measurements.md]

Of each recipe the rows of its present config count, the newest of each seed; what was run with an
older config is history. Of each comparison the newest row counts.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from record import config_hash

HERE = Path(__file__).parent
SHOWN = {  # a row of the table: file of raw rows, label in it, metrics
    "tiny Shakespeare, AdamW": ("shakespeare_quick", "shakespeare/quick_adamw", ["val/loss"]),
    "tiny Shakespeare, Muon": ("shakespeare_quick", "shakespeare/quick", ["val/loss"]),
    "MNIST, a classifier": ("mnist_classifier", "classifier/mnist", ["test/accuracy"]),
    "no letter e: base model": ("reinforce_quick", "reinforce/quick", ["base/loss"]),
    "no letter e: v1, e alone": (
        "reinforce_quick",
        "reinforce/quick",
        ["v1/e", "v1/vocabulary_of_base"],
    ),
    "no letter e: v6 with KL": (
        "reinforce_quick",
        "reinforce/quick",
        ["v6/e", "v6/vocabulary_of_base", "v6/nearest_jaccard", "v6/distinct_words_of_base"],
    ),
    "an unseen play, all weights": ("lora_play", "shakespeare/full_play", ["val/loss"]),
    "an unseen play, LoRA rank 8": ("lora_play", "shakespeare/lora", ["val/loss"]),
    "an unseen play, QLoRA": ("lora_play", "shakespeare/qlora", ["val/loss"]),
    "SMS Spam": ("spam", "spam", ["test/accuracy", "test/f1", "test/auroc"]),
    "SMS Spam, scikit-learn's rival": (
        "spam",
        "scikit-learn",
        ["test/accuracy", "test/f1", "test/auroc"],
    ),
}

FASTER = {  # file of raw rows: what a claim of it says (or its rival's name), and the ratio asked
    "trainer_overhead": {"ours": "1.05"},
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
}


def rows_of(file: str, config: str) -> list[dict[str, Any]]:
    """The newest row of each seed, of the newest config that was run."""
    path = HERE / "rows" / f"{file}.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["config"] == config]
    present = HERE.parent / "configs" / f"{config}.yaml"
    if present.exists():
        now = config_hash(config)
        rows = [row for row in rows if row["config_hash"] == now]
    return list({row["seed"]: row for row in rows}.values())


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table() -> str:
    """The rows that exist, in the order of SHOWN."""
    lines = ["| task | command | result | seconds | seeds | machine |", "|---|---|---|---|---|---|"]
    for name, (file, config, metrics) in SHOWN.items():
        rows = rows_of(file, config)
        if not rows:
            continue
        results = ", ".join(
            f"{m.partition('/')[2] if m != 'val/loss' else m} {spread([r[m] for r in rows], 3)}"
            for m in metrics
        )
        command = f"`fit --config {config}`" if "words" in rows[0] else f"`benchmarks/{file}.py`"
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
        "| what | rival | time of ours | of the rival | ratio | asked | A/A | machine | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file, asked in FASTER.items():
        path = HERE / "rows" / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for row in {row["what"]: row for row in rows if "ratios" in row}.values():
            median = {name: statistics.median(spent) for name, spent in row["seconds"].items()}
            for rival, ratio in row["ratios"].items():
                bound = next(
                    (b for part, b in asked.items() if part in f"{row['what']} {rival}"), ""
                )
                named = f"{rival} {row[rival]}" if rival in row else rival
                lines.append(
                    f"| [{row['what']}](../benchmarks/{file}.py) | {named} "
                    f"| {duration(median['ours'])} | {duration(median[rival])} | **{ratio:.3f}** "
                    f"| {bound} | {row['A/A']:.3f} | {row['machine']} | {row['commit']} |"
                )
    return "\n".join(lines)


TABLES = {"results": table, "speeds": speeds}


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
    pages = [HERE.parent / "README.md", HERE.parent / "docs" / "measurements.md"]
    for given in [Path(word) for word in sys.argv[1:]] or pages:
        write(given)
