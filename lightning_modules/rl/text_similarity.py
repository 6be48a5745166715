"""How alike texts are: the Jaccard distance of their word n-grams, of all pairs at once.

    distance(A, B) = 1 - |A and B| / |A or B|          1: nothing in common, 0: the same set

An n-gram that one text alone has is in no intersection, and in a living batch nearly all are such:
what is left makes one small product of matrices (64 texts of 256 characters: 1 ms).
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np


def ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n items, in order: len(items) - n + 1 of them, or none."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def distances(texts: Sequence[str], n: int = 4) -> np.ndarray:
    """Distances of word n-grams, float64 (b b); two texts without any are the same text."""
    holders: dict[Hashable, list[int]] = defaultdict(list)
    sizes = np.zeros(len(texts))
    for row, text in enumerate(texts):
        grams = set(ngrams(text.split(), n))
        sizes[row] = len(grams)
        for gram in grams:
            holders[gram].append(row)
    shared = [rows for rows in holders.values() if len(rows) > 1]
    incidence = np.zeros((len(texts), len(shared)), np.float32)  # exact up to 2^24 n-grams
    for column, rows in enumerate(shared):
        incidence[rows, column] = 1
    both = (incidence @ incidence.T).astype(np.float64)
    either = sizes[:, None] + sizes - both
    apart = 1 - both / np.maximum(either, 1)
    apart[either == 0] = 0.0
    np.fill_diagonal(apart, 0.0)
    return apart


def to_nearest(apart: np.ndarray) -> np.ndarray:
    """From each text to the nearest of the others (b); of a single text 1."""
    if len(apart) < 2:
        return np.ones(len(apart))
    others = apart + np.diag(np.full(len(apart), np.inf))
    return others.min(1)


def mean_pairwise(apart: np.ndarray) -> float:
    """Mean over all pairs of different texts; of a single text 1."""
    n = len(apart)
    return float(apart.sum() / (n * (n - 1))) if n > 1 else 1.0
