"""A member's state in a checkpoint: by its own `state_dict`, as plain values, numbered by place.

    member.state_dict() -> its groups and its states by parameter: flat, as torch's optimizers have
                           the rest (counters, a form of its own): under `members`, an entry each

A checkpoint holds tensors and plain values only. Other objects (a queue, an enum, a random
generator, an object of the optimizer's own package) are written as a dict with a tag. They are
rebuilt without an import or a constructor: the class must be loaded already by this run.
"""

import enum
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

from ravine.strategies.checkpoint.atomic_io import PLAIN, PLAIN_TORCH, CheckpointError

Group = dict[str, Any]
TAG = "__kind__"  # the key of a dict that stands for an object
CONSTANTS = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, partial)


class Packed(NamedTuple):
    """What a member saves; parameters are numbered from 0 in the order of its groups."""

    groups: list[Group]
    state: dict[int, dict[str, Any]]
    rest: dict[str, Any]  # {} for an optimizer that saves as torch's do


def pack(member: Optimizer) -> Packed:
    """The member's own state_dict as plain values.

    Raises:
        CheckpointError: it keeps an object that no checkpoint can hold.
    """
    whole = member.state_dict()
    code = _StateCodec(member)
    live = member.param_groups
    if not _standard(whole, live):
        numbers = iter(range(sum(len(group["params"]) for group in live)))
        groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in live]
        groups = [code.group(group, loose=True) for group in groups]
        return Packed(groups, {}, {"whole": code.encode(whole, "state_dict()")})
    ids = [i for group in whole["param_groups"] for i in group["params"]]
    place = {old: new for new, old in enumerate(ids)}
    state, others = {}, {}
    for key, value in whole["state"].items():
        if key in place:
            state[place[key]] = code.encode(value, f"the state of parameter {place[key]}")
        else:
            others[key] = code.encode(value, f"state[{key!r}]")
    groups = [
        code.group({**group, "params": [place[i] for i in group["params"]]})
        for group in whole["param_groups"]
    ]
    rest = {
        key: code.encode(value, key)
        for key, value in whole.items()
        if key not in ("state", "param_groups")
    }
    return Packed(groups, state, {**rest, **({"state": others} if others else {})})


def unpack(member: Optimizer, packed: Packed) -> None:
    """Give a member what `pack` made, by its own load_state_dict."""
    code = _StateCodec(member)
    if "whole" in packed.rest:
        member.load_state_dict(code.decode(packed.rest["whole"]))
        return
    groups = []
    for saved, live in zip(packed.groups, member.param_groups, strict=True):
        group = {key: code.decode(value, live.get(key)) for key, value in saved.items()}
        groups.append(group)
    state: dict[Any, Any] = {key: code.decode(value) for key, value in packed.state.items()}
    rest = {key: code.decode(value) for key, value in packed.rest.items()}
    state |= rest.pop("state", {})
    member.load_state_dict({**rest, "state": dict(state), "param_groups": groups})
    if type(member).load_state_dict is Optimizer.load_state_dict:
        for number, parameter in enumerate(code.parameters):
            for key, value in state.get(number, {}).items():
                if _changed_by_loader(value) and key in member.state[parameter]:
                    member.state[parameter][key] = value


def _changed_by_loader(value: Any) -> bool:
    """Whether torch's loader would change the value.

    It rebuilds every iterable item by item: a text becomes the repr of a generator, and a queue
    loses its `maxlen`. A value that holds tensors must pass through it, to be moved and cast.
    """
    leaves = list(_leaves(value))
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        return False
    return any(isinstance(leaf, str | bytes | numpy.ndarray | deque) for leaf in leaves)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, deque):
        yield value
    if isinstance(value, list | tuple | set | frozenset | deque):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _standard(whole: Any, live: list[Group]) -> bool:
    """Whether a state_dict has the form of torch's, with one entry for each live parameter."""
    if not isinstance(whole, dict):
        return False
    groups, state = whole.get("param_groups"), whole.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(live):
        return False
    for group, ours in zip(groups, live, strict=True):
        ids = group.get("params") if isinstance(group, dict) else None
        if not isinstance(ids, list) or len(ids) != len(ours["params"]):
            return False
        if not all(isinstance(i, int | str) for i in ids):
            return False
    ids = [i for group in groups for i in group["params"]]
    own = set(ids)
    return len(own) == len(ids) and all(
        isinstance(value, dict) for key, value in state.items() if key in own
    )


