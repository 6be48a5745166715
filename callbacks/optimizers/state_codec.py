"""Optimizer state_dict in a checkpoint: encode an optimizer's state as plain values, and decode.

    member.state_dict() -> param groups and state of each parameter: flat, as in torch's optimizers
                           all else (counters, a custom format): under `members`, one entry for each

A member is one of the optimizers of a CompositeOptimizer; its parameters are numbered by position.
A checkpoint holds only tensors and plain values. Any other object (a queue, an enum, a random
generator, an object of the optimizer's package) is encoded as a dict with a tag. Decoding uses no
import and no constructor, so this run must have loaded the class already.
"""

import enum
import itertools
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ravine.strategies.checkpoint.atomic_io import SAFE_TORCH_TYPES, SAFE_TYPES, CheckpointError

ParamGroup = dict[str, Any]
TYPE_TAG = "__kind__"  # the key that marks a dict as an encoded object
LIVE_TYPES = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, partial)


class PackedState(NamedTuple):
    """The encoded state of a member; parameters are numbered from 0 in the order of its groups."""

    groups: list[ParamGroup]
    state: dict[int, dict[str, Any]]
    extra: dict[str, Any]  # {} for a state_dict in torch's format


def pack_state(optimizer: Optimizer) -> PackedState:
    """Return the optimizer's own state_dict as plain values, with parameters numbered from 0.

    A state_dict in torch's format is divided into groups, states of parameters and the rest. One in
    another format is kept whole; its groups are then those of the optimizer.

    Raises:
        CheckpointError: the optimizer keeps an object that no checkpoint can hold.
    """
    state_dict = optimizer.state_dict()
    codec = _StateCodec(optimizer)  # encodes objects as plain values
    live_groups = optimizer.param_groups
    if not _is_standard_state_dict(state_dict, live_groups):
        numbers = itertools.count()
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]} for group in live_groups
        ]
        groups = [codec.encode_group(group, allow_unsaved=True) for group in groups]
        encoded = codec.encode(state_dict, "state_dict()")
        return PackedState(groups, state={}, extra={"whole": encoded})
    # numbers from 0 in the order of the groups, in place of the ids of this state_dict
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    index_of = {param_id: index for index, param_id in enumerate(ids)}
    state, extra_state = {}, {}  # of parameters, and under other keys
    for key, value in state_dict["state"].items():
        if key in index_of:
            state[index_of[key]] = codec.encode(value, f"the state of parameter {index_of[key]}")
        else:
            extra_state[key] = codec.encode(value, f"state[{key!r}]")
    groups = [
        codec.encode_group({**group, "params": [index_of[i] for i in group["params"]]})
        for group in state_dict["param_groups"]
    ]
    extra = {
        key: codec.encode(value, key)
        for key, value in state_dict.items()
        if key not in ("state", "param_groups")
    }
    if extra_state:
        extra["state"] = extra_state
    return PackedState(groups, state, extra)


def unpack_state(optimizer: Optimizer, packed: PackedState) -> None:
    """Load the result of `pack_state` with the optimizer's own load_state_dict.

    torch's `load_state_dict` changes some values, such as a string; they are set again afterwards.
    """
    codec = _StateCodec(optimizer)
    if "whole" in packed.extra:  # a state_dict in a format of its own
        optimizer.load_state_dict(codec.decode(packed.extra["whole"]))
        return
    groups = [
        {key: codec.decode(value, live_group.get(key)) for key, value in saved_group.items()}
        for saved_group, live_group in zip(packed.groups, optimizer.param_groups, strict=True)
    ]
    state: dict[Any, Any] = {key: codec.decode(value) for key, value in packed.state.items()}
    extra = {key: codec.decode(value) for key, value in packed.extra.items()}
    state |= extra.pop("state", {})  # under keys that are not parameters
    optimizer.load_state_dict({**extra, "state": dict(state), "param_groups": groups})
    # an optimizer's own method loads its values as it wants
    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        for number, parameter in enumerate(codec.parameters):
            for key, value in state.get(number, {}).items():
                # a value without tensors that torch rebuilds item by item: a string, a deque
                if _changed_by_loader(value) and key in optimizer.state[parameter]:
                    optimizer.state[parameter][key] = value


def _changed_by_loader(value: Any) -> bool:
    """Whether Optimizer.load_state_dict would change the value.

    It rebuilds every iterable item by item: a string becomes the repr of a generator, and a deque
    loses its `maxlen`. A value with tensors must pass through it to be moved and cast.
    """
    leaves = list(_iter_leaves(value))
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        return False
    return any(isinstance(leaf, str | bytes | numpy.ndarray | deque) for leaf in leaves)


def _iter_leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, deque):
        yield value
    if isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            yield from _iter_leaves(item)
    else:
        yield value


