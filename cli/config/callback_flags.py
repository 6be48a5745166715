"""Flags that change one argument of one callback and leave all others as they are.

    --trainer.callbacks.Muon.lr=0.01            the callback of the class Muon
    --trainer.callbacks.Muon.1.lr=0.01          the second of two callbacks of the class Muon
    --trainer.callbacks.OptimizerPlan.rules.0.lr_scale=2    an element of a list, by its index
    --optimizer.lr=0.01 --schedule.warmup=20    the callback that trains: OptimizerPlan, Muon
    --optimizer=SGD                             the same with another optimizer

The parser first builds the list of callbacks, from configs, other flags and the checkpoint. These
flags are then applied to that list, in the order in which they were typed. The plain form
`--trainer.callbacks.lr`, which addresses the last callback, is left to the parser.
"""

import argparse
import functools
import inspect
import json
import shlex
from collections import deque
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import AdamW, Optimizer

from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.errors import UsageError, suggest_names

from ..discovery.class_pages import EXAMPLE_VALUES
from ..error_report import program_name
from ..trainer import DEFAULT_CALLBACKS, EQUIVALENT_CLASSES
from . import flag_guesses, typehints
from .callback_arguments import (
    FLAG_PREFIX,
    CallbackSpec,
    argument_paths,
    class_name,
    find_argument,
    flag_of,
    flags_of_argument,
    is_plan,
    load_class,
    nearest_paths,
    numbered_name,
    optimizers_of,
)
from .errors import ConfigErrorFinder, check_class_text
from .optimizer_choice import choose_optimizer, with_optimizer
from .values import ConfigValue, parse_node

CALLBACKS_KEY = "trainer.callbacks"
CLASS_ARGUMENTS = ("optimizer", "aux_optimizer", "rules")  # arguments of plans with classes
SHORT_FORMS = ("optimizer", "schedule")  # --optimizer.KEY, --schedule.KEY


@dataclass(frozen=True)
class CallbackFlag:
    """A flag that addresses a callback of the run.

    Args:
        owner: the name of a class; optimizer or schedule for a short form.
        path: the argument, such as schedule.warmup; it ends in + if the value is appended. ""
            for `--optimizer=NAME`.
        text: the value as typed.
        flag: the flag as typed, without the value.
        number: which of several callbacks of the class, from 0; None without a number.
        is_applied: whether the parser applies it, as `--trainer.callbacks.path` of the last
            callback.
        is_overridden: whether a later `--trainer.callbacks.path` sets the same argument, if the
            callback is the last one.
        is_missing: whether no value was typed.
    """

    owner: str
    path: str
    text: str
    flag: str
    number: int | None = None
    is_applied: bool = False
    is_overridden: bool = False
    is_missing: bool = False

    @property
    def quoted_text(self) -> str:
        """Return the value, quoted for a shell."""
        return shlex.quote(self.text)

    @property
    def location(self) -> str:
        """Return the location for error messages."""
        return f"on the command line, {self.flag}"

    def as_value(self) -> ConfigValue:
        """Return the value with its key as typed."""
        return ConfigValue(self.flag[2:].rstrip("+"), parse_node(self.text), self.flag)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[CallbackFlag]]:
    """Return the arguments for the parser, and the flags that address callbacks by class.

    Args:
        argv: the command and its arguments.
    """
    words: list[str] = []
    flags: list[CallbackFlag] = []
    appended = ""  # the class that the last `--trainer.callbacks+=X` names
    remaining = deque(argv)
    while remaining:
        word = remaining.popleft()
        name, equals, text = word.partition("=")
        # None for any other argument
        flag = _parse_flag(name)
        if flag is None:
            words.append(word)
            if not name.startswith(f"--{CALLBACKS_KEY}"):
                continue
            if not equals and remaining:
                words.append(text := remaining.popleft())
            if name.rstrip("+") == f"--{CALLBACKS_KEY}":
                appended = _last_class_name(text)
                flags = [replace(earlier, is_overridden=False) for earlier in flags]
            else:  # of the last callback
                path = _without_init_args(name.removeprefix(FLAG_PREFIX).split("."))
                flags = [
                    replace(earlier, is_overridden=True) if earlier.path == path else earlier
                    for earlier in flags
                ]
            continue
        # a flag is never the value of the flag before it
        is_missing = not equals and (not remaining or remaining[0].startswith("--"))
        value = text if equals or is_missing else remaining.popleft()
        flag = replace(flag, text=value, is_missing=is_missing)
        # The parser needs a required argument at once.
        if flag.owner == appended and flag.number is None and _is_required(appended, flag.path):
            words.append(f"{FLAG_PREFIX}{flag.path}={value}")
            flag = replace(flag, is_applied=True)
        flags.append(flag)
    return words, flags


