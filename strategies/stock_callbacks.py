"""Reject Lightning callbacks that do not work with this package.

docs/lightning_callbacks.md has the table of all Lightning callbacks, as measured.
"""

from typing import Any

from lightning.pytorch.callbacks import ModelPruning

from ravine.errors import UsageError
from ravine.lightning_compat import averaging_callbacks

COPIES_REASON = "copies the network in setup, before it is built, changed or placed"
USE_EMA_HINT = "use ravine.callbacks.EMA; type --trainer.callbacks+=EMA"
# by class: the reason, and the alternative
UNSUPPORTED_CALLBACKS: dict[type, tuple[str, str]] = {
    **{kind: (COPIES_REASON, USE_EMA_HINT) for kind in averaging_callbacks()},
    ModelPruning: (
        "replaces weights in setup, before the network is built, and gives them other names",
        "use torch.nn.utils.prune in the module's configure_model",
    ),
}


def check_stock_callbacks(trainer: Any) -> None:
    """Raise UsageError for a Lightning callback that would have no effect or a wrong one."""
    for callback in trainer.callbacks:
        for callback_class, (reason, instead) in UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, callback_class):
                name = type(callback).__name__
                raise UsageError(
                    f"{name} {reason}; allowed: another way; take {name} out of "
                    f"trainer.callbacks and {instead}"
                )
