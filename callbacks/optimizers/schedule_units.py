"""Count the samples or tokens of a batch, for learning-rate schedules in these units."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ravine.errors import UsageError


def count_schedule_units(module: L.LightningModule, batch: Any, units: str) -> int:
    """Return the samples or tokens in a batch of this rank.

    Samples are the rows of the first tensor. Tokens are counted by the module's `count_units`.

    Raises:
        UsageError: the module does not count tokens, or the batch has no samples.
    """
    if units == "tokens" and getattr(module, "unit", "samples") != "tokens":
        raise UsageError(
            f"LRSchedule: units='tokens' needs the tokens of a batch, and {type(module).__name__} "
            "does not count tokens",
            ["steps", "samples", "a module with unit = 'tokens' and count_units(batch)"],
            hint="use units='samples'",
            flag="--schedule.units=samples",
        )
    if units == "tokens":
        return module.count_units(batch)  # type: ignore[operator]
    rows = next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 0)
    if not rows:
        raise UsageError(
            f"LRSchedule: units='samples' needs the rows of a batch, and a {type(batch).__name__} "
            "has none",
            ["steps", "batches with tensors"],
            hint="use units='steps'",
            flag="--schedule.units=steps",
        )
    return rows
