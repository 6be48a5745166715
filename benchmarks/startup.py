"""Seconds until the program answers: the median of n calls of the installed script.

python benchmarks/startup.py [n]      appends a raw row a question to rows/startup.jsonl
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ravine.cli.run_folders import record

LIMIT, LOOKUP_LIMIT = 0.15, 1.0  # seconds
NUM_RUNS = 1000
QUESTIONS = {
    **dict.fromkeys(
        (
            *("--help", "--version", "fit --help", "fti", "fit --config nowhere/nothing"),
            *("list", "list configs", "list configs lora"),
            *("completion bash", "completion words|lightning fit --config sha"),
        ),
        LIMIT,
    ),
    **dict.fromkeys(
        (
            *("list callbacks", "list optimizers", "list tasks", "list data", "list muon"),
            *("list strategies", "list samplers", "list schedules", "list rewards", "list nothing"),
            *("show EMA", "show Trainer", "show shakespeare/quick", "show Mouon"),
            "show gpt2/124m strategy/zero3",
            "completion words|lightning fit --trainer.callbacks+=E",
            "completion words|lightning fit --config shakespeare/quick --model.",
            "completion words|lightning fit --config shakespeare/quick --trainer.",
            *("runs", "runs --status=done --sort=best", "runs show last"),  # of NUM_RUNS runs
        ),
        LOOKUP_LIMIT,
    ),
}
ROWS = Path(__file__).parent / "rows" / "startup.jsonl"


def make_runs(root: Path) -> None:
    """Create NUM_RUNS folders of runs, each with 200 logged rows, every second with a record."""
    lines = "".join(
        f"{i // 10},{i * 50},{2 - i / 200},\n{i // 10},{i * 50},,2\n" for i in range(100)
    )
    config = "model:\n  class_path: ravine.lightning_modules.LanguageModel\n" + "x: 1\n" * 300
    for number in range(NUM_RUNS):
        folder = root / f"task/config{number % 20}" / f"version_{number // 20}"
        (folder / "checkpoints").mkdir(parents=True)
        for name in ("checkpoints/step=005000.ckpt", "hparams.yaml", "loss.png", "events.out.1"):
            (folder / name).write_text("x" * 1000)
        (folder / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n" + lines)
        (folder / "config.yaml").write_text(config)
        if number % 2:
            known = record.new_record("fit", "task", "LanguageModel")
            record.write_record(folder, known | {"status": "done", "steps": 5000})


def seconds(words: list[str], folder: str) -> tuple[float, float]:
    """Of the clock, and of the processor: the second is the same on a busy machine."""
    start_s, before = time.perf_counter(), os.times()
    subprocess.run(words, capture_output=True, cwd=folder)
    after = os.times()
    used = sum(after[2:4]) - sum(before[2:4])
    return round(time.perf_counter() - start_s, 4), round(used, 2)


def main(calls: int = 15) -> int:
    program = str(Path(sys.executable).with_name("ravine"))
    commit = subprocess.run(
        ["git", "-C", str(ROWS.parent.parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    slow = 0
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as rows, tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder, "runs"))
        for question, limit in QUESTIONS.items():
            command, bar, line = question.partition("|")  # the line is one argument
            words = [program, *command.split(), *([line] if bar else [])]
            seconds(words, folder)  # the first call compiles and fills the caches
            clock, processor = zip(*(seconds(words, folder) for _ in range(calls)), strict=True)
            row = {"commit": commit, "machine": machine, "load": round(os.getloadavg()[0], 2)}
            row |= {"question": question, "seconds": clock, "processor_seconds": processor}
            rows.write(json.dumps(row) + "\n")
            median = statistics.median(clock)
            slow += median > limit
            used = statistics.mean(processor)
            print(f"{median:.3f} s (of {limit}), processor {used:.3f} s   {question}")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return slow


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