def _parse_flag(name: str) -> CallbackFlag | None:
    """Return a flag, without its value; None if it does not address a callback by class.

    Classes begin with a capital letter, and arguments do not.
    """
    if name.startswith(FLAG_PREFIX):
        owner, *segments = name.removeprefix(FLAG_PREFIX).split(".")
        if not owner[:1].isupper() and not owner.isdigit():
            return None
        number = int(segments.pop(0)) if segments and segments[0].isdigit() else None
        return CallbackFlag(owner.rstrip("+"), _without_init_args(segments), "", name, number)
    short, dot, path = name.removeprefix("--").partition(".")
    if name == "--optimizer":
        return CallbackFlag("optimizer", "", "", name)
    if name.startswith("--") and short in SHORT_FORMS and dot:
        return CallbackFlag(short, _without_init_args(path.split(".")), "", name)
    return None


def _without_init_args(segments: Iterable[str]) -> str:
    return ".".join(segment for segment in segments if segment != "init_args")


def _last_class_name(text: str) -> str:
    """Return the class in the value of `--trainer.callbacks+=`; of a list, the last one."""
    value = ConfigValue(CALLBACKS_KEY, parse_node(text), "").value
    value = value[-1] if isinstance(value, list) and value else value
    value = value.get("class_path") if isinstance(value, dict) else value
    return str(value).rpartition(".")[2]


def _is_required(name: str, path: str) -> bool:
    """Return whether an argument of a known callback class has no default."""
    callback_class = load_class(name)
    if callback_class is None:
        return False
    actions = typehints.class_parser(callback_class, 0)._actions
    return any(action.required and action.dest == path for action in actions)


def apply_flags(
    parser: ArgumentParser,
    command: str,
    config: Namespace,
    flags: Sequence[CallbackFlag],
) -> None:
    """Change the callbacks of a parsed configuration, and print what the short forms stand for.

    Args:
        parser: the parser of all commands, for errors.
        command: the command.
        config: the arguments of the command; its list of callbacks is replaced.
        flags: the flags in the order in which they were typed.

    Raises:
        UsageError: no callback or several callbacks match, or an argument or a value is wrong.
    """
    if not flags:
        return
    trainer = config["trainer"]
    callbacks: list[Namespace] = list(trainer.get("callbacks") or [])
    for position, flag in enumerate(flags):
        if flag.owner == "optimizer" and not flag.path:
            model = config.get("model") or {}
            class_path = str(model.get("class_path", model))
            _choose_optimizer(parser, command, callbacks, class_path, flags[position:])
            continue
        if flag.number is None and _is_added_by_trainer(callbacks, flag.owner):
            added = _callback_parser().parse_args([f"--callback={flag.owner}"])
            callbacks.append(cast(Namespace, added.callback))
        specs = [callback.as_dict() for callback in callbacks]
        # the position of the callback in the list, and the path of the argument
        index, path = _resolve(specs, flag, command)
        is_overridden = flag.is_overridden and index == len(callbacks) - 1
        if not flag.is_applied and not is_overridden:
            callbacks[index] = _set_argument(parser, command, callbacks[index], path, flag)
        if flag.owner in SHORT_FORMS:
            full_flag = flag_of(numbered_name(specs, index), path, flag.text)
            rank_zero_only(print)(f"{flag.flag.removeprefix('--')}: {full_flag}")
    trainer["callbacks"] = callbacks


def _is_added_by_trainer(callbacks: Sequence[Namespace], name: str) -> bool:
    """Return whether the trainer adds a callback of this class itself, because none is given."""
    default_class = next((cls for cls in DEFAULT_CALLBACKS if cls.__name__ == name), None)
    if default_class is None:
        return False
    kind = EQUIVALENT_CLASSES.get(default_class, default_class)
    classes = [load_class(str(callback["class_path"])) for callback in callbacks]
    return not any(cls is not None and issubclass(cls, kind) for cls in classes)


