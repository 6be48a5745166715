"""Error reporting: print errors that a user can correct, with allowed values and a suggested flag.

An exception of a class in `ravine.errors` is shown without traceback. Exceptions of the operating
system and of Lightning are recognized by their class and by the module that raised them. No source
file is read, so the import path of the package does not matter.
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

from . import lightning_errors

INTERRUPTED_STATUS = 130  # 128 + SIGINT, as a shell reports Ctrl-C
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "out of memory",
)
BATCH_SIZE_FLAGS = {  # by command; export has no batches
    **dict.fromkeys(("fit", "validate", "test", "predict"), "--data.batch_size=NUMBER"),
    "generate": "--batch_size=NUMBER",
}
REFUSED_ERRNOS = (*DISK_FULL_ERRNOS, errno.EACCES, errno.EPERM, errno.EROFS)


def unknown_name_error(
    problem: str,
    word: str,
    allowed: Iterable[str],
    make_flag: Callable[[str], str],
    placeholder: str,
    fallback: str = "",
) -> UsageError:
    """Return the error for a name that does not exist.

    Args:
        problem: the location of the word and the problem
        word: the wrong word
        allowed: all allowed names
        make_flag: makes the suggested flag from the nearest name
        placeholder: replaces the name in the flag if no name is near
        fallback: the whole flag or command to suggest if no name is near, instead of a placeholder
    """
    allowed = list(allowed)
    # the names that resemble the word; none if all are too different
    if suggestions := suggest_names(word, allowed):
        return UsageError(problem, suggestions, flag=make_flag(suggestions[0]), label="nearest")
    rest_text = [f"and {len(allowed) - 12} more"] if len(allowed) > 12 else []
    short = sorted(allowed, key=lambda name: (len(name), name))[:12]  # variants have longer names
    return UsageError(problem, [*short, *rest_text], flag=fallback or make_flag(placeholder))


def program_name() -> str:
    """Return the name of the called program: `lightning` and `ravine` are the same."""
    name = Path(sys.argv[0]).stem
    return name if name in ("lightning", "ravine") else "ravine"


def print_error(text: str) -> None:
    """Print an error to stderr, on one rank per node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program_name()}: error: {text}\n")


def report_interrupt(argv: list[str]) -> int:
    """Print that Ctrl-C ended the command before a signal handler was set; return the status."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        note = " before the first step: no checkpoint was saved" if "fit" in argv else ""
        error = RunError(f"stopped by Ctrl-C{note}", hint="run the same command to start again")
        sys.stderr.write(f"\n{format_parts(error)}\n")
    return INTERRUPTED_STATUS


def message_of(error: Exception, argv: list[str]) -> str:
    """Return the text to print for an exception that ended a command.

    The errors of Ravine and of the operating system have a line for the problem, for the allowed
    values, and for the fix. An error of Lightning is printed unchanged.

    Args:
        error: an exception for which `exit_status` is not None.
        argv: the command and its arguments.
    """
    if isinstance(error, UsageError | RunError):
        return format_parts(error)
    if (system_error := explain_system_error(error, argv)) is not None:
        return format_parts(system_error)
    # the same error with what to type; None for a text that is not in the table
    if (explained := lightning_errors.explain(str(error), argv)) is not None:
        return format_parts(explained)
    return str(error.args[0] if isinstance(error, LookupError) else error)


def format_parts(error: UsageError | RunError) -> str:
    """Return the parts of an error, one a line: the command line shows its flag, or else its hint.

    A flag follows the word "type". A script shows the hint, because it has no command line.
    """
    allowed = [f"  {error.label}: {', '.join(error.allowed)}"] if error.allowed else []
    fix = [f"  type: {error.flag}"] if error.flag else [f"  {error.hint}"] if error.hint else []
    return "\n".join([strip_worker_traceback(error.problem), *allowed, *fix])


def explain_system_error(error: Exception, argv: list[str]) -> UsageError | RunError | None:
    """Return the parts of an error for which the system gives no advice; None for other errors.

    Such errors are a full disk, a missing permission, too little memory, and an invalid file name.

    Args:
        error: the error that ended the command.
        argv: the command and its arguments.
    """
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        path = getattr(error, "checkpoint", None)  # set by RavineCLI.run_subcommand
        note = "" if path or "fit" not in argv else "; no checkpoint was saved"
        # with a checkpoint, the run can go on from it
        end = f"with --ckpt_path={path}" if path else "again"
        # problem, what is needed, and what to do
        return RunError(
            f"{error.strerror or error}{file_note(error)}{note}",
            "a disk with free space",
            f"free disk space, then run the same command {end}",
        )
    if isinstance(error, OSError) and error.errno in REFUSED_ERRNOS:
        return RunError(
            f"{error.strerror or error}{file_note(error)}",
            "a path with the needed permission",
            "change the permission, or use another path",
        )
    if problem := invalid_file_name_message(error):
        allowed = "at most 255 bytes in each part of the path, and no NUL character"
        return UsageError(problem, allowed, "use another name")
    if is_out_of_memory(error):
        text = " ".join(str(error).split())[:120]
        # set by OutOfMemoryReport, which has printed its table; it knows what saves the most
        report = getattr(error, "memory_report", None)
        if report is not None and report.top_changes():
            change = report.top_changes()[0]
            return RunError(report.title, change.name, change.hint, flag=change.flag)
        # BATCH_SIZE_FLAGS: by command, the flag that makes its batches smaller
        command = next((word for word in argv if word in BATCH_SIZE_FLAGS), "")
        return RunError(
            f"out of memory: {text}" if text else "out of memory",
            "a smaller batch or a smaller model",
            "use a smaller model",
            flag=BATCH_SIZE_FLAGS.get(command, ""),
        )
    return None


def file_note(error: OSError) -> str:
    """Return the file of an error, to be appended to its reason; "" if the system names none."""
    return f": {error.filename}" if error.filename else ""


def strip_worker_traceback(text: str) -> str:
    """Return the message of an error in a DataLoader worker without the worker's traceback.

    torch raises the class again in the main process, with the worker's whole traceback as text.
    """
    if not re.match(r"Caught \w+ in .*\nOriginal Traceback \(most recent call last\):\n", text):
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]


def invalid_file_name_message(error: BaseException) -> str:
    """Return why no file can have the requested name; "" for any other error."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        longest = max(str(error.filename or "").split(os.sep), key=len)
        return f"the file name {longest[:40]}... has {len(os.fsencode(longest))} bytes"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a file name contains a NUL character"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the machine or the device had no memory left."""
    if isinstance(error, (MemoryError, loaded_exception_class("torch", "OutOfMemoryError"))):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in OUT_OF_MEMORY_TEXTS
    )


