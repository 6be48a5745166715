"""LR finder: use the rate that Lightning's LearningRateFinder suggests as a plan's base rate.

    rate of a group = suggested rate * lr_scale of its rule * factor of the schedule

The search sets one rate for all param groups. A plan whose optimizers have different rates is
therefore refused, because one rate cannot replace several.
"""

from typing import Any

from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError
from ravine.lightning_compat import sets_learning_rate

from ..base import find_callbacks
from .composite import CompositeOptimizer


def find_lr_finders(trainer: Any) -> list[LearningRateFinder]:
    """Return the trainer's finders that set the learning rate instead of only suggesting it."""
    finders = find_callbacks(trainer, LearningRateFinder)
    return [finder for finder in finders if sets_learning_rate(finder)]


def get_suggested_lr(trainer: Any) -> float | None:
    """Return the rate that a finder of this trainer suggests, or None before a search."""
    for finder in find_lr_finders(trainer):
        if finder.optimal_lr is not None:
            return finder.optimal_lr.suggestion()
    return None


def check_single_lr(
    trainer: Any, composite: CompositeOptimizer, lr_scales: dict[str, float]
) -> None:
    """Raise UsageError if there is a LearningRateFinder and the rules have several base rates.

    Args:
        trainer: its callbacks may include a finder.
        composite: the plan's optimizers.
        lr_scales: factor on the base rate by label of a rule.
    """
    if not find_lr_finders(trainer):
        return
    base_lrs = {
        float(group["lr"]) / lr_scales.get(label, 1.0)
        for label, (_, groups) in composite.groups_by_label().items()
        for group in groups
    }
    # rounded, because the division by the scale is not exact
    if len({round(lr, 12) for lr in base_lrs}) > 1:
        text = ", ".join(f"{lr:g}" for lr in sorted(base_lrs))
        raise UsageError(
            f"LearningRateFinder: the optimizers of the plan have the learning rates {text}, and "
            "the search finds one",
            ["one learning rate, with lr_scale in the rules"],
            hint="use one lr for all optimizers, or remove LearningRateFinder() from "
            "Trainer(callbacks=...)",
        )


def set_base_lr(
    lr: float, composite: CompositeOptimizer, scheduler: Any, lr_scales: dict[str, float]
) -> None:
    """Set the base rate of every param group; the schedule scales it from now on.

    Args:
        lr: the rate that a search has found.
        composite: the plan's optimizers.
        scheduler: the plan's ScheduleLR; None without a schedule.
        lr_scales: factor on the base rate by label of a rule.
    """
    # 1.0 for a rule whose first parameters were added during training: it stands on its own rate
    base_lrs = {
        id(group): lr * lr_scales.get(label, 1.0)
        for label, (_, groups) in composite.groups_by_label().items()
        for group in groups
    }
    # the scheduler numbers the groups in the order of `param_groups`
    for index, group in enumerate(composite.param_groups):
        base_lr = base_lrs[id(group)]
        factor = scheduler.current_factor(index) if scheduler is not None else 1.0
        group["lr"] = base_lr * factor
        if scheduler is not None:  # torch's scheduler keeps copies of both rates
            group["initial_lr"] = base_lr
            scheduler.base_lrs[index] = base_lr
            scheduler._last_lr[index] = base_lr * factor
    rank_zero_only(print)(f"learning rate {lr:.4g}, found by a search, is the plan's base rate")
