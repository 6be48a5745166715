"""Errors of optimizers of other packages as one line; errors of the user's code with traceback.

A traceback that passes through a file of the user's own shows the place to correct, and is kept.
Other tracebacks are replaced by one sentence. `RAVINE_TRACEBACK=1` in the environment keeps all.
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

STANDARD = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]


class OptimizerError(RunError):
    """An optimizer failed in a step; the text has the type and the message of its exception."""


@contextmanager
def in_words(member: Optimizer, place: str = "in its step") -> Iterator[None]:
    """Turn an exception of a package into one line, unless it passes through the user's files."""
    try:
        yield
    except Exception as error:
        spoken = isinstance(error, UsageError | RunError)
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if spoken or memory or wants_traceback() or own_frame(error) is not None or _ours(error):
            raise
        raise OptimizerError(text(member, error, place)) from error


def text(member: Optimizer, error: Exception, place: str) -> str:
    """The line: the optimizer, its exception, and a hint."""
    parameters = (p for group in member.param_groups for p in group["params"])
    spread = any(isinstance(p, DTensor) for p in parameters)
    way_out = (
        "it cannot step sharded parameters; type --trainer.strategy ddp, or take AdamW"
        if spread
        else "take another optimizer, or give it other parameters by a rule; RAVINE_TRACEBACK=1 "
        "shows where"
    )
    return f"{type(member).__name__} failed {place}: {words(error)}; {way_out}"


def words(error: BaseException) -> str:
    """Type and text of an exception, in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0")


def own_frame(error: BaseException) -> str | None:
    """The innermost frame of the user's own code in a traceback, as file:line; None if none."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not _in_ravine(frame) and is_own(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{line}"
    return None


def is_own(filename: str) -> bool:
    """Whether a file is neither Python's nor of an installed package."""
    path = Path(filename)
    if not path.is_absolute() or not path.exists():  # "<string>", or generated code
        return False
    path = path.resolve()
    if any(path.is_relative_to(folder) for folder in STANDARD):
        return False
    above = [Path(entry).resolve() for entry in sys.path if entry]
    above = [entry for entry in above if path.is_relative_to(entry)]
    installed = any(next(entry.glob("*.dist-info"), None) for entry in above)
    return not installed and not {"site-packages", "dist-packages"} & set(path.parts)


def _ours(error: BaseException) -> bool:
    """Whether Ravine itself raised it: a sentence already, or a bug that needs its traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _in_ravine(frames[-1])


def _in_ravine(frame: FrameType) -> bool:
    """Whether a frame runs code of Ravine: decided by its module, not by the path of a file."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "ravine"
