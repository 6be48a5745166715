"""Turn errors of sharded tensors in a user's module into a one-line error with a hint.

torch's DTensor and FSDP2 raise if an operation has no rule for shards, or if the memory of a
gathered parameter is freed. Their traceback shows internals of torch. The one-line error names the
module, the line of its code, and the strategies with full parameters on every rank.
"""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ravine.errors import RunError, UsageError

# prefixes of module names
TORCH_INTERNAL_MODULES = ("torch.distributed.tensor.", "torch.distributed.fsdp.")
LIBRARY_PACKAGES = ("torch", "lightning", "ravine", "contextlib")
SHARDING_ERROR_TEXTS = (
    "DTensor", "setStorage", "storage of size 0", "sharding strategy", "FSDP",
    "data is not allocated yet",
)  # fmt: skip
# errors after another rank has ended
CONNECTION_ERROR_TEXTS = ("gloo/transport", "NCCL", "Connection closed", "Timed out")


class ShardingError(UsageError, RuntimeError):
    """An operation of a module does not support sharded parameters."""


@contextmanager
def raise_as_sharding_error(module: Any, location: str) -> Iterator[None]:
    """Convert errors of sharded tensors to ShardingError, unless RAVINE_TRACEBACK=1 is set."""
    try:
        yield
    except Exception as error:
        if os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0") or not is_sharding_error(error):
            raise
        raise sharding_error(type(module).__name__, error, location) from error


def is_sharding_error(error: Exception) -> bool:
    """Whether torch raised an error because of sharded tensors."""
    modules = [_module_name(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not modules or any(w in str(error) for w in CONNECTION_ERROR_TEXTS):
        return False
    if isinstance(error, UsageError | RunError):
        return False  # an error of this package
    is_internal = any(f"{name}.".startswith(TORCH_INTERNAL_MODULES) for name in modules)
    has_known_text = any(known_text in str(error) for known_text in SHARDING_ERROR_TEXTS)
    return has_known_text or (is_internal and isinstance(error, RuntimeError | NotImplementedError))


def sharding_error(name: str, error: Exception, location: str) -> ShardingError:
    """Return the one-line error for an error of torch.

    Args:
        name: the class of the module.
        error: the error of torch.
        location: where it was raised, e.g. "in its step".

    Returns:
        an error that names the user's line of code, and a strategy with full parameters.
    """
    error_text = " ".join(str(error).split())[:160]
    return ShardingError(
        # _user_code_line: the last line of the traceback outside of libraries, or ""
        f"{name}: an operation {location}{_user_code_line(error)} does not support sharded "
        f"parameters ({type(error).__name__}: {error_text})",
        ["strategies with full parameters on each rank, such as ddp and zero1"],
        'use Trainer(strategy="ddp")',
        flag="--trainer.strategy=ddp",
    )


def _user_code_line(error: Exception) -> str:
    """Return file and line of the innermost frame outside of torch, Lightning and ravine."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if path.is_absolute() and _module_name(frame).partition(".")[0] not in LIBRARY_PACKAGES:
            return f" ({path.name}:{line})"
    return ""


def _module_name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
