"""A user's mistake in three parts: what was given, what is allowed, what to type."""

import difflib
import errno
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
ROOT = Path(__file__).resolve().parent.parent
OURS = [ROOT / n for n in ("lightning_modules", "datamodules", "callbacks", "strategies", "cli")]
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "out of memory")
REFUSED = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)


class Mistake(ValueError):
    """Something the user can put right by typing another thing; its text says which."""

    def __init__(self, given: str, names: Iterable[str], fix: str, kind: str = "allowed") -> None:
        """Put the three parts together.

        Args:
            given: what was given, and why it cannot be
            names: what is allowed, nearest first; may be empty
            fix: what to type
            kind: the word before the names
        """
        names = list(names)
        middle = [f"  {kind}: {', '.join(names)}"] if names else []
        super().__init__("\n".join([given, *middle, f"  type: {fix}"]))


def nearest(word: str, names: Iterable[str]) -> list[str]:
    """At most three names that ``word`` was probably meant to be, best first, whatever the case."""
    alike = {n: difflib.SequenceMatcher(None, n.lower(), word.lower()).ratio() for n in names}
    enough = max([0.6, *(ratio - 0.15 for ratio in alike.values())])  # 1: the same letters
    near = [name for name in sorted(alike) if alike[name] >= enough]
    return sorted(near, key=lambda name: -alike[name])[:3]


def unknown(
    given: str, word: str, names: Iterable[str], fix: Callable[[str], str], form: str
) -> Mistake:
    """The mistake of a name that does not exist.

    Args:
        given: where the word stands, and what it is not
        word: the wrong word
        names: every right one
        fix: what to type, made of the nearest name
        form: what stands in the place of a name if none is near
    """
    names = list(names)
    if near := nearest(word, names):
        return Mistake(given, near, fix(near[0]), "nearest")
    more = [f"and {len(names) - 12} more"] if len(names) > 12 else []
    short = sorted(names, key=lambda name: (len(name), name))[:12]  # variants have longer names
    return Mistake(given, [*short, *more], fix(form))


def program() -> str:
    """The name the program was called by: `lightning` and `ravine` are the same."""
    name = Path(sys.argv[0]).stem
    return name if name in ("lightning", "ravine") else "ravine"


def say(text: str) -> None:
    """Print one block to stderr, on one rank of a node only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program()}: error: {text}\n")


def interrupted(typed: list[str]) -> int:
    """Say that Ctrl-C ended the command, before anything took the signals over; the status."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        what = " before the first step: nothing was saved" if "fit" in typed else ""
        sys.stderr.write(f"\nstopped by Ctrl-C{what}\n")
    return INTERRUPTED


def words(error: Exception, typed: list[str]) -> str:
    """The text of an exception; that of the system does not say what to do about a full disk."""
    if isinstance(error, OSError) and error.errno in FULL:
        saved = getattr(error, "checkpoint", None)
        again = f"go on with --ckpt_path={saved}" if saved else "type the same again"
        lost = "" if saved or "fit" not in typed else "; no checkpoint was written"
        return f"{error}{lost}; make room, then {again}"
    if bad_name(error):
        return f"{bad_name(error)}; allowed: 255 bytes in each part, no NUL; type a shorter name"
    if out_of_memory(error):
        said = " ".join(str(error).split())[:120] or "no more was to be had"
        return f"out of memory: {said}; type a smaller --data.batch_size or a smaller model"
    return str(error.args[0] if isinstance(error, LookupError) else error)


def bad_name(error: BaseException) -> str:
    """Why no file can have the name that was asked for; empty for any other error."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(str(error.filename or "").split(os.sep), key=len)
        return f"the name {longest[:40]}... of {len(os.fsencode(longest))} bytes is too long"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a name holds a NUL character"
    return ""


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device had no memory left, however that was put."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


@contextmanager
def threads_silent() -> Iterator[None]:
    """Let a thread that the system refuses something (TensorBoard's writer) leave it at that.

    What it meets, it raises once more in the main thread; the first time it is a traceback.
    """
    before = threading.excepthook

    def hook(met: threading.ExceptHookArgs) -> None:
        if not (isinstance(met.exc_value, OSError) and met.exc_value.errno in REFUSED):
            before(met)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def original(error: Exception) -> Exception:
    """What a class raised while the parser built it, out of the parser's own wrapping."""
    while error.__traceback__ and isinstance(error.__cause__, Exception):
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        if "jsonargparse" not in Path(raised).parts:
            break
        error = error.__cause__
    return error


def status(error: Exception) -> int | None:
    """Exit status of a run that ``error`` ended, or None where the traceback has to be shown.

    An exception speaks for itself, without a traceback, only if the statement that raised it is a
    ``raise`` in Ravine or in Lightning: then somebody wrote its text for the user. The same type
    out of any other line (a bug of ours, torch, the user's own module) keeps its traceback.

    2: a mistake in what was asked (ValueError, TypeError, LookupError, a missing file, Lightning's
    MisconfigurationException). 1: what was asked failed on the way (any other exception of ours,
    and what the operating system refused: a full disk, a folder that may not be written). An
    exception of ours that knows better carries `exit_status`. RAVINE_TRACEBACK=1 shows all.
    """
    if os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0"):
        return None
    if isinstance(error, OSError) and error.errno in REFUSED:
        return 1
    if out_of_memory(error):
        return 1
    if bad_name(error):
        return 2
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not linecache.getline(frame.filename, frame.lineno or 0).lstrip().startswith("raise "):
        return None
    source = Path(frame.filename)
    asked = isinstance(error, ValueError | TypeError | LookupError | FileNotFoundError)
    if any(source.is_relative_to(folder) for folder in OURS):
        return getattr(error, "exit_status", 2 if asked else 1)
    lightning = getattr(sys.modules.get("lightning"), "__path__", ["lightning"])[0]
    asked = asked or type(error).__name__ in ("MisconfigurationException", "ModuleNotFoundError")
    if isinstance(error, RuntimeError):  # two callbacks of a kind, a metric that nobody logs
        asked = asked or source.parent.name in ("callbacks", "connectors")
    return 2 if asked and source.is_relative_to(lightning) else None
