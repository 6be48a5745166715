"""From the rules' shares of the parameters to one composite optimizer.

Rules with the same optimizer and arguments become groups of one: ten of them cost a step no more
than one does. What a rule changes for itself (lr_scale, decay) is kept in its groups.
"""

import difflib
import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from rich.table import Column, Table
from torch import Tensor
from torch.optim import Optimizer

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
        lists = [[p for _, p in share.named] for share in mates]
        groups = [{"params": each} for each in lists]
        member = make(mates[0].rule.optimizer, lists[0] if len(lists) == 1 else groups)
        owner = {id(p): share for share in mates for _, p in share.named}
        for group in list(member.param_groups):
            rule = owner[id(group["params"][0])].rule
            if "lr" in group:
                check_rate(group["lr"], member)
                group["lr"] *= rule.lr_scale
            split_decay(member, group, rule.decay or decay)
        members.append(member)
        labels += [owner[id(group["params"][0])].label for group in member.param_groups]
    return Composite(members, labels)


def later(
    share: Share, member: Optimizer | None, decay: Decay, given: Group, factor: float | None
) -> Part:
    """What a rule's optimizer gets of parameters that are trained from now on.

    Args:
        share: the rule and the parameters.
        member: the rule's optimizer; None if it has none yet.
        decay: for a rule that says nothing of it.
        given: the settings that came with the parameters; they count.
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
        base = lr * rule.lr_scale
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
    """Whether weight decay is meant for a parameter."""
    return decay == "all" or (decay == "matrices" and parameter.ndim >= 2)


def check_rate(lr: Any, optimizer: Optimizer) -> None:
    """Refuse what an optimizer without checks of its own would compute with."""
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < math.inf:
        raise ValueError(
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
    if made is not None:
        allowed = list(inspect.signature(made).parameters)[1:]
        for word in getattr(factory, "keywords", {}):
            if word not in allowed:
                nearest = difflib.get_close_matches(word, allowed, n=3, cutoff=0.3) or allowed
                raise ValueError(
                    f"{made.__name__} has no argument {word!r}; nearest: {', '.join(nearest)}"
                )
    assert factory is not None  # the plan checks it
    try:
        return factory(parameters)
    except ValueError as error:  # torch: "Invalid learning rate: -1.0"
        given = getattr(factory, "keywords", {})
        usual = inspect.signature(made).parameters if made is not None else {}
        words = [f"{k}={v}" for k, v in given.items() if k not in usual or usual[k].default != v]
        name = made.__name__ if made is not None else "the optimizer"
        raise ValueError(f"{name} refuses {', '.join(words) or 'this'}: {error}") from error


def split_decay(optimizer: Optimizer, group: dict[str, Any], decay: Decay) -> None:
    """Leave weight decay to the tensors that it is meant for; the others become a second group."""
    if decay == "all" or not group.get("weight_decay"):
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
                f"{group['lr']:g}" if "lr" in group else "",
                f"{group['weight_decay']:g}" if "weight_decay" in group else "",
                type(member).__name__,
            )
            for name in (name for name, p in share.named if names and id(p) in own):
                made.add_row(f"  {name}")
    return made
