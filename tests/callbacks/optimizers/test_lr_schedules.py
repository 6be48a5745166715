"""Schedules: closed forms, one row a shape; and the runs that they do not fit."""

import math
import re
from typing import get_args

import pytest

from ravine.callbacks.optimizers.lr_schedules import SCHEDULE_SHAPES, LRSchedule, ScheduleKind
from ravine.errors import UsageError

# shape, arguments, {step: factor} in a run of 100 optimizer steps
CLOSED_FORMS = [
    ("constant", {}, {0: 1, 50: 1, 99: 1}),
    ("constant", {"warmup": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
    ("linear", {}, {0: 1, 25: 0.75, 100: 0}),
    ("linear", {"warmup": 20, "final_fraction": 0.2}, {19: 1, 20: 1, 60: 0.6, 100: 0.2, 150: 0.2}),
    ("cosine", {"final_fraction": 0.1}, {0: 1, 50: 0.55, 100: 0.1}),
    ("cosine", {}, {25: (1 + math.sqrt(0.5)) / 2}),
    ("wsd", {"warmup": 10, "cooldown": 0.4}, {10: 1, 60: 1, 80: 0.5, 100: 0}),
    ("step", {"period": 30, "decay_factor": 0.1}, {29: 1, 30: 0.1, 60: 0.01, 99: 0.001}),
    ("inverse_sqrt", {"warmup": 16}, {15: 1, 16: 1, 64: 0.5}),
    ("exponential", {"decay_factor": 0.98}, {0: 1, 1: 0.98, 10: 0.98**10}),
    ("exponential", {"decay_factor": 0.5, "final_fraction": 0.125}, {3: 0.125, 50: 0.125}),
    ("power", {"power": 0.7}, {0: 1, 1: 0.5**0.7, 99: 0.01**0.7}),
    ("power", {"timescale": 10.0}, {0: 1, 10: 0.5, 90: 0.1}),
    ("cosine_restarts", {"period": 20, "final_fraction": 0.5}, {0: 1, 10: 0.75, 20: 1, 30: 0.75}),
]


@pytest.mark.parametrize(("kind", "arguments", "factors"), CLOSED_FORMS)
def test_every_shape_equals_its_closed_form(kind, arguments, factors):
    schedule = LRSchedule(kind, **arguments)
    schedule.validate(100)
    assert {step: schedule.factor(step, 100) for step in factors} == pytest.approx(factors)


def test_every_shape_has_a_closed_form_here_and_a_name_in_the_type():
    assert set(SCHEDULE_SHAPES) == {row[0] for row in CLOSED_FORMS} == set(get_args(ScheduleKind))


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_every_shape_starts_at_one_whatever_the_length(kind):
    assert LRSchedule(kind).factor(0, 100) == LRSchedule(kind).factor(0, math.inf) == 1


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_the_warmup_never_starts_at_zero_and_meets_the_shape_at_its_peak(kind):
    schedule = LRSchedule(kind, warmup=5)
    assert schedule.factor(0, 100) == 0.2
    assert schedule.factor(4, 100) == schedule.factor(5, 100) == 1


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_a_warmup_from_zero_starts_there_and_has_its_peak_once(kind):
    schedule = LRSchedule(kind, warmup=5, warmup_from_zero=True)
    schedule.validate(120)
    rise = [schedule.factor(k, 120) for k in range(6)]
    assert rise == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    default = LRSchedule(kind, warmup=5)
    for step in (5, 6, 50, 119, 130):  # the shape itself is the same
        assert schedule.factor(step, 120) == default.factor(step, 120)


def test_a_cosine_from_zero_equals_the_cosine_of_the_course():
    """CS336, assignment 1: warm-up of 7, end of the cosine at 21, from 1 to 0.1."""
    schedule, found = LRSchedule("cosine", warmup=7, final_fraction=0.1, warmup_from_zero=True), []
    for it in range(25):
        cosine = 0.1 + 0.5 * (1 + math.cos((it - 7) / 14 * math.pi)) * 0.9
        found.append((schedule.factor(it, 21), it / 7 if it < 7 else 0.1 if it > 21 else cosine))
    assert [a for a, _ in found] == pytest.approx([b for _, b in found])


@pytest.mark.parametrize(
    ("schedule", "length", "message", "flag"),
    [
        (
            LRSchedule("cosine"),
            math.inf,
            "this run has no end; pass max_steps=1000 to Trainer, or use",
            "--trainer.max_steps=1000, or --schedule.kind=constant",
        ),
        (
            LRSchedule(warmup=0.1),
            math.inf,
            "this run has no end; pass max_steps=1000 to Trainer",
            "--trainer.max_steps=1000, or --schedule.warmup=100",
        ),
        (
            LRSchedule(warmup=-1),
            100,
            "allowed: 0 or more optimizer steps, a fraction",
            "warmup=0.1",
        ),
        (LRSchedule(warmup=-0.1), 100, "use warmup=0.1", "--schedule.warmup=0.1"),
        (LRSchedule(warmup=2.5), 100, "neither a number of steps nor a fraction", "warmup=0.1"),
        (LRSchedule(warmup=math.nan), 100, "warmup=nan is neither", "warmup=0.1"),
        (LRSchedule(warmup=math.inf), math.inf, "warmup=inf is neither", "warmup=0.1"),
        (
            LRSchedule(warmup_from_zero=True),
            100,
            "warmup is 0; allowed: warmup of 1 step or more; use warmup=100",
            "--schedule.warmup=100",
        ),
        (
            LRSchedule("wsd", warmup=50, cooldown=0.6),
            100,
            "allowed: cooldown of 0.50 or less; use cooldown=0.50",
            "--schedule.cooldown=0.50",
        ),
        (
            LRSchedule("step", period=200),
            100,
            "period=200 does not occur in the 100 optimizer steps after the warmup; "
            "allowed: 1 to 100; use period=25",
            "--schedule.period=25",
        ),
        (
            LRSchedule("cosine_restarts", period=0),
            100,
            "period=0 does not occur",
            "--schedule.period=25",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(schedule, length, message, flag):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        schedule.validate(length)
    assert error.value.flag.endswith(flag)


@pytest.mark.parametrize("name", ["power", "timescale"])
def test_a_power_schedule_needs_positive_numbers(name):
    with pytest.raises(UsageError, match=rf"{name}=0.0 is not positive; allowed: above 0; use"):
        LRSchedule("power", **{name: 0.0}).validate(100)


@pytest.mark.parametrize(
    ("warmup", "length", "steps"),
    [
        (20, 100, 20),  # it fits
        (99, 100, 99),
        (100, 100, 10),  # a tenth of the run
        (2000, 40, 4),
        (50, 39, 3),
        (50, 9, 1),  # at least one step, and one step after it
        (50, 2, 1),
        (1, 1, 0),
        (0.1, 100, 10),  # a fraction
        (0.29, 100, 29),
        (0.1, 30, 3),
        (0.05, 50, 2),
        (0.001, 100, 1),
        (0.999, 10, 9),
        (20, math.inf, 20),
    ],
)
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt", "exponential"])
def test_a_fraction_or_a_warmup_that_is_too_long_equals_a_number_of_steps(
    kind, warmup, length, steps
):
    schedule, equal = LRSchedule(kind, warmup=warmup), LRSchedule(kind, warmup=steps)
    assert schedule.warmup_steps(length) == steps
    if kind == "constant" or not math.isinf(length):
        schedule.validate(length)
    counts = range(min(length, 300) + 1)
    assert [schedule.factor(k, length) for k in counts] == [equal.factor(k, length) for k in counts]
    assert (schedule.shortened_warmup_message(length) is not None) == (1 <= length <= warmup)


def test_the_message_of_a_shortened_warmup_has_both_numbers():
    assert LRSchedule("linear", warmup=50).shortened_warmup_message(40) == (
        "LRSchedule('linear'): warmup=50 does not fit into the run of 40 optimizer steps, so the "
        "warmup has 4"
    )


def test_a_wsd_schedule_with_a_fraction_rises_is_constant_and_falls():
    schedule = LRSchedule("wsd", warmup=0.25, cooldown=0.5)
    schedule.validate(100)
    expected = {0: 1 / 25, 24: 1, 25: 1, 50: 1, 75: 0.5, 100: 0}
    assert {k: schedule.factor(k, 100) for k in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "share"), [("final_fraction", -3.0), ("final_fraction", 2.0), ("decay_factor", 1e30)]
)
def test_fractions_of_a_schedule_are_between_0_and_1(name, share):
    with pytest.raises(ValueError, match=rf"{name}=.* peak learning rate; allowed: 0 to 1; use"):
        LRSchedule("cosine", **{name: share}).validate(100)
