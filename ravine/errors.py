"""Errors that a user can correct: what is wrong, what is allowed, what to do.

The command line prints such an error without a traceback. Any other exception keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the user's.

    raise UsageError(
        "Transformer: num_heads=5 does not divide d_model=128", allowed=[4, 8], hint="use 4 or 8"
    )
    """

    exit_status = 2

    def __init__(
        self,
        problem: str,
        allowed: Iterable[object] = (),
        hint: str = "",
        *,
        flag: str = "",
        label: str = "allowed",
    ) -> None:
        """Store the parts; the text holds those that are not empty, in one line.

        Args:
            problem: what was given, and why it cannot be used.
            allowed: the values that can be used, nearest first.
            hint: one thing to do, in a Python script.
            flag: the same as words of the command line, which shows it in the place of `hint`.
            label: the word before the allowed values.
        """
        self.problem, self.hint, self.flag, self.label = problem, hint, flag, label
        self.allowed = [str(name) for name in allowed]
        names = f"{label}: {', '.join(self.allowed)}" if self.allowed else ""
        super().__init__("; ".join(part for part in (problem, names, hint or flag) if part))


class UsageTypeError(UsageError, TypeError):
    """A value of the wrong type."""


class MissingFileError(UsageError, FileNotFoundError):
    """A file or folder that does not exist."""


class RunError(RuntimeError):
    """What was asked is allowed, but failed during the run: exit status 1, no traceback."""

    exit_status = 1


def suggest_names(name: str, allowed: Iterable[str]) -> list[str]:
    """At most three of the allowed names, most similar to ``name`` first; upper case is ignored."""
    ratios = {n: difflib.SequenceMatcher(None, n.lower(), name.lower()).ratio() for n in allowed}
    least = max([0.6, *(ratio - 0.15 for ratio in ratios.values())])  # 1: the same letters
    near = [n for n in sorted(ratios) if ratios[n] >= least]
    return sorted(near, key=lambda n: -ratios[n])[:3]
