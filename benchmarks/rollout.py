"""A policy's rollout with a key-value cache and without: python benchmarks/rollout.py

4 layers of width 128; 64 prompts of 32 tokens and 128 new ones (reinforce/quick), and 16 of 64 and
64; fp32, temperature 0.8. The ways take turns (cached, uncached, cached again: the A/A control) on
one thread, in seconds of the processor. The tokens are compared. A raw row a round, in
rows/rollout.jsonl.
"""

import os
import statistics
import time

import torch
from record import append, circumstances

from ravine.lightning_modules.language import Transformer
from ravine.lightning_modules.language.generation import Generated, generate
from ravine.lightning_modules.language.sampling import Sampling

ROUNDS = 3


def main() -> None:
    torch.set_num_threads(1)
    for b, prompt, new in ((64, 32, 128), (16, 64, 64)):
        torch.manual_seed(0)
        net = Transformer(65, prompt + new, layers=4, width=128, heads=4, zero_init=False)
        prompts = list(torch.randint(65, (b, prompt)))
        rows = []
        for number in range(ROUNDS):
            took, written = {}, list[Generated]()
            for way in ("cached", "uncached", "cached_again"):
                begun = time.process_time()
                how = {"cached": way != "uncached", "window": "refuse"}
                written.append(
                    generate(net, prompts, new, prompt + new, Sampling(0.8), **how)  # type: ignore
                )
                took[way] = round(time.process_time() - begun, 3)
            ratio = 2 * took["uncached"] / (took["cached"] + took["cached_again"])
            rows.append(
                {
                    "shape": [b, prompt, new],
                    "seed": 0,
                    "round": number,
                    "seconds": took,
                    "ratio": round(ratio, 2),
                    "same_tokens": written[0].tokens.equal(written[1].tokens),
                    "control": round(took["cached_again"] / took["cached"], 3),
                }
            )
            append("rollout", circumstances("reinforce/quick") | rows[-1])
        ratios = [row["ratio"] for row in rows]
        print(
            f"{b} x ({prompt} + {new}): {statistics.median(ratios):.1f} x, load {os.getloadavg()}"
        )


if __name__ == "__main__":
    main()
