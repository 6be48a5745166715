"""Save a checkpoint on all ranks: all succeed or all raise, and non-finite weights are not saved.

A save runs after all hooks of the same name, including the module's: see `defer_saving_hooks`.
"""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from ravine.lightning_compat import attached_trainer

from .atomic_io import CheckpointError

SAVING_HOOKS = ("on_train_batch_end", "on_validation_end")
MAX_WEIGHT = 2.0**64  # its square, and so a norm of such weights, is infinite in fp32


def save_on_all_ranks(trainer: L.Trainer, path: str | Path) -> None:
    """Save a checkpoint; called on all ranks, which all succeed or all raise.

    If the writer fails in `trainer.save_checkpoint`, the other ranks wait at a barrier until a
    timeout. Here all ranks raise the writer's error.
    """
    error: Exception | None = None
    try:
        # weights_only=False: with the optimizer states
        trainer.save_checkpoint(path, weights_only=False)
    except Exception as problem:
        error = problem
        # trainer.save_checkpoint ends with a barrier, at which ranks without an error wait
        trainer.strategy.barrier("failed save")
    # true if no rank had an error; else rank 0 broadcasts the text of its error
    if not trainer.strategy.reduce_boolean_decision(error is None):
        text = trainer.strategy.broadcast(
            str(error or "another rank could not save the checkpoint")
        )
        raise error or CheckpointError(text, exit_status=1)


def defer_saving_hooks(trainer: L.Trainer, module: L.LightningModule, callback: L.Callback) -> None:
    """Run the saving hooks of a callback after the module's hooks of the same names.

    Lightning calls the hooks of all callbacks before the module's hook. A module that changes
    weights in `on_train_batch_end` (a teacher, a clamp) would be saved without that change. Called
    from `setup`; it has no effect on another trainer, and a second call changes nothing.
    """
    for name in SAVING_HOOKS:
        _defer_hook(trainer, module, callback, name)


def restore_saving_hooks(module: L.LightningModule, callback: L.Callback) -> None:
    """Undo `defer_saving_hooks`; called from `teardown`."""
    for name in SAVING_HOOKS:
        if hasattr(callback.__dict__.get(name), "deferred"):
            del callback.__dict__[name]
        if isinstance(hook := module.__dict__.get(name), _DeferredSavingHook):
            hook.pending_hooks.pop(callback, None)
            if not hook.pending_hooks:
                hook.restore(name)


def _defer_hook(
    trainer: L.Trainer, module: L.LightningModule, callback: L.Callback, name: str
) -> None:
    """Run the hook `name` of a callback after the module's hook of this name.

    The callback's attribute is replaced by a function that does nothing in this trainer.

    Args:
        trainer: the trainer of this fit; the callback may be used in another one, too.
        module: the module, whose hook calls the pending hooks after its own code.
        callback: the callback.
        name: name of the hook.
    """
    # _pending_hooks: the dict that the module's hook runs; installed at the first call
    pending = _pending_hooks(trainer, module, name)
    is_overridden = getattr(type(callback), name) is not getattr(L.Callback, name)
    if callback in pending or not is_overridden:
        return
    hook = getattr(callback, name)
    # a fit that failed has no teardown, and leaves its skip_in_this_trainer
    hook = getattr(hook, "deferred", hook)

    def skip_in_this_trainer(other: L.Trainer, *args: Any) -> None:
        if other is not trainer:
            hook(other, *args)

    skip_in_this_trainer.deferred = hook  # type: ignore[attr-defined]
    callback.__dict__[name] = skip_in_this_trainer
    pending[callback] = hook


def _pending_hooks(
    trainer: L.Trainer, module: L.LightningModule, name: str
) -> dict[L.Callback, Callable[..., Any]]:
    """Return the hooks that run after the module's hook of this name, in this trainer."""
    current = module.__dict__.get(name)
    if isinstance(current, _DeferredSavingHook) and current.trainer is trainer:
        return current.pending_hooks
    if isinstance(current, _DeferredSavingHook):  # a failed fit has no teardown
        current.restore(name)
    module.__dict__[name] = hook = _DeferredSavingHook(trainer, module, name)
    return hook.pending_hooks


class _DeferredSavingHook:
    """A module's hook, followed by the saving hooks of callbacks, in the callbacks' order."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, name: str) -> None:
        self.trainer, self.module = trainer, module
        self.previous = module.__dict__.get(name)  # an instance attribute, if any
        self.original: Callable[..., Any] = getattr(module, name)
        self.pending_hooks: dict[L.Callback, Callable[..., Any]] = {}

    def restore(self, name: str) -> None:
        """Restore the module's hook."""
        if self.previous is None:
            del self.module.__dict__[name]
        else:
            self.module.__dict__[name] = self.previous

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the module's own hook only, so that a copied module does not save."""
        return deepcopy(self.original, memo)

    def __call__(self, *args: Any) -> Any:
        result = self.original(*args)
        trainer: Any = self.trainer
        if attached_trainer(self.module) is trainer:  # else the hook is left over from a failed fit
            for callback in trainer.callbacks:
                if callback in self.pending_hooks:
                    self.pending_hooks[callback](trainer, self.module, *args)
        return result

    @property
    def __code__(self) -> Any:
        """Return the code object, which Lightning compares to see whether a hook is overridden."""
        return type(self).__call__.__code__


def weights_are_finite(trainer: L.Trainer) -> bool:
    """Whether the weights are finite on all ranks; if not, warn with the first name."""
    name = first_non_finite(trainer.lightning_module.named_parameters(), limit=MAX_WEIGHT)
    if trainer.strategy.reduce_boolean_decision(name is None):
        return True
    rank_zero_warn(
        f"no checkpoint is written at step {trainer.global_step}, because "
        f"{name or 'a tensor of another rank'} is not finite, or its square is not. The last "
        "valid checkpoint is kept. Add NaNGuard() to Trainer(callbacks=...) to stop such a run."
    )
    return False


def first_non_finite(tensors: Iterable[tuple[str, Tensor]], limit: float = math.inf) -> str | None:
    """Return the name of the first tensor with a NaN or an absolute value >= `limit`, or None.

    Of a sharded tensor, this rank's shard is checked. If all are finite, there is one device sync.
    """
    names: list[str] = []
    finite_flags: list[Tensor] = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            continue  # torch has no norm for floating point numbers of 8 bits
        local_tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local_tensor.numel():
            # the norm of infinite order is the maximum absolute value; it is NaN if a value is NaN
            max_abs = torch.linalg.vector_norm(local_tensor.detach(), math.inf)
            names.append(name)
            finite_flags.append(max_abs < limit)  # false for NaN, too
    if not finite_flags:
        return None
    device = finite_flags[0].device
    if bool(torch.stack([flag.to(device) for flag in finite_flags]).all()):  # the device sync
        return None
    return next(name for name, flag in zip(names, finite_flags, strict=True) if not flag)
