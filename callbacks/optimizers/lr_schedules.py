"""Learning-rate schedules as pure functions of the optimizer step (STAT 4830, lecture 8).

The learning rate of optimizer step k (k = 0, 1, ...) is `lr * factor(k, total_steps)`. In the first
`warmup` steps the factor rises linearly, (k + 1) / warmup, so that no step has the rate 0. After
the warmup the shape of `kind` begins. With `warmup_from_zero` the factor rises as k / warmup, as in
CS336 and in Hugging Face's schedules.

The number W of warmup steps follows from `warmup` = w and the run's number T of optimizer steps:

    w is a whole number below T      W = w
    w is a whole number, T or more   W = max(1, floor(T / 10)), at most T - 1: a tenth of the run
    0 < w < 1                        W = max(1, round(w T)), at most T - 1: a fraction of the run
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ravine.errors import UsageError, format_arguments

ScheduleKind = Literal[
    "constant",
    "linear",
    "cosine",
    "wsd",
    "step",
    "inverse_sqrt",
    "exponential",
    "cosine_restarts",
    "power",
]
ScheduleUnit = Literal["steps", "samples", "tokens"]


@dataclass(frozen=True)
class LRSchedule:
    """A learning-rate schedule: warmup, then a decay shape; it applies to all rules of a plan.

    Example: `LRSchedule("cosine", warmup=50, final_fraction=0.1)` rises for 50 optimizer steps and
    then falls to a tenth of the peak at the end of the run.

    Args:
        kind: the shape after the warmup.
        warmup: the number of optimizer steps with a linearly rising rate; below 1 a fraction of
            the run. A run that is not longer takes a tenth of its steps.
        final_fraction: the lowest rate, as a fraction of the peak rate.
        cooldown: wsd only: the fraction of the run, at its end, with a linearly falling rate.
        period: step and cosine_restarts only: optimizer steps between two drops, or in one cosine.
        decay_factor: step and exponential only: the factor of one drop, or of one optimizer step.
        warmup_from_zero: rise as k / warmup; the first step then has the rate 0.
        power: power only: the exponent p of 1 / (1 + k / timescale)^p.
        timescale: power only: the optimizer steps after which the rate has fallen by 2^p.
        units: unit of `warmup`, `period` and `timescale`: steps, samples or tokens. Samples and
            tokens are those of all ranks and of all batches of an optimizer step. They are counted
            in the first batch, and rounded to whole steps.
    """

    kind: ScheduleKind = "constant"
    warmup: int | float = 0
    final_fraction: float = 0.0
    cooldown: float = 0.2
    period: int = 100
    decay_factor: float = 0.5
    warmup_from_zero: bool = False
    power: float = 1.0
    timescale: float = 1.0
    units: ScheduleUnit = "steps"

    def __str__(self) -> str:
        """Return the schedule with the arguments that differ from their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        changed = {name: value for name, (value, default) in values.items() if value != default}
        return f"LRSchedule({format_arguments(changed)})"

    @property
    def needs_total_steps(self) -> bool:
        """Whether the learning rates depend on the length of the run."""
        return self.kind in ("linear", "cosine", "wsd") or 0 < self.warmup < 1

    def in_steps(self, units_per_step: int) -> "LRSchedule":
        """Return the schedule in optimizer steps.

        A warmup keeps one step at least, and a fraction of the run remains that fraction.

        Args:
            units_per_step: samples or tokens of all ranks in an optimizer step.
        """
        if self.units == "steps":
            return self
        is_fraction = self.warmup < 1
        return replace(
            self,
            units="steps",
            warmup=self.warmup if is_fraction else max(1, round(self.warmup / units_per_step)),
            period=max(1, round(self.period / units_per_step)),
            timescale=self.timescale / units_per_step,
        )

    def warmup_steps(self, total_steps: float) -> int:
        """Return the number of warmup steps in a run of `total_steps` optimizer steps, maybe inf.

        A fraction of a run whose length is not known yet has 0 steps.
        """
        is_fraction = 0 < self.warmup < 1
        if math.isinf(total_steps):
            return 0 if is_fraction else int(self.warmup)
        if is_fraction:
            steps = max(1, round(self.warmup * total_steps))
        elif self.warmup < total_steps:
            return int(self.warmup)
        else:
            steps = max(1, int(total_steps // 10))
        return max(0, min(steps, int(total_steps) - 1))

    def factor(self, step: int, total_steps: float) -> float:
        """Return the fraction of the peak learning rate at step `step` of `total_steps`."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return (step + (not self.warmup_from_zero)) / warmup
        span = max(total_steps - warmup, 1)
        schedule = self if warmup == self.warmup else replace(self, warmup=warmup)
        return max(
            self.final_fraction,
            SCHEDULE_SHAPES[self.kind](min(step - warmup, span), span, schedule),
        )

    def shortened_warmup_message(self, total_steps: float) -> str | None:
        """Return a message if the warmup does not fit into the run and is shortened, else None."""
        if self.warmup < max(1, total_steps):
            return None
        return (
            f"LRSchedule({self.kind!r}): warmup={self.warmup} does not fit into the run of "
            f"{total_steps:g} optimizer steps, so the warmup has {self.warmup_steps(total_steps)}"
        )

    def validate(self, total_steps: float) -> None:
        """Raise UsageError if the schedule does not fit a run of `total_steps` optimizer steps.

        `total_steps` is inf if only time or a signal ends the run.
        """
        name = f"LRSchedule({self.kind!r})"
        if self.units not in get_args(ScheduleUnit):
            raise UsageError(
                f"{name}: there is no unit {self.units!r}",
                list(get_args(ScheduleUnit)),
                hint="use units='steps'",
                flag="--schedule.units=steps",
            )
        if self.needs_total_steps and math.isinf(total_steps):
            argument = "kind=constant" if self.kind in ("linear", "cosine", "wsd") else "warmup=100"
            raise UsageError(
                f"{name} depends on the length of the run, and this run has no end",
                hint="pass max_steps=1000 to Trainer, or use LRSchedule('constant')",
                flag=f"--trainer.max_steps=1000, or --schedule.{argument}",
            )
        # not less than 0, no infinity and no NaN; above 1 there are only whole steps
        if not 0 <= self.warmup < math.inf or (self.warmup > 1 and self.warmup % 1):
            raise UsageError(
                f"{name}: warmup={self.warmup} is neither a number of steps nor a fraction",
                ["0 or more optimizer steps", "a fraction of the run between 0 and 1"],
                hint="use warmup=0.1",
                flag="--schedule.warmup=0.1",
            )
        warmup = self.warmup_steps(total_steps)
        if self.warmup_from_zero and not self.warmup:
            raise UsageError(
                f"{name}: warmup_from_zero=True needs a warmup, and warmup is 0",
                ["warmup of 1 step or more"],
                hint="use warmup=100",
                flag="--schedule.warmup=100",
            )
        fractions = {"final_fraction": self.final_fraction, "decay_factor": self.decay_factor}
        for argument, fraction in fractions.items():
            if not 0 <= fraction <= 1:
                raise UsageError(
                    f"{name}: {argument}={fraction} is not a fraction of the peak learning rate",
                    ["0 to 1"],
                    hint=f"use {argument}=0.1",
                    flag=f"--schedule.{argument}=0.1",
                )
        for argument in ("power", "timescale"):
            if not 0 < getattr(self, argument) < math.inf:
                raise UsageError(
                    f"{name}: {argument}={getattr(self, argument)} is not positive",
                    ["above 0"],
                    hint=f"use {argument}=1.0",
                    flag=f"--schedule.{argument}=1.0",
                )
        # wsd: the rate rises in the warmup, is constant, and falls in the cooldown
        num_changing_steps = warmup + self.cooldown * total_steps  # rising or falling rate
        fits_wsd = 0 < self.cooldown <= 1 and num_changing_steps <= total_steps
        if self.kind == "wsd" and not fits_wsd:
            longest = f"{1 - warmup / total_steps:.2f}"
            raise UsageError(
                f"{name}: warmup={warmup} and cooldown={self.cooldown} do not fit into "
                f"{total_steps:g} optimizer steps",
                [f"cooldown of {longest} or less"],
                hint=f"use cooldown={longest}",
                flag=f"--schedule.cooldown={longest}",
            )
        num_decay_steps = total_steps - warmup
        if self.kind in ("step", "cosine_restarts") and not 0 < self.period <= num_decay_steps:
            quarter = f"{max(1, num_decay_steps // 4):g}"
            raise UsageError(
                f"{name}: period={self.period} does not occur in the {num_decay_steps:g} "
                "optimizer steps after the warmup",
                [f"1 to {num_decay_steps:g}"],
                hint=f"use period={quarter}",
                flag=f"--schedule.period={quarter}",
            )


class ScheduleLR(LambdaLR):
    """torch's LambdaLR, extended to param groups that are added to the optimizer during the run.

    An added group starts at the learning rate that it was given, and the schedule scales that rate.
    A rate that a callback sets later, such as Lightning's BackboneFinetuning, is scaled likewise.
    """

    def __init__(
        self, optimizer: Optimizer, factor_of_group: Callable[[int], Callable[[int], float]]
    ) -> None:
        """Find the factor of each group.

        Args:
            optimizer: the optimizer.
            factor_of_group: maps the index of a param group to a function of the optimizer step.
        """
        self.num_initial_groups = len(optimizer.param_groups)  # number of groups at the start
        self._factor_of_group = factor_of_group
        super().__init__(optimizer, [factor_of_group(i) for i in range(self.num_initial_groups)])

    def current_factor(self, index: int) -> float:
        """Return the schedule factor of a param group at the next optimizer step."""
        return self.lr_lambdas[index](self.last_epoch)

    def current_factors(self) -> list[float]:
        """Return the schedule factor of every param group at the next optimizer step."""
        return [factor(self.last_epoch) for factor in self.lr_lambdas]

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state without the function, which a checkpoint cannot hold."""
        return {k: v for k, v in super().state_dict().items() if k != "_factor_of_group"}

    def set_current_lrs(self) -> None:
        """Set the rates of the current step again, after the function of the factor has changed."""
        for index, (group, base_lr) in enumerate(
            zip(self.optimizer.param_groups, self.base_lrs, strict=True)
        ):
            lr = base_lr * self.current_factor(index)
            if isinstance(group["lr"], Tensor):  # the optimizer reads this tensor
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            self._last_lr[index] = group["lr"]

    def get_lr(self) -> list[Any]:
        """Return the base rate times the factor for each group; torch calls it at each step.

        Groups added during the run get an entry in `base_lrs` and `lr_lambdas` first. If a callback
        has set the rate of such a group, the base rate follows from it.
        """
        groups = self.optimizer.param_groups
        # `lr_lambdas` of torch's LambdaLR: functions of the step that return the factor
        self.lr_lambdas += [
            self._factor_of_group(i) for i in range(len(self.lr_lambdas), len(groups))
        ]
        for index in range(self.num_initial_groups, len(groups)):
            group = groups[index]
            old_factor = self.lr_lambdas[index](max(self.last_epoch - 1, 0))  # of the previous step
            is_new = index >= len(self.base_lrs)
            # `_last_lr`: the rates that this scheduler has set
            is_changed = is_new or group["lr"] != self._last_lr[index]
            if is_changed and old_factor:
                base_lr = group["lr"] / old_factor
            else:  # the factor is 0 at the first step of a warmup from 0
                base_lr = group.get("initial_lr", group["lr"])
            if is_new:
                self.base_lrs.append(group.get("initial_lr", base_lr))
            elif is_changed:
                self.base_lrs[index] = base_lr
            group["initial_lr"] = self.base_lrs[index]
        return super().get_lr()


# t: optimizer steps since the end of the warmup; span: the total of these steps, at least t.


def _constant(t: float, span: float, s: LRSchedule) -> float:
    """Keep the peak rate."""
    return 1.0


def _linear(t: float, span: float, s: LRSchedule) -> float:
    """Fall linearly from 1 to `final_fraction`."""
    return 1 - (1 - s.final_fraction) * t / span


def _cosine(t: float, span: float, s: LRSchedule) -> float:
    """Fall along half a cosine from 1 to `final_fraction` (Loshchilov and Hutter, 2017)."""
    return s.final_fraction + (1 - s.final_fraction) * (1 + math.cos(math.pi * t / span)) / 2


def _wsd(t: float, span: float, s: LRSchedule) -> float:
    """Stay at 1, then fall linearly in the last `cooldown` of the run (warmup-stable-decay)."""
    falling = s.cooldown * (span + s.warmup)  # `cooldown` is a fraction of the run with its warmup
    return 1 - (1 - s.final_fraction) * max(0.0, t - (span - falling)) / falling


def _step(t: float, span: float, s: LRSchedule) -> float:
    """Multiply the rate by `decay_factor` every `period` steps (step decay)."""
    return s.decay_factor ** (t // s.period)


def _inverse_sqrt(t: float, span: float, s: LRSchedule) -> float:
    """Fall as 1 / sqrt(k) from the end of the warmup (Vaswani et al., 2017)."""
    start = max(s.warmup, 1)  # avoids 0 / 0 without a warmup
    return math.sqrt(start / (start + t))


def _exponential(t: float, span: float, s: LRSchedule) -> float:
    """Multiply the rate by `decay_factor` in each step (exponential decay)."""
    return s.decay_factor**t


def _cosine_restarts(t: float, span: float, s: LRSchedule) -> float:
    """Repeat a cosine of `period` steps (SGDR, cosine annealing with warm restarts)."""
    return _cosine(t % s.period, s.period, s)


def _power(t: float, span: float, s: LRSchedule) -> float:
    """Fall as 1 / (1 + k / `timescale`)^`power` (Robbins and Monro, 1951; lecture 2)."""
    return (1 + t / s.timescale) ** -s.power


SCHEDULE_SHAPES: dict[str, Callable[[float, float, LRSchedule], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
    "step": _step,
    "inverse_sqrt": _inverse_sqrt,
    "exponential": _exponential,
    "cosine_restarts": _cosine_restarts,
    "power": _power,
}
