"""Print the errors that a user can correct: what was given, what is allowed, what to type.

An exception is shown without its traceback if its class is one of `ravine.errors`. Those that the
operating system and Lightning raise are recognised by their class and by the module that raised
them. No source file is read, so it makes no difference through which path the package is imported.
"""

import errno
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from opcode import opmap
from pathlib import Path

from ravine.errors import RunError, UsageError, suggest_names

INTERRUPTED_STATUS = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "out of memory",
)
REFUSED_ERRNOS = (*DISK_FULL_ERRNOS, errno.EACCES, errno.EPERM, errno.EROFS)


def unknown_name_error(
    problem: str,
    word: str,
    allowed: Iterable[str],
    make_flag: Callable[[str], str],
    placeholder: str,
) -> UsageError:
    """The error for a name that does not exist.

    Args:
        problem: where the word stands, and what it is not
        word: the wrong word
        allowed: every right one
        make_flag: what to type, made of the nearest name
        placeholder: what stands in the place of a name if none is near
    """
    allowed = list(allowed)
    if suggestions := suggest_names(word, allowed):
        return UsageError(problem, suggestions, flag=make_flag(suggestions[0]), label="nearest")
    rest_text = [f"and {len(allowed) - 12} more"] if len(allowed) > 12 else []
    short = sorted(allowed, key=lambda name: (len(name), name))[:12]  # variants have longer names
    return UsageError(problem, [*short, *rest_text], flag=make_flag(placeholder))


def program_name() -> str:
    """The name the program was called by: `lightning` and `ravine` are the same."""
    name = Path(sys.argv[0]).stem
    return name if name in ("lightning", "ravine") else "ravine"


def print_error(text: str) -> None:
    """Print one block to stderr, on one rank of a node only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program_name()}: error: {text}\n")


def report_interrupt(argv: list[str]) -> int:
    """Say that Ctrl-C ended the command, before anything took the signals over; the status."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        note = " before the first step: nothing was saved" if "fit" in argv else ""
        sys.stderr.write(f"\nstopped by Ctrl-C{note}\n")
    return INTERRUPTED_STATUS


def message_of(error: Exception, argv: list[str]) -> str:
    """The text to print for an exception.

    A UsageError takes a line for each of its parts: the problem, the allowed values, what to type.
    The system does not say what to do about a full disk or too little memory: that is added.
    """
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        checkpoint_path = getattr(error, "checkpoint", None)
        resume_hint = (
            f"go on with --ckpt_path={checkpoint_path}"
            if checkpoint_path
            else "type the same again"
        )
        loss_note = "" if checkpoint_path or "fit" not in argv else "; no checkpoint was written"
        return f"{error}{loss_note}; make room, then {resume_hint}"
    if isinstance(error, UsageError):
        allowed = [f"  {error.label}: {', '.join(error.allowed)}"] if error.allowed else []
        fix = [f"  type: {error.flag}"] if error.flag else [f"  {error.hint}"] if error.hint else []
        return "\n".join([strip_worker_traceback(error.problem), *allowed, *fix])
    if isinstance(error, RunError):
        return strip_worker_traceback(str(error))
    if invalid_file_name_message(error):
        problem = invalid_file_name_message(error)
        return f"{problem}; allowed: 255 bytes in each part, no NUL; type a shorter name"
    if is_out_of_memory(error):
        error_text = " ".join(str(error).split())[:120] or "no more was to be had"
        return f"out of memory: {error_text}; type a smaller --data.batch_size or a smaller model"
    return str(error.args[0] if isinstance(error, LookupError) else error)


def strip_worker_traceback(text: str) -> str:
    """The message alone of an error in a process of a DataLoader: torch puts a traceback before it.

    torch raises the class again in the main process, with the worker's whole traceback as text.
    """
    if not re.match(r"Caught \w+ in .*\nOriginal Traceback \(most recent call last\):\n", text):
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]