def _choose_optimizer(
    parser: ArgumentParser,
    command: str,
    callbacks: list[Namespace],
    model: str,
    flags: Sequence[CallbackFlag],
) -> None:
    """Give the run the optimizer of `--optimizer=NAME`, and print what is kept and lost.

    Args:
        parser: the parser of all commands, for errors.
        command: the command.
        callbacks: the callbacks of the run, one of which is replaced or added.
        model: the class of the model.
        flags: the flag, and those after it, which may set required arguments of the optimizer.
    """
    flag, *later_flags = flags
    specs = [_to_plain(callback) for callback in callbacks]
    if command != "fit" and not any(is_plan(spec) for spec in specs):
        raise _no_plan_error(specs, flag, "", command)
    value = ConfigValue("optimizer", parse_node(flag.text), flag.flag)
    if flag.is_missing or not flag.text:
        names = ["the name of an optimizer"]
        raise UsageError(f"{flag.location}: the value is missing", names, flag="--optimizer=AdamW")
    check_class_text(value)
    if flag.text.rpartition(".")[2] == OptimizerPlan.__name__:
        problem = f"{flag.location}: OptimizerPlan trains with an optimizer, whose name is missing"
        raise UsageError(problem, flag="--optimizer=AdamW")
    finder = ConfigErrorFinder(parser, command)
    # raises an error with the nearest names
    finder.choose_class([(Optimizer, 1), (OptimizerPlan, 0)], "optimizer", value)
    new_class, num_supplied = finder.chosen_classes.get("optimizer", (None, 0))
    actions = typehints.class_parser(new_class, num_supplied)._actions if new_class else ()
    missing = {action.dest for action in actions if action.required}
    required = {
        later.path: get_loader("yaml")(later.text)
        for later in later_flags
        if later.owner == "optimizer" and later.path in missing
    }
    choice = choose_optimizer(specs, flag.text, flag.location, model, required)
    lacking = sorted(missing - required.keys())
    if lacking:
        example = flag_guesses.default_text(cast(type, new_class), lacking[0])
        raise UsageError(
            f"{flag.location}: {flag.text} needs {' and '.join(map(repr, lacking))}",
            flag=f"--optimizer={flag.quoted_text} --optimizer.{lacking[0]}={example}",
        )
    parsed = _callback_parser().parse_args([f"--callback={json.dumps(choice.spec)}"])
    if choice.index is None:
        callbacks.append(cast(Namespace, parsed.callback))
    else:
        callbacks[choice.index] = cast(Namespace, parsed.callback)
    rank_zero_only(print)(f"optimizer: {choice.flags}")
    rank_zero_only(print)(choice.note)


def replacement_notes(values: Iterable[ConfigValue], model: str) -> list[str]:
    """Return a line for each flag or config that discards callbacks or the arguments of a plan.

    Args:
        values: the user's values in order, from configs and flags.
        model: the dotted path of the model's class, which may build its own optimizer.
    """
    notes: list[str] = []
    specs: list[CallbackSpec] = []  # the callbacks of the run so far
    # a plan that an appended plan of its class replaces, its name in flags, and the flags for the
    # arguments that were typed
    replaced: tuple[CallbackSpec, str] | None = None
    kept_flags: list[str] = []
    for value in values:
        key = value.key.rstrip("+")
        if replaced is not None and key.startswith(f"{CALLBACKS_KEY}."):
            plan, name = replaced
            path = _without_init_args(key.removeprefix(f"{CALLBACKS_KEY}.").split("."))
            # the same argument of the plan that is there
            same_paths = find_argument(plan, path)
            if same_paths and path not in CLASS_ARGUMENTS:
                kept_flags.append(flag_of(name, same_paths[0], value.flag_text))
            else:  # another optimizer is meant
                replaced, kept_flags = None, []
        if key != CALLBACKS_KEY:
            continue
        elements = value.children() if isinstance(value.node, yaml.SequenceNode) else [value]
        new: list[CallbackSpec] = [s for element in elements if (s := element.class_spec)]
        if not value.is_appended:
            if specs:
                notes.append(_dropped_note(value, specs, new, model))
            specs, replaced, kept_flags = new, None, []
            continue
        for index, spec in enumerate(specs):
            if new and is_plan(spec) and class_name(spec) == class_name(new[-1]):
                replaced = spec, numbered_name(specs, index)
        specs += new
    if replaced is not None and kept_flags:
        flags = " ".join(kept_flags)
        notes.append(f"to keep the other arguments of the {replaced[1]} that is there: {flags}")
    return notes