@contextmanager
def silence_thread_errors() -> Iterator[None]:
    """Suppress tracebacks of threads (TensorBoard's writer) for errors such as a full disk.

    The main thread raises the same error again.
    """
    previous_hook = threading.excepthook

    def thread_hook(hook_args: threading.ExceptHookArgs) -> None:
        error = hook_args.exc_value
        if not (isinstance(error, OSError) and error.errno in REFUSED_ERRNOS):
            previous_hook(hook_args)

    threading.excepthook = thread_hook
    try:
        yield
    finally:
        threading.excepthook = previous_hook


def unwrap_error(error: Exception) -> Exception:
    """Return the exception that a class raised in the parser, without the parser's wrapper."""
    while isinstance(error.__cause__, Exception) and is_raised_by_parser(error):
        error = error.__cause__
    return error


def is_raised_by_parser(error: BaseException) -> bool:
    """Return whether a function of jsonargparse raised the error."""
    return raising_module(error)[0].partition(".")[0] == "jsonargparse"


def raising_module(error: BaseException) -> tuple[str, bool]:
    """Return the module of a traceback's innermost frame, and whether a `raise` statement ended it.

    The second value is read from the bytecode. It is False for an exception of the interpreter or
    of a C function, such as the TypeError of `None + 1`.
    """
    trace = error.__traceback__
    if trace is None:
        return "", False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    instruction = trace.tb_lasti  # offset of the last instruction in the bytecode; -1 for none
    is_raise_statement = (
        instruction >= 0 and frame.f_code.co_code[instruction] == opmap["RAISE_VARARGS"]
    )
    return frame.f_globals.get("__name__") or "", is_raise_statement


def loaded_exception_class(module: str, name: str) -> type[BaseException] | tuple[()]:
    """Return an exception class of a module that may not be imported yet; () matches nothing."""
    return getattr(sys.modules.get(module), name, ())


def exit_status(error: Exception) -> int | None:
    """Return the exit status of a run that ``error`` ended, or None if the traceback must be shown.

    A UsageError or a RunError has its own exit status: 2 for a wrong argument, 1 for a failure
    during the run. Errors of the operating system (a full disk, a folder that may not be written)
    and too little memory are 1.

    An exception of Lightning is 2 if a ``raise`` statement in one of its modules raised it and its
    class means a wrong argument. Such classes are MisconfigurationException, ValueError, TypeError,
    LookupError, FileNotFoundError and ModuleNotFoundError. From its callbacks and connectors,
    RuntimeError is 2 too.

    Every other exception (a bug of Ravine, torch, or the user's module) keeps its traceback,
    including a ValueError of Ravine that is not a UsageError. RAVINE_TRACEBACK=1 shows all
    tracebacks.
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
    # name of the module that raised the error, and whether by a `raise` statement
    module, is_raise_statement = raising_module(error)
    if not is_raise_statement or module.partition(".")[0] != "lightning":
        return None
    usage_error_types = (ValueError, TypeError, LookupError, FileNotFoundError, ModuleNotFoundError)
    # (), which matches no error, if its module is not imported
    misconfiguration = loaded_exception_class(
        "lightning.fabric.utilities.exceptions", "MisconfigurationException"
    )
    if isinstance(error, (*usage_error_types, misconfiguration)):
        return 2
    # for example duplicate callbacks, or a monitored metric that is not logged
    folder = module.rpartition(".")[0].rpartition(".")[2]  # lightning.pytorch.FOLDER.module
    is_known = isinstance(error, RuntimeError) and folder in ("callbacks", "connectors")
    return 2 if is_known else None
