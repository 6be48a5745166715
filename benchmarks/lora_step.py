"""A training step with adapters, ours against peft's: two blocks of width 512, rank 16.

    OMP_NUM_THREADS=1 python benchmarks/lora_step.py    # 4 x 128 tokens, 31 rounds of one step

Forward, backward and an AdamW step of the adapters. The ways take turns within a round, and ours
runs twice: the ratio of the two is what this machine calls equal (A/A). Rows are appended to
benchmarks/rows/lora_step.jsonl. Needs peft (pip install 'ravine[test]').
"""

import argparse
import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from versus import compare
from versus import rounds as time_rounds

from ravine.callbacks.lora import inject_lora
from ravine.lightning_modules.nn import Transformer

LAYERS = ["query", "key", "value", "out", "up", "down"]


def step(net: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def once() -> None:
        net(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    base = Transformer(65, 128, num_layers=2, d_model=512, num_heads=8)
    tokens = torch.randint(65, (4, 128))
    ways = {}
    for name in ("ours", "peft", "ours again"):
        net = copy.deepcopy(base)
        if name == "peft":
            config = LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS)
            net = inject_adapter_in_model(config, net)
        else:
            inject_lora(net, LAYERS, rank=16)
        ways[name] = step(net, tokens)
    what = "a training step of rank 16 adapters on two blocks of width 512"
    compare("lora_step", what, time_rounds(ways, rounds), ["peft"])


if __name__ == "__main__":
    main()
