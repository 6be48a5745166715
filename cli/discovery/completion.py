"""Words that complete a command line: commands, configs, flags, class names and their values."""

import os
import re
import shlex
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .. import help_text
from ..config import presets
from ..run_folders import index
from . import class_pages, config_pages, registry, source_index
from .source_index import Parameter

TRAINING_COMMANDS = ("fit", "validate", "test", "predict")
CONFIG_FLAGS = ("-c", "--config")
BARE_FLAGS = ("--print_config", "--help", "--debug", "--help=all", "--allow_changed_data")
CALLBACKS_FLAG = "--trainer.callbacks"
SHORT_FORMS = ("--optimizer", "--schedule")  # arguments of the run's optimizer callback
CLASS_FLAG_KINDS = {  # kinds of the classes that a flag may name
    "--model": ("tasks",),
    "--data": ("data",),
    "--model.rewards": ("rewards",),
    "--trainer.strategy": ("strategies",),
    CALLBACKS_FLAG: ("callbacks", "optimizers"),
    "--optimizer": ("optimizers",),
}
RUNS_VERBS = ("show", "compare", "clean")
FREED_FILES = ("checkpoints", "evaluations", "events", "failed")  # by `runs clean`
RESOLVED_CHECKPOINTS = ("auto", "last", "best")


def complete_line(line: str, commands: Iterable[str]) -> list[str]:
    """Return the words that may replace the last word of a line.

    `starting_with(text, names)` returns the names that begin with the text, sorted.

    Args:
        line: the command line up to the cursor, with the name of the program.
        commands: the commands of the program.
    """
    # as a shell splits them; the last is the word at the cursor, maybe empty
    words = split_words(line)
    typed, current = words[1:-1], words[-1]
    if not typed:
        return starting_with(current, commands)
    command, arguments = typed[0], typed[1:]
    match command:
        case "list":
            names = registry.KINDS if not arguments else ()
            return starting_with(current, names)
        case "show":
            return starting_with(current, [*config_names(), *registry.all_names()])
        case "new":
            names = () if arguments else ("task", "optimizer", "callback", "reward")
            return starting_with(current, names)
        case "completion":
            return starting_with(current, () if arguments else ("bash", "zsh"))
        # a run may be named by its folder, so paths are offered too
        case "runs" if not current.startswith("-"):
            if arguments == ["clean"]:
                return starting_with(current, FREED_FILES)
            names = [*run_names(), "last"] if arguments else [*RUNS_VERBS, *run_names()]
            return [*starting_with(current, names), *file_names(current or "runs/")]
    # the word before is a flag without its value, which this word is
    if arguments and is_open(arguments[-1]) and not current.startswith("-"):
        return flag_values(command, arguments[-1], current, arguments[:-1])
    flag, equals, value = current.partition("=")
    if equals:
        # the values that begin with `value` replace this flag
        values = flag_values(command, flag, value, arguments)
        return [f"{flag}={word}" for word in values]
    if current and not current.startswith("-"):
        return []
    flags = flag_names(command, current, arguments)
    # a word that is complete needs no proposal of itself
    return [flag for flag in starting_with(current, flags) if flag != current]


def is_open(word: str) -> bool:
    """Return whether a word is a flag that takes the next word as its value."""
    return word in CONFIG_FLAGS or (
        word.startswith("--") and "=" not in word and word not in BARE_FLAGS
    )


def run_names() -> list[str]:
    """Return the short names of the runs below `runs`, such as spam/quick/3."""
    root = Path("runs")
    return [index.run_name_of(folder, root) for folder in index.find_run_folders(root)]


def split_words(line: str) -> list[str]:
    """Split a line as a shell does; the last word is the one at the cursor, perhaps empty."""
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote
        words = line.split()
    return words if line and not line[-1].isspace() and words else [*words, ""]


def starting_with(prefix: str, names: Iterable[str]) -> list[str]:
    """Return the names with this prefix, sorted."""
    return sorted({name for name in names if name.startswith(prefix)})


def config_names() -> list[str]:
    """Return the presets and the YAML files of the current folder."""
    return [*presets.list_presets(), *(path.name for path in Path().glob("[!.]*.yaml"))]


def file_names(prefix: str) -> list[str]:
    """Return the files and folders with this prefix; a folder ends in /."""
    folder, _, start = prefix.rpartition("/")
    root = Path(folder or ("/" if prefix.startswith("/") else "."))
    try:
        paths = [path for path in root.iterdir() if path.name.startswith(start)]
    except OSError:
        return []
    head = prefix[: len(prefix) - len(start)]
    return sorted(f"{head}{path.name}{'/' * path.is_dir()}" for path in paths)


