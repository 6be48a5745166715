"""The front door: what can be answered without torch is answered here, in the standard library."""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from ravine.errors import UsageError

from . import error_report as errors
from . import help_text as pages
from .config import environment, presets

# A command and the module whose `run(argv) -> int` does it; one that needs no model has its own.
COMMANDS: dict[str, str] = dict.fromkeys(
    ("fit", "validate", "test", "predict"), "ravine.cli.command"
) | {"generate": "ravine.cli.commands.generate", "export": "ravine.cli.commands.export"}


def main(argv: list[str] | None = None) -> int:
    """Run the program with the words ``argv``, those of the shell by default; return its status."""
    return told(outcome(sys.argv[1:] if argv is None else argv))


def told(status: int) -> int:
    """Write a stop or a refusal to the file that a launcher names, and end with 0.

    torchrun starts again whatever ends otherwise; configs/cluster/torchrun.sh reads the file.
    """
    path = os.environ.get("RAVINE_STATUS")
    if path is None or status in (0, 1):
        return status
    with open(path, "w") as file:
        file.write(str(status))
    return 0


def outcome(argv: list[str]) -> int:
    """Do what the words say.

    0: done. 1: the run failed. 2: a mistake of the user's. 130: Ctrl-C. Where the traceback of an
    exception has to be shown (`errors.status` decides), the exception is left to pass through.
    """
    words = list(argv)
    if "--debug" in words:
        words = [w for w in words if w != "--debug"]
        os.environ["RAVINE_DEBUG"] = "1"  # the ranks that Lightning starts inherit it
    try:
        if asks_only(words):
            return answer(words)
        with signals_held(), errors.threads_silent():
            return start(words)
    except KeyboardInterrupt:
        return errors.interrupted(words)
    except SystemExit as leave:
        if isinstance(leave.__context__, KeyboardInterrupt):  # before our handler: Lightning's 1
            return errors.interrupted(words)
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception as raised:
        error = errors.original(raised)
        status = errors.status(error)
        if status is None:
            told = sharding_error(error)
            if told is None:
                raise error from error.__cause__
            error, status = told, 2
        if os.environ.get("RAVINE_DEBUG"):
            traceback.print_exc()
        errors.say(errors.words(error, words))
        return status


def sharding_error(error: Exception) -> Exception | None:
    """An error of sharded tensors in a hook of a module or callback, as one line; else None."""
    found = sys.modules.get("ravine.strategies.sharding_errors")  # with it, something was sharded
    if found is None or os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0"):
        return None
    if not found.of_shards(error):
        return None
    return found.ShardingError(found.text("the module or a callback", error, "in a hook"))


def asks_only(words: list[str]) -> bool:
    """Whether a page or the version is all that is wanted."""
    return not words or bool({"-h", "--help", "--version"} & set(words))


def answer(words: list[str]) -> int:
    """Print a page or the version."""
    if "--version" in words:
        text = pages.version()
    else:
        command = split(words)[0] if words and words[0][0] != "-" else None
        text = pages.page(command, errors.program())
    sys.stdout.write(text)
    return 0


def split(words: list[str]) -> tuple[str, list[str], list[str]]:
    """The command, the names of the configs in their order, and the other words in theirs."""
    configs, rest = [], []
    each = iter(words)
    for word in each:
        if word in ("-c", "--config"):
            configs.append(next(each, ""))
        elif word.startswith(("-c=", "--config=")):
            configs.append(word.partition("=")[2])
        else:
            rest.append(word)
    command = next((word for word in rest if word in COMMANDS), None)
    if command is None:
        wrong = rest[0] if rest and not rest[0].startswith("-") else ""

        def fix(name: str) -> str:
            others = [word for word in words if word != wrong]
            return shlex.join([errors.program(), name, *others])

        if not wrong:
            raise UsageError("no command was given", COMMANDS, flag=fix("fit"))
        raise errors.unknown_name(f"no command is called {wrong!r}", wrong, COMMANDS, fix, "fit")
    rest.remove(command)
    return command, configs, rest


def arrange(words: list[str]) -> list[str]:
    """The command, then every config by its path, then the rest; arranged words stay as they are.

    A config that comes later than `--trainer.callbacks+=EMA` would take the callback back.
    """
    command, configs, rest = split(words)
    return [command, *(f"--config={presets.find(name)}" for name in configs), *rest]


def start(words: list[str]) -> int:
    """Check what can be checked cheaply, then hand the words over to the command."""
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder you are in has been removed", flag="cd FOLDER") from error
    argv = arrange(words)
    environment.check(os.environ, argv[0], COMMANDS)
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    for path in configs:
        presets.check(path)
    presets.check_order(configs)
    presets.checkpoint(argv)
    sys.argv[1:] = argv  # in place: Lightning's launcher runs sys.argv again in the other ranks
    if sys.path[0] != here:  # a console script has its own bin/ there
        sys.path.insert(0, here)
    return load(COMMANDS[argv[0]]).run(["--help" if w == "--help=all" else w for w in argv])


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back SIGUSR1, by which a cluster says that it will take the machine away.

    It kills a process that has no handler yet: sent while torch was being imported, it ended the
    job with nothing saved. Held, it waits for the handler of
    `callbacks/checkpointing/graceful_stop.py`, which lets it
    through; one that comes when all is done is dropped.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        if signal.SIGUSR1 in signal.sigpending():
            signal.sigwait({signal.SIGUSR1})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load(module: str) -> ModuleType:
    """Import the module of a command, and with it torch: four seconds, and far more on a cold disk.

    On a terminal a line says so, and goes when that is done.
    """
    shown = sys.stderr.isatty() and "LOCAL_RANK" not in os.environ and module not in sys.modules
    if shown:
        sys.stderr.write("loading torch and lightning ...")
        sys.stderr.flush()
    try:
        return import_module(module)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise UsageError(
            "torch and torchvision are not of one build, so torchvision cannot be imported",
            flag="pip install --force-reinstall torch torchvision",
        ) from error
    finally:
        if shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
