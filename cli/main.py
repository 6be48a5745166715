"""Command-line entry point: parses the command and answers help and simple errors without torch."""

import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from ravine.errors import UsageError, suggest_names

from . import error_report, help_text
from .config import early_checks, environment, presets, stray_words
from .run_folders import record

# Each command and the module whose `run(argv) -> int` executes it.
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS: dict[str, str] = dict.fromkeys(LIGHTNING_COMMANDS, "ravine.cli.command") | {
    "estimate": "ravine.cli.commands.estimate",
    "generate": "ravine.cli.commands.generate",
    "export": "ravine.cli.commands.export",
}
# Commands that read files only, without torch. Each is the first argument.
LOOKUP_COMMANDS: dict[str, str] = {
    "list": "ravine.cli.commands.list_names",
    "show": "ravine.cli.commands.show",
    "new": "ravine.cli.commands.new_file",
    "completion": "ravine.cli.commands.completion",
    "runs": "ravine.cli.commands.runs",
}
# Commands of other programs.
COMMAND_GUESSES = {
    **dict.fromkeys(("train", "training", "finetune", "run", "start", "resume", "tune"), "fit"),
    **dict.fromkeys(("eval", "evaluate", "evaluation", "val", "validation"), "validate"),
    **dict.fromkeys(("sample", "infer", "inference", "chat", "complete", "prompt"), "generate"),
    **dict.fromkeys(("convert", "save", "merge", "quantize"), "export"),
    **dict.fromkeys(("ls", "search", "find"), "list"),
    **dict.fromkeys(("config", "configs", "presets", "models", "recipes"), "list configs"),
    **dict.fromkeys(("info", "describe", "cat", "print"), "show"),
    **dict.fromkeys(("init", "create", "scaffold"), "new"),
    **dict.fromkeys(("history", "log", "logs", "compare", "status"), "runs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the program with ``argv``, by default that of the shell; return its exit status."""
    return report_status(run_command(sys.argv[1:] if argv is None else argv))


def report_status(status: int) -> int:
    """Write the status of an interrupted or rejected run to $RAVINE_STATUS, and return 0.

    torchrun restarts a job that ends with a status other than 0; configs/cluster/torchrun.sh reads
    the file.
    """
    path = os.environ.get("RAVINE_STATUS")
    if path is None or status in (0, 1):
        return status
    with open(path, "w") as file:
        file.write(str(status))
    return 0


def run_command(argv: list[str]) -> int:
    """Run a command and return its exit status.

    0: success. 1: the run failed. 2: a wrong argument. 130: Ctrl-C. If the traceback of an
    exception must be shown (see `error_report.exit_status`), the exception is raised.
    """
    args = list(argv)
    if "--debug" in args:
        args = [w for w in args if w != "--debug"]
        os.environ["RAVINE_DEBUG"] = "1"  # the ranks that Lightning starts inherit it
    try:
        check_help_topic(args)
        if wants_help(args):
            return print_help(args)
        # commands without training, such as list and show, which do not import torch
        if args[0] in LOOKUP_COMMANDS:
            return run_lookup_command(args)
        # no signal ends the process during imports, and threads print no second traceback
        with hold_sigusr1(), error_report.silence_thread_errors():
            return run_subcommand(args)
    except KeyboardInterrupt:
        return error_report.report_interrupt(args)
    except SystemExit as leave:
        # Ctrl-C before GracefulStop's handler is set: Lightning exits with 1
        if isinstance(leave.__context__, KeyboardInterrupt):
            return error_report.report_interrupt(args)
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except Exception as raised:
        # the error that a class raised in the parser, without the parser's wrapper
        error = error_report.unwrap_error(raised)
        # None: the traceback must be shown
        status = error_report.exit_status(error)
        if status is None:
            # an error of torch for a module that a strategy cannot shard
            sharding_error = as_sharding_error(error)
            if sharding_error is None:
                raise error from error.__cause__
            error, status = sharding_error, 2
        if os.environ.get("RAVINE_DEBUG"):
            traceback.print_exc()
        error_report.print_error(error_report.message_of(error, args))
        return status


def as_sharding_error(error: Exception) -> Exception | None:
    """Convert an error of sharded tensors in a hook to a one-line error; None for other errors."""
    sharding_errors = sys.modules.get(
        "ravine.strategies.sharding_errors"
    )  # it is imported if something was sharded
    if sharding_errors is None or os.environ.get("RAVINE_TRACEBACK", "") not in ("", "0"):
        return None
    if not sharding_errors.is_sharding_error(error):
        return None
    return sharding_errors.sharding_error("the module or a callback", error, "in a hook")


def wants_help(argv: list[str]) -> bool:
    """Return whether only a help page or the version is requested."""
    return not argv or bool({"-h", "--help", "--version"} & set(argv))


def check_help_topic(argv: list[str]) -> None:
    """Raise UsageError for `--help=NAME`, other than `--help=all`: `show NAME` has that page."""
    for word in argv:
        name = word.removeprefix("--help=")
        if name not in (word, "all"):
            raise UsageError(
                f"{word}: --help shows the arguments of a command, or with =all every argument",
                flag=shlex.join([error_report.program_name(), "show", name]),
            )


def print_help(argv: list[str]) -> int:
    """Print a help page or the version."""
    if "--version" in argv:
        text = help_text.version_text()
    else:
        command = find_command(argv) if argv and argv[0][0] != "-" else None
        text = help_text.help_text(command, error_report.program_name())
    sys.stdout.write(text)
    return 0


def find_command(argv: list[str]) -> str:
    """Return the command; one of LOOKUP_COMMANDS is the first argument."""
    return argv[0] if argv[0] in LOOKUP_COMMANDS else split_argv(argv)[0]


def split_argv(argv: list[str]) -> tuple[str, list[str], list[str]]:
    """Return the command, the names of the configs in order, and the other arguments in order.

    Raises:
        UsageError: no command is given, or it is not known.
    """
    configs, other_words = [], []
    remaining = iter(argv)
    for word in remaining:
        if word in ("-c", "--config"):
            name = next(remaining, "")
            if not name or (name.startswith("-") and name != "-"):
                raise missing_config_error(word, name)
            configs.append(name)
        elif word.startswith(("-c=", "--config=")):
            configs.append(word.partition("=")[2])
        else:
            other_words.append(word)
    # COMMANDS: fit, validate, test, predict, estimate, generate and export
    command = next((word for word in other_words if word in COMMANDS), None)
    if command is None or other_words[0] == "help":
        raise unknown_command_error(argv, other_words[0] if other_words else "")
    other_words.remove(command)
    return command, configs, other_words


def missing_config_error(flag: str, next_word: str) -> UsageError:
    """Return the error for `--config` at the end, or before another flag."""
    behind = f", and {next_word} is another flag" if next_word else ""
    return UsageError(
        f"on the command line, {flag}: the name of a config is missing{behind}",
        ["a preset", "a YAML file"],
        flag="--config=shakespeare/quick",
    )


def unknown_command_error(argv: list[str], first_word: str) -> UsageError:
    """Return the error for a command line without a known command.

    Args:
        argv: the words as typed.
        first_word: the first of them that is not a config.
    """
    names, program = (*COMMANDS, *LOOKUP_COMMANDS), error_report.program_name()
    if first_word in ("-v", "-V", "version"):
        return UsageError(f"no command is called {first_word!r}", flag=f"{program} --version")
    if not first_word or first_word.startswith("-"):
        return UsageError("no command was given", names, flag=suggested_command("fit", [*argv]))
    problem = f"no command is called {first_word!r}"
    other_words = [word for word in argv if word != first_word]
    if first_word == "help":
        topic = [word for word in other_words if word in names][:1]
        return UsageError(problem, names, flag=shlex.join([program, *topic, "--help"]))
    if first_word in presets.list_presets():
        return UsageError(
            f"{problem}, but a config is",
            flag=shlex.join([program, "fit", "--config", first_word, *other_words]),
        )
    if guess := COMMAND_GUESSES.get(first_word.lower()):
        return UsageError(
            problem, [guess], flag=suggested_command(guess, other_words), label="nearest"
        )
    # suggests the nearest command with the other words, or the help page if none is near
    return error_report.unknown_name_error(
        problem,
        first_word,
        names,
        lambda name: suggested_command(name, other_words),
        "fit",
        f"{program} --help",
    )


def suggested_command(command: str, other_words: list[str]) -> str:
    """Return a command with the words as typed, and with the config or checkpoint it needs.

    Args:
        command: the command, and its first argument if there is one: "list configs".
        other_words: the words after it.
    """
    flags = {word.partition("=")[0] for word in other_words}
    needed = {"fit": ["--config", "shakespeare/quick"], "export": ["--ckpt_path=last"]}
    words = needed.get(command, [] if command not in COMMANDS else ["--ckpt_path=last"])
    # also with a typing error, which is reported next
    if "-c" in flags or any(
        suggest_names(flag, ("--config", "--model", "--ckpt_path")) for flag in flags
    ):
        words = []
    if command == "export" and "--folder" not in flags:
        words = [*words, "--folder=exported"]
    return shlex.join([error_report.program_name(), *command.split(" "), *words, *other_words])


def normalize_argv(argv: list[str]) -> list[str]:
    """Return the command, then all configs by path, then the other arguments.

    A config after `--trainer.callbacks+=EMA` would discard that callback. Normalized arguments do
    not change.
    """
    command, configs, other_words = split_argv(argv)
    return [command, *(f"--config={presets.find_config(name)}" for name in configs), *other_words]


def run_lookup_command(argv: list[str]) -> int:
    """Run a command that reads files only; a reader such as `head` may stop reading early."""
    add_current_folder_to_path()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without α shows a ?
    try:
        return import_module(LOOKUP_COMMANDS[argv[0]]).run_argv(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0


def add_current_folder_to_path() -> None:
    """Put the current folder first in the search path; a console script has its bin/ there."""
    try:
        current_folder = os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder has been removed", flag="cd FOLDER") from error
    if sys.path[0] != current_folder:
        sys.path.insert(0, current_folder)


def run_subcommand(raw_argv: list[str]) -> int:
    """Run the checks that need no torch, then call the module of the command."""
    add_current_folder_to_path()
    argv = normalize_argv(raw_argv)
    record.set_typed_command([error_report.program_name(), *raw_argv])
    environment.check_env_vars(os.environ, argv[0], COMMANDS)
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if argv[0] in LIGHTNING_COMMANDS:
        # raises an error for a config, a checkpoint or a sign = without its flag
        stray_words.check_names_of_files(argv)
    for path in configs:
        presets.check_config_file(path)
    presets.check_config_order(configs)
    presets.check_checkpoint_exists(argv)
    if argv[0] in LIGHTNING_COMMANDS:
        early_checks.check_argv(argv)
    sys.argv[1:] = argv  # in place: Lightning's launcher runs sys.argv in other ranks
    return import_command(COMMANDS[argv[0]]).run_argv(
        ["--help" if w == "--help=all" else w for w in argv]
    )


@contextmanager
def hold_sigusr1() -> Iterator[None]:
    """Block SIGUSR1, which a cluster sends before it stops a job.

    Without a handler SIGUSR1 kills the process: sent during the import of torch, it ended a job
    without a checkpoint. The blocked signal stays pending until the handler of
    `callbacks/checkpointing/graceful_stop.py` unblocks it. A signal that arrives after the run is
    discarded.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        if signal.SIGUSR1 in signal.sigpending():
            signal.sigwait({signal.SIGUSR1})  # takes the signal, so that it is not delivered
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def import_command(module: str) -> ModuleType:
    """Import the module of a command, and with it torch: four seconds, and far more on a cold disk.

    On a terminal a line shows this, and is erased after the import.

    Args:
        module: the dotted path of the module.

    Raises:
        UsageError: torchvision does not fit the installed torch.
    """
    # LOCAL_RANK is set in the processes of a launcher, which share one terminal
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
            "torch and torchvision are of different builds, so torchvision cannot be imported",
            flag="pip install --force-reinstall torch torchvision",
        ) from error
    finally:
        if shows_notice:
            sys.stderr.write("\r\x1b[2K")  # to the start of the line; erase it
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
