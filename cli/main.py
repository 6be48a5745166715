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
    return report_status(run_command(sys.argv[1:] if argv is None else argv))


def report_status(status: int) -> int:
    """Write a stop or a refusal to the file that a launcher names, and end with 0.

    torchrun starts again whatever ends otherwise; configs/cluster/torchrun.sh reads the file.
    """
    path = os.environ.get("RAVINE_STATUS")
    if path is None or status in (0, 1):
        return status
    with open(path, "w") as file:
        file.write(str(status))
    return 0


def run_command(argv: list[str]) -> int:
    """Do what the words say.

    0: done. 1: the run failed. 2: a mistake of the user's. 130: Ctrl-C. Where the traceback of an
    exception has to be shown (`errors.status` decides), the exception is left to pass through.
    """
    args = list(argv)
    if "--debug" in args:
        args = [w for w in args if w != "--debug"]
        os.environ["RAVINE_DEBUG"] = "1"  # the ranks that Lightning starts inherit it
    try:
        if wants_help(args):
            return print_help(args)
        with hold_sigusr1(), errors.silence_thread_errors():
            return run_subcommand(args)
    except KeyboardInterrupt:
        return errors.report_interrupt(args)
    except SystemExit as leave:
        if isinstance(leave.__context__, KeyboardInterrupt):  # before our handler: Lightning's 1
            return errors.report_interrupt(args)
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception as raised:
        error = errors.unwrap_error(raised)
        status = errors.exit_status(error)
        if status is None:
            sharding = as_sharding_error(error)
            if sharding is None:
                raise error from error.__cause__
            error, status = sharding, 2
        if os.environ.get("RAVINE_DEBUG"):
            traceback.print_exc()
        errors.print_error(errors.message_of(error, args))
        return status


def as_sharding_error(error: Exception) -> Exception | None:
    """An error of sharded tensors in a hook of a module or callback, as one line; else None."""
    sharding_errors = sys.modules.get(
        "ravine.strategies.sharding_errors"
    )  # with it, something was sharded
    if sharding_errors is None or os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0"):
        return None
    if not sharding_errors.is_sharding_error(error):
        return None
    return sharding_errors.ShardingError(
        sharding_errors.sharding_error_message("the module or a callback", error, "in a hook")
    )


def wants_help(argv: list[str]) -> bool:
    """Whether a page or the version is all that is wanted."""
    return not argv or bool({"-h", "--help", "--version"} & set(argv))


def print_help(argv: list[str]) -> int:
    """Print a page or the version."""
    if "--version" in argv:
        text = pages.version_text()
    else:
        command = split_argv(argv)[0] if argv and argv[0][0] != "-" else None
        text = pages.help_text(command, errors.program_name())
    sys.stdout.write(text)
    return 0


def split_argv(argv: list[str]) -> tuple[str, list[str], list[str]]:
    """The command, the names of the configs in their order, and the other words in theirs."""
    configs, other_words = [], []
    remaining = iter(argv)
    for word in remaining:
        if word in ("-c", "--config"):
            configs.append(next(remaining, ""))
        elif word.startswith(("-c=", "--config=")):
            configs.append(word.partition("=")[2])
        else:
            other_words.append(word)
    command = next((word for word in other_words if word in COMMANDS), None)
    if command is None:
        unknown_command = (
            other_words[0] if other_words and not other_words[0].startswith("-") else ""
        )

        def suggested_command(name: str) -> str:
            kept_words = [word for word in argv if word != unknown_command]
            return shlex.join([errors.program_name(), name, *kept_words])

        if not unknown_command:
            raise UsageError("no command was given", COMMANDS, flag=suggested_command("fit"))
        raise errors.unknown_name_error(
            f"no command is called {unknown_command!r}",
            unknown_command,
            COMMANDS,
            suggested_command,
            "fit",
        )
    other_words.remove(command)
    return command, configs, other_words


def normalize_argv(argv: list[str]) -> list[str]:
    """The command, then every config by its path, then the rest; arranged words stay as they are.

    A config that comes later than `--trainer.callbacks+=EMA` would take the callback back.
    """
    command, configs, other_words = split_argv(argv)
    return [command, *(f"--config={presets.find_config(name)}" for name in configs), *other_words]


def run_subcommand(raw_argv: list[str]) -> int:
    """Check what can be checked cheaply, then hand the words over to the command."""
    try:
        current_folder = os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder you are in has been removed", flag="cd FOLDER") from error
    argv = normalize_argv(raw_argv)
    environment.check_env_vars(os.environ, argv[0], COMMANDS)
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    for path in configs:
        presets.check_config_file(path)
    presets.check_config_order(configs)
    presets.check_checkpoint_exists(argv)
    sys.argv[1:] = argv  # in place: Lightning's launcher runs sys.argv again in the other ranks
    if sys.path[0] != current_folder:  # a console script has its own bin/ there
        sys.path.insert(0, current_folder)
    return import_command(COMMANDS[argv[0]]).run(
        ["--help" if w == "--help=all" else w for w in argv]
    )


@contextmanager
def hold_sigusr1() -> Iterator[None]:
    """Hold back SIGUSR1, by which a cluster says that it will take the machine away.

    It kills a process that has no handler yet: sent while torch was being imported, it ended the
    job with nothing saved. Held, it waits for the handler of
    `callbacks/checkpointing/graceful_stop.py`, which lets it
    through; one that comes when all is done is dropped.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        if signal.SIGUSR1 in signal.sigpending():
            signal.sigwait({signal.SIGUSR1})
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def import_command(module: str) -> ModuleType:
    """Import the module of a command, and with it torch: four seconds, and far more on a cold disk.

    On a terminal a line says so, and goes when that is done.
    """
    shows_notice = (
        sys.stderr.isatty() and "LOCAL_RANK" not in os.environ and module not in sys.modules
    )
    if shows_notice:
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
        if shows_notice:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
