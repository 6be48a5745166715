"""Reject Lightning callbacks that do not work with this package.

docs/lightning_callbacks.md has the table of all Lightning callbacks, as measured.
"""

from typing import Any

from lightning.pytorch.callbacks import ModelPruning

from ravine.errors import UsageError
from ravine.lightning_compat import averaging_callbacks

COPIES_REASON = "copies the network in setup, before configure_model builds it"
USE_EMA_HINT = "add ravine.callbacks.EMA()"
# by class: the reason, and the alternative
UNSUPPORTED_CALLBACKS: dict[type, tuple[str, str]] = {
    **{kind: (COPIES_REASON, USE_EMA_HINT) for kind in averaging_callbacks()},
    ModelPruning: (
        "replaces and renames weights in setup, before configure_model builds the network",
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
                    f"{name} {reason}",
                    hint=f"remove {name} from Trainer(callbacks=...), and {instead}",
                )
