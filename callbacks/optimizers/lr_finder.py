"""The learning rate that Lightning's LearningRateFinder finds becomes the base rate of a plan.

    rate of a group = found rate * lr_scale of its rule * factor of the schedule

The search gives every group one rate. So a plan whose optimizers have different rates is refused
beside it: one number cannot replace two.
"""

from typing import Any

from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError
from ravine.lightning_compat import sets_learning_rate

from .composite import Composite


def finders(trainer: Any) -> list[LearningRateFinder]:
    """The finders that set the rate and do not only suggest it."""
    found = [c for c in trainer.callbacks if isinstance(c, LearningRateFinder)]
    return [finder for finder in found if sets_learning_rate(finder)]


def found_rate(trainer: Any) -> float | None:
    """The rate that a finder of this trainer suggests, if a search has run."""
    for finder in finders(trainer):
        if finder.optimal_lr is not None:
            return finder.optimal_lr.suggestion()
    return None


def check_one_rate(trainer: Any, composite: Composite, scales: dict[str, float]) -> None:
    """ValueError if a finder is there and the rules have more than one base rate."""
    if not finders(trainer):
        return
    rates = {
        float(group["lr"]) / scales.get(label, 1.0)
        for label, (_, groups) in composite.by_label().items()
        for group in groups
    }
    if len({round(rate, 12) for rate in rates}) > 1:
        listed = ", ".join(f"{rate:g}" for rate in sorted(rates))
        raise UsageError(
            "LearningRateFinder searches one learning rate, and the plan's optimizers have "
            f"{listed}; allowed: one rate, with lr_scale in the rules; leave LearningRateFinder "
            "out of trainer.callbacks, or give the optimizers one lr"
        )


def use_rate(rate: float, composite: Composite, scheduler: Any, scales: dict[str, float]) -> None:
    """Make the rate the base of every group, and let the schedule multiply it from now on."""
    factor = scheduler.factor_now() if scheduler is not None else 1.0
    of_group = {
        id(group): rate * scales.get(label, 1.0)
        for label, (_, groups) in composite.by_label().items()
        for group in groups
    }
    for number, group in enumerate(composite.param_groups):
        base = of_group[id(group)]
        group["lr"] = base * factor
        if scheduler is not None:
            group["initial_lr"] = scheduler.base_lrs[number] = base
            scheduler._last_lr[number] = base * factor
    rank_zero_only(print)(f"learning rate {rate:.4g}, found by a search, is the plan's base rate")
