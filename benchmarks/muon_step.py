"""One step of Muon against torch.optim.Muon: python benchmarks/muon_step.py [--threads 2]

The hidden matrices of two transformers (4 layers of width 256, 12 of width 128; on a GPU 8 of 768),
Newton-Schulz in bf16 for both: the same numbers to the last bit. Ours, torch's and ours again (the
A/A control) take turns; the first two rounds warm up. On a CPU seconds are of the processor, so
that a busy machine counts less. One raw row a model, in rows/muon_step.jsonl.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from record import append, processor
from torch import nn
from torch.optim import Optimizer

from ravine.callbacks import MuonOptimizer

CPU, GPU = {"4 x 256": (4, 256), "12 x 128": (12, 128)}, {"8 x 768": (8, 768)}
ROUNDS, WARM = 23, 2


def matrices(layers: int, width: int, device: str) -> list[nn.Parameter]:
    """Queries, keys, values, out, up and down of each layer, with gradients."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    made = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes * layers]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def seconds(optimizer: Optimizer, device: str, threads: int) -> float:
    """Of one step."""
    clock: Callable[[], float] = time.perf_counter
    if device == "cpu" and threads == 1:
        clock = time.process_time
    begun = clock()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def main() -> None:
    """Measure the models that this machine is meant for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {threads} threads"
    for model, (layers, width) in (GPU if device == "cuda" else CPU).items():
        settings = {"coefficients": "newton_schulz", "iteration_dtype": "bfloat16"}
        ours = MuonOptimizer(matrices(layers, width, device), **settings)
        theirs = torch.optim.Muon(matrices(layers, width, device))
        turns = [(ours, "ours"), (theirs, "torch"), (ours, "ours_again")]
        times: dict[str, list[float]] = {label: [] for _, label in turns}
        for number in range(ROUNDS):
            for optimizer, label in turns if number % 2 else reversed(turns):
                spent = seconds(optimizer, device, threads)
                if number >= WARM:
                    times[label].append(spent)
        median = {label: statistics.median(spent) for label, spent in times.items()}
        row = {
            "model": model,
            "matrices": 6 * layers,
            "machine": name,
            "load": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "milliseconds": {k: [round(1e3 * s, 3) for s in v] for k, v in times.items()},
            "ratio": round(median["ours"] / median["torch"], 3),
            "control": round(median["ours_again"] / median["ours"], 3),
        }
        append("muon_step", row)


if __name__ == "__main__":
    main()
