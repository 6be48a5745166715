"""The README's results table, written from raw rows: no number stands there by hand.

python benchmarks/report.py [README.md]

Of each recipe the rows of its present config count, the newest of each seed; what was run with an
older config is history.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from record import config_hash

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
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


def main(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{readme} needs one line {BEGIN} and one {END} after it; the table goes between")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else HERE.parent / "README.md")
