"""Import a function of the user by its dotted path, with an error that lists similar names.

    import_function("my_file.f", FunctionKind("objective", "f", "function", flag="--model.f"))

Only paths that the user names are imported: `cli/config/trust.py` checks the paths of a checkpoint.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ravine.errors import UsageError, sort_by_similarity

MAX_CHARS_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class FunctionKind:
    """What an imported function is for, in messages.

    Args:
        noun: what the function computes: "reward", "objective".
        default_name: name of the function in a suggestion.
        argument: the argument that has the path, in Python.
        flag: the argument that has the path, on the command line, without its value.
        error: class of the error.
    """

    noun: str
    default_name: str
    argument: str
    flag: str
    error: type[UsageError] = UsageError


def import_function(path: str, kind: FunctionKind) -> Callable[..., Any]:
    """Import the function at a path such as my_file.f.

    Raises:
        UsageError: there is no such function; the message lists similar names. Its class is
            `kind.error`.
    """
    file, _, name = path.rpartition(".")  # my_file, f
    if not file:
        problem = "the path names no file, or no function in it"
        raise _not_found_error(path, problem, ["my_file.my_function"], path.strip("."), [], kind)
    module = _import_module(path, file, name, kind)
    function = getattr(module, name, None)
    if callable(function):
        return function
    # functions of the module, the most similar name first
    similar_names = sort_by_similarity(
        name, [k for k, v in vars(module).items() if inspect.isfunction(v)]
    )
    problem = f"{file} has no such function"
    if function is not None:
        text = repr(function)
        short_text = text if len(text) <= MAX_CHARS_SHOWN else text[: MAX_CHARS_SHOWN - 1] + "…"
        problem = f"it is {short_text}, not a function"
    allowed = [f"{file}.{similar_name}" for similar_name in similar_names[:9]]
    # the error shows the path, the problem, existing functions and the nearest one
    raise _not_found_error(path, problem, allowed, file, similar_names, kind)


def format_error(error: Exception) -> str:
    """Format an error's type and message in one line."""
    return ": ".join([type(error).__name__, *filter(None, [" ".join(str(error).split())])])


def _import_module(path: str, file: str, name: str, kind: FunctionKind) -> ModuleType:
    """Import the module of a function.

    Args:
        path: import path of the function, my_file.f, for messages.
        file: the part before the last dot, my_file.
        name: the part after it, f, for messages.
        kind: what the function is for.

    Raises:
        UsageError: there is no such module, or importing it fails.
    """
    try:
        return importlib.import_module(file)
    except Exception as error:  # importing a user's file can raise any error
        missing_module = error.name if isinstance(error, ModuleNotFoundError) else None
        # the module itself or its package is missing, and not a module that it imports
        if missing_module and f"{file}.".startswith(f"{missing_module}."):
            # Python files of the current folder, the most similar name first
            files = sort_by_similarity(
                file, [file_path.stem for file_path in Path().glob("[!._]*.py")]
            )
            problem = f"there is no file {missing_module}.py"
            allowed = [f"{similar_file}.py" for similar_file in files[:9]]
            nearest = files[0] if files else file
            raise _not_found_error(path, problem, allowed, nearest, [name], kind) from error
        raise kind.error(
            f"the {kind.noun} function {path} cannot be imported: importing {file} raises "
            f"{format_error(error)}",
            hint=f"correct the file, and try import {file} in Python",
            flag=f'python -c "import {file}"',
        ) from error


def _not_found_error(
    path: str,
    problem: str,
    allowed: Sequence[str],
    file: str,
    names: Sequence[str],
    kind: FunctionKind,
) -> UsageError:
    suggestion = f"{file}.{names[0] if names else kind.default_name}"
    return kind.error(
        f"the {kind.noun} function {path} does not exist: {problem}",
        allowed,
        f"use {kind.argument}={suggestion!r}",
        flag=f"{kind.flag}={suggestion}",
    )
