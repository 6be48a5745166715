"""Take over one method of one module instance, by one owner at a time, and give it back.

A callback that wants to decide `configure_optimizers`, `configure_gradient_clipping` or
`configure_model` puts its own function on the instance: nothing is subclassed, and Lightning, which
looks its hooks up on the instance, calls it at the usual moment.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import lightning as L

from ravine.errors import UsageError


class _Patch(NamedTuple):
    owner: L.Callback
    before: Callable[..., Any] | None  # what stood on the instance itself, if anything did


def _patches(module: L.LightningModule) -> dict[str, _Patch]:
    return module.__dict__.setdefault("_patches", {})


def living(trainer: L.Trainer, owner: L.Callback) -> bool:
    """Whether the trainer knows the callback.

    Lightning skips `teardown` when a fit raises, so a module may still carry an earlier owner.
    """
    return any(owner is one for one in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def owner_of(trainer: L.Trainer, module: L.LightningModule, name: str) -> L.Callback | None:
    """The callback that holds the method now; one the trainer does not know holds nothing."""
    patch = _patches(module).get(name)
    return patch.owner if patch is not None and living(trainer, patch.owner) else None


def patch(
    trainer: L.Trainer,
    module: L.LightningModule,
    name: str,
    function: Callable[..., Any],
    owner: L.Callback,
) -> Callable[..., Any]:
    """Put `function(module, ...)` in the place of the method and return the method it replaces.

    Called from `Callback.setup`; `unpatch` belongs in `teardown`.
    """
    holder = owner_of(trainer, module, name)
    if holder is not None and holder is not owner:
        raise UsageError(
            f"{type(holder).__name__} and {type(owner).__name__} both decide {name}: keep one of"
            " the two in trainer.callbacks"
        )
    if name in _patches(module):
        _restore(module, name)
    original = getattr(module, name)
    _patches(module)[name] = _Patch(owner, module.__dict__.get(name))
    module.__dict__[name] = MethodType(function, module)
    return original


def unpatch(module: L.LightningModule, name: str, owner: L.Callback) -> None:
    """Undo `patch` if `owner` still holds the method."""
    if name in _patches(module) and _patches(module)[name].owner is owner:
        _restore(module, name)


def _restore(module: L.LightningModule, name: str) -> None:
    before = _patches(module).pop(name).before
    if before is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = before
