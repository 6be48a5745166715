"""Lightning's own callbacks beside this package: those that cannot work are refused by name.

The measured table of all of them is docs/lightning_callbacks.md.
"""

from typing import Any

from lightning.pytorch.callbacks import (
    StochasticWeightAveraging,
    WeightAveraging,
)

COPIES = "copies the network in setup, before it is built, changed or placed"
# the first class that a callback is an instance of decides
REFUSED: dict[type, tuple[str, str]] = {
    WeightAveraging: (COPIES, "ravine.callbacks.EMA"),
    StochasticWeightAveraging: (COPIES, "ravine.callbacks.EMA"),
}


def refuse_stock_callbacks(trainer: Any) -> None:
    """ValueError for a callback of Lightning's that would do nothing or something wrong here."""
    for callback in trainer.callbacks:
        for kind, (reason, instead) in REFUSED.items():
            if isinstance(callback, kind):
                name = type(callback).__name__
                raise ValueError(
                    f"{name} {reason}; allowed in its place: {instead}; take {name} out of "
                    f"trainer.callbacks and type --trainer.callbacks+={instead.rpartition('.')[2]}"
                )
