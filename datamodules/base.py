"""Data that one process of a machine prepares for all of its ranks, such as files of tokens.

    prepare_data   local rank 0 works, with all cores; the other ranks wait, without a time limit
    setup          every rank gets the result: `handed_over`

Lightning calls `prepare_data` on local rank 0 only, and lets the others wait at a barrier of its
own. An error there, or Ctrl-C, is kept until `setup`, so that all ranks end with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from ravine.errors import RunError, UsageError


class Prepared(NamedTuple):
    """The result of a preparation, in plain values, or the error that ended it."""

    content: Any = None
    failure: BaseException | None = None

    @classmethod
    def by(cls, work: Callable[[], Any]) -> "Prepared":
        """Call `work` and keep what it returns or raises."""
        try:
            return cls(work())
        except BaseException as error:  # Ctrl-C too: the other ranks wait for a result
            return cls(failure=error)


def has_ranks(trainer: Any) -> bool:
    """Whether a trainer has several ranks, which have joined their job."""
    several = getattr(trainer, "world_size", 1) > 1
    return several and dist.is_available() and dist.is_initialized()


def handed_over(prepared: Prepared | None, trainer: Any) -> Any:
    """Return what local rank 0 of this machine has prepared, or None. Every rank calls it.

    Args:
        prepared: what this process has prepared, if it has.
        trainer: of this rank.

    Raises:
        PreparationFailed, WrongData: on the other ranks. The rank that failed raises its own error.
    """
    failure = None if prepared is None else prepared.failure
    group: Any = dist.new_group(backend="gloo")
    try:
        found: list[Any] = [None] * dist.get_world_size(group)
        mine = None if prepared is None else (prepared.content, _in_words(failure))
        dist.all_gather_object(found, (trainer.node_rank, mine), group=group)
    except RuntimeError:  # another rank has ended, for example by its own Ctrl-C
        if failure is not None:
            raise failure from None
        raise
    finally:
        dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    done = [(node, *each) for node, each in found if each is not None]
    for _, _, words in done:
        if words is not None:
            _raise(*words)
    here = [content for node, content, _ in done if node == trainer.node_rank]
    return (here or [content for _, content, _ in done] or [None])[0]


class PreparationFailed(RunError):
    """Local rank 0 could not prepare the data."""


class WrongData(UsageError):
    """Local rank 0 refuses the data; the text is that of its error."""


def _in_words(failure: BaseException | None) -> tuple[str, str] | None:
    if failure is None:
        return None
    if isinstance(failure, KeyboardInterrupt):
        return "interrupt", ""
    asked = isinstance(failure, UsageError)
    text = str(failure.args[0] if isinstance(failure, LookupError) and failure.args else failure)
    return "asked" if asked else "failed", text or type(failure).__name__


def _raise(kind: str, text: str) -> None:
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "asked":
        raise WrongData(text)
    raise PreparationFailed(f"local rank 0 could not prepare the data, see its output: {text}")
