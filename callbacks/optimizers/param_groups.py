"""From the rules' shares of the parameters to one composite optimizer.

Rules with the same optimizer and arguments become groups of one: ten of them cost a step no more
than one does. What a rule changes for itself (lr_scale, decay) is kept in its groups.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from rich.table import Column, Table
from torch import Tensor
from torch.optim import Optimizer

from ravine.errors import UsageError, suggest_names

from . import optimizer_errors as faults
from .composite import Composite, Group, Part
from .rules import Decay, Named, OptimizerFactory, Rule, optimizer_class


class Share(NamedTuple):
    """What one rule took, under a label that no other rule has."""

    rule: Rule
    label: str
    named: list[Named]


def compose(shares: Sequence[Share], decay: Decay) -> Composite:
    """Build each optimizer once and join them; `decay` is for rules that say nothing of it."""
    together: list[list[Share]] = []
    for share in shares:
        mates = (m for m in together if same(m[0].rule.optimizer, share.rule.optimizer))
        if (found := next(mates, None)) is None:
            together.append([share])
        else:
            found.append(share)
    members: list[Optimizer] = []
    labels: list[str] = []
    for mates in together:
        factory = mates[0].rule.optimizer
        groups = split_before(mates, decay)
        member = make(factory, groups[0]["params"] if len(groups) == 1 else groups)
        owner = {id(p): share for share in mates for _, p in share.named}
        for group in list(member.param_groups):
            rule = owner[id(group["params"][0])].rule
            if group.get("lr") is not None:
                check_rate(group["lr"], member)
                group["lr"] = scaled(group["lr"], rule.lr_scale)
            split_decay(member, group, rule.decay or decay)
        members.append(member)
        labels += [owner[id(group["params"][0])].label for group in member.param_groups]
    return Composite(members, labels)


def later(
    share: Share, member: Optimizer | None, decay: Decay, given: Group, factor: float | None
) -> Part:
    """The groups and settings for parameters that a rule's optimizer trains from now on.

    Args:
        share: the rule and the parameters.
        member: the rule's optimizer; None if it has none yet.
        decay: for a rule that says nothing of it.
        given: the settings that came with the parameters; they take precedence.
        factor: what the schedule multiplies learning rates by now; None without one.
    """
    rule, parameters = share.rule, [p for _, p in share.named]
    new = member is None
    member = make(rule.optimizer, parameters) if member is None else member
    defaults = getattr(member, "defaults", {})
    lr = defaults.get("lr")
    settings: Group = {}
    if isinstance(lr, int | float | Tensor):
        check_rate(lr, member)
        base = scaled(lr, rule.lr_scale)
        settings = {"lr": base} if factor is None else {"lr": base * factor, "initial_lr": base}
    if "lr" in given:
        settings = {}
    settings |= given
    groups: list[Group] = [{**settings, "params": parameters}]
    usual = defaults.get("weight_decay")
    if usual and isinstance(usual, int | float) and "weight_decay" not in given:
        kept = [p for p in parameters if decays(p, rule.decay or decay)]
        spared = [p for p in parameters if not decays(p, rule.decay or decay)]
        groups = [{**settings, "params": spared, "weight_decay": 0.0}] if spared else []
        groups += [{**settings, "params": kept}] if kept else []
    if new:
        (only,) = member.param_groups
        only |= groups[0]
        for group in groups[1:]:
            member.add_param_group(group)
    return Part(share.label, member, [] if new else groups)


def decays(parameter: Tensor, decay: Decay) -> bool:
    """Whether weight decay applies to a parameter."""
    return decay == "all" or (decay == "matrices" and parameter.ndim >= 2)


def split_before(mates: Sequence[Share], decay: Decay) -> list[Group]:
    """The groups of rules with one optimizer, parameters that do not decay apart.

    Done where the class has a `weight_decay` argument, because some classes count their groups in
    the constructor and ignore groups added later. For the others `split_decay` adds groups.
    """
    factory = mates[0].rule.optimizer
    argument = _arguments(optimizer_class(factory)).get("weight_decay")
    usual = argument.default if argument is not None else None
    value = getattr(factory, "keywords", {}).get("weight_decay", usual)
    known = argument is not None and isinstance(value, int | float) and bool(value)
    first: list[Group] = []
    spared: list[Group] = []
    for share in mates:
        policy = share.rule.decay or decay
        parameters = [p for _, p in share.named]
        kept = [p for p in parameters if decays(p, policy)]
        if not known or not kept or len(kept) == len(parameters):
            first.append({"params": parameters})
        else:
            first.append({"params": kept})
            rest = [p for p in parameters if not decays(p, policy)]
            spared.append({"params": rest, "weight_decay": 0.0})
    return first + spared


def scaled(lr: Any, scale: float) -> Any:
    """A learning rate of its own for a group: a tensor may be shared with others."""
    if isinstance(lr, Tensor):
        return lr.clone() * scale if scale != 1 else lr.clone()
    return lr * scale if scale != 1 else lr


def check_rate(lr: Any, optimizer: Optimizer) -> None:
    """Refuse what an optimizer without checks of its own would compute with."""
    if isinstance(lr, list | tuple):  # several rates, whose meaning the class defines
        return
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < math.inf:
        raise UsageError(
            f"{type(optimizer).__name__}: lr is {lr!r}; allowed: a finite number, 0 or more; type "
            "0.001 in its place, or lr: 1.0e-3 in a config"
        )


def same(one: OptimizerFactory | None, other: OptimizerFactory | None) -> bool:
    """Whether two factories make the same optimizer; partials are compared by what they hold."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other