def invalid_file_name_message(error: BaseException) -> str:
    """Why no file can have the name that was asked for; empty for any other error."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(str(error.filename or "").split(os.sep), key=len)
        return f"the name {longest[:40]}... of {len(os.fsencode(longest))} bytes is too long"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a name holds a NUL character"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device had no memory left, however that was put."""
    if isinstance(error, (MemoryError, loaded_exception_class("torch", "OutOfMemoryError"))):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in OUT_OF_MEMORY_TEXTS
    )


@contextmanager
def silence_thread_errors() -> Iterator[None]:
    """Let a thread that the system refuses something (TensorBoard's writer) leave it at that.

    What it meets, it raises once more in the main thread; the first time it is a traceback.
    """
    previous_hook = threading.excepthook

    def thread_hook(hook_args: threading.ExceptHookArgs) -> None:
        if not (
            isinstance(hook_args.exc_value, OSError) and hook_args.exc_value.errno in REFUSED_ERRNOS
        ):
            previous_hook(hook_args)

    threading.excepthook = thread_hook
    try:
        yield
    finally:
        threading.excepthook = previous_hook


def unwrap_error(error: Exception) -> Exception:
    """What a class raised while the parser built it, out of the parser's own wrapping."""
    while isinstance(error.__cause__, Exception) and is_raised_by_parser(error):
        error = error.__cause__
    return error


def is_raised_by_parser(error: BaseException) -> bool:
    """Whether a function of jsonargparse raised the error."""
    return raising_module(error)[0].partition(".")[0] == "jsonargparse"


def raising_module(error: BaseException) -> tuple[str, bool]:
    """The module of the innermost frame of a traceback, and whether a `raise` statement ended it.

    The second is read from the bytecode: False for an exception of the interpreter or of a
    function in C, such as the TypeError of `None + 1`.
    """
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame, instruction = trace.tb_frame, trace.tb_lasti
    is_raise_statement = (
        instruction >= 0 and frame.f_code.co_code[instruction] == opmap["RAISE_VARARGS"]
    )
    return frame.f_globals.get("__name__") or "", is_raise_statement


def loaded_exception_class(module: str, name: str) -> type[BaseException] | tuple[()]:
    """An exception class of a module that may not have been imported; () matches nothing."""
    return getattr(sys.modules.get(module), name, ())


def exit_status(error: Exception) -> int | None:
    """Exit status of a run that ``error`` ended, or None where the traceback has to be shown.

    A UsageError or a RunError carries its exit status: 2 for a mistake in what was asked, 1 for
    what failed during the run. What the operating system refused (a full disk, a folder that may
    not be written) and too little memory are 1.

    An exception of Lightning is 2 if a ``raise`` statement in one of its modules made it, and if
    its class says that an argument is wrong: MisconfigurationException, ValueError, TypeError,
    LookupError, a missing file or package; from its callbacks and connectors RuntimeError too.

    Every other exception (a bug of Ravine, torch, the user's own module) keeps its traceback, a
    ValueError of Ravine that is no UsageError included. RAVINE_TRACEBACK=1 shows all.
    """
    if os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0"):
        return None
    if isinstance(error, UsageError | RunError):
        return error.exit_status
    if isinstance(error, OSError) and error.errno in REFUSED_ERRNOS:
        return 1
    if is_out_of_memory(error):
        return 1
    if invalid_file_name_message(error):
        return 2
    module, is_raise_statement = raising_module(error)
    if not is_raise_statement or module.partition(".")[0] != "lightning":
        return None
    usage_error_types = (ValueError, TypeError, LookupError, FileNotFoundError, ModuleNotFoundError)
    misconfiguration = loaded_exception_class(
        "lightning.fabric.utilities.exceptions", "MisconfigurationException"
    )
    if isinstance(error, (*usage_error_types, misconfiguration)):
        return 2
    # two callbacks of a kind, a metric that nobody logs
    is_known = isinstance(error, RuntimeError) and {"callbacks", "connectors"} & {
        *module.split(".")[-2:-1]
    }
    return 2 if is_known else None
