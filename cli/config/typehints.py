"""Type hint inspection: the classes and values that a hint accepts, and their descriptions."""

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

TYPE_DESCRIPTIONS = {int: "a whole number", float: "a number", str: "text", type(None): "null"}
EXAMPLE_VALUES = {int: "10", float: "0.1", bool: "true", str: "TEXT"}


def union_members(hint: Any) -> list[Any]:
    """Return the members of a union, or the hint itself in a list."""
    if get_origin(hint) in (Union, types.UnionType):
        return [member for union_part in get_args(hint) for member in union_members(union_part)]
    return [hint]


def accepts_list(hint: Any) -> bool:
    """Return whether ``hint`` or one of its union members is a list type."""
    lists = (list, tuple, collections.abc.Iterable, collections.abc.Sequence)
    return any(get_origin(member) in lists for member in union_members(hint))


def element_type(hint: Any) -> Any:
    """Return the element type of the list types in ``hint``."""
    lists = [member for member in union_members(hint) if accepts_list(member)]
    elements = [a for list_hint in lists for a in get_args(list_hint) if a is not ...]
    return Union[tuple(elements)]  # noqa: UP007


def configurable_classes(hint: Any, num_supplied: int = 0) -> list[tuple[type, int]]:
    """Return the classes that a config may name for ``hint``, and the number of supplied arguments.

    Supplied arguments are passed by the code: an optimizer as ``Callable[[Iterable], Optimizer]``
    gets its parameters later, so the number is 1.

    Args:
        hint: the type hint of an argument.
        num_supplied: the number for classes that ``hint`` names directly.
    """
    choices = []
    # `X | None` has the members X and None; any other hint is its own member
    for member in union_members(hint):
        origin, hint_args = get_origin(member), get_args(member)
        if origin is collections.abc.Callable and hint_args:
            # Callable[[A, B], C]: the arguments are [A, B], the class is C
            callable_args = hint_args[0] if isinstance(hint_args[0], list) else []
            choices += configurable_classes(hint_args[-1], len(callable_args))
        elif accepts_list(member):
            choices += [
                choice
                for hint_arg in hint_args
                for choice in configurable_classes(hint_arg, num_supplied)
            ]
        # `_is_configurable`: the class is no plain type such as int
        elif isinstance(member, type) and origin is None and _is_configurable(member):
            choices.append((member, num_supplied))
    return choices


def _is_configurable(candidate: type) -> bool:
    is_plain = issubclass(candidate, enum.Enum | PurePath | Tensor) or is_typeddict(candidate)
    return not is_plain and candidate.__module__ not in ("builtins", "typing", "datetime")


def describe(hint: Any) -> list[str]:
    """Return descriptions of the values that ``hint`` accepts."""
    descriptions: list[str] = []
    # `X | None` has the members X and None; any other hint is its own member
    for member in union_members(hint):
        origin, hint_args = get_origin(member), get_args(member)
        if origin is Literal:
            descriptions += [str(hint_arg) for hint_arg in hint_args]
        elif member is bool:
            descriptions += ["true", "false"]
        elif accepts_list(member):
            element_texts = [
                " or ".join(describe(hint_arg)) for hint_arg in hint_args if hint_arg is not ...
            ]
            # only tuple[int, str] has a fixed length
            if origin is not tuple or ... in hint_args:
                element_texts.append("...")
            descriptions.append(f"[{', '.join(element_texts)}]")
        elif dataclasses.is_dataclass(member):
            fields = ", ".join(field.name for field in dataclasses.fields(member))
            descriptions.append(f"{{{fields}}}")
        else:
            descriptions.append(
                # words for plain types; else the name of the class
                TYPE_DESCRIPTIONS.get(member) or getattr(member, "__name__", str(member))
            )
    return list(dict.fromkeys(descriptions))


def example_value(hint: Any) -> str:
    """Return an example of a value that ``hint`` accepts."""
    first = union_members(hint)[0]
    if get_origin(first) is Literal:
        return str(get_args(first)[0])
    if accepts_list(first):
        examples = [example_value(argument) for argument in get_args(first) if argument is not ...]
        return f"[{', '.join(examples)}]"
    if dataclasses.is_dataclass(first):
        field = dataclasses.fields(first)[0]
        return f"{{{field.name}: {field.default}}}"
    return EXAMPLE_VALUES.get(first, "NAME" if configurable_classes(first) else "VALUE")


def is_valid(hint: Any, value: Any) -> bool:
    """Return whether the parser accepts ``value`` for ``hint``; a text is parsed as in a flag."""
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
def class_parser(target_class: type, num_supplied: int) -> ArgumentParser:
    """Return a parser for the arguments of a class, except the first ``num_supplied``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(
        target_class, fail_untyped=False, skip={num_supplied} if num_supplied else set()
    )
    return parser


def subclasses_by_name(bases: Iterable[type]) -> dict[str, type]:
    """Return the imported subclasses by bare name; of equal names, Ravine's class is returned."""
    classes_by_name: dict[str, type] = {}
    pending = [subclass for base in bases for subclass in base.__subclasses__()]
    while pending:
        subclass = pending.pop()
        pending += subclass.__subclasses__()
        if not subclass.__name__.startswith("_") and not inspect.isabstract(subclass):
            is_ravine = subclass.__module__.startswith("ravine.")
            classes_by_name[subclass.__name__] = (
                subclass if is_ravine else classes_by_name.get(subclass.__name__, subclass)
            )
    return classes_by_name
