"""Which ranks wait, and which are absent or have skipped a collective, follows from the reports."""

from ravine.callbacks.stability.rank_reports import (
    RankReport,
    describe_absent_ranks,
    describe_mismatch,
    find_ranks_behind,
    split_ranks,
)


def report(waiting_s=0.0, phase="forward pass", count=5, unchanged_s=0.0, batch=3) -> RankReport:
    return RankReport(
        1, 0, batch, 0, waiting_s, False, "step (a.py:1)", phase, 2, 0.0, unchanged_s, {"0": count}
    )


def test_a_rank_outside_of_the_collective_is_absent():
    reports = {0: report(9.0), 1: report(), 2: report(7.0)}
    assert split_ranks(reports, {0: 0, 1: 0, 2: 0}, 5) == ([0, 2], [1], 7.0)


def test_a_rank_with_an_old_report_is_absent_even_if_it_waited():
    reports = {0: report(9.0), 1: report(9.0)}
    assert split_ranks(reports, {0: 0, 1: 6}, 5) == ([0], [1], 9.0)


def test_on_a_gpu_the_rank_with_fewer_collectives_is_absent():
    reports = {0: report(count=8, unchanged_s=40.0), 1: report(count=7, unchanged_s=50.0)}
    ages = {0: 0.0, 1: 0.0}
    assert split_ranks(reports, ages, 5, is_asynchronous=True) == ([0], [1], 40.0)
    assert split_ranks(reports, ages, 5, is_asynchronous=False)[0] == []
    assert find_ranks_behind({0: report(), 1: report()}) == []


def test_a_rank_further_in_the_step_with_as_many_collectives_has_skipped_one():
    ahead = report(phase="backward pass")
    assert describe_mismatch({0: report(), 1: ahead, 2: report()}).startswith("rank 1 has skipped")
    assert describe_mismatch({0: report(), 1: report()}) == ""


def test_a_rank_that_is_behind_in_the_step_has_skipped_nothing():
    behind = report(count=4)
    assert describe_mismatch({0: report(phase="backward pass"), 1: behind}) == ""


def test_of_many_absent_ranks_four_are_named():
    reports = {rank: report() for rank in range(9)}
    text = describe_absent_ranks(range(9), reports, dict.fromkeys(range(9), 0.0), 5, {})
    assert text.startswith("rank 0 has been in step (a.py:1) since ")
    assert "in the forward pass of step 3, after 5 collectives" in text
    assert text.endswith("; and 5 more ranks")
