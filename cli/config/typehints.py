"""What a type hint takes: which classes, which plain values, and how to say so in words."""

import argparse
import collections.abc
import dataclasses
import enum
import functools
import inspect
import types
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from jsonargparse import ArgumentParser
from torch import Tensor

PLAIN = {int: "a whole number", float: "a number", str: "text", type(None): "null"}
SAMPLE = {int: "10", float: "0.1", bool: "true", str: "TEXT"}


def members(hint: Any) -> list[Any]:
    """The hint itself, or what a union offers."""
    if get_origin(hint) in (Union, types.UnionType):
        return [member for part in get_args(hint) for member in members(part)]
    return [hint]


def takes_list(hint: Any) -> bool:
    """Whether ``hint``, or a member of it, is a list of other things."""
    lists = (list, tuple, collections.abc.Iterable, collections.abc.Sequence)
    return any(get_origin(member) in lists for member in members(hint))


def elements(hint: Any) -> Any:
    """The type of what stands in such a list."""
    lists = [member for member in members(hint) if takes_list(member)]
    return Union[tuple(part for one in lists for part in get_args(one) if part is not ...)]  # noqa: UP007


def classes(hint: Any, supplied: int = 0) -> list[tuple[type, int]]:
    """Classes a configuration may name for ``hint``, and how many arguments each gets elsewhere.

    An optimizer given as ``Callable[[Iterable], Optimizer]`` receives its parameters later: 1.
    """
    found = []
    for member in members(hint):
        origin, parts = get_origin(member), get_args(member)
        if origin is collections.abc.Callable and parts:
            given = parts[0] if isinstance(parts[0], list) else []
            found += classes(parts[-1], len(given))
        elif takes_list(member):
            found += [each for part in parts for each in classes(part, supplied)]
        elif isinstance(member, type) and origin is None and _configurable(member):
            found.append((member, supplied))
    return found


def _configurable(kind: type) -> bool:
    plain = issubclass(kind, enum.Enum | PurePath | Tensor) or is_typeddict(kind)
    return not plain and kind.__module__ not in ("builtins", "typing", "datetime")


def described(hint: Any) -> list[str]:
    """The values that ``hint`` takes, each in words."""
    words: list[str] = []
    for member in members(hint):
        origin, parts = get_origin(member), get_args(member)
        if origin is Literal:
            words += [str(part) for part in parts]
        elif member is bool:
            words += ["true", "false"]
        elif takes_list(member):
            each = [" or ".join(described(part)) for part in parts if part is not ...]
            more = ["..."] if origin is not tuple or ... in parts else []
            words.append(f"[{', '.join(each + more)}]")
        elif dataclasses.is_dataclass(member):
            fields = ", ".join(field.name for field in dataclasses.fields(member))
            words.append(f"{{{fields}}}")
        else:
            words.append(PLAIN.get(member) or getattr(member, "__name__", str(member)))
    return list(dict.fromkeys(words))


def sample(hint: Any) -> str:
    """A value that ``hint`` takes, to show its form."""
    first = members(hint)[0]
    if get_origin(first) is Literal:
        return str(get_args(first)[0])
    if takes_list(first):
        return f"[{', '.join(sample(part) for part in get_args(first) if part is not ...)}]"
    if dataclasses.is_dataclass(first):
        field = dataclasses.fields(first)[0]
        return f"{{{field.name}: {field.default}}}"
    return SAMPLE.get(first, "NAME" if classes(first) else "VALUE")


def accepts(hint: Any, value: Any) -> bool:
    """Whether the parser would take ``value`` for ``hint``; a text is read as a flag's."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except argparse.ArgumentError:
        return False
    return True


@functools.cache
def arguments(kind: type, supplied: int) -> ArgumentParser:
    """A parser of the arguments of a class, but the first ``supplied``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False, skip={supplied} if supplied else set())
    return parser


def subclasses(bases: Iterable[type]) -> dict[str, type]:
    """Every class that a bare name may stand for, of those imported."""
    found: dict[str, type] = {}
    todo = [kind for base in bases for kind in base.__subclasses__()]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if not kind.__name__.startswith("_") and not inspect.isabstract(kind):
            ours = kind.__module__.startswith("ravine.")  # of two with one name, ours is meant
            found[kind.__name__] = kind if ours else found.get(kind.__name__, kind)
    return found
