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


class _HookOverride(NamedTuple):
    owner: L.Callback
    previous: Callable[..., Any] | None  # what stood on the instance itself, if anything did


def _get_overrides(module: L.LightningModule) -> dict[str, _HookOverride]:
    return module.__dict__.setdefault("_patches", {})


def is_attached(trainer: L.Trainer, owner: L.Callback) -> bool:
    """Whether the trainer knows the callback.

    Lightning skips `teardown` when a fit raises, so a module may still carry an earlier owner.
    """
    return any(owner is callback for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def hook_owner(trainer: L.Trainer, module: L.LightningModule, name: str) -> L.Callback | None:
    """The callback that holds the method now; one the trainer does not know holds nothing."""
    override = _get_overrides(module).get(name)
    return override.owner if override is not None and is_attached(trainer, override.owner) else None


def override_hook(
    trainer: L.Trainer,
    module: L.LightningModule,
    name: str,
    function: Callable[..., Any],
    owner: L.Callback,
) -> Callable[..., Any]:
    """Put `function(module, ...)` in the place of the method and return the method it replaces.

    Called from `Callback.setup`; `restore_hook` belongs in `teardown`.
    """
    current_owner = hook_owner(trainer, module, name)
    if current_owner is not None and current_owner is not owner:
        raise UsageError(
            f"{type(current_owner).__name__} and {type(owner).__name__} both decide {name}: keep "
            "one of"
            " the two in trainer.callbacks"
        )
    if name in _get_overrides(module):
        _reset_hook(module, name)
    original = getattr(module, name)
    _get_overrides(module)[name] = _HookOverride(owner, module.__dict__.get(name))
    module.__dict__[name] = MethodType(function, module)
    return original


def restore_hook(module: L.LightningModule, name: str, owner: L.Callback) -> None:
    """Undo `override_hook` if `owner` still holds the method."""
    if name in _get_overrides(module) and _get_overrides(module)[name].owner is owner:
        _reset_hook(module, name)


def _reset_hook(module: L.LightningModule, name: str) -> None:
    previous = _get_overrides(module).pop(name).previous
    if previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = previous
