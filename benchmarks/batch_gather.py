"""Microseconds for a batch of characters: our gather against nanoGPT's list of slices.

    python benchmarks/batch_gather.py            # B=64, T=128, 21 rounds of 100 batches each

The ways take turns within a round, so that a busy machine disturbs them alike, and ours runs twice:
the ratio of the two is what this machine calls equal (A/A). A ratio is printed only if A/A is
within 3 %. Raw rows are appended to benchmarks/rows/batch_gather.jsonl.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ravine.datamodules import TextDataModule

ROWS = Path(__file__).parent / "rows" / "batch_gather.jsonl"
Ways = dict[str, Callable[[], Any]]
LIMIT = 0.03  # A/A may differ by this much for a ratio to mean something


def ours(data: TextDataModule) -> Callable[[], Any]:
    """The training loader, epoch after epoch."""
    loader = data.train_dataloader()

    def epochs() -> Iterator[Any]:
        for epoch in count():
            loader.set_epoch(epoch)
            yield from loader

    return epochs().__next__


def nanogpt(path: Path, context: int, batch_size: int) -> Callable[[], Any]:
    """The way of nanoGPT's train.py: slices of a mapped file of uint16, stacked."""

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - context, (batch_size,))
        x = [torch.from_numpy(data[i : i + context].astype(np.int64)) for i in ix]
        y = [torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in ix]
        return torch.stack(x), torch.stack(y)

    return get_batch


def microseconds(way: Callable[[], Any], batches: int) -> float:
    start = time.perf_counter()
    for _ in range(batches):
        way()
    return (time.perf_counter() - start) / batches * 1e6


def measure(
    ways: dict[str, Callable[[], Any]], rounds: int, batches: int
) -> dict[str, list[float]]:
    """Rounds in which every way has its turn, in an order drawn anew each time."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names, order = list(ways), random.Random(0)
    for number in range(-1, rounds):  # the first round only warms the caches
        for name in order.sample(names, len(names)):
            taken = round(microseconds(ways[name], batches), 1)
            if number >= 0:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("context", 128), ("batch_size", 64), ("rounds", 21), ("batches", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()

    torch.set_num_threads(1)
    data = TextDataModule(context=given.context, batch_size=given.batch_size, seed=0)
    data.setup("fit")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        data.corpus.tokens.numpy().astype(np.uint16).tofile(path)
        theirs = nanogpt(path, given.context, given.batch_size)
        ways = {"ours": ours(data), "nanoGPT": theirs, "ours again": ours(data)}
        times = measure(ways, given.rounds, given.batches)

    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:<12}{medians[name]:9.1f} us a batch (quartiles {low:.1f} to {high:.1f})")
    control = medians["ours again"] / medians["ours"]
    print(f"A/A {control:.3f}")
    if abs(control - 1) <= LIMIT:
        print(f"nanoGPT's way takes {medians['nanoGPT'] / medians['ours']:.1f} times as long")
    else:
        print(f"no ratio: A/A is not within {LIMIT:.0%}; run again on a quiet machine")

    git = ["git", "-C", str(ROWS.parent.parent), "rev-parse", "--short", "HEAD"]
    row = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "source": data.resolved["source"],
        **vars(given),
        "microseconds": times,
    }
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
