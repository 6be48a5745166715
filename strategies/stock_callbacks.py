"""Lightning's callbacks that do not work with this package are refused by name.

The measured table of all of them is docs/lightning_callbacks.md.
"""

from typing import Any

from lightning.pytorch.callbacks import ModelPruning

from ravine.errors import UsageError
from ravine.lightning_compat import averaging_callbacks

COPIES_REASON = "copies the network in setup, before it is built, changed or placed"
USE_EMA_HINT = "use ravine.callbacks.EMA; type --trainer.callbacks+=EMA"
# why, and what to do
UNSUPPORTED_CALLBACKS: dict[type, tuple[str, str]] = {
    **{kind: (COPIES_REASON, USE_EMA_HINT) for kind in averaging_callbacks()},
    ModelPruning: (
        "replaces weights in setup, before the network is built, and gives them other names",
        "use torch.nn.utils.prune in the module's configure_model",
    ),
}


def check_stock_callbacks(trainer: Any) -> None:
    """ValueError for a callback of Lightning that would have no effect or a wrong one here."""
    for callback in trainer.callbacks:
        for callback_class, (reason, instead) in UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, callback_class):
                name = type(callback).__name__
                raise UsageError(
                    f"{name} {reason}; allowed: another way; take {name} out of "
                    f"trainer.callbacks and {instead}"
                )
