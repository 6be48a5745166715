"""Type hint inspection: the classes and values that a hint accepts, and their descriptions."""

import argparse
import collections.abc
import contextlib
import dataclasses
import enum
import functools
import inspect
import re
import types
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from jsonargparse import ArgumentParser
from torch import Tensor

SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}  # 10k is 10,000
TYPE_DESCRIPTIONS = {int: "a whole number", float: "a number", str: "text", type(None): "null"}
EXAMPLE_VALUES = {int: "10", float: "0.1", bool: "true", str: "TEXT"}
# Classes to suggest, where any subclass is accepted.
EXAMPLE_CLASSES = ("LanguageModel", "TextDataModule", "EMA", "AdamW", "MeshStrategy")


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
    # a class, where a list of classes is accepted, too
    members = union_members(hint)
    first = next(
        (m for m in members if not accepts_list(m) and configurable_classes(m)), members[0]
    )
    if get_origin(first) is Literal:
        return str(get_args(first)[0])
    if accepts_list(first):
        examples = [example_value(argument) for argument in get_args(first) if argument is not ...]
        return f"[{', '.join(examples)}]"
    if dataclasses.is_dataclass(first):
        field = dataclasses.fields(first)[0]
        return f"{{{field.name}: {field.default}}}"
    if choices := configurable_classes(first):
        names = subclasses_by_name(base for base, _ in choices)
        return next((name for name in EXAMPLE_CLASSES if name in names), min(names, default="NAME"))
    return EXAMPLE_VALUES.get(first, "VALUE")


def example_of(hint: Any, default: Any = None) -> str:
    """Return an example of a value that ``hint`` accepts: the default, or a usual value.

    Args:
        hint: the type hint of an argument.
        default: the default of the argument; None, 0 and negative numbers are no examples.
    """
    # a default such as max_steps=-1 stands for "no limit"
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    is_plain = isinstance(default, str | bool) or (is_number and default > 0)
    if not is_plain or default == "" or not is_valid(hint, default):
        return example_value(hint)
    return str(default).lower() if isinstance(default, bool) else str(default)


def literal_choices(hint: Any) -> list[str]:
    """Return the names that ``hint`` accepts: those of a Literal, true and false, null."""
    names: list[str] = []
    for member in union_members(hint):
        if get_origin(member) is Literal:
            names += [str(choice) for choice in get_args(member)]
        names += {bool: ["true", "false"], type(None): ["null"]}.get(member, [])
    return names


def corrected_value(hint: Any, text: str) -> str | None:
    """Return the value that a text means in another notation, if ``hint`` accepts it, else None.

    1e3 is 1000 as a whole number, 10k is 10000, 0,5 is 0.5, yes is true, and 0.9,0.95 or (0.9,
    0.95) is a list. A size such as 62x47 is [62, 47].
    """
    plain = text.strip().removeprefix("=").strip()
    number = plain.replace("_", "")
    candidates = [plain, plain.lower(), number, number.replace(",", ".")]
    for digits, factor in ((number, 1), (number[:-1], SUFFIXES.get(number[-1:].lower(), 0))):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(digits) * factor
            candidates += [str(int(value))] if value and value == int(value) else []
    switches = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false"}
    candidates += [switches.get(plain.lower(), plain), f"[{plain.strip('()[]')}]"]
    candidates.append(f"[{', '.join(plain.strip('()[]').split())}]")
    candidates.append(f"[{', '.join(re.split('[xX*]', plain))}]")
    return next((c for c in candidates if c and c != text and is_valid(hint, c)), None)


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
