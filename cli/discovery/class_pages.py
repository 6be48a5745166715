"""The page of a class in `lightning show NAME`: docstring, arguments, and a command with it."""

import ast
import importlib
import inspect
import re
import shlex
from types import ModuleType

from ravine.errors import UsageError, suggest_names

from ..error_report import program_name
from . import registry, source_index
from .config_pages import configs_with_class, scalar
from .registry import Entry
from .source_index import Parameter, UnknownValueError
from .text_layout import two_columns

FUNCTION = "function"  # kind of a function, such as a reward of the user
OTHER_CLASS = ""  # kind of a class that is in no list, such as LRSchedule
SINGULAR = {
    "callbacks": "a callback",
    "optimizers": "an optimizer",
    "strategies": "a strategy",
    "tasks": "a task",
    "data": "a datamodule",
    "rewards": "a reward",
    "samplers": "a sampler",
    "schedules": "a schedule",
    FUNCTION: "a function",
    OTHER_CLASS: "a class",
}
# How a class is named on the command line, and how its arguments are set.
CLASS_FLAGS = {
    "callbacks": ("--trainer.callbacks+={}", "--trainer.callbacks.{}={}"),
    "plan": (
        "--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer={}",
        "--trainer.callbacks.optimizer.{}={}",
    ),
    "strategies": ("--trainer.strategy={}", "--trainer.strategy.{}={}"),
    "tasks": ("--model={}", "--model.{}={}"),
    "data": ("--data={}", "--data.{}={}"),
    "rewards": ("--model.rewards={}", "--model.rewards.{}={}"),
}
# Configs of example commands, in order of preference.
EXAMPLE_CONFIGS = ("shakespeare/quick", "spam/quick", "diffusion/digits", "reinforce/quick")
EXAMPLE_CONFIG_OF = {  # of a class, and of a kind
    "FrechetDistance": "diffusion/digits",
    "InstructionDataModule": "shakespeare/quick",
    "optimizers": "shakespeare/quick_adamw",
    "rewards": "reinforce/quick",
}
# What to type for a required argument: by its name, or by a word of its type hint.
EXAMPLE_VALUES = {
    "path": "FILE",
    "base_checkpoint": "FILE",
    "monitor": "val/loss",
    "reward": "LineLength",
    "scheduling": "{4: 2}",
}
PLACEHOLDERS = {
    "Callable": "my_file.function",
    "int": "10",
    "float": "0.1",
    "bool": "true",
    "Path": "FILE",
    "str": "TEXT",
}


def default_text(parameter: Parameter) -> str | None:
    """Return the default as it is typed: 0.001, true, null; None if a value is required."""
    if parameter.default is None:
        return None
    try:
        return scalar(source_index.default_value(parameter))
    except UnknownValueError:
        return parameter.default


def type_text(parameter: Parameter) -> str:
    """Return the type hint, or the values of a Literal: `spectral | rms`."""
    if choices := source_index.literal_choices(parameter.annotation, parameter.source):
        return " | ".join(map(str, choices))
    return re.sub(r"\s*\|\s*None$", "", parameter.annotation)


def short_arguments(entry: Entry) -> list[str]:
    """Return the arguments as words: `lr=0.02`, or `path=` if a value is required."""
    return [f"{p.name}={default_text(p) or ''}" for p in entry.parameters or ()]


def argument_rows(parameters: list[Parameter], prefix: str = "") -> list[tuple[str, list[str]]]:
    """Return the rows of the arguments; those of a dataclass follow as `schedule.kind`."""
    rows = []
    for p in parameters:
        fields = [] if prefix else dataclass_fields(p)
        default = default_text(p)
        has_value = default is not None and not (fields and default != "null")
        name = f"{prefix}{p.name}={default}" if has_value else f"{prefix}{p.name}"
        hint = ", ".join(filter(None, (type_text(p), "required" if default is None else "")))
        text = ". ".join(filter(None, (hint, p.description)))
        rows.append((name, [text]))
        rows += argument_rows(fields, f"{p.name}.")
    return rows


def dataclass_fields(parameter: Parameter) -> list[Parameter]:
    """Return the fields of an argument that takes a dataclass; none for a list of them."""
    if re.search(r"\b(list|tuple|dict|Sequence|Iterable|Mapping)\[", parameter.annotation):
        return []
    definition = source_index.annotation_dataclass(parameter.annotation, parameter.source)
    return (source_index.parameters_of(definition) or []) if definition else []


