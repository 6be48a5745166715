"""Tested versions of Lightning, and access to private names with a one-line error if missing."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import lightning

from ravine.errors import UsageError

SEEN_VERSIONS = ("2.5.6", "2.6.0", "2.6.1", "2.6.4", "2.6.5", "2.6.6")
SWITCH = "RAVINE_FAST_LOOP"  # environment variable; 0 switches the fast loop off
HINT = "pip install 'lightning>=2.6,<2.7'"


def missing(owner: str, name: str) -> UsageError:
    """Return the error for a private part that the installed Lightning does not have."""
    return UsageError(
        f"Lightning {lightning.__version__} has no {owner}.{name}, which Ravine needs here",
        SEEN_VERSIONS,
        HINT,
        label="versions seen to work",
    )


def private(owner: Any, name: str) -> Any:
    """Return the attribute ``name`` of a Lightning object.

    Raises:
        UsageError: the installed version has no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise missing(kind.__name__, name) from error


def set_private(owner: Any, name: str, value: Any) -> None:
    """Set an attribute that must exist already: a new one would have no effect.

    Raises:
        UsageError: the installed version has no such attribute.
    """
    private(owner, name)
    setattr(owner, name, value)


def private_import(module: str, name: str) -> Any:
    """Import a private class or function of Lightning.

    Raises:
        UsageError: the installed version has no such name.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise missing(module, name) from error


def replace_method(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of one Lightning object; `function` does not get the object.

    Raises:
        UsageError: the object has no such method, so that the function would never be called.
    """
    private(owner, name)
    vars(owner)[name] = function


def restore_method(owner: Any, name: str) -> None:
    """Undo `replace_method`; do nothing if the method was not replaced."""
    vars(owner).pop(name, None)


def fast_loop_refusal() -> str | None:
    """Return why the fast loop is not used, or None if it is.

    Reason: the fast loop repeats the body of Lightning's training loop. On an untested version the
    order of hooks could differ.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    if lightning.__version__ not in SEEN_VERSIONS:
        seen = f"{SEEN_VERSIONS[0]} to {SEEN_VERSIONS[-1]}"
        return f"Lightning {lightning.__version__} was not tried with it, as {seen} were"
    return None
