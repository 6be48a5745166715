"""Text similarity: pairwise Jaccard distances of word n-grams.

    distance(A, B) = 1 - |A and B| / |A or B|          1: nothing in common, 0: the same set

An n-gram of one text only is in no intersection, and in a diverse batch nearly all n-grams are of
this kind. The others form one small matrix product (64 texts of 256 characters: 1 ms).
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np


def sequence_ngrams(items: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return all runs of n items, in order: len(items) - n + 1 of them, or none."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))


def pairwise_jaccard_distance(texts: Sequence[str], n: int = 4) -> np.ndarray:
    """Compute the Jaccard distances of the word n-grams of b texts, float64 (b b).

    It is 1 - |intersection| / |union| of their sets of n-grams, and 0 for two texts without
    n-grams.
    """
    rows_by_ngram: dict[Hashable, list[int]] = defaultdict(list)
    sizes = np.zeros(len(texts))  # different n-grams of each text
    for row, text in enumerate(texts):
        grams = set(sequence_ngrams(text.split(), n))
        sizes[row] = len(grams)
        for gram in grams:
            rows_by_ngram[gram].append(row)
    # an n-gram of a single text is in no intersection
    rows_of_shared = [rows for rows in rows_by_ngram.values() if len(rows) > 1]
    # 1 where a text (row) has a shared n-gram (column); float32 is exact up to 2^24 n-grams
    incidence = np.zeros((len(texts), len(rows_of_shared)), np.float32)
    for column, rows in enumerate(rows_of_shared):
        incidence[rows, column] = 1
    intersection = (incidence @ incidence.T).astype(np.float64)  # sizes of the intersections
    union = sizes[:, None] + sizes - intersection
    distance = 1 - intersection / np.maximum(union, 1)
    distance[union == 0] = 0.0
    np.fill_diagonal(distance, 0.0)
    return distance


def nearest_distance(distance: np.ndarray) -> np.ndarray:
    """Distance (b) from each text to the nearest other text; 1 for a single text."""
    if len(distance) < 2:
        return np.ones(len(distance))
    off_diagonal = distance + np.diag(np.full(len(distance), np.inf))
    return off_diagonal.min(1)


def mean_pairwise_distance(distance: np.ndarray) -> float:
    """Mean distance over all pairs of different texts; 1 for a single text."""
    n = len(distance)
    return float(distance.sum() / (n * (n - 1))) if n > 1 else 1.0
