"""Tokens per second with a key-value cache and without: python benchmarks/generation.py

4 layers of width 128, context 256, 16 prompts of 128 characters, 128 new tokens, fp32. Ours
takes turns with itself (the A/A control); without a cache it takes so long that it goes alone. On
a CPU one thread; on a GPU one way more: a step recorded as a CUDA graph. One raw row in
rows/generation.jsonl.
"""

import statistics
import time
from functools import partial
from typing import Any

import torch
from versus import compare, rounds, waited

from ravine.lightning_modules.generation.cuda_graphs import capture_cuda_graph
from ravine.lightning_modules.generation.generate_text import generate
from ravine.lightning_modules.nn import Transformer

B, PROMPT, NEW, CONTEXT, ROUNDS = 16, 128, 128, 256, 3


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = Transformer(
        65, CONTEXT, num_layers=4, d_model=128, num_heads=4, zero_init_residual=False
    ).to(device)
    prompts = list(torch.randint(65, (B, PROMPT)))
    ways: dict[str, dict[str, Any]] = {"ours": {}, "uncached": {"cached": False}, "ours again": {}}
    if device == "cuda":
        ways["ours, recorded"] = {"capture": capture_cuda_graph}
    calls = {k: partial(generate, net, prompts, NEW, CONTEXT, **how) for k, how in ways.items()}
    clock = waited if device == "cuda" else time.process_time
    slow = {"uncached": calls.pop("uncached")}
    times = rounds(calls, 5 * ROUNDS, clock=clock) | rounds(slow, ROUNDS, clock=clock, num_warmup=0)
    per_second = {name: round(B * NEW / statistics.median(s), 1) for name, s in times.items()}
    what = f"generation with a cache, {B} x ({PROMPT} + {NEW}) tokens"
    compare("generation", what, times, [], tokens_per_second=per_second)


if __name__ == "__main__":
    main()
