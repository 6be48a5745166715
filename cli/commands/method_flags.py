"""Flags out of a signature: `--top_k=40` because a method has an argument `top_k: int | None`.

What a task can do (generate, export) it says by the arguments of a method; the command line adds
nothing. An argument that takes a text or several is a flag that may be repeated.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ravine.errors import UsageError

from ..error_report import unknown_name

NUMBERS = {int: "a whole number", float: "a number"}


class Flag(NamedTuple):
    """An argument that can be typed."""

    kind: type
    default: Any
    choices: tuple[str, ...] = ()
    repeats: bool = False


def flags(method: Callable[..., Any]) -> dict[str, Flag]:
    """The arguments of a method that can be typed: numbers, texts, choices."""
    hints, found = get_type_hints(method), {}
    for name, parameter in inspect.signature(method).parameters.items():
        hint = hints.get(name)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kind = next((kind for kind in (int, float, str) if kind in kinds), None)
        repeats = any(get_origin(kind) is Sequence for kind in kinds)
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
        if choices:
            found[name] = Flag(str, parameter.default, choices)
        elif kind is not None:
            found[name] = Flag(kind, parameter.default, repeats=repeats)
    return found


def pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    """Flags and their values: `--key=value` and `--key value` alike."""
    found, each = [], iter(words)
    for word in each:
        if not word.startswith("--"):
            raise UsageError(f"{word!r} belongs to no flag", flag=f"--prompt={word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(each, None)
            if value is None:
                raise UsageError(f"--{name} has no value", flag=f"--{name}=VALUE")
        found.append((name, value))
    return found


def read(given: list[tuple[str, str]], known: dict[str, Flag], command: str) -> dict[str, Any]:
    """The values of the flags given, of their kinds; the last one wins, repeated texts add up."""
    values: dict[str, Any] = {}
    for name, text in given:
        if name not in known:
            wrong = f"{command} has no flag --{name}"
            raise unknown_name(wrong, name, known, lambda near: f"--{near}=...", "NAME")
        flag = known[name]
        value = convert(name, text, flag)
        values[name] = [*values.get(name, []), value] if flag.repeats else value
    return {name: v[0] if known[name].repeats and len(v) == 1 else v for name, v in values.items()}


def convert(name: str, text: str, flag: Flag) -> Any:
    """One value; in texts that may be repeated \\n is a line break, since shells make it hard."""
    if flag.choices and text not in flag.choices:
        wrong, first = f"--{name} is {text!r}", flag.choices[0]
        raise unknown_name(wrong, text, flag.choices, lambda n: f"--{name}={n}", first)
    if flag.kind is str:
        return unescape(text) if flag.repeats else text
    try:
        return flag.kind(text)
    except ValueError:
        fix = f"--{name}={flag.default if isinstance(flag.default, int | float) else 10}"
        raise UsageError(f"--{name} is {text!r}, not {NUMBERS[flag.kind]}", flag=fix) from None


def unescape(text: str) -> str:
    r"""Line breaks for \n, tabs for \t, a backslash for two."""
    parts = text.split(r"\\")
    return "\\".join(part.replace(r"\n", "\n").replace(r"\t", "\t") for part in parts)
