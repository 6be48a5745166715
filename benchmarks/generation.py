"""Tokens per second with a key-value cache and without: python benchmarks/generation.py

4 layers of width 128, context 256, 16 prompts of 128 characters, 128 new tokens, fp32. The ways
take turns (cached, uncached, cached again: the A/A control). On a CPU one thread, seconds of the
processor, so that a busy machine counts less; on a GPU seconds of the clock, and one way more: a
step recorded as a CUDA graph. One raw row a round, in rows/generation.jsonl.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import append, processor

from ravine.lightning_modules.language import Transformer
from ravine.lightning_modules.language.generation import generate
from ravine.lightning_modules.language.replay import cuda_graph

B, PROMPT, NEW, CONTEXT, ROUNDS = 16, 128, 128, 256, 5


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - begun
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = Transformer(65, CONTEXT, layers=4, width=128, heads=4, zero_init=False).to(device)
    prompts = list(torch.randint(65, (B, PROMPT)))
    ways: dict[str, dict[str, Any]] = {"cached": {}, "uncached": {"cached": False}}
    ways |= {"cached_again": {}} | (
        {"recorded": {"capture": cuda_graph}} if device == "cuda" else {}
    )
    generate(net, prompts, NEW, CONTEXT)
    ratios, controls = [], []
    for number in range(ROUNDS):
        took = {
            name: seconds(lambda how=how: generate(net, prompts, NEW, CONTEXT, **how))
            for name, how in ways.items()
        }
        ratios.append(2 * took["uncached"] / (took["cached"] + took["cached_again"]))
        controls.append(took["cached_again"] / took["cached"])
        append(
            "generation",
            {
                "round": number,
                "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
                "load": round(os.getloadavg()[0], 2),
                "torch": torch.__version__,
                "tokens_per_second": {k: round(B * NEW / s, 1) for k, s in took.items()},
                "ratio": round(ratios[-1], 2),
            },
        )
    print(f"cached / uncached, median {statistics.median(ratios):.1f} x", end=", ")
    print(f"cached / cached, median {statistics.median(controls):.3f}")


if __name__ == "__main__":
    main()