def make(factory: OptimizerFactory | None, parameters: Sequence[Any]) -> Optimizer:
    """Call the factory; an argument that its class does not know ends in the nearest it does."""
    made = optimizer_class(factory)
    given = getattr(factory, "keywords", {})
    usual = _arguments(made)
    if usual and not any(a.kind is a.VAR_KEYWORD for a in usual.values()):
        allowed = list(usual)[1:]
        for word in given:
            if word not in allowed:
                nearest = suggest_names(word, allowed, least=0.3) or allowed
                raise UsageError(
                    f"{made.__name__ if made else 'the optimizer'} has no argument {word!r}; "
                    f"nearest: {', '.join(nearest)}"
                )
    assert factory is not None  # the plan checks it
    try:
        built = factory(parameters)
    except Exception as error:  # torch: ValueError "Invalid learning rate: -1.0"
        if faults.wants_traceback():
            raise
        shown = [f"{k}={v}" for k, v in given.items() if k not in usual or usual[k].default != v]
        name = made.__name__ if made is not None else "the optimizer"
        raise UsageError(
            f"{name} refuses {', '.join(shown) or 'this'}: {_why(error, parameters)}"
        ) from error
    if not isinstance(getattr(built, "param_groups", None), list):
        raise UsageError(
            f"{type(built).__name__} is no torch.optim.Optimizer: it has no param_groups; give a "
            "class, or a function of the parameters that returns one"
        )
    return built


def _arguments(made: type | None) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name, where they can be seen."""
    try:
        return dict(inspect.signature(made).parameters) if made is not None else {}
    except (TypeError, ValueError):
        return {}


def _why(error: Exception, parameters: Sequence[Any]) -> str:
    """The text of a constructor's error, with a hint for the usual causes."""
    at = faults.own_frame(error)
    plain = type(error) is ValueError or isinstance(error, UsageError)
    where = f" (at {at})" if at and not plain else ""
    said = str(error) if plain else faults.words(error)
    wants_model = isinstance(error, AttributeError) and "named_parameters" in str(error)
    wants_model = wants_model or "'parameters'" in str(error) or "'modules'" in str(error)
    if wants_model:
        return (
            f"{said}{where}; it wants the model, and a plan gives it parameters: make it in the "
            "module's configure_optimizers, without a plan"
        )
    if plain:
        return said
    return (
        f"{said}{where}; it is called with {len(parameters)} parameters or groups of them: set its"
        " arguments, or give a function of the parameters that makes it"
    )


def split_decay(optimizer: Optimizer, group: dict[str, Any], decay: Decay) -> None:
    """Leave weight decay to the tensors that it is meant for; the others become a second group."""
    given = group.get("weight_decay")
    if decay == "all" or not isinstance(given, int | float) or not given:
        return
    spared = [p for p in group["params"] if not decays(p, decay)]
    if len(spared) == len(group["params"]):
        group["weight_decay"] = 0.0
    elif spared:
        group["params"] = [p for p in group["params"] if decays(p, decay)]
        settings = {k: v for k, v in group.items() if k != "params"}
        optimizer.add_param_group({**settings, "params": spared, "weight_decay": 0.0})


def table(shares: Sequence[Share], composite: Composite, names: bool = False) -> Table:
    """What runs, before it runs: a wrong grouping trains without complaint."""
    made = Table(
        Column("rule", overflow="fold"), "tensors", "parameters", "lr", "decay", "optimizer"
    )
    parts = composite.by_label()
    for share in shares:
        member, groups = parts[share.label]
        for place, group in enumerate(groups):
            own = {id(p) for p in group["params"]}
            made.add_row(
                share.label.replace("+", " + ") if place == 0 else "",
                str(len(own)),
                f"{sum(p.numel() for p in group['params']):,}",
                _shown(group.get("lr")),
                _shown(group.get("weight_decay")),
                type(member).__name__,
            )
            for name in (name for name, p in share.named if names and id(p) in own):
                made.add_row(f"  {name}")
    return made


def _shown(setting: Any) -> str:
    """A setting as shown in the table: a number in short form, None as an empty text."""
    if isinstance(setting, Tensor) and setting.numel() == 1:
        setting = setting.item()
    if setting is None:
        return ""
    return f"{setting:g}" if isinstance(setting, int | float) else str(setting)
