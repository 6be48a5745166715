"""Optimizer errors: one line for other packages, the full traceback for the user's own code.

A traceback that contains a file of the user shows the line to correct, so it is kept. One line
replaces any other traceback. `RAVINE_TRACEBACK=1` in the environment keeps all tracebacks.
"""

import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ravine.errors import RunError, UsageError

STDLIB_DIRS = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]


class OptimizerError(RunError):
    """An optimizer failed; the message has the type and the text of its exception."""


@contextmanager
def wrap_optimizer_errors(optimizer: Optimizer, action: str = "in its step") -> Iterator[None]:
    """Raise OptimizerError for an exception in the context, if another package caused it.

    Errors of Ravine, of user code and of memory pass unchanged, and all errors if a traceback is
    requested by RAVINE_TRACEBACK.

    Args:
        optimizer: the optimizer that is called in the context.
        action: says in the message when it failed.
    """
    try:
        yield
    except Exception as error:
        has_exit_status = isinstance(error, UsageError | RunError)  # its message is complete
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if (
            has_exit_status
            or is_out_of_memory
            or wants_traceback()
            or find_user_frame(error) is not None  # the user's own code is in the traceback
            or _is_raised_by_ravine(error)
        ):
            raise
        raise make_optimizer_error(optimizer, error, action) from error


def make_optimizer_error(optimizer: Optimizer, error: Exception, action: str) -> OptimizerError:
    """Return an error with the optimizer, its exception and a hint."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    problem = f"{type(optimizer).__name__} failed {action}: {format_exception(error)}"
    if any(isinstance(p, DTensor) for p in parameters):
        return OptimizerError(
            f"{problem}; it does not support sharded parameters",
            hint="use Trainer(strategy='ddp'), or AdamW",
            flag="--trainer.strategy=ddp",
        )
    return OptimizerError(
        problem,
        hint="use another optimizer, or other parameters by a ParamRule; RAVINE_TRACEBACK=1 in "
        "the environment shows the traceback",
    )


def format_exception(error: BaseException) -> str:
    """Return type and text of an exception in one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


def wants_traceback() -> bool:
    """Whether RAVINE_TRACEBACK is set in the environment."""
    return os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0")


def find_user_frame(error: BaseException) -> str | None:
    """Return the innermost frame of user code in a traceback as file:line, or None."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not _in_ravine(frame) and is_user_file(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{line}"
    return None


def is_user_file(filename: str) -> bool:
    """Whether a file is outside the standard library and all installed packages."""
    path = Path(filename)
    if not path.is_absolute() or not path.exists():  # "<string>", or generated code
        return False
    path = path.resolve()
    if any(path.is_relative_to(folder) for folder in STDLIB_DIRS):
        return False
    above = [Path(entry).resolve() for entry in sys.path if entry]
    above = [entry for entry in above if path.is_relative_to(entry)]
    installed = any(next(entry.glob("*.dist-info"), None) for entry in above)
    return not installed and not {"site-packages", "dist-packages"} & set(path.parts)


def _is_raised_by_ravine(error: BaseException) -> bool:
    """Whether code of Ravine raised the error: it is one line already, or a bug with traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _in_ravine(frames[-1])


def _in_ravine(frame: FrameType) -> bool:
    """Whether a frame runs code of Ravine, by the name of its module instead of its file path."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "ravine"
