"""The quick Shakespeare recipes: full-split validation loss and seconds, three seeds.

python benchmarks/shakespeare_quick.py [config ...] [--seeds 0 1 2]

By default shakespeare/quick_adamw and, with Muon, shakespeare/quick.
Two idle CPU cores; appends a raw row a run to rows/shakespeare_quick.jsonl. Reference, a bare
loop of the same recipe: 1.647 nats in 63 s (AdamW), 1.573 in 70 s (Muon).
"""

import argparse

from record import append, train

CONFIGS = ["shakespeare/quick_adamw", "shakespeare/quick"]


def main(configs: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        for config in configs:  # one beside the other, so that a slow hour slows both
            append("shakespeare_quick", train(config, seed, "--data.source=shakespeare"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    main(**vars(parser.parse_args()))
