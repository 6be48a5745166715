"""Tokens per second with a key-value cache and without: python benchmarks/generation.py

One thread, 4 layers of width 128, context 256, 16 prompts of 128 characters, 128 new tokens, fp32.
The three take turns (cached, uncached, cached again: the A/A control); seconds are of the
processor, so that a busy machine counts less. One raw row a round, in rows/generation.jsonl.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from record import append, processor

from ravine.lightning_modules.language import Transformer
from ravine.lightning_modules.language.generation import generate

B, PROMPT, NEW, CONTEXT, ROUNDS = 16, 128, 128, 256, 5


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Transformer(65, CONTEXT, layers=4, width=128, heads=4, zero_init=False)
    prompts = list(torch.randint(65, (B, PROMPT)))

    def write(cached: bool) -> object:
        return generate(net, prompts, NEW, CONTEXT, cached=cached)

    write(True)
    ratios, controls = [], []
    for number in range(ROUNDS):
        fast, slow, again = (seconds(lambda c=c: write(c)) for c in (True, False, True))
        ratios.append(2 * slow / (fast + again))
        controls.append(again / fast)
        rates = {"cached": fast, "uncached": slow, "cached_again": again}
        append(
            "generation",
            {
                "round": number,
                "machine": f"{processor()}, one thread",
                "load": round(os.getloadavg()[0], 2),
                "torch": torch.__version__,
                "tokens_per_second": {k: round(B * NEW / s, 1) for k, s in rates.items()},
                "ratio": round(ratios[-1], 2),
            },
        )
    print(f"cached / uncached, median {statistics.median(ratios):.1f} x", end=", ")
    print(f"cached / cached, median {statistics.median(controls):.3f}")


if __name__ == "__main__":
    main()
