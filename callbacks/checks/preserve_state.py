"""Run code on a module, then restore its buffers, attributes, generators and counters.

    with undisturbed(trainer, module):
        module.validation_step(batch, 0)

Parameters are not copied, because they do not change without gradients and an optimizer. Objects of
torch, Lightning and other packages that an attribute holds are not copied either.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset

from ravine.lightning_compat import MODULE_REFERENCES
from ravine.strategies.parallel_module import units

Restore = Callable[[], Any]
DEPTH = 6  # containers within containers that are looked into
WHOLE = (nn.Parameter, nn.Module, L.Trainer, L.Callback, L.LightningDataModule, Dataset)
OTHERS = ("torch.", "lightning.", "numpy.", "jsonargparse.", "builtins.")


@contextmanager
def undisturbed(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Run the body in evaluation mode without gradients, then restore what it changed.

    Inside, `trainer.sanity_checking` is true, loggers write nothing, and every layer evaluates.
    """
    _ = trainer.log_dir  # the first access creates the folder and the loggers
    stage, loggers = trainer.state.stage, list(trainer.loggers)
    restore = snapshot(module)
    try:
        with isolate_rng(), torch.no_grad():
            trainer.sanity_checking = True
            trainer.loggers = [DummyLogger() for _ in loggers]
            module.eval()
            yield
    finally:
        trainer.loggers, trainer.state.stage = loggers, stage
        restore()


def snapshot(module: nn.Module) -> Restore:
    """Copy the buffers and attributes of all layers; returns a function that restores them."""
    seen: dict[int, Any] = {}
    undo = [_of_layer(part, seen) for part in module.modules()]

    @torch.no_grad()
    def restore() -> None:
        for each in undo:
            each()
        for unit in units(module):  # a forward may have left gathered weights
            unit.reshard()

    return restore


def _of_layer(layer: nn.Module, seen: dict[int, Any]) -> Restore:
    names = layer.__dict__
    skipped = ("_parameters", "_modules", *MODULE_REFERENCES)
    inner = [snapshot_value(v, seen, 0) for k, v in names.items() if k not in skipped]
    kept, modules, parameters = dict(names), dict(layer._modules), dict(layer._parameters)

    def restore() -> None:
        for key in names.keys() - kept.keys():
            del names[key]
        names.update(kept)
        _refill(layer._modules, modules)
        _refill(layer._parameters, parameters)
        for each in inner:
            each()

    return restore


def _refill(held: Any, kept: Any) -> None:
    if list(held) != list(kept) or any(held[key] is not kept[key] for key in kept):
        held.clear()
        held.update(kept)


def snapshot_value(value: Any, seen: dict[int, Any], depth: int = 0) -> Restore:
    """Copy a value; returns a function that restores it."""
    if id(value) in seen or depth > DEPTH or value is None:
        return _nothing
    seen[id(value)] = value
    if isinstance(value, WHOLE):
        return _nothing
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, numpy.random.Generator):
        numbers = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", numbers)
    if isinstance(value, numpy.random.RandomState):
        words = value.get_state()
        return lambda: value.set_state(words)
    if isinstance(value, random.Random):
        drawn = value.getstate()
        return lambda: value.setstate(drawn)
    if isinstance(value, numpy.ndarray):
        array = value.copy()
        return lambda: value.__setitem__(..., array) if value.flags.writeable else None
    if isinstance(value, dict):
        return _of_members(value, dict(value), value.values(), _refill, seen, depth)
    if isinstance(value, list | deque | set):
        return _of_members(value, list(value), value, _replace, seen, depth)
    if isinstance(value, tuple):
        return _of_members(value, value, value, _leave, seen, depth)
    if _is_plain_object(value):
        names = value.__dict__
        return _of_members(names, dict(names), names.values(), _refill, seen, depth)
    return _nothing


def _of_tensor(tensor: Tensor) -> Restore:
    if tensor.is_inference() or tensor.device.type == "meta":
        return _nothing
    clone = tensor.detach().clone()
    return lambda: tensor.detach().copy_(clone)


def _of_members(
    value: Any, kept: Any, members: Any, put: Callable[[Any, Any], None], seen: Any, depth: int
) -> Restore:
    inner = [snapshot_value(each, seen, depth + 1) for each in list(members)]

    def restore() -> None:
        put(value, kept)
        for each in inner:
            each()

    return restore


def _replace(held: Any, kept: list[Any]) -> None:
    held.clear()
    held.update(kept) if isinstance(held, set) else held.extend(kept)


def _leave(held: Any, kept: Any) -> None:
    """Do nothing: a tuple itself cannot change."""


def _nothing() -> None:
    """Do nothing: the value cannot change, or is not looked into."""


def _is_plain_object(value: Any) -> bool:
    """Whether it is an instance of a class of the user's or of this package, with attributes."""
    kind = type(value)
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return not f"{kind.__module__}.".startswith(OTHERS)
