"""Reject Lightning callbacks that do not work with this package.

docs/lightning_callbacks.md has the table of all Lightning callbacks, as measured.
"""

from typing import Any

from lightning.pytorch.callbacks import ModelPruning

from ravine.errors import UsageError
from ravine.lightning_compat import averaging_callbacks

COPIES_REASON = "copies the network in setup, before configure_model builds it"
EMA_NAME = "ravine.callbacks.EMA"
# by class: the reason, what is allowed instead, and what replaces the callback
UNSUPPORTED_CALLBACKS: dict[type, tuple[str, str, str]] = {
    **{kind: (COPIES_REASON, EMA_NAME, "EMA()") for kind in averaging_callbacks()},
    ModelPruning: (
        "replaces and renames weights in setup, before configure_model builds the network",
        "torch.nn.utils.prune in configure_model",
        "",
    ),
}


def check_stock_callbacks(trainer: Any) -> None:
    """Raise UsageError for a Lightning callback that would have no effect or a wrong one."""
    for callback in trainer.callbacks:
        for callback_class, (reason, allowed, new) in UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, callback_class):
                name = type(callback).__name__
                change = f"replace {name} by {new} in" if new else f"remove {name} from"
                raise UsageError(f"{name} {reason}", [allowed], f"{change} Trainer(callbacks=...)")
