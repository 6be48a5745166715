"""Microseconds for a batch of characters: our gather against nanoGPT's list of slices.

    python benchmarks/batch_gather.py            # B=64, T=128, 21 rounds of 100 batches each

The ways take turns, and ours runs twice (the A/A control). One raw
row in rows/batch_gather.jsonl.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from versus import compare, rounds

from ravine.datamodules import TextDataModule


def make_loader(data: TextDataModule) -> Callable[[], Any]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("context", 128), ("batch_size", 64), ("rounds", 21), ("batches", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()

    torch.set_num_threads(1)
    data = TextDataModule(context_length=given.context, batch_size=given.batch_size, seed=0)
    data.setup("fit")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        data.corpus.tokens.numpy().astype(np.uint16).tofile(path)
        nanogpt_batch = nanogpt(path, given.context, given.batch_size)
        ways = {
            "ours": make_loader(data),
            "nanoGPT": nanogpt_batch,
            "ours again": make_loader(data),
        }
        times = rounds(ways, given.rounds, given.batches)
    what = f"a batch of {given.batch_size} x {given.context} characters"
    compare("batch_gather", what, times, [], source=data.provenance["source"])


if __name__ == "__main__":
    main()
