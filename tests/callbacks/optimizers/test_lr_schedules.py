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
            "--trainer.max_steps=1000, or in the config schedule: {kind: constant}",
        ),
        (
            LRSchedule("constant", warmup=100),
            100,
            "has 100 optimizer steps; allowed: 0 to 99; use warmup=10",
            "--trainer.max_steps=200, or in the config schedule: {warmup: 10}",
        ),
        (LRSchedule(warmup=-1), 100, "allowed: 0 to 99; use warmup=10", "{warmup: 10}"),
        (LRSchedule(warmup=-1), math.inf, "use warmup=0", "{warmup: 0}"),
        (
            LRSchedule(warmup_from_zero=True),
            100,
            "warmup is 0; allowed: warmup of 1 step or more; use warmup=100",
            "{warmup: 100, warmup_from_zero: true}",
        ),
        (
            LRSchedule("wsd", warmup=50, cooldown=0.6),
            100,
            "allowed: cooldown of 0.50 or less; use cooldown=0.50",
            "{cooldown: 0.50}",
        ),
        (
            LRSchedule("step", period=200),
            100,
            "period=200 does not occur in the 100 optimizer steps after the warmup; "
            "allowed: 1 to 100; use period=25",
            "{period: 25}",
        ),
        (LRSchedule("cosine_restarts", period=0), 100, "period=0 does not occur", "{period: 25}"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(schedule, length, message, flag):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        schedule.validate(length)
    assert error.value.flag.endswith(flag)


@pytest.mark.parametrize(
    ("name", "share"), [("final_fraction", -3.0), ("final_fraction", 2.0), ("decay_factor", 1e30)]
)
def test_fractions_of_a_schedule_are_between_0_and_1(name, share):
    with pytest.raises(ValueError, match=rf"{name}=.* peak learning rate; allowed: 0 to 1; use"):
        LRSchedule("cosine", **{name: share}).validate(100)
