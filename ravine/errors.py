"""Errors that a user can correct: the problem, the allowed values and a hint.

The command line prints such an error without a traceback. Any other exception keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class _ErrorParts(Exception):
    """The parts of an error message: problem, allowed values, hint, and the flag of the hint."""

    def __init__(
        self,
        problem: str,
        allowed: Iterable[object] | str = (),
        hint: str = "",
        *,
        flag: str = "",
        label: str = "allowed",
    ) -> None:
        """Store the parts; the message joins those that are not empty, in one line.

        Args:
            problem: the given value, and why it cannot be used.
            allowed: the values that can be used, nearest first, or one phrase.
            hint: one thing to do, in a Python script.
            flag: the same as arguments of the command line, which shows it instead of `hint`.
            label: the word before the allowed values.
        """
        self.problem, self.hint, self.flag, self.label = problem, hint, flag, label
        # splitlines: a phrase becomes a list of one, an empty text an empty list
        values = allowed.splitlines() if isinstance(allowed, str) else allowed
        self.allowed = [str(value) for value in values]
        allowed_text = f"{label}: {', '.join(self.allowed)}" if self.allowed else ""
        super().__init__("; ".join(text for text in (problem, allowed_text, hint or flag) if text))

    def to_arguments(self) -> dict[str, Any]:
        """Return the arguments of an equal error, as plain values that another rank can receive."""
        names = ("problem", "allowed", "hint", "flag", "label")
        return {name: getattr(self, name) for name in names}


class UsageError(_ErrorParts, ValueError):
    """An input or setting of the user that is not valid.

    For example:

        raise UsageError(
            "Transformer: num_heads=5 does not divide d_model=128",
            [4, 8],
            hint="use num_heads=4",
            flag="--model.num_heads=4",
        )
    """

    exit_status = 2


class UsageTypeError(UsageError, TypeError):
    """A value of the wrong type."""


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that does not exist."""


class RunError(_ErrorParts, RuntimeError):
    """An error during a run with valid input: exit status 1, no traceback."""

    exit_status = 1


def check_at_least_one(owner: str, flag_prefix: str = "", **sizes: int) -> None:
    """Raise UsageError for a size below 1.

    Args:
        owner: class or function of which the sizes are arguments.
        flag_prefix: the start of the flags on the command line, such as "--model."; "" for none.
        sizes: the values by the name of the argument.
    """
    for name, size in sizes.items():
        if size < 1:
            suggested = max(1, -size)  # 64 for -64: the sign is the mistake
            flag = f"{flag_prefix}{name}={suggested}" if flag_prefix else ""
            hint = f"use {name}={suggested}"
            raise UsageError(f"{owner}: {name}={size} is too small", ["1 or more"], hint, flag=flag)


def format_arguments(arguments: Mapping[str, object]) -> str:
    """Return arguments as Python: "num_heads=4, norm='rmsnorm'"."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def format_flags(prefix: str, arguments: Mapping[str, object]) -> str:
    """Return arguments as flags of the command line: "--model.bias=all --model.d_ff=null".

    Lists and texts with spaces are quoted for a shell: "--data.classes='[1, 2]'".
    """
    import json  # only in errors: `--help` is fast without it
    import shlex

    texts = {
        n: v if isinstance(v, str) else json.dumps(v, default=str) for n, v in arguments.items()
    }
    return " ".join(f"{prefix}{name}={shlex.quote(text)}" for name, text in texts.items())


def suggest_names(
    name: str, allowed: Iterable[str], count: int = 3, *, least: float = 0.6, dotted: bool = False
) -> list[str]:
    """Return at most ``count`` allowed names, most similar to ``name`` first; case is ignored.

    Names whose similarity is more than 0.15 below that of the best are left out.

    Args:
        name: the name that does not exist.
        allowed: the names that exist.
        count: the largest number of names in the result.
        least: similarity from 0 to 1 (equal) below which a name is left out; 0 always finds one.
        dotted: whether ``name`` may also be the end of a dotted name, as "query" is of
            "blocks.0.query".
    """
    ratios = _similarities(name, allowed, dotted)  # similarity by allowed name
    least = max(least, max(ratios.values(), default=0.0) - 0.15)
    # `_by_similarity`: the names, the most similar first
    return [n for n in _by_similarity(ratios) if ratios[n] >= least][:count]


def sort_by_similarity(name: str, allowed: Iterable[str]) -> list[str]:
    """Return all allowed names, most similar to ``name`` first; case is ignored."""
    return _by_similarity(_similarities(name, allowed))


def _similarities(name: str, allowed: Iterable[str], dotted: bool = False) -> dict[str, float]:
    """Return the similarity of each allowed name to ``name``, from 0 to 1."""

    def ratio(other: str) -> float:
        segments = other.lower().split(".")
        ends = (".".join(segments[i:]) for i in range(len(segments) if dotted else 1))
        return max(difflib.SequenceMatcher(None, end, name.lower()).ratio() for end in ends)

    return {other: ratio(other) for other in allowed}


def _by_similarity(ratios: dict[str, float]) -> list[str]:
    return sorted(sorted(ratios), key=lambda name: -ratios[name])
