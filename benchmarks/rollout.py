"""A policy's rollout with a key-value cache and without: python benchmarks/rollout.py

4 layers of width 128; 64 prompts of 32 tokens and 128 new ones (reinforce/quick), and 16 of 64 and
64; fp32, temperature 0.8. On one thread ours takes turns with itself (the A/A control); without
a cache it takes so long that it goes alone. The tokens are compared. A raw row a shape, in
rows/rollout.jsonl.
"""

from functools import partial

import torch
from torch import Tensor
from versus import compare, rounds

from ravine.lightning_modules.generation.generate_text import generate
from ravine.lightning_modules.generation.sampling import DecodingConfig
from ravine.lightning_modules.nn import Transformer

ROUNDS = 3


def shape(b: int, prompt: int, new: int) -> None:
    """One row: b prompts, as many tokens in and out."""
    torch.manual_seed(0)
    net = Transformer(
        65, prompt + new, num_layers=4, d_model=128, num_heads=4, zero_init_residual=False
    )
    prompts = list(torch.randint(65, (b, prompt)))
    written: dict[str, Tensor] = {}

    def write(way: str) -> None:
        how = {"cached": way != "uncached", "window": "refuse"}
        completions = generate(net, prompts, new, prompt + new, DecodingConfig(0.8), **how)  # type: ignore
        written[way] = completions.tokens

    ways = {way: partial(write, way) for way in ("ours", "ours again")}
    times = rounds(ways, 5 * ROUNDS) | rounds(
        {"uncached": partial(write, "uncached")}, 1, num_warmup=0
    )
    same = written["ours"].equal(written["uncached"])
    what = f"a rollout with a cache, {b} x ({prompt} + {new}) tokens"
    compare("rollout", what, times, [], same_tokens=same)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shape(64, 32, 128)
    shape(16, 64, 64)