def _dropped_note(
    value: ConfigValue, old: Sequence[CallbackSpec], new: Sequence[CallbackSpec], model: str
) -> str:
    """Return the line that names the callbacks that `--trainer.callbacks=X` drops."""
    if plans := [class_name(spec) for spec in new if is_plan(spec)]:
        trains = plans[-1]
    else:
        model_class = load_class(model, LightningModule)
        method = getattr(model_class, "configure_optimizers", None)
        trains = getattr(method, "__qualname__", f"{model}.configure_optimizers")
    source = value.source if value.line else f"{value.source}={shlex.quote(value.flag_text)}"
    keep = "" if value.line else f"; {value.source}+={shlex.quote(value.flag_text)} would keep them"
    names = ", ".join(class_name(spec) for spec in old)
    return f"{source} drops the callbacks {names}{keep}; {trains} now gives the optimizer"


def to_argv(config: Namespace) -> list[str]:
    """Return the flags that set the callbacks of a parsed configuration, for a second parse."""
    callbacks = config["trainer"].get("callbacks") or []
    specs = [_to_plain(callback) for callback in callbacks]
    # null first: a list of the same length would be merged with the one before
    words = [f"--{CALLBACKS_KEY}=null"]
    return [*words, f"--{CALLBACKS_KEY}+={json.dumps(specs)}"] if specs else words


def _resolve(specs: Sequence[CallbackSpec], flag: CallbackFlag, command: str) -> tuple[int, str]:
    """Return the position of the callback that a flag addresses, and the path of its argument."""
    if flag.owner in SHORT_FORMS:
        return _resolve_short_form(specs, flag, command)
    names = [class_name(spec) for spec in specs]
    if flag.owner.isdigit():
        raise _position_error(specs, flag)
    indices = [i for i, name in enumerate(names) if name == flag.owner]
    if not indices:
        raise _missing_callback_error(specs, flag)
    if flag.number is None and len(indices) > 1:
        choices = [flag_of(f"{flag.owner}.{i}", flag.path, flag.text) for i in range(len(indices))]
        raise UsageError(
            f"{flag.location}: the run has {len(indices)} callbacks {flag.owner}",
            choices,
            flag=choices[-1],
        )
    if flag.number is not None and flag.number >= len(indices):
        raise UsageError(
            f"{flag.location}: the run has {len(indices)} callbacks {flag.owner}, numbered from 0",
            [str(i) for i in range(len(indices))],
            flag=flag_of(numbered_name(specs, indices[-1]), flag.path, flag.text),
        )
    index = indices[flag.number or 0]
    if not flag.path:
        raise UsageError(
            f"{flag.location}: no argument of {flag.owner} is named",
            [path for path in argument_paths(specs[index]) if "." not in path],
            flag=f"{program_name()} show {flag.owner}",
        )
    return index, flag.path


