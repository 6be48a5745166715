"""Load balancing: assign items to ranks, the largest first, each to the least loaded rank."""

from collections.abc import Sequence


def assign_balanced(sizes: Sequence[int], load: list[int]) -> list[int]:
    """Return the rank of each item, in the order of `sizes`; deterministic.

    Args:
        sizes: sizes of the items, in any unit.
        load: the current load of each rank; the sizes of the assigned items are added in place.

        assign_balanced([3, 5, 1], [0, 0])  # [1, 0, 1]
    """
    ranks = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):  # stable
        rank = min(range(len(load)), key=load.__getitem__)
        ranks[item] = rank
        load[rank] += sizes[item]
    return ranks