def flag_values(command: str, flag: str, value: str, arguments: list[str]) -> list[str]:
    """Return the values of a flag that begin as typed.

    Args:
        command: fit, or another command.
        flag: the flag, such as --model.net.
        value: what is typed of the value.
        arguments: the words between the command and this flag, which may name configs and classes.
    """
    if flag in CONFIG_FLAGS:
        return starting_with(value, config_names()) or file_names(value)
    if flag == "--ckpt_path":
        # RESOLVED_CHECKPOINTS: auto, last and best, which are no files
        names = [*RESOLVED_CHECKPOINTS, *run_names()]
        return [*starting_with(value, names), *file_names(value)]
    if command not in TRAINING_COMMANDS:  # list, show and so on have no flags with values
        return []
    # `--trainer.callbacks+=X` adds to a list
    key = flag.rstrip("+")
    # flags whose value is the name of a class, such as --model
    if key in CLASS_FLAG_KINDS or key.endswith((".optimizer", "_optimizer")):
        return class_names(key, value)
    head, _, name = key.rpartition(".")
    if name == "source" and head == "--data":
        return starting_with(value, source_names(named_class(head, arguments))) or file_names(value)
    # the arguments of the class that `head`, such as --model, has in this line
    for p in section_parameters(head, arguments):
        if p.name == name:
            return starting_with(value, map(str, choices(p))) or file_names(value)
    return []


def class_names(flag: str, prefix: str) -> list[str]:
    """Return the classes that a flag may name and that begin with a prefix."""
    kinds = CLASS_FLAG_KINDS.get(flag, ("optimizers",))
    entries = [e for kind in kinds for e in registry.entries_of(kind, has_prefix(prefix))]
    if flag == CALLBACKS_FLAG:
        entries = [e for e in entries if e.kind == "callbacks" or e.is_plan]
    elif flag not in CLASS_FLAG_KINDS:
        entries = [e for e in entries if not e.is_plan]
    elif flag == "--optimizer":  # a class, or a callback such as Muon
        entries = [e for e in entries if e.name != "OptimizerPlan"]
    elif flag == "--data":
        entries = [e for e in entries if e.path]
    return sorted({entry.name for entry in entries})


def has_prefix(prefix: str) -> Callable[[str], bool]:
    """Return a function that tells whether a name begins with a prefix."""
    return lambda name: name.startswith(prefix)


def source_names(datamodule: str) -> list[str]:
    """Return the data sets that a datamodule knows by name."""
    entries = registry.installed_entries("data")
    return [e.name for e in entries if f"--data={datamodule} " in e.group]


def choices(parameter: Parameter) -> list[object]:
    """Return the values of a Literal or a bool."""
    if re.search(r"\bbool\b", parameter.annotation):
        return ["true", "false"]
    return source_index.literal_choices(parameter.annotation, parameter.source)


def flag_names(command: str, current: str, arguments: list[str]) -> list[str]:
    """Return the flags of a command; those below `--model.` once that much is typed.

    Args:
        command: fit, or another command.
        current: what is typed of the flag.
        arguments: the words between the command and this flag.
    """
    if command not in TRAINING_COMMANDS:
        # other commands have no parser: their flags are read from the text of their help page
        flags = re.findall(r"--[a-z]\w*(?==)", page_text(command))
        return [f"{flag}=" for flag in flags if flag != "--key"]
    head = current.rpartition(".")[0]
    # the arguments of the class that `head`, such as --model, has in this line
    parameters = section_parameters(head, arguments) if head else []
    if parameters or head == CALLBACKS_FLAG:
        flags = []
        if head == CALLBACKS_FLAG:  # one callback of the run: --trainer.callbacks.Muon.
            names = [class_path(spec).rpartition(".")[2] for spec in run_callbacks(arguments)]
            flags += [f"{head}.{name}." for name in names]
        for p in parameters:
            name = f"{head}.{p.name}"
            flags.append(f"{name}=")
            # such an argument has arguments of its own below it
            has_arguments = name == CALLBACKS_FLAG or named_class(name, arguments)
            if has_arguments or class_pages.dataclass_fields(p):
                flags.append(f"{name}.")
        return [*flags, *([f"{CALLBACKS_FLAG}+="] if head == "--trainer" else [])]
    sections = ("--model", "--data", "--trainer")
    names = [f"{name}=" for name in ("--config", "--ckpt_path", "--seed_everything", "--trust")]
    names += ["--allow_changed_data", "--optimizer="] if command == "fit" else []
    names += [f"{name}=" for name in sections[:2]]
    names += [f"{name}." for name in (*sections, *SHORT_FORMS)]
    return [*names, *BARE_FLAGS]


