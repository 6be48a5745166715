"""Work is divided among ranks: the largest item first, each to the rank with the least so far."""

from ravine.strategies.work_partition import assign_balanced


def test_each_item_goes_to_the_rank_with_the_least_so_far():
    load = [0, 2, 0]
    assert assign_balanced([1, 9, 4, 4, 0], load) == [2, 0, 2, 1, 2]
    assert load == [9, 6, 5]


def test_ranks_differ_by_the_smallest_item_at_most_if_sizes_fall_slowly():
    sizes = [100 - n for n in range(41)]
    load = [0] * 4
    ranks = assign_balanced(sizes, load)
    assert load == [sum(s for s, r in zip(sizes, ranks, strict=True) if r == n) for n in range(4)]
    assert max(load) - min(load) <= min(sizes)


def test_no_items_and_one_rank_are_possible():
    assert assign_balanced([], [0, 0]) == []
    assert assign_balanced([3, 1], [0]) == [0, 0]
