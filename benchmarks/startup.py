"""Seconds until the program answers without torch: the median of n calls of the installed script.

python benchmarks/startup.py [n]      appends a raw row a question to rows/startup.jsonl
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

QUESTIONS = ("--help", "--version", "fit --help", "fti", "fit --config nowhere/nothing")
LIMIT = 0.15  # seconds
ROWS = Path(__file__).parent / "rows" / "startup.jsonl"


def seconds(words: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(words, capture_output=True)
    return time.perf_counter() - begun


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
    with ROWS.open("a") as rows:
        for question in QUESTIONS:
            words = [program, *question.split()]
            seconds(words)  # the first call compiles and fills the caches
            raw = [round(seconds(words), 4) for _ in range(calls)]
            row = {"commit": commit, "machine": machine, "question": question, "seconds": raw}
            rows.write(json.dumps(row) + "\n")
            median = statistics.median(raw)
            slow += median > LIMIT
            print(f"{median:.3f} s (of {LIMIT}), slowest {max(raw):.3f}   {question}")
    return slow


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
