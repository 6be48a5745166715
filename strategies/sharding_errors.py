"""Errors of sharded tensors in a user's module, as one line that says what to type.

torch's DTensor and FSDP2 raise where an operation has no rule for shards, or finds the memory of a
gathered parameter freed. Their traceback shows internals of torch; the line names the module, the
place in its code and the strategies that give every rank whole parameters.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ravine.errors import RunError, UsageError

INTERNALS = ("torch.distributed.tensor.", "torch.distributed.fsdp.")  # modules, each with a dot
PACKAGES = ("torch", "lightning", "ravine", "contextlib")
TEXTS = (
    "DTensor", "setStorage", "storage of size 0", "sharding strategy", "FSDP",
    "data is not allocated yet",
)  # fmt: skip
LOST = ("gloo/transport", "NCCL", "Connection closed", "Timed out")  # another rank has ended


class ShardingError(UsageError, RuntimeError):
    """An operation of a module does not work with sharded parameters."""


@contextmanager
def in_one_line(module: Any, place: str) -> Iterator[None]:
    """Raise errors of sharded tensors as a ShardingError; RAVINE_TRACEBACK=1 shows them as is."""
    try:
        yield
    except Exception as error:
        if os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0") or not of_shards(error):
            raise
        raise ShardingError(text(type(module).__name__, error, place)) from error


def of_shards(error: Exception) -> bool:
    """Whether torch raised an error because of sharded tensors."""
    modules = [_module(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not modules or any(w in str(error) for w in LOST):
        return False
    if isinstance(error, UsageError | RunError):
        return False  # an error of this package: one line already
    inside = any(f"{name}.".startswith(INTERNALS) for name in modules)
    said = any(each in str(error) for each in TEXTS)
    return said or (inside and isinstance(error, RuntimeError | NotImplementedError))


def text(name: str, error: Exception, place: str) -> str:
    """The error message, in one line."""
    said = " ".join(str(error).split())[:160]
    return (
        f"{name}: {place}{_own_line(error)} an operation cannot work with sharded "
        f"parameters ({type(error).__name__}: {said}); allowed: strategies where each rank has "
        "whole parameters: ddp, zero1; type --trainer.strategy ddp"
    )


def _own_line(error: Exception) -> str:
    """File and line of the innermost frame outside of torch, Lightning and this package."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if path.is_absolute() and _module(frame).partition(".")[0] not in PACKAGES:
            return f" ({path.name}:{line})"
    return ""


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
