"""One step of Muon against torch.optim.Muon: python benchmarks/muon_step.py [--threads 2]

The hidden matrices of two transformers (4 layers of width 256, 12 of width 128; on a GPU 8 of 768),
Newton-Schulz in bf16 for both: the same numbers to the last bit. Ours, torch's and ours again (the
A/A control) take turns. On one thread seconds are of the processor. One raw row a model, in
rows/muon_step.jsonl.
"""

import argparse
import time

import torch
from torch import nn
from versus import compare, rounds, waited

from ravine.callbacks import MuonOptimizer

CPU, GPU = {"4 x 256": (4, 256), "12 x 128": (12, 128)}, {"8 x 768": (8, 768)}
ROUNDS = 21


def matrices(layers: int, width: int, device: str) -> list[nn.Parameter]:
    """Queries, keys, values, out, up and down of each layer, with gradients."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    made = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes * layers]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def main() -> None:
    """Measure the models that this machine is meant for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if device == "cpu" and threads == 1 else waited
    for model, (layers, width) in (GPU if device == "cuda" else CPU).items():
        settings = {"coefficients": "newton_schulz", "iteration_dtype": "bfloat16"}
        ravine_muon = MuonOptimizer(matrices(layers, width, device), **settings)
        torch_muon = torch.optim.Muon(matrices(layers, width, device))
        ways = {"ours": ravine_muon.step, "torch": torch_muon.step, "ours again": ravine_muon.step}
        times = rounds(ways, ROUNDS, clock=clock, num_warmup=2)
        what = f"a step of Muon on {6 * layers} matrices, {model}"
        compare("muon_step", what, times, [], threads=threads)


if __name__ == "__main__":
    main()
