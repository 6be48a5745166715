"""One save on all ranks: it succeeds on every one or ends every one, and never writes a NaN.

A save comes after all hooks of its moment, the module's own included: see `save_last`.
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
SQUARABLE = 2.0**64  # the square of this is infinite in fp32, and so is a norm of such weights


def save(trainer: L.Trainer, path: str | Path) -> None:
    """Write one checkpoint, called on all ranks.

    After a stock `trainer.save_checkpoint` whose writer fails, the other ranks wait for it at a
    barrier until their time is over. Here all of them end with its error.
    """
    error: Exception | None = None
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except Exception as problem:
        error = problem
        trainer.strategy.barrier("failed save")  # meets the others at the one that ends a save
    if not trainer.strategy.reduce_boolean_decision(error is None):
        text = trainer.strategy.broadcast(str(error or "another rank could not save"))
        raise error or CheckpointError(text, exit_status=1)


def save_last(trainer: L.Trainer, module: L.LightningModule, callback: L.Callback) -> None:
    """Run the hooks in which the callback may save after the module's own hooks of these names.

    Lightning calls the hooks of all callbacks and then the module's. A module that changes weights
    in `on_train_batch_end` (a teacher, a clamp) would be saved without that change. Called from
    `setup`; has no effect on another trainer, and a second call changes nothing.
    """
    for name in SAVING_HOOKS:
        _defer(trainer, module, callback, name)


def save_as_usual(module: L.LightningModule, callback: L.Callback) -> None:
    """Undo `save_last`; called from `teardown`."""
    for name in SAVING_HOOKS:
        if hasattr(callback.__dict__.get(name), "deferred"):
            del callback.__dict__[name]
        if isinstance(hook := module.__dict__.get(name), _HookThenSave):
            hook.pending.pop(callback, None)
            if not hook.pending:
                hook.restore(name)


def _defer(trainer: L.Trainer, module: L.LightningModule, callback: L.Callback, name: str) -> None:
    pending = _pending(trainer, module, name)
    if callback in pending or getattr(type(callback), name) is getattr(L.Callback, name):
        return
    hook = getattr(callback, name)
    hook = getattr(hook, "deferred", hook)  # a fit that failed had no teardown

    def wait(other: L.Trainer, *args: Any) -> None:
        if other is not trainer:
            hook(other, *args)

    wait.deferred = hook  # type: ignore[attr-defined]
    callback.__dict__[name] = wait
    pending[callback] = hook


def _pending(
    trainer: L.Trainer, module: L.LightningModule, name: str
) -> dict[L.Callback, Callable[..., Any]]:
    """What runs after the module's hook of this name, in this trainer."""
    present = module.__dict__.get(name)
    if isinstance(present, _HookThenSave) and present.trainer is trainer:
        return present.pending
    if isinstance(present, _HookThenSave):  # a fit that failed had no teardown
        present.restore(name)
    module.__dict__[name] = hook = _HookThenSave(trainer, module, name)
    return hook.pending


class _HookThenSave:
    """A module's hook, and after it the saving hooks of callbacks, in the callbacks' order."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, name: str) -> None:
        self.trainer, self.module = trainer, module
        self.before = module.__dict__.get(name)  # what stood on the instance itself
        self.original: Callable[..., Any] = getattr(module, name)
        self.pending: dict[L.Callback, Callable[..., Any]] = {}

    def restore(self, name: str) -> None:
        """Put back what the module had."""
        if self.before is None:
            del self.module.__dict__[name]
        else:
            self.module.__dict__[name] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module saves nothing."""
        return deepcopy(self.original, memo)

    def __call__(self, *args: Any) -> Any:
        result = self.original(*args)
        trainer: Any = self.trainer
        if attached_trainer(self.module) is trainer:  # else a failed fit has left this hook behind
            for callback in trainer.callbacks:
                if callback in self.pending:
                    self.pending[callback](trainer, self.module, *args)
        return result

    @property
    def __code__(self) -> Any:
        """Lightning compares it to see whether a hook is overridden."""
        return type(self).__call__.__code__


def worth_saving(trainer: L.Trainer) -> bool:
    """Whether the weights are finite on all ranks; where not, a warning names the first."""
    name = non_finite(trainer.lightning_module.named_parameters(), below=SQUARABLE)
    if trainer.strategy.reduce_boolean_decision(name is None):
        return True
    rank_zero_warn(
        f"no checkpoint at step {trainer.global_step}: {name or 'a tensor of another rank'} is "
        "not finite, or its square is not; the last good file stays; "
        "--trainer.callbacks+=NaNGuard stops such a run"
    )
    return False


def non_finite(tensors: Iterable[tuple[str, Tensor]], below: float = math.inf) -> str | None:
    """Name of the first tensor with a NaN or a number not below; one host read where there is none.

    Of a sharded tensor, this rank's part is looked at.
    """
    parts = [
        (name, t.to_local() if isinstance(t, DTensor) else t)
        for name, t in tensors
        if t.is_floating_point() and t.element_size() > 1  # torch has no isfinite for 8 bits
    ]
    parts = [(name, part) for name, part in parts if part.numel()]
    norms = [torch.linalg.vector_norm(part.detach(), math.inf) for _, part in parts]  # keep a NaN
    flags = [norm < below for norm in norms]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        return None
    return next(name for (name, _), flag in zip(parts, flags, strict=True) if not flag)
