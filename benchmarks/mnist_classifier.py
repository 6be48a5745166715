"""MNIST's classifier: test accuracy and seconds of training: python benchmarks/mnist_classifier.py

Two idle CPU cores, three seeds and the first once more, whose weights must be the same bits. A raw
row a run in rows/mnist_classifier.jsonl. Reference, a bare loop of 1,400 steps with batch norm:
0.9938 in 12.6 s.
"""

import sys

from record import append, train

CONFIG = "classifier/mnist"


def main(seeds: list[int]) -> None:
    for seed in seeds:
        append("mnist_classifier", train(CONFIG, seed, test=True))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [0, 1, 2, 0])
