"""Arguments of a callback found by a short name: `lr` of an OptimizerPlan is its optimizer's.

A callback is a mapping as in config.yaml, with class_path and init_args:

    {class_path: OptimizerPlan, init_args: {optimizer: {class_path: AdamW, init_args: {lr: 0.005}}}}
    argument paths: optimizer, optimizer.lr, optimizer.betas, ..., schedule, schedule.warmup, ...
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.errors import sort_by_similarity, suggest_names

from . import typehints

CallbackSpec = Mapping[str, Any]
FLAG_PREFIX = "--trainer.callbacks."


def class_name(spec: CallbackSpec) -> str:
    """Return the class of a callback without its module."""
    return str(spec["class_path"]).rpartition(".")[2]


def load_class(path: str, base: type = Callback) -> type | None:
    """Return a class by its bare name or dotted path; None if it is no known subclass of `base`.

    A bare name is that of an imported class.
    """
    module, _, name = path.rpartition(".")
    if not module:
        return typehints.subclasses_by_name((base,)).get(name)
    try:
        imported = getattr(import_module(module), name, None)
    except Exception:  # the file of a user may raise anything; the parser reports it
        return None
    return imported if isinstance(imported, type) and issubclass(imported, base) else None


def is_plan(spec: CallbackSpec) -> bool:
    """Return whether a callback is OptimizerPlan or a subclass, such as Muon."""
    callback_class = load_class(str(spec["class_path"]))
    return callback_class is not None and issubclass(callback_class, OptimizerPlan)


def argument_names(cls: type, num_supplied: int = 0) -> list[str]:
    """Return the arguments of a class in order, except the first `num_supplied`."""
    try:
        # a parser of the arguments of that class
        actions = typehints.class_parser(cls, num_supplied)._actions
    except Exception:  # a signature that the parser cannot read
        return []
    names = [action.dest.partition(".")[0] for action in actions]
    return [name for name in dict.fromkeys(names) if name != "help"]


def optimizers_of(spec: CallbackSpec) -> dict[str, type]:
    """Return the optimizer classes in a callback's arguments by path: optimizer, rules.0.optimizer.

    They are those that the arguments name; a default within the class has no name.
    """
    classes = {}
    pending: list[tuple[str, Any]] = [("", spec.get("init_args") or {})]
    while pending:
        path, value = pending.pop(0)
        if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
            if optimizer_class := load_class(value["class_path"], Optimizer):
                classes[path] = optimizer_class
                continue
            value = value.get("init_args") or {}
        if isinstance(value, Mapping | list | tuple):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            pending += [(f"{path}.{key}".lstrip("."), child) for key, child in pairs]
    return classes


def find_argument(spec: CallbackSpec, key: str) -> list[str]:
    """Return the paths of the argument that a short key means.

    It is an argument of the callback itself, or else of its optimizers: ["optimizer.lr"] for lr.

    Args:
        spec: the callback.
        key: the argument, such as lr or schedule.warmup.
    """
    callback_class = load_class(str(spec["class_path"]))
    if callback_class is None:
        return []
    first = key.partition(".")[0].rstrip("+")
    if first in argument_names(callback_class):
        return [key]
    # an optimizer's first argument is its parameters, which the code supplies
    return [
        f"{path}.{key}"
        for path, optimizer_class in optimizers_of(spec).items()
        if first in argument_names(optimizer_class, 1)
    ]


def argument_paths(spec: CallbackSpec) -> list[str]:
    """Return the paths of a callback's arguments, those of its optimizers and schedule included."""
    callback_class = load_class(str(spec["class_path"]))
    if callback_class is None:
        return []
    paths = argument_names(callback_class)
    for path, optimizer_class in optimizers_of(spec).items():
        paths += [f"{path}.{name}" for name in argument_names(optimizer_class, 1)]
    for action in typehints.class_parser(callback_class, 0)._actions:
        hint = getattr(action, "_typehint", None)
        if typehints.accepts_list(hint):
            continue
        for field_class, _ in typehints.configurable_classes(hint):
            if dataclasses.is_dataclass(field_class):  # schedule.warmup
                paths += [f"{action.dest}.{f.name}" for f in dataclasses.fields(field_class)]
    return [path for path in dict.fromkeys(paths) if ".help." not in path]


def nearest_paths(key: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that end in the last word of a key, or else those that resemble it."""
    paths = list(paths)
    last = key.rpartition(".")[2].rstrip("+")
    near = [path for path in paths if path.rpartition(".")[2] == last and path != key]
    # `dotted`: the key may be the end of a path
    near = sort_by_similarity(key, near)[:3] or suggest_names(key, paths, dotted=True)
    depth = key.count(".")
    return sorted(near, key=lambda path: abs(path.count(".") - depth))


def flag_of(name: str, path: str, text: str) -> str:
    """Return the flag that sets an argument of the callback of a class, quoted for a shell."""
    return f"{FLAG_PREFIX}{name}.{path}={shlex.quote(text)}"


def numbered_name(specs: Sequence[CallbackSpec], index: int) -> str:
    """Return the class of a callback, with its number if the class stands twice: Muon.1."""
    names = [class_name(spec) for spec in specs]
    name = names[index]
    return name if names.count(name) == 1 else f"{name}.{names[:index].count(name)}"


def flags_of_argument(specs: Sequence[CallbackSpec], key: str, text: str) -> list[str]:
    """Return the flags for an argument that was typed without, or with a wrong, class name.

    Args:
        specs: the callbacks of the run.
        key: the argument: lr, schedule.warmup, muon.lr or my_file.MyClip.max_norm.
        text: the value.
    """
    flags = [
        flag_of(numbered_name(specs, index), path, text)
        for index, spec in enumerate(specs)
        for path in find_argument(spec, key)
    ]
    flags = flags or [
        flag_of(numbered_name(specs, index), path, text)
        for index, spec in enumerate(specs)
        for path in argument_paths(spec)
        if path.endswith(f".{key}")  # schedule.warmup for warmup
    ]
    if flags:
        return flags
    segments = key.split(".")
    names = {class_name(spec).lower(): numbered_name(specs, i) for i, spec in enumerate(specs)}
    for position, segment in enumerate(segments[:-1]):
        if name := names.get(segment.lower()):
            return [flag_of(name, ".".join(segments[position + 1 :]), text)]
    return []