def page_text(command: str) -> str:
    """Return the help page of a command; "" for a command without one."""
    try:
        return help_text.help_text(command, "lightning")
    except (KeyError, ValueError):
        return ""


def section_parameters(head: str, arguments: list[str]) -> list[Parameter]:
    """Return the arguments below `--model`, `--trainer.callbacks.Muon`, `--optimizer` or others."""
    if head == "--trainer":
        entry = registry.find_named("Trainer")
        return (entry[0].parameters or []) if entry else []
    if head in SHORT_FORMS:
        return short_form_parameters(head, arguments)
    if name := named_class(head, arguments):
        return config_pages.class_parameters(name) or []
    outer, _, name = head.rpartition(".")
    if not outer:
        return []
    for p in section_parameters(outer, arguments):
        if p.name == name:
            return class_pages.dataclass_fields(p)
    return []


def short_form_parameters(head: str, arguments: list[str]) -> list[Parameter]:
    """Return the arguments below `--schedule` or `--optimizer`: of the run's optimizer callback.

    Those of the optimizer that OptimizerPlan is given follow its own.
    """
    if head == "--schedule":
        return config_pages.class_parameters("LRSchedule") or []
    if name := named_class(head, arguments):  # of --optimizer=NAME
        return config_pages.class_parameters(name) or []
    parameters: list[Parameter] = []
    for spec in run_callbacks(arguments):
        entries = registry.find_named(class_path(spec))
        if entries and entries[0].is_plan:
            inner = nested_class(spec, ["optimizer"])
            parameters += entries[0].parameters or []
            parameters += (config_pages.class_parameters(inner) or []) if inner else []
    return parameters


def named_class(head: str, arguments: list[str]) -> str:
    """Return the class whose arguments a flag sets: that of an earlier flag or of a config."""
    names = [
        word.partition("=")[2]
        for word in arguments
        if word.partition("=")[0].rstrip("+") == head and "=" in word
    ]
    if names:
        return names[-1]
    callbacks = run_callbacks(arguments)
    if head == CALLBACKS_FLAG:
        return class_path(callbacks[-1]) if callbacks else ""
    if head.startswith(f"{CALLBACKS_FLAG}."):
        # --trainer.callbacks.Muon.aux_optimizer: the class Muon, and the path aux_optimizer
        owner, *path = head.removeprefix(f"{CALLBACKS_FLAG}.").split(".")
        for spec in callbacks:
            if class_path(spec).rpartition(".")[2] == owner:
                return nested_class(spec, path)
        # of the last callback: --trainer.callbacks.optimizer
        return nested_class(callbacks[-1], [owner, *path]) if callbacks else ""
    spec = merged_config(arguments).get(head.removeprefix("--"))
    return class_path(spec)


def nested_class(spec: object, path: list[str]) -> str:
    """Return the class at a path below a mapping with class_path; "" if none is named there."""
    for name in path:
        arguments = spec.get("init_args") if isinstance(spec, dict) else None
        spec = arguments.get(name) if isinstance(arguments, dict) else None
    return class_path(spec)


def run_callbacks(arguments: list[str]) -> list[object]:
    """Return the callbacks of the configs and flags of a line, in the form of a config."""
    trainer = merged_config(arguments).get("trainer") or {}
    callbacks: list[object] = list(trainer.get("callbacks") or ())
    for word in arguments:
        flag, equals, value = word.partition("=")
        if equals and flag.rstrip("+") == CALLBACKS_FLAG:
            kept = callbacks if flag.endswith("+") else []
            callbacks = [*kept, {"class_path": value}]
    return callbacks


def merged_config(arguments: list[str]) -> dict[str, Any]:
    """Return the values of the configs of a line; later configs replace values of earlier ones."""
    return _merged_config(tuple(config_arguments(arguments)), os.getcwd())


@cache
def _merged_config(names: tuple[str, ...], folder: str) -> dict[str, Any]:
    nodes = []
    for name in names:
        try:
            # `find_config` finds the file of a name; a node is a value with the comment of its line
            nodes.append(config_pages.load_config(presets.find_config(name)))
        except Exception:  # an incomplete or broken config completes nothing
            continue
    merged = config_pages.plain_value(config_pages.merge_configs(nodes)) if nodes else {}
    return merged if isinstance(merged, dict) else {}


def class_path(spec: object) -> str:
    """Return the class that a text or a mapping with class_path names; "" for anything else."""
    if isinstance(spec, str):
        return spec
    return str(spec.get("class_path", "")) if isinstance(spec, dict) else ""


def config_arguments(arguments: list[str]) -> list[str]:
    """Return the names of the configs on a line."""
    names = []
    remaining = iter(arguments)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS:
            names.append(value if equals else next(remaining, ""))
    return names
