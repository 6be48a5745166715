"""The table of lecture 5: every preset of the ladder, its losses, and a figure of all curves.

    python benchmarks/lecture5.py            # 10,000 steps each: a GPU, or days
    python benchmarks/lecture5.py --short    # 250 steps, B=16, T=64, d=128, depth 2: two minutes
    python benchmarks/lecture5.py --draw     # only the table and the figure, from the rows

Rows go to rows/lecture5.jsonl (or lecture5_short.jsonl), one a run, with its curve; the figure to
docs/figures/lecture5.png (or lecture5_short.png). `--seeds=3` runs each three times.
"""

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from record import HERE, ROWS, append, circumstances, ravine

PUBLISHED = {  # train nats; what the lecture gives no number for is left out
    "bigram": 2.45,
    "attention_only --model.num_layers=4": 1.88,
    "attention_only --model.num_layers=8": 1.50,
    "transformer_char --model.num_layers=2": 1.63,
    "transformer_char --model.num_layers=4": 1.25,
    "transformer_char --model.num_layers=8": 0.92,
}
SINGLE = [
    "bigram",
    "running_mean",
    "attention_embedding",
    "attention_shared_qk",
    "attention_qk",
    "attention_qkv",
]
DEEP = [
    f"{name} --model.num_layers={n}"
    for name in ("attention_only", "transformer_char")
    for n in (1, 2, 4, 8)
]
PLACES = [
    f"transformer_char --model.positional_encoding={p}" for p in ("sinusoidal", "learned", "rope")
]
FULL = [*SINGLE, *DEEP, *PLACES, "transformer_char --model.num_heads=4", "transformer_bpe"]
SHORT = [*SINGLE, "attention_only --model.num_layers=2", "transformer_char --model.num_layers=2"]
SMALL = ["--data.batch_size=16", "--data.context_length=64", "--model.d_model=128",
         "--trainer.max_steps=250", "--trainer.val_check_interval=250",
         "--trainer.log_every_n_steps=5"]  # fmt: skip


def run(name: str, seed: int, words: list[str]) -> dict[str, Any]:
    """One training in a folder of its own: last values, and the curve of the training loss."""
    preset, *flags = name.split()
    config = f"shakespeare/{preset}"
    with tempfile.TemporaryDirectory() as folder:
        where = [f"--trainer.default_root_dir={folder}", f"--trainer.name={preset}"]
        watch = "--trainer.callbacks+=benchmarks.record.Stopwatch"
        ravine(
            "fit", "--config", config, f"--seed_everything={seed}", *where, *flags, *words, watch
        )
        place = Path(folder, preset, "version_0")
        with (place / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        values = {k: float(v) for row in rows for k, v in row.items() if v and "/" in k}
        curve = [(int(row["step"]), round(float(row["train/loss"]), 4))
                 for row in rows if row.get("train/loss")]  # fmt: skip
        watched = json.loads((place / "stopwatch.json").read_text())
    keep = ("train/loss_last_100", "val/loss", "val/perplexity", "val/bits_per_byte")
    figures = {key: round(values[key], 4) for key in keep}
    row = circumstances(config) | {"name": name, "seed": seed, "words": words}
    return row | watched | figures | {"curve": curve}


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """The training curves of the ladder, one line a model, first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axis = figure.subplots()
    first = {row["name"]: row for row in reversed(rows)}
    for number, (name, row) in enumerate(reversed(first.items())):
        steps, losses = zip(*row["curve"], strict=True)
        size = max(1, len(losses) // 25)  # a single step's loss is mostly chance
        smooth = [statistics.mean(losses[max(0, i - size) : i + 1]) for i in range(len(losses))]
        label = name.removeprefix("seed_").replace(" --model.", ", ")
        # the first (bigram) and third (embedding) curves coincide: dashes keep both visible
        look = {"linestyle": "--", "zorder": 3} if number == 0 or number > 9 else {}
        axis.plot(steps, smooth, label=label, linewidth=1.4, **look)
    axis.set(xlabel="optimizer steps", ylabel="training loss, nats a token")
    if max(max(loss for _, loss in row["curve"]) for row in rows) > 6:
        axis.set_ylim(0.8, 5)  # embeddings from N(0, 1) start far above uniform guessing
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds in Markdown; bits per byte are what different tokenizers compare by."""
    lines = ["| model | train nats (published) | val nats | perplexity | bits per byte | runs |"]
    lines.append("|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        named_rows = [row for row in rows if row["name"] == name]
        keys = ("train/loss_last_100", "val/loss", "val/perplexity", "val/bits_per_byte")
        train, *others = (f"{statistics.mean(row[key] for row in named_rows):.3f}" for key in keys)
        published_note = (
            f" ({PUBLISHED[name]})" if name in PUBLISHED and named_rows[0]["words"] == [] else ""
        )
        lines.append(
            f"| {name} | {train}{published_note} | {' | '.join(others)} | {len(named_rows)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    name = "lecture5_short" if given.short else "lecture5"
    if not given.draw:
        for seed in range(given.seeds):
            for model in SHORT if given.short else FULL:
                append(name, run(model, seed, SMALL if given.short else []))
    rows = [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]
    draw(rows, HERE.parent / "docs" / "figures" / f"{name}.png")
    print(table(rows))


if __name__ == "__main__":
    main()
