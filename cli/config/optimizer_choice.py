"""`--optimizer=NAME`: another optimizer for the callback that trains, and which settings stay.

    OptimizerPlan(AdamW(lr=0.005, betas=...))  --optimizer=SGD      OptimizerPlan(SGD(lr=0.005))
    Muon(lr=0.03, schedule=...)                --optimizer=AdamW    OptimizerPlan(AdamW, schedule)
    OptimizerPlan(AdamW, schedule=...)         --optimizer=Muon     Muon(schedule=...)
    no callback that trains                    --optimizer=SGD      + OptimizerPlan(SGD)

An argument of the old optimizer stays if its value is not the default and the new class has an
argument of that name. All other arguments have the defaults of the new class. If a callback takes
the place of another, only the arguments of every plan stay: decay, schedule, print_groups.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer

from ravine.callbacks import LRSchedule
from ravine.callbacks.optimizers.plan import OptimizerPlan
from ravine.errors import UsageError

from . import typehints
from .callback_arguments import (
    FLAG_PREFIX,
    CallbackSpec,
    argument_names,
    class_name,
    flag_of,
    is_plan,
    load_class,
    numbered_name,
)

PLAN_ARGUMENTS = ("decay", "schedule", "print_groups")  # that every plan has
Spec = dict[str, Any]


class OptimizerChoice(NamedTuple):
    """The callback with another optimizer, and the lines that are printed.

    Args:
        index: position of the callback that it replaces; None if it is added at the end.
        spec: class_path and init_args.
        flags: the flags in full that `--optimizer=NAME` stands for.
        note: what is replaced, kept and lost.
    """

    index: int | None
    spec: Spec
    flags: str
    note: str


def choose_optimizer(
    specs: Sequence[CallbackSpec],
    name: str,
    location: str,
    model: str,
    required: Mapping[str, Any],
) -> OptimizerChoice:
    """Return the callback that trains with the optimizer called `name`.

    Args:
        specs: the callbacks of the run; the last plan among them trains.
        name: an optimizer or a plan, by its bare name or dotted path.
        location: location of the flag, for errors.
        model: dotted path of the model's class, whose own optimizer may be replaced.
        required: arguments of the new class without a default.

    Raises:
        UsageError: the plan has several optimizers.
    """
    index = max((i for i, spec in enumerate(specs) if is_plan(spec)), default=None)
    is_new_plan = load_class(name, OptimizerPlan) is not None
    if index is None:
        replaced = f"the optimizer of {model.rpartition('.')[2]}" if model else "no optimizer"
        new = _new_plan(name, is_new_plan, {}, required)
        return _with_lines(None, new, f"{class_name({'class_path': name})} replaces {replaced}")
    plan = specs[index]
    paths = [] if is_new_plan else _optimizer_paths(plan)
    if len(paths) > 1:
        choices = [flag_of(numbered_name(specs, index), path, name) for path in paths]
        raise UsageError(
            f"{location}: {class_name(plan)} has {len(paths)} optimizers",
            choices,
            flag=choices[-1],
        )
    arguments = _changed_arguments(plan)
    if paths:
        (path,) = paths
        changed, note = with_optimizer(plan, path, name, required)
        flags = flag_of(numbered_name(specs, index), path, name)
        return OptimizerChoice(index, changed, flags, note)
    kept = {key: value for key, value in arguments.items() if key in PLAN_ARGUMENTS}
    if is_new_plan:
        plan_class = load_class(name, OptimizerPlan)
        kept = {k: v for k, v in kept.items() if plan_class and k in argument_names(plan_class)}
    lost = {key: value for key, value in arguments.items() if key not in kept}
    new = _new_plan(name, is_new_plan, kept, required)
    note = _describe(name, class_name(plan), kept, lost)
    return _with_lines(index, new, note)


def with_optimizer(
    plan: CallbackSpec, path: str, name: str, required: Mapping[str, Any] | None = None
) -> tuple[Spec, str]:
    """Return a plan with another optimizer at a path of its arguments, and what is kept and lost.

    Args:
        plan: the callback that trains.
        path: the argument: optimizer, aux_optimizer or rules.0.optimizer.
        name: the class of the optimizer.
        required: arguments of the new class without a default.
    """
    changed: Spec = json.loads(json.dumps(plan))
    container: Any = changed.setdefault("init_args", {})
    *parents, last = path.split(".")
    for key in parents:
        container = container[int(key)] if key.isdigit() else container[key]
        if isinstance(container, dict) and "class_path" in container:
            container = container.setdefault("init_args", {})
    old = container.get(last)
    old = {"class_path": old} if isinstance(old, str) else old
    arguments = _changed_arguments(old, 1, Optimizer) if old else {}
    new_class = load_class(name, Optimizer)
    # the type hints of the new class by argument; a function of the user has none
    parser = typehints.class_parser(new_class, 1) if new_class else None
    hints = {a.dest: getattr(a, "_typehint", None) for a in parser._actions} if parser else {}
    kept = {
        key: value
        for key, value in arguments.items()
        if key in hints and (hints[key] is None or typehints.is_valid(hints[key], value))
    }
    container[last] = {"class_path": name, "init_args": {**kept, **(required or {})}}
    if new_class is None:  # a function takes no arguments of a config
        container[last] = name
    lost = {key: value for key, value in arguments.items() if key not in kept}
    stays = {} if path != "optimizer" else _changed_arguments(plan)
    stays = {key: value for key, value in stays.items() if key in PLAN_ARGUMENTS}
    replaced = class_name(old) if old else "no optimizer"
    return changed, _describe(name, replaced, kept | stays, lost)


def _optimizer_paths(plan: CallbackSpec) -> list[str]:
    """Return the paths of the optimizers that a plan has, if it has an argument `optimizer`."""
    plan_class = load_class(str(plan["class_path"]))
    if plan_class is None or "optimizer" not in argument_names(plan_class):
        return []
    rules = (plan.get("init_args") or {}).get("rules") or []
    rule_paths = [f"rules.{i}.optimizer" for i, rule in enumerate(rules) if _rule_optimizer(rule)]
    # the plan's optimizer trains the rules without one, or everything if there are no rules
    is_used = len(rule_paths) < len(rules) or not rules
    return [*(["optimizer"] if is_used else []), *rule_paths]


def _rule_optimizer(rule: Any) -> Any:
    arguments = rule.get("init_args", rule) if isinstance(rule, Mapping) else {}
    return arguments.get("optimizer")


def _changed_arguments(
    spec: Mapping[str, Any], num_supplied: int = 0, base: type | None = None
) -> Spec:
    """Return the arguments of a class that differ from its defaults."""
    arguments = dict(spec.get("init_args") or {})
    loaded = load_class(str(spec["class_path"]), *([base] if base else []))
    if loaded is None:
        return arguments
    actions = typehints.class_parser(loaded, num_supplied)._actions
    defaults = {a.dest: json.loads(json.dumps(a.default, default=str)) for a in actions}
    return {
        key: value
        for key, value in arguments.items()
        if key not in defaults or value != defaults[key]
    }


def _new_plan(
    name: str, is_plan_class: bool, arguments: Mapping[str, Any], required: Mapping[str, Any]
) -> Spec:
    if is_plan_class:
        return {"class_path": name, "init_args": {**arguments, **required}}
    optimizer = {"class_path": name, "init_args": dict(required)}
    is_class = load_class(name, Optimizer) is not None
    return {
        "class_path": "OptimizerPlan",
        "init_args": {"optimizer": optimizer if is_class else name, **arguments},
    }


def _with_lines(index: int | None, spec: Spec, note: str) -> OptimizerChoice:
    """Return the choice of a new callback, with the flags that append it."""
    words = [f"{FLAG_PREFIX[:-1]}+={spec['class_path']}"]
    for key, value in spec["init_args"].items():
        argument = value["class_path"] if key == "optimizer" and isinstance(value, dict) else value
        text = argument if isinstance(argument, str) else json.dumps(_short_value(key, argument))
        words.append(f"{FLAG_PREFIX}{key}={shlex.quote(text)}")
        if key == "optimizer" and isinstance(value, dict):
            words += [
                f"{FLAG_PREFIX}{key}.{name}={shlex.quote(json.dumps(setting))}"
                for name, setting in value["init_args"].items()
            ]
    return OptimizerChoice(index, spec, " ".join(words), note)


def _short_value(key: str, value: Any) -> Any:
    """Return a schedule without the fields that have their defaults."""
    if key != "schedule" or not isinstance(value, Mapping):
        return value
    return {k: v for k, v in value.items() if v != getattr(LRSchedule(), k, None)} or value


def _describe(name: str, replaced: str, kept: Mapping[str, Any], lost: Mapping[str, Any]) -> str:
    def listed(arguments: Mapping[str, Any]) -> str:
        return ", ".join(f"{key}={_format(key, value)}" for key, value in arguments.items())

    new = class_name({"class_path": name})
    text = f"{new} replaces {replaced}; kept: {listed(kept) or 'nothing'}"
    return f"{text}; lost: {listed(lost)}" if lost else text


def _format(key: str, value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        base = Optimizer if load_class(str(value["class_path"]), Optimizer) else None
        arguments = _changed_arguments(value, 1, base) if base else value.get("init_args") or {}
        inner = ", ".join(f"{k}={_format(k, v)}" for k, v in arguments.items())
        return f"{class_name(value)}({inner})"
    value = _short_value(key, value)
    if isinstance(value, Mapping):
        return f"({', '.join(f'{k}={_format(k, v)}' for k, v in value.items())})"
    return str(value)
