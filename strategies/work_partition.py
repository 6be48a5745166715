"""Divide work among ranks: the largest item first, each to the rank with the least so far."""

from collections.abc import Sequence


def assign_balanced(sizes: Sequence[int], load: list[int]) -> list[int]:
    """The rank of each item, in the order given; the same on all ranks if the sizes are.

    Args:
        sizes: of the items, in any unit.
        load: what each rank has already; the sizes of its items are added.

    spread_evenly([3, 5, 1], [0, 0])  # [1, 0, 1]
    """
    ranks = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):  # stable
        rank = min(range(len(load)), key=load.__getitem__)
        ranks[item] = rank
        load[rank] += sizes[item]
    return ranks