def _resolve_short_form(
    specs: Sequence[CallbackSpec], flag: CallbackFlag, command: str
) -> tuple[int, str]:
    """Return the position of the plan that trains, and the path that a short form stands for."""
    # of several plans the last one trains
    plans = [index for index, spec in enumerate(specs) if is_plan(spec)][-1:]
    key = f"schedule.{flag.path}" if flag.owner == "schedule" else flag.path
    if not plans:
        raise _no_plan_error(specs, flag, key, command)
    # the position of each plan with the paths of its arguments
    matches = [(index, path) for index in plans for path in find_argument(specs[index], key)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise _unknown_short_form_error(specs[plans[0]], flag, key)
    choices = [flag_of(numbered_name(specs, index), path, flag.text) for index, path in matches]
    raise UsageError(
        f"{flag.location}: it may mean {len(choices)} arguments of this run",
        choices,
        flag=choices[-1],
    )


def _unknown_short_form_error(plan: CallbackSpec, flag: CallbackFlag, key: str) -> UsageError:
    """Return the error for a short form whose argument the plan does not have."""
    prefix = "schedule." if flag.owner == "schedule" else ""
    paths = [path for path in argument_paths(plan) if path.startswith(prefix)]
    # `nearest_paths`: those that end in the same word, or else similar ones
    near = [path.removeprefix(f"{flag.owner}.") for path in nearest_paths(key, paths)]
    # arguments of an optimizer without the path, as they are typed after --optimizer.
    allowed = [
        path.removeprefix(prefix) if prefix else path.rpartition(".")[2]
        for path in paths
        if prefix or not path.startswith("schedule.")
    ]
    return UsageError(
        f"{flag.location}: {class_name(plan)} has no argument {key!r}",
        near or dict.fromkeys(allowed),
        flag=f"--{flag.owner}.{near[0]}={flag.quoted_text}"
        if near
        else f"{program_name()} show {class_name(plan)}",
        label="nearest" if near else "allowed",
    )


def _position_error(specs: Sequence[CallbackSpec], flag: CallbackFlag) -> UsageError:
    """Return the error for `--trainer.callbacks.0.lr`."""
    names = [class_name(spec) for spec in specs]
    position = int(flag.owner)
    key = f"{flag.number}.{flag.path}" if flag.number is not None else flag.path
    if position < len(specs):
        path = next(iter(find_argument(specs[position], key)), key)
        fixes = [flag_of(numbered_name(specs, position), path, flag.text)]
    else:
        fixes = flags_of_argument(specs, key, flag.text)
    return UsageError(
        f"{flag.location}: a callback is addressed by its class",
        names or ["this run has no callbacks"],
        flag=fixes[0] if fixes else "",
        label="callbacks of the run" if names else "allowed",
    )


def _missing_callback_error(specs: Sequence[CallbackSpec], flag: CallbackFlag) -> UsageError:
    """Return the error for a class that is not in the list: how to add it, or the nearest name."""
    names = list(dict.fromkeys(class_name(spec) for spec in specs))
    problem = f"{flag.location}: the run has no callback {flag.owner}"
    plans = [spec for spec in specs if is_plan(spec)]
    callback_class = load_class(flag.owner)
    trained_by = load_class(flag.owner, Optimizer)
    fixes = []
    # the argument of the run's own plan that was meant, for Muon.lr or AdamW.lr
    is_optimizer = trained_by is not None or is_plan({"class_path": flag.owner})
    if plans and is_optimizer:
        key = flag.path.removeprefix("aux_optimizer.").removeprefix("optimizer.")
        index = max(i for i, spec in enumerate(specs) if spec is plans[-1])
        if len(find_argument(plans[-1], key)) == 1:
            fixes.append(f"--optimizer.{key}={flag.quoted_text}")
        else:  # the optimizers of that class
            fixes += [
                flag_of(numbered_name(specs, index), f"{path}.{key}", flag.text)
                for path, optimizer_class in optimizers_of(plans[-1]).items()
                if optimizer_class is trained_by
            ][:1]
    if callback_class is not None:
        fixes.append(_adding_flags(callback_class, flag))
        if plans and is_optimizer:
            fixes[-1] += f", which replaces {class_name(plans[-1])}"
    elif trained_by is not None:
        fixes = fixes or [f"--optimizer={flag.owner} --optimizer.{flag.path}={flag.quoted_text}"]
    elif near := suggest_names(flag.owner, names):
        fixes.append(flag_of(near[0], flag.path, flag.text))
    elif near := suggest_names(flag.owner, typehints.subclasses_by_name((Callback,))):
        near_class = typehints.subclasses_by_name((Callback,))[near[0]]
        fixes.append(_adding_flags(near_class, flag))
    return UsageError(problem, names, flag=", or ".join(fixes), label="callbacks of the run")


def _adding_flags(callback_class: type, flag: CallbackFlag) -> str:
    """Return the flags that add a callback with an argument; a wrong argument is corrected."""
    spec = {"class_path": f"{callback_class.__module__}.{callback_class.__qualname__}"}
    names = argument_paths(spec)
    segments, text = flag.path.split("."), flag.text
    if any(segment.isdigit() for segment in segments):  # an element of a list that is not there
        first = next(i for i, segment in enumerate(segments) if segment.isdigit())
        is_last = first == len(segments) - 1
        position = int(segments[first])
        segments, text = (segments[:first], f"[{text}]") if is_last else ([], "")
        if len(segments) == 2 and segments[0] in CLASS_ARGUMENTS:  # of AdamW, such as betas
            default = inspect.signature(AdamW).parameters.get(segments[1])
            if default is not None and isinstance(default.default, tuple):
                elements = [
                    flag.text if i == position else v for i, v in enumerate(default.default)
                ]
                text = f"[{','.join(map(str, elements))}]"
    path = ".".join(segments)
    if segments and segments[0].rstrip("+") not in names:
        path = next(iter(nearest_paths(path, names)), "")
    values: dict[str, str] = {}
    # an optimizer needs a class before its arguments, and OptimizerPlan needs an optimizer
    parent = path.partition(".")[0] if "." in path else ""
    if parent in CLASS_ARGUMENTS:
        values[parent] = "AdamW"
    elif callback_class is OptimizerPlan and path != "optimizer":
        values["optimizer"] = "AdamW"
    if path:
        values[path] = text
    for action in typehints.class_parser(callback_class, 0)._actions:
        if action.required and action.dest not in values:
            values[action.dest] = EXAMPLE_VALUES.get(action.dest, "VALUE")
    words = [f"{FLAG_PREFIX[:-1]}+={callback_class.__name__}"]
    words += [f"{FLAG_PREFIX}{name}={shlex.quote(text)}" for name, text in values.items()]
    return " ".join(words)


def _no_plan_error(
    specs: Sequence[CallbackSpec], flag: CallbackFlag, key: str, command: str
) -> UsageError:
    """Return the error for a short form in a run without OptimizerPlan."""
    if command != "fit":
        return UsageError(
            f"{flag.location}: {command} trains nothing", flag=f"{command} without it"
        )
    return UsageError(
        f"{flag.location}: no callback of the run trains, the model builds its own optimizer",
        [class_name(spec) for spec in specs] or "no callbacks",
        flag=f"--optimizer=AdamW {flag.flag}={flag.quoted_text}",
        label="callbacks of the run",
    )


@functools.cache
def _callback_parser() -> ArgumentParser:
    """Return a parser for one callback: `--callback.lr=0.01` changes one argument of it."""
    parser = ArgumentParser(exit_on_error=False)
    # fail_untyped=False: an optimizer of the user's own may have no type for `params`
    parser.add_subclass_arguments(Callback, "callback", fail_untyped=False, required=False)
    return parser


def _to_plain(callback: Namespace) -> dict[str, Any]:
    """Return a parsed callback as plain values."""
    text = _callback_parser().dump(Namespace(callback=callback), format="json", skip_unset=False)
    return json.loads(text)["callback"]


def _set_argument(
    parser: ArgumentParser, command: str, callback: Namespace, path: str, flag: CallbackFlag
) -> Namespace:
    """Return a callback with one argument changed.

    Args:
        parser: the parser of all commands, for errors.
        command: the command.
        callback: class_path and init_args, as the parser has built them.
        path: the argument; a number is the index of a list.
        flag: the flag with the value.
    """
    segments, text, spec = path.split("."), flag.text, _to_plain(callback)
    if flag.is_missing:
        message = f"{flag.location}: the value is missing"
        error = argparse.ArgumentError(None, message)
        _raise_argument_error(parser, command, callback, path, text, flag, error)
    if path in optimizers_of(spec) and load_class(text, Optimizer):
        # arguments of the old optimizer stay only if they were set and the new one has them
        spec, note = with_optimizer(spec, path, text)
        rank_zero_only(print)(note)
        parsed = _callback_parser().parse_args([f"--callback={json.dumps(spec)}"])
        return cast(Namespace, parsed.callback)
    if any(segment.rstrip("+").isdigit() for segment in segments):
        # the parser has no form for an element: the whole list is set
        path, text = _changed_list(spec, segments, flag)
    try:
        changed = _callback_parser().parse_args(
            [f"--callback={json.dumps(spec)}", f"--callback.{path}={text}"]
        )
    except argparse.ArgumentError as error:
        _raise_argument_error(parser, command, callback, path, text, flag, error)
    return cast(Namespace, changed.callback)


def _changed_list(spec: dict[str, Any], segments: list[str], flag: CallbackFlag) -> tuple[str, str]:
    """Return the path of the list in which a flag changes an element, and the list as JSON."""
    first = next(i for i, segment in enumerate(segments) if segment.rstrip("+").isdigit())
    changed: Any = deepcopy(spec)
    for segment in segments[:first]:
        changed = _child(changed, segment)
    container: Any = changed
    for position, segment in enumerate(segments[first:]):
        key: Any = segment
        if isinstance(container, list):
            if not segment.isdigit() or int(segment) >= len(container):
                start, _, end = flag.flag.rpartition(f".{segment}")
                raise UsageError(
                    f"{flag.location}: {'.'.join(segments[: first + position])} has "
                    f"{len(container)} elements, numbered from 0",
                    [str(i) for i in range(len(container))],
                    flag=f"{start}.{len(container) - 1}{end}={flag.quoted_text}"
                    if container
                    else "",
                )
            key = int(segment)
        elif isinstance(container, dict) and "class_path" in container:
            container = container.setdefault("init_args", {})
        if not isinstance(container, dict | list):
            raise UsageError(
                f"{flag.location}: {'.'.join(segments[: first + position])} has no arguments"
            )
        if position == len(segments) - first - 1:
            container[key] = get_loader("yaml")(flag.text)  # reads 1e-3 as a number
        else:
            container = container[key] if isinstance(container, list) else container.get(key)
    return ".".join(segments[:first]), json.dumps(changed)


def _child(value: Any, name: str) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        value = value.get("init_args") or {}
    return value.get(name) if isinstance(value, dict) else None


def _raise_argument_error(
    parser: ArgumentParser,
    command: str,
    callback: Namespace,
    path: str,
    text: str,
    flag: CallbackFlag,
    error: argparse.ArgumentError,
) -> NoReturn:
    """Raise the error that names the wrong argument or value of a flag.

    Args:
        parser: the parser of all commands.
        command: the command.
        callback: the callback before the change.
        path: the argument that is set.
        text: the value of that argument.
        flag: the flag as typed.
        error: the parser's error.
    """
    spec = _to_plain(callback)
    paths = argument_paths(spec)
    name = class_name(spec)
    first = path.partition(".")[0].rstrip("+")
    if paths and first not in paths:
        # such as lr of OptimizerPlan, which is optimizer.lr
        near = nearest_paths(path, paths)
        prefix = flag.flag.removesuffix(".".join(flag.path.split("."))).rstrip("+")
        raise UsageError(
            f"{flag.location}: {name} has no argument {first!r}",
            near or [p for p in paths if "." not in p],
            flag=f"{prefix}{(near or paths)[0]}={flag.quoted_text}",
            label="nearest" if near else "allowed",
        ) from error
    parent = path.rpartition(".")[0]
    if parent in CLASS_ARGUMENTS and (spec.get("init_args") or {}).get(parent) is None:
        # rules may have optimizers of their own
        key = path.rpartition(".")[2]
        others = [p for p in nearest_paths(path, paths) if p.endswith(f".{key}")]
        prefix = flag.flag.removesuffix(flag.path)
        if others:
            raise UsageError(
                f"{flag.location}: no class is set for {parent!r} of {name}",
                others,
                flag=f"{prefix}{others[0]}={flag.quoted_text}",
                label="nearest",
            ) from error
        parent_flag = f"{flag.flag.rpartition('.')[0]}=AdamW"
        raise UsageError(
            f"{flag.location}: no class is set for {parent!r} of {name}",
            hint=f"set {parent}",
            flag=f"{parent_flag} {flag.flag}={flag.quoted_text}",
        ) from error
    # reads values against the types of the arguments, and raises an error that names the wrong one
    finder = ConfigErrorFinder(parser, command)
    spec_value = ConfigValue(CALLBACKS_KEY, yaml.compose(json.dumps(spec)), flag.flag)
    finder.check_value(Callback, CALLBACKS_KEY, [], spec_value)
    if CALLBACKS_KEY in finder.chosen_classes:
        # the key of a whole list, so that the keys of its elements are those that were typed
        index_part = flag.path.removeprefix(path) if flag.path.startswith(f"{path}.") else ""
        typed_key = flag.flag.removeprefix("--").rstrip("+").removesuffix(index_part)
        node = parse_node(text)
        value = ConfigValue(typed_key, node, flag.flag, is_missing=flag.is_missing)
        class_parser = typehints.class_parser(*finder.chosen_classes[CALLBACKS_KEY])
        finder.check_key(class_parser, CALLBACKS_KEY, path, value)
    raise UsageError(f"{flag.location}={flag.quoted_text}: {error}") from error
