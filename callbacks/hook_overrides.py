"""Hook override: a callback replaces one method of a LightningModule instance and restores it.

A callback overrides `configure_optimizers`, `configure_gradient_clipping` or `configure_model` by a
function on the instance, without a subclass. Lightning looks up its hooks on the instance, so it
calls the function at the usual time. A method has at most one owner.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import lightning as L

from ravine.errors import UsageError


class _HookOverride(NamedTuple):
    owner: L.Callback
    previous: Callable[..., Any] | None  # the attribute of the instance before, if any


def _get_overrides(module: L.LightningModule) -> dict[str, _HookOverride]:
    return module.__dict__.setdefault("_patches", {})


def is_attached(trainer: L.Trainer, owner: L.Callback) -> bool:
    """Whether the callback is in `trainer.callbacks`.

    Lightning skips `teardown` when a fit raises, so a module may keep the override of an earlier
    trainer's callback.
    """
    return any(owner is callback for callback in trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]


def hook_owner(trainer: L.Trainer, module: L.LightningModule, name: str) -> L.Callback | None:
    """Return the trainer's callback that overrides the method now, or None."""
    override = _get_overrides(module).get(name)
    return override.owner if override is not None and is_attached(trainer, override.owner) else None


def override_hook(
    trainer: L.Trainer,
    module: L.LightningModule,
    name: str,
    function: Callable[..., Any],
    owner: L.Callback,
) -> Callable[..., Any]:
    """Replace a module's method by `function(module, ...)` and return the original method.

    Call it in `Callback.setup`, and `restore_hook` in `teardown`.

    Args:
        trainer: its callbacks are the possible owners.
        module: the instance that gets the method; its class does not change.
        name: name of the method.
        function: the replacement.
        owner: the callback that makes the override.

    Raises:
        UsageError: another callback of the trainer overrides the method.
    """
    current_owner = hook_owner(trainer, module, name)
    if current_owner is not None and current_owner is not owner:
        raise UsageError(
            f"{type(current_owner).__name__} and {type(owner).__name__} both override {name}",
            ["one callback that overrides it"],
            hint=f"remove {type(owner).__name__}() from Trainer(callbacks=...)",
        )
    # `_get_overrides`: overrides of this module by name of the method
    if name in _get_overrides(module):  # of the same owner, or of an earlier trainer's callback
        _reset_hook(module, name)
    original = getattr(module, name)
    previous = module.__dict__.get(name)  # None if the method comes from the class
    _get_overrides(module)[name] = _HookOverride(owner, previous)
    module.__dict__[name] = MethodType(function, module)  # Lightning reads the instance first
    return original


def restore_hook(module: L.LightningModule, name: str, owner: L.Callback) -> None:
    """Undo `override_hook` if `owner` still overrides the method."""
    if name in _get_overrides(module) and _get_overrides(module)[name].owner is owner:
        _reset_hook(module, name)


def _reset_hook(module: L.LightningModule, name: str) -> None:
    previous = _get_overrides(module).pop(name).previous
    if previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = previous