def example_command(entry: Entry, program: str) -> str:
    """Return a command that uses a name of a list.

    Args:
        entry: a name of a list, with its kind (tasks, optimizers, callbacks, ...), group and path.
        program: the name of the command line's program.
    """
    fit, name = f"{program} fit --config", entry.name
    match entry.kind:
        case "samplers":
            return f"{program} generate --ckpt_path=last --sampler={name}"
        # a noise schedule of diffusion has a group; others are schedules of the learning rate
        case "schedules" if entry.group:
            return f"{fit} diffusion/digits --model.noise_schedule={name}"
        case "schedules":
            return f"{fit} shakespeare/quick --schedule.kind={name}"
        # a data set without a class of its own is a value of --data.source
        case "data" if not entry.path:
            config = "diffusion/digits" if "images" in entry.group else "shakespeare/quick"
            return f"{fit} {config} --data.source={name}"
        # a preset such as ddp or pp, which has a name but no class of its own
        case "strategies" if not entry.path:
            return f"{fit} shakespeare/quick --trainer.strategy={name} --trainer.devices=2"
    # plan: the callback OptimizerPlan, whose argument `optimizer` names such an optimizer
    is_for_plan = entry.kind == "optimizers" and not entry.is_plan
    style = "plan" if is_for_plan else entry.kind
    # the flag that chooses a class of this kind, and the beginning of flags for its arguments
    class_flag, argument_flag = CLASS_FLAGS.get(style, CLASS_FLAGS["callbacks"])
    # `argument_flags`: flags for the required arguments, or for the first with a plain value
    class_flag, arguments = class_flag.format(name), argument_flags(entry, argument_flag)
    if entry.kind in ("tasks", "data") and name not in EXAMPLE_CONFIG_OF:
        # `complete_only`: only configs that name a model
        used_in = configs_with_class(name, complete_only=True)
        preferred = next(iter([*(c for c in used_in if "quick" in c), *used_in]), "")
        # a class of the user: `partner_flag` names the data of the task, or the task of the data
        pair = [f"{program} fit", class_flag, partner_flag(entry)]
        return " ".join([*([f"{fit} {preferred}"] if preferred else pair), *arguments])
    # is_added: the config lacks the class, so the command adds it by a flag
    config, is_added = example_config(entry)
    return " ".join([f"{fit} {config}", *([class_flag, *arguments] if is_added else [])])


def partner_flag(entry: Entry) -> str:
    """Return the flag of the data of a task, or of the task of a datamodule, in the same file."""
    kind, flag = ("data", "--data") if entry.kind == "tasks" else ("tasks", "--model")
    folder = entry.name.rpartition(".")[0] + "."
    names = [e.name for e in registry.user_entries(kind) if e.name.startswith(folder)]
    return f"{flag}={names[0] if names else 'NAME'}"


def example_config(entry: Entry) -> tuple[str, bool]:
    """Return a config of a task that a class fits, and whether the class must be added to it."""
    fixed = EXAMPLE_CONFIG_OF.get(entry.name) or EXAMPLE_CONFIG_OF.get(entry.kind)
    used_in = configs_with_class(entry.name, complete_only=True)
    tasks = {config.partition("/")[0] for config in used_in}
    if fixed or not tasks:
        return fixed or EXAMPLE_CONFIGS[0], True
    others = [config for config in EXAMPLE_CONFIGS if config not in used_in]
    fitting = [c for c in others if len(tasks) > 1 or c.partition("/")[0] in tasks]
    return (fitting[0], True) if fitting else (used_in[0], False)


def argument_flags(entry: Entry, flag: str) -> list[str]:
    """Return flags for the required arguments, or for the first argument with a plain value."""
    parameters = entry.parameters or []
    if required := [p for p in parameters if p.default is None]:
        return [shlex.quote(flag.format(p.name, placeholder(p))) for p in required]
    for p in parameters:
        text = default_text(p)
        is_known = text not in (None, "null", p.default) or re.fullmatch(r"[\d.+-]+", text or "")
        if is_known and re.fullmatch(r"[\w.+-]+", text or ""):
            return [flag.format(p.name, text)]
    return []


def placeholder(parameter: Parameter) -> str:
    """Return what to type for a required argument."""
    if choices := source_index.literal_choices(parameter.annotation, parameter.source):
        return str(choices[0])
    if parameter.name in EXAMPLE_VALUES:
        return EXAMPLE_VALUES[parameter.name]
    words = re.findall(r"\w+", parameter.annotation)
    return next((text for word, text in PLACEHOLDERS.items() if word in words), "VALUE")


def class_page(entry: Entry, program: str) -> str:
    """Return the page of a name: what it is, its docstring, its arguments, and a command.

    Args:
        entry: the name with its kind, path, docstring and arguments, read from source text.
        program: the name of the command line's program, for the example.
    """
    kind = "a data set" if entry.kind == "data" and not entry.path else SINGULAR[entry.kind]
    lines = [f"{entry.name}: {kind}" + (f", {entry.path}" if entry.path else ""), ""]
    if entry.docstring:
        # the description without its Args section, which the table below shows
        text, _ = source_index.split_docstring(entry.docstring)
        lines += [*source_index.without_directives(text).splitlines(), ""]
    elif entry.summary:
        lines += [f"{entry.summary}.", ""]
    # a preset stands for arguments of MeshStrategy
    if entry.kind == "strategies" and entry.name in registry.strategy_presets():
        _, arguments = registry.strategy_presets()[entry.name]
        values = ", ".join(f"{key}={value}" for key, value in arguments.items())
        lines += [f"The same in Python: MeshStrategy({values})", ""]
    if rows := argument_rows(entry.parameters or []):
        lines += ["Arguments:", *two_columns(rows), ""]
    # a class of none of the lists has no flag that could use it
    if entry.kind not in (OTHER_CLASS, FUNCTION):
        lines += ["Example:", f"  {example_command(entry, program)}", ""]
        if used_in := configs_with_class(entry.name):
            more = f", and {len(used_in) - 6} more" if len(used_in) > 6 else ""
            names = ", ".join(used_in[:6]) + more
            lines += [*two_columns([("Configs that use it:", [names])], 0), ""]
    return "\n".join(lines).rstrip() + "\n"


