"""The quick Shakespeare recipes: full-split validation loss and seconds, three seeds.

python benchmarks/shakespeare_quick.py [config ...]     default: shakespeare/quick_adamw and, with
                                                        Muon, shakespeare/quick
Two idle CPU cores; appends a raw row a run to rows/shakespeare_quick.jsonl. Reference, a bare
loop of the same recipe: 1.647 nats in 63 s (AdamW), 1.573 in 70 s (Muon).
"""

import sys

from record import append, train

CONFIGS = ["shakespeare/quick_adamw", "shakespeare/quick"]


def main(configs: list[str]) -> None:
    for seed in range(3):
        for config in configs:  # one beside the other, so that a slow hour slows both
            append("shakespeare_quick", train(config, seed, "--data.source=shakespeare"))


if __name__ == "__main__":
    main(sys.argv[1:] or CONFIGS)
