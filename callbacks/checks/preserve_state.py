"""Run code on a module, then restore its buffers, attributes, random generators and counters.

    with preserve_state(trainer, module):
        module.validation_step(batch, 0)

Parameters are not copied, because they do not change without gradients and an optimizer. Attributes
that are objects of torch, Lightning and other packages are not copied either.
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
from ravine.strategies.parallel_module import fsdp_units

RestoreFn = Callable[[], Any]
MAX_DEPTH = 6  # levels of nested containers whose members are copied
OPAQUE_TYPES = (nn.Parameter, nn.Module, L.Trainer, L.Callback, L.LightningDataModule, Dataset)
THIRD_PARTY_PREFIXES = ("torch.", "lightning.", "numpy.", "jsonargparse.", "builtins.")


@contextmanager
def preserve_state(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Run the body in evaluation mode without gradients, then restore the changed state.

    In the body `trainer.sanity_checking` is true, loggers write nothing and `module.eval()` holds.
    """
    _ = trainer.log_dir  # the first access creates the folder and the loggers
    stage, loggers = trainer.state.stage, list(trainer.loggers)  # `sanity_checking` sets the stage
    restore = snapshot_module(module)  # a function that restores buffers and attributes
    try:
        with isolate_rng(), torch.no_grad():  # `isolate_rng` restores the default generators
            trainer.sanity_checking = True
            trainer.loggers = [DummyLogger() for _ in loggers]
            module.eval()
            yield
    finally:
        trainer.loggers, trainer.state.stage = loggers, stage
        restore()


def snapshot_module(module: nn.Module) -> RestoreFn:
    """Copy the buffers and attributes of all layers; return a function that restores them."""
    seen: dict[int, Any] = {}
    layer_restores = [_snapshot_layer(layer, seen) for layer in module.modules()]

    @torch.no_grad()
    def restore() -> None:
        for restore_layer in layer_restores:
            restore_layer()
        for unit in fsdp_units(module):  # a forward pass may leave weights gathered
            unit.reshard()

    return restore


def _snapshot_layer(layer: nn.Module, seen: dict[int, Any]) -> RestoreFn:
    """Copy buffers and attributes of one layer; return a function that restores them.

    Values of parameters are not copied: they do not change without gradients and an optimizer.

    Args:
        layer: its submodules are not entered.
        seen: values copied so far by id, which are not copied again.
    """
    attributes = layer.__dict__
    skipped = ("_parameters", "_modules", *MODULE_REFERENCES)  # references to the trainer
    # functions that restore the values in place; `restore` also sets the attributes themselves
    value_restores = [snapshot_value(v, seen, 0) for k, v in attributes.items() if k not in skipped]
    saved_attributes = dict(attributes)
    saved_modules, saved_parameters = dict(layer._modules), dict(layer._parameters)

    def restore() -> None:
        for key in attributes.keys() - saved_attributes.keys():
            del attributes[key]
        attributes.update(saved_attributes)
        _restore_dict(layer._modules, saved_modules)
        _restore_dict(layer._parameters, saved_parameters)  # a layer may replace a parameter
        for restore_value in value_restores:
            restore_value()

    return restore


def _restore_dict(current: Any, saved: Any) -> None:
    if list(current) != list(saved) or any(current[key] is not saved[key] for key in saved):
        current.clear()
        current.update(saved)


def snapshot_value(value: Any, seen: dict[int, Any], depth: int = 0) -> RestoreFn:
    """Copy a value; return a function that restores it in place.

    Containers and plain objects are copied with their members. Immutable values, parameters,
    modules and objects of other packages are not copied.

    Args:
        value: any attribute.
        seen: values visited so far by id; it also keeps them alive, so that ids stay unique.
        depth: level of nesting; members deeper than MAX_DEPTH are not copied.
    """
    if id(value) in seen or depth > MAX_DEPTH or value is None:
        return _restore_nothing
    seen[id(value)] = value
    # parameters, modules and other types whose objects are not entered
    if isinstance(value, OPAQUE_TYPES):
        return _restore_nothing
    if isinstance(value, Tensor):
        return _snapshot_tensor(value)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, numpy.random.Generator):
        bit_generator_state = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", bit_generator_state)
    if isinstance(value, numpy.random.RandomState):
        legacy_state = value.get_state()
        return lambda: value.set_state(legacy_state)
    if isinstance(value, random.Random):
        random_state = value.getstate()
        return lambda: value.setstate(random_state)
    if isinstance(value, numpy.ndarray):
        array = value.copy()
        return lambda: value.__setitem__(..., array) if value.flags.writeable else None
    if isinstance(value, dict):
        return _snapshot_members(value, dict(value), value.values(), _restore_dict, seen, depth)
    if isinstance(value, list | deque | set):
        return _snapshot_members(value, list(value), value, _restore_collection, seen, depth)
    if isinstance(value, tuple):
        return _snapshot_members(value, value, value, _restore_tuple, seen, depth)
    if _is_plain_object(value):  # of user code, with attributes
        attributes = value.__dict__
        return _snapshot_members(
            attributes, dict(attributes), attributes.values(), _restore_dict, seen, depth
        )
    return _restore_nothing


def _snapshot_tensor(tensor: Tensor) -> RestoreFn:
    if tensor.is_inference() or tensor.device.type == "meta":
        return _restore_nothing
    clone = tensor.detach().clone()
    return lambda: tensor.detach().copy_(clone)


def _snapshot_members(
    value: Any,
    saved: Any,
    members: Any,
    restore_container: Callable[[Any, Any], None],
    seen: dict[int, Any],
    depth: int,
) -> RestoreFn:
    """Copy the members of a container; return a function that restores it and the members.

    Args:
        value: the container.
        saved: a shallow copy of it.
        members: the values in it.
        restore_container: called with `value` and `saved`.
        seen: values visited so far by id.
        depth: level of nesting of the container.
    """
    member_restores = [snapshot_value(member, seen, depth + 1) for member in list(members)]

    def restore() -> None:
        restore_container(value, saved)
        for restore_member in member_restores:
            restore_member()

    return restore


def _restore_collection(current: Any, saved: list[Any]) -> None:
    current.clear()
    current.update(saved) if isinstance(current, set) else current.extend(saved)


def _restore_tuple(current: Any, saved: Any) -> None:
    """Do nothing: a tuple is immutable."""


def _restore_nothing() -> None:
    """Do nothing: the value is immutable or is not copied."""


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an instance, with attributes, of a class of the user or of Ravine."""
    cls = type(value)
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    return not f"{cls.__module__}.".startswith(THIRD_PARTY_PREFIXES)