class _StateCodec:
    """Objects as plain values and back, for one member."""

    def __init__(self, member: Optimizer) -> None:
        self.name = type(member).__name__
        self.packages = {_package(kind.__module__) for kind in type(member).__mro__}
        self.packages -= {"torch", "builtins", "typing", "abc"}
        self.parameters = [p for group in member.param_groups for p in group["params"]]
        self.place = {id(p): i for i, p in enumerate(self.parameters)}
        self.within: list[int] = []  # ids of the objects that contain the present one

    def group(self, group: Group, loose: bool = False) -> Group:
        """The settings of a group; a class or a function is taken from the live optimizer on load.

        With `loose` the member saves them by itself, and any other object may be left out.
        """
        coded = {}
        for key, value in group.items():
            try:
                constant = isinstance(value, CONSTANTS) or type(value) is object
                coded[key] = {TAG: "live"} if constant else self.encode(value, key)
            except CheckpointError:
                # any callable is a setting; modules hold weights and are not
                if not loose and (not callable(value) or isinstance(value, nn.Module)):
                    raise
                coded[key] = {TAG: "live"}
        return coded

    def encode(self, value: Any, name: str) -> Any:
        """A value as a checkpoint can hold it."""
        kind = type(value)
        if isinstance(value, Tensor):
            place = self.place.get(id(value))
            return value if place is None else {TAG: "parameter", "place": place}
        if kind in PLAIN or kind in PLAIN_TORCH:
            return value
        if id(value) in self.within:
            raise self._refused(value, name, "which contains itself")
        self.within.append(id(value))
        try:
            return self._encode(value, name)
        finally:
            self.within.pop()

    def _encode(self, value: Any, name: str) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict, Counter):
            items = [(k, self.encode(v, f"{name}[{_short(k)}]")) for k, v in value.items()]
            if all(_plain_key(k) for k, _ in items):
                return kind(dict(items))
            keys = [self.encode(k, f"a key of {name}") for k, _ in items]
            return {TAG: "items", "keys": keys, "values": [v for _, v in items]}
        if kind in (list, tuple, set):
            return kind(self.encode(each, f"{name}[{i}]") for i, each in enumerate(value))
        if kind in torch.serialization.get_safe_globals():
            return value
        for name_of, encode in self._special(value, name):
            return {TAG: name_of, **encode()}
        raise self._refused(value, name, "which a checkpoint cannot hold")

    def _special(self, value: Any, name: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """The kinds of object that have a plain form."""

        def items() -> list[Any]:
            return [self.encode(each, f"{name}[{i}]") for i, each in enumerate(value)]

        kind = type(value)
        if kind is deque:
            yield "deque", lambda: {"items": items(), "maxlen": value.maxlen}
        if kind is frozenset:
            yield "frozenset", lambda: {"items": items()}
        if kind is defaultdict:
            plain = self.encode(dict(value), name)
            factory = value.default_factory
            simple = {list: "list", dict: "dict", int: "int", float: "float", None: "none"}
            if factory in simple:
                yield "defaultdict", lambda: {"items": plain, "of": simple[factory]}
        if isinstance(value, numpy.generic | numpy.ndarray) and value.dtype.kind in "biufc":
            tensor = torch.from_numpy(numpy.array(value))
            yield "numpy", lambda: {"value": tensor, "scalar": isinstance(value, numpy.generic)}
        if isinstance(value, torch.Generator):
            state = {"state": value.get_state(), "device": str(value.device)}
            yield "generator", lambda: state
        if isinstance(value, enum.Enum) and self._ours(kind):
            yield "enum", lambda: {"type": _path(kind), "name": value.name}
        if isinstance(value, type) and self._ours(value):
            yield "type", lambda: {"type": _path(value)}
        if self._rebuildable(kind):
            yield "object", lambda: {"type": _path(kind), "state": self.encode(vars(value), name)}

    def _refused(self, value: Any, name: str, why: str) -> CheckpointError:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return CheckpointError(
            f"{self.name} keeps a {kind} in {name}, {why}: such a run could not be continued; "
            f"give {self.name} a state_dict() of tensors and plain values, or take another "
            "optimizer",
            exit_status=1,
        )

    def decode(self, value: Any, live: Any = None) -> Any:
        """What `encode` was given; `live` is the setting of the present optimizer."""
        kind = type(value)
        if kind in (list, tuple, set):
            return kind(self.decode(each) for each in value)
        if kind in (dict, OrderedDict) and TAG not in value:
            return kind((key, self.decode(each)) for key, each in value.items())
        if kind is not dict:
            return value
        which = value[TAG]
        if which == "live":
            return live
        if which == "parameter":
            return self.parameters[value["place"]]
        if which == "items":
            keys = [self.decode(each) for each in value["keys"]]
            return dict(zip(keys, [self.decode(each) for each in value["values"]], strict=True))
        if which in ("deque", "frozenset"):
            items = [self.decode(each) for each in value["items"]]
            return deque(items, value["maxlen"]) if which == "deque" else frozenset(items)
        if which == "defaultdict":
            factory = {"list": list, "dict": dict, "int": int, "float": float}.get(value["of"])
            return defaultdict(factory, self.decode(value["items"]))
        if which == "numpy":
            array = value["value"].numpy()
            return array[()] if value["scalar"] else array
        if which == "generator":
            generator = torch.Generator(value["device"])
            generator.set_state(value["state"].cpu())
            return generator
        found = self._find(value["type"], which)
        if which == "enum":
            return found[value["name"]]
        if which == "type":
            return found
        made = object.__new__(found)
        made.__dict__.update(self.decode(value["state"]))
        return made

    def _find(self, path: str, which: str) -> Any:
        """A class that this run has loaded, of the optimizer's own package; never an import."""
        module, _, name = path.partition(":")
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = vars(found).get(part) if found is not None else None
        good = isinstance(found, type) and self._ours(found)
        good = good and (which != "enum" or issubclass(found, enum.Enum))
        if not good or (which == "object" and not self._rebuildable(found)):
            raise CheckpointError(
                f"the checkpoint's state of {self.name} names {path}, which is no class of its "
                "package; resume with the optimizer and the package version that wrote it"
            )
        return found

    def _ours(self, kind: type) -> bool:
        return _package(kind.__module__) in self.packages

    def _rebuildable(self, kind: type) -> bool:
        """Whether an object is no more than its attributes."""
        plain = all(
            getattr(kind, name, None) is getattr(object, name, None)
            for name in ("__reduce__", "__reduce_ex__", "__new__")
        )
        acts = ("__slots__", "__setstate__", "__del__")  # the last would run with any attributes
        simple = not any(hasattr(kind, name) for name in acts)
        builtin = any(b.__module__ in ("builtins",) and b is not object for b in kind.__mro__)
        return self._ours(kind) and plain and simple and not builtin


def _plain_key(key: Any) -> bool:
    return type(key) in PLAIN or (type(key) is tuple and all(type(k) in PLAIN for k in key))


def _short(key: Any) -> str:
    """A key in a message; a tensor would fill it with numbers."""
    return type(key).__name__ if isinstance(key, Tensor) else repr(key)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