def find_pages(name: str) -> list[Entry]:
    """Return the entries with a name; an own class is given by its dotted path, mine.SignDescent.

    Raises:
        UsageError: the file of a dotted path cannot be imported, or has no such class.
    """
    if entries := registry.find_named(name):
        return entries
    if re.fullmatch(r"\w+(\.\w+)+", name) and not name.endswith((".yaml", ".yml", ".py")):
        return find_dotted(name)
    return []


def find_dotted(path: str) -> list[Entry]:
    """Return the entry of a class by its dotted path, from its source text or by an import."""
    definition = source_index.find_definition(path)
    if definition and isinstance(definition.node, ast.ClassDef | source_index.FunctionNode):
        other = OTHER_CLASS if isinstance(definition.node, ast.ClassDef) else FUNCTION
        kind = registry.kind_of(definition) or other
        entry = registry.make_entry(definition, kind, "", path)
        if entry.parameters is not None:
            return [entry]
    module, _, name = path.rpartition(".")
    if source_index.find_module_file(module) is None and not source_index.is_installed(module):
        return []
    return [import_entry(module, name)]


def import_entry(module_name: str, name: str) -> Entry:
    """Import a class that cannot be read from source text, and return its entry.

    Args:
        module_name: the dotted path of the module.
        name: the class or function in it.
    """
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's file can raise anything
        # a SyntaxError has the number of its line
        number = getattr(error, "lineno", None)
        line = f" in line {number}" if number else ""
        reason = f"{type(error).__name__}{line}: {getattr(error, 'msg', None) or error}"
        raise UsageError(
            f"{module_name} cannot be imported: {reason.splitlines()[0]}",
            flag=f'python -c "import {module_name}"',
        ) from error
    target = getattr(module, name, None)
    if not callable(target):
        # makes an error with the nearest class names of the module
        raise no_class_error(module, name)
    bases = tuple(base.__name__ for base in getattr(target, "__mro__", ())[1:])
    other = OTHER_CLASS if isinstance(target, type) else FUNCTION
    # KIND_OF_BASE: by name of a base class, the list in which its subclasses are shown
    kind = next((k for base, k in registry.KIND_OF_BASE.items() if base in bases), other)
    text = target.__doc__ or ""
    summary = source_index.first_paragraph(text)
    path, parameters = f"{module_name}.{name}", inspected_parameters(target, text)
    return Entry(path, kind, "", summary, parameters, text, path, bases)


def no_class_error(module: ModuleType, name: str) -> UsageError:
    """Return the error for a dotted path that names no class, with classes of the module."""
    module_name, path = module.__name__, f"{module.__name__}.{name}"
    problem = f"{module_name} has no class {name!r}"
    if isinstance(submodule := getattr(module, name, None), ModuleType):
        problem, module, module_name = (
            f"{path} is a module, and show takes a class",
            submodule,
            path,
        )
    public = getattr(module, "__all__", vars(module))
    class_names = [key for key in public if isinstance(vars(module).get(key), type)]
    # classes that the module defines, rather than imports
    local = [key for key in class_names if vars(module)[key].__module__ == module_name]
    # least=0: names are suggested however little they resemble `name`
    nearest = suggest_names(name, local or class_names, least=0)
    return UsageError(
        problem,
        [f"{module_name}.{other}" for other in nearest],
        flag=f"{program_name()} show {module_name}.{nearest[0] if nearest else 'NAME'}",
        label="nearest",
    )


def inspected_parameters(target: object, text: str) -> list[Parameter]:
    """Return the arguments of an imported class or function.

    Args:
        target: the class or function.
        text: its docstring, whose Args section describes the arguments.
    """
    # by argument, its text in the Args section
    descriptions = source_index.argument_descriptions(text)
    try:
        parameters = inspect.signature(target).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):  # written in C
        return []
    return [
        Parameter(
            p.name,
            "" if p.annotation is p.empty else inspect.formatannotation(p.annotation),
            None if p.default is p.empty else repr(p.default),
            descriptions.get(p.name, ""),
        )
        for p in parameters
        # `params` of an optimizer is given by the trainer, not by the user
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "params"
    ]