def _is_standard_state_dict(state_dict: Any, live_groups: list[ParamGroup]) -> bool:
    """Whether a state_dict has torch's format, with a unique id for each parameter.

    That is `param_groups` with the ids under `params`, and `state` with a dict for an id.
    `live_groups` are the optimizer's param groups.
    """
    if not isinstance(state_dict, dict):
        return False
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        return False
    if len(groups) != len(live_groups):
        return False
    for group, live_group in zip(groups, live_groups, strict=True):
        ids = group.get("params") if isinstance(group, dict) else None
        if not isinstance(ids, list) or len(ids) != len(live_group["params"]):
            return False
        if not all(isinstance(i, int | str) for i in ids):
            return False
    ids = [i for group in groups for i in group["params"]]
    param_ids = set(ids)
    return len(param_ids) == len(ids) and all(
        isinstance(value, dict) for key, value in state.items() if key in param_ids
    )


class _StateCodec:
    """Encode objects as plain values and decode them, for one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.name = type(optimizer).__name__
        self.packages = {_top_package(cls.__module__) for cls in type(optimizer).__mro__}
        self.packages -= {"torch", "builtins", "typing", "abc"}
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.param_index = {id(p): i for i, p in enumerate(self.parameters)}
        self.ancestor_ids: list[int] = []  # ids of the objects that contain the current value

    def encode_group(self, group: ParamGroup, allow_unsaved: bool = False) -> ParamGroup:
        """Encode the settings of a param group as plain values.

        A class, a function or a sentinel object is not stored: the tag `live` stands for it, and
        loading takes the value of the current optimizer.

        Args:
            group: settings by name.
            allow_unsaved: whether any object that cannot be encoded may be left out, because the
                optimizer's custom state_dict has the settings.

        Raises:
            CheckpointError: a setting cannot be encoded.
        """
        encoded = {}
        for key, value in group.items():
            # LIVE_TYPES: classes, functions, modules and partials; `object()` is a sentinel
            is_live = isinstance(value, LIVE_TYPES) or type(value) is object
            try:
                encoded[key] = {TYPE_TAG: "live"} if is_live else self.encode(value, key)
            except CheckpointError:
                # a callable counts as a setting, but a module holds weights
                is_setting = callable(value) and not isinstance(value, nn.Module)
                if not allow_unsaved and not is_setting:
                    raise
                encoded[key] = {TYPE_TAG: "live"}
        return encoded

    def encode(self, value: Any, name: str) -> Any:
        """Return a value as tensors and plain values; raise CheckpointError if there is no way."""
        cls = type(value)
        if isinstance(value, Tensor):
            index = self.param_index.get(id(value))
            return value if index is None else {TYPE_TAG: "parameter", "place": index}
        if cls in SAFE_TYPES or cls in SAFE_TORCH_TYPES:
            return value
        if id(value) in self.ancestor_ids:
            raise self._unsupported_error(value, name, "which contains itself")
        self.ancestor_ids.append(id(value))
        try:
            return self._encode(value, name)
        finally:
            self.ancestor_ids.pop()

    def _encode(self, value: Any, name: str) -> Any:
        cls = type(value)
        if cls in (dict, OrderedDict, Counter):
            items = [(k, self.encode(v, f"{name}[{_format_key(k)}]")) for k, v in value.items()]
            if all(_is_plain_key(k) for k, _ in items):
                return cls(dict(items))
            keys = [self.encode(k, f"a key of {name}") for k, _ in items]
            return {TYPE_TAG: "items", "keys": keys, "values": [v for _, v in items]}
        if cls in (list, tuple, set):
            return cls(self.encode(item, f"{name}[{i}]") for i, item in enumerate(value))
        if cls in torch.serialization.get_safe_globals():
            return value
        for tag, encode_content in self._iter_encoders(value, name):
            return {TYPE_TAG: tag, **encode_content()}  # the first encoder is used
        raise self._unsupported_error(value, name, "which a checkpoint cannot hold")

    def _iter_encoders(
        self, value: Any, name: str
    ) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Yield a tag and an encoder for each supported type that the value has.

        The encoder returns plain values, which `decode` reads under the same tag. `name` says in
        error messages where the value is.
        """

        def encode_items() -> list[Any]:
            return [self.encode(item, f"{name}[{i}]") for i, item in enumerate(value)]

        cls = type(value)
        if cls is deque:
            yield "deque", lambda: {"items": encode_items(), "maxlen": value.maxlen}
        if cls is frozenset:
            yield "frozenset", lambda: {"items": encode_items()}
        if cls is defaultdict:
            plain = self.encode(dict(value), name)
            factory = value.default_factory
            names = {list: "list", dict: "dict", int: "int", float: "float", None: "none"}
            if factory in names:
                yield "defaultdict", lambda: {"items": plain, "of": names[factory]}
        if isinstance(value, numpy.generic | numpy.ndarray) and value.dtype.kind in "biufc":
            tensor = torch.from_numpy(numpy.array(value))
            yield "numpy", lambda: {"value": tensor, "scalar": isinstance(value, numpy.generic)}
        if isinstance(value, torch.Generator):
            state = {"state": value.get_state(), "device": str(value.device)}
            yield "generator", lambda: state
        # only classes of the optimizer's own package are accepted, also on loading
        if isinstance(value, enum.Enum) and self._is_from_package(cls):
            yield "enum", lambda: {"type": _class_path(cls), "name": value.name}
        if isinstance(value, type) and self._is_from_package(value):
            yield "type", lambda: {"type": _class_path(value)}
        if self._is_rebuildable(cls):
            yield (
                "object",
                lambda: {"type": _class_path(cls), "state": self.encode(vars(value), name)},
            )

    def _unsupported_error(self, value: Any, name: str, reason: str) -> CheckpointError:
        type_name = f"{type(value).__module__}.{type(value).__qualname__}"
        return CheckpointError(
            f"{self.name} keeps a {type_name} in {name}, {reason}; such a run cannot be resumed",
            ["tensors and plain values"],
            hint=f"define a state_dict() of tensors and plain values in {self.name}, or use "
            "another optimizer",
            exit_status=1,
        )

    def decode(self, value: Any, live: Any = None) -> Any:
        """Invert `encode`: rebuild a value from plain values, without an import.

        A dict with TYPE_TAG is an encoded object, all other values are plain.

        Args:
            value: an encoded value.
            live: the current optimizer's value of the same setting, for the tag `live`.
        """
        cls = type(value)
        if cls in (list, tuple, set):
            return cls(self.decode(item) for item in value)
        if cls in (dict, OrderedDict) and TYPE_TAG not in value:
            return cls((key, self.decode(item)) for key, item in value.items())
        if cls is not dict:
            return value
        tag = value[TYPE_TAG]
        if tag == "live":
            return live
        if tag == "parameter":
            return self.parameters[value["place"]]  # the optimizer's parameter of this number
        if tag == "items":
            keys = [self.decode(item) for item in value["keys"]]
            return dict(zip(keys, [self.decode(item) for item in value["values"]], strict=True))
        if tag in ("deque", "frozenset"):
            items = [self.decode(item) for item in value["items"]]
            return deque(items, value["maxlen"]) if tag == "deque" else frozenset(items)
        if tag == "defaultdict":
            factory = {"list": list, "dict": dict, "int": int, "float": float}.get(value["of"])
            return defaultdict(factory, self.decode(value["items"]))
        if tag == "numpy":
            array = value["value"].numpy()
            return array[()] if value["scalar"] else array  # [()] makes a 0-D array a scalar
        if tag == "generator":
            generator = torch.Generator(value["device"])
            generator.set_state(value["state"].cpu())
            return generator
        loaded_class = self._find_class(value["type"], tag)
        if tag == "enum":
            return loaded_class[value["name"]]
        if tag == "type":
            return loaded_class
        instance = object.__new__(loaded_class)  # the tag is "object"; no constructor runs
        instance.__dict__.update(self.decode(value["state"]))
        return instance

    def _find_class(self, path: str, tag: str) -> Any:
        """Return a class of the optimizer's package that is already imported.

        Args:
            path: `module:qualified name`, read from a checkpoint.
            tag: `enum` needs an enum, `object` a class whose attributes determine its objects.

        Raises:
            CheckpointError: there is no such class.
        """
        module, _, name = path.partition(":")
        target: Any = sys.modules.get(module)  # None if it is not imported
        for attribute in name.split("."):
            target = vars(target).get(attribute) if target is not None else None
        is_valid = isinstance(target, type) and self._is_from_package(target)
        is_valid = is_valid and (tag != "enum" or issubclass(target, enum.Enum))
        if not is_valid or (tag == "object" and not self._is_rebuildable(target)):
            raise CheckpointError(
                f"the state of {self.name} in the checkpoint refers to {path}, which is not a "
                "class of the optimizer's package",
                hint="resume with the optimizer and the version of its package that wrote the "
                "checkpoint",
            )
        return target

    def _is_from_package(self, cls: type) -> bool:
        return _top_package(cls.__module__) in self.packages

    def _is_rebuildable(self, cls: type) -> bool:
        """Whether the attributes alone determine an object of this class."""
        plain = all(
            getattr(cls, name, None) is getattr(object, name, None)
            for name in ("__reduce__", "__reduce_ex__", "__new__")
        )
        # __del__ would run with any attributes
        active_hooks = ("__slots__", "__setstate__", "__del__")
        simple = not any(hasattr(cls, name) for name in active_hooks)
        builtin = any(b.__module__ in ("builtins",) and b is not object for b in cls.__mro__)
        return self._is_from_package(cls) and plain and simple and not builtin


def _is_plain_key(key: Any) -> bool:
    return type(key) in SAFE_TYPES or (
        type(key) is tuple and all(type(k) in SAFE_TYPES for k in key)
    )


def _format_key(key: Any) -> str:
    """Return a key for an error message; only the type of a tensor, whose repr is long."""
    return type(key).__name__ if isinstance(key, Tensor) else repr(key)


def _top_package(module: str) -> str:
    return module.partition(".")[0]


def _class_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
