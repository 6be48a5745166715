"""Param groups: build one composite optimizer from the parameters that each rule takes.

Rules with the same optimizer and arguments become param groups of one optimizer, so ten such rules
cost no more per step than one. The lr_scale and decay of a rule are settings of its groups.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from rich.table import Column, Table
from torch import Tensor
from torch.optim import Optimizer

from ravine.errors import UsageError, format_arguments, suggest_names

from . import optimizer_errors
from .composite import CompositeOptimizer, ParamGroup, RuleGroups
from .parameter_rules import (
    DecayFilter,
    NamedParam,
    OptimizerFactory,
    ParamRule,
    get_optimizer_class,
)


class RuleParams(NamedTuple):
    """The parameters that one rule takes, with a unique label."""

    rule: ParamRule
    label: str
    named_params: list[NamedParam]


def build_optimizer(rule_params: Sequence[RuleParams], decay: DecayFilter) -> CompositeOptimizer:
    """Build one optimizer for all rules that share it, and join the optimizers.

    The groups of a rule get its lr_scale and weight decay.

    Args:
        rule_params: the rules with their parameters, in order.
        decay: the decay filter of rules without their own.
    """
    members: list[Optimizer] = []
    labels: list[str] = []  # of each param group
    # lists of rules with the same optimizer class and arguments, which share one optimizer
    for rules in _group_by_optimizer(rule_params):
        factory = rules[0].rule.optimizer
        groups = make_decay_groups(rules, decay)
        # some functions accept only parameters, not groups
        member = call_factory(factory, groups[0]["params"] if len(groups) == 1 else groups)
        rule_of_param = {id(p): one_rule for one_rule in rules for _, p in one_rule.named_params}
        # a copy, because `apply_decay_filter` moves tensors without decay into a new group
        for group in list(member.param_groups):
            rule = rule_of_param[id(group["params"][0])].rule
            if group.get("lr") is not None:
                check_lr(group["lr"], member)
                group["lr"] = scale_lr(group["lr"], rule.lr_scale)
            apply_decay_filter(member, group, rule.decay or decay)
        members.append(member)
        labels += [rule_of_param[id(group["params"][0])].label for group in member.param_groups]
    return CompositeOptimizer(members, labels)


def _group_by_optimizer(rule_params: Sequence[RuleParams]) -> list[list[RuleParams]]:
    """Return lists of rules with the same optimizer and arguments, in the order of the rules."""
    rules_by_optimizer: list[list[RuleParams]] = []
    for one_rule in rule_params:
        for rules in rules_by_optimizer:
            if same_factory(rules[0].rule.optimizer, one_rule.rule.optimizer):
                rules.append(one_rule)
                break
        else:
            rules_by_optimizer.append([one_rule])
    return rules_by_optimizer


def make_added_groups(
    rule_params: RuleParams,
    member: Optimizer | None,
    decay: DecayFilter,
    overrides: ParamGroup,
    factor: float | None,
) -> RuleGroups:
    """Return the param groups for parameters that a rule's optimizer trains from now on.

    A new optimizer already has its groups, so the list of groups to add is empty then.

    Args:
        rule_params: the rule, its label, and the parameters with their names.
        member: the rule's optimizer; None if it must be built.
        decay: the decay filter of a rule without its own.
        overrides: the settings passed with the parameters; they take precedence.
        factor: the current factor of the learning-rate schedule; None without a schedule.
    """
    rule, parameters = rule_params.rule, [p for _, p in rule_params.named_params]
    is_new = member is None
    member = call_factory(rule.optimizer, parameters) if member is None else member
    defaults = getattr(member, "defaults", {})
    lr = defaults.get("lr")
    settings: ParamGroup = {}
    if isinstance(lr, int | float | Tensor):
        check_lr(lr, member)
        base_lr = scale_lr(lr, rule.lr_scale)
        settings = {"lr": base_lr}
        if factor is not None:  # torch's schedulers read `initial_lr`
            settings = {"lr": base_lr * factor, "initial_lr": base_lr}
    if "lr" in overrides:  # it is used as given, without lr_scale and factor
        settings = {}
    settings |= overrides
    groups: list[ParamGroup] = [{**settings, "params": parameters}]
    default_decay = defaults.get("weight_decay")
    if default_decay and isinstance(default_decay, int | float) and "weight_decay" not in overrides:
        decayed = [p for p in parameters if should_decay(p, rule.decay or decay)]
        undecayed = [p for p in parameters if not should_decay(p, rule.decay or decay)]
        groups = [{**settings, "params": undecayed, "weight_decay": 0.0}] if undecayed else []
        groups += [{**settings, "params": decayed}] if decayed else []
    if is_new:  # the class has put all parameters into one group
        (first_group,) = member.param_groups
        first_group |= groups[0]
        for group in groups[1:]:
            member.add_param_group(group)
    return RuleGroups(rule_params.label, member, [] if is_new else groups)


def should_decay(parameter: Tensor, decay: DecayFilter) -> bool:
    """Whether weight decay applies to a parameter."""
    return decay == "all" or (decay == "matrices" and parameter.ndim >= 2)


def make_decay_groups(same_optimizer: Sequence[RuleParams], decay: DecayFilter) -> list[ParamGroup]:
    """Return the param groups of rules with one optimizer, split by weight decay.

    The split needs a `weight_decay` argument of the class. It happens here because some classes
    count their groups in the constructor and ignore groups added later. For other classes
    `apply_decay_filter` adds groups.

    Args:
        same_optimizer: the rules, which have the same optimizer and arguments.
        decay: the decay filter of rules without their own.

    Returns:
        One group for each rule, then the groups with weight_decay=0 of the rules that are split.
    """
    factory = same_optimizer[0].rule.optimizer
    argument = _constructor_parameters(get_optimizer_class(factory)).get("weight_decay")
    default_value = argument.default if argument is not None else None
    # the weight decay that applies: that of a partial, else the default of the class
    value = getattr(factory, "keywords", {}).get("weight_decay", default_value)
    has_weight_decay = argument is not None and isinstance(value, int | float) and bool(value)
    rule_groups: list[ParamGroup] = []
    undecayed_groups: list[ParamGroup] = []
    for one_rule in same_optimizer:
        decay_filter = one_rule.rule.decay or decay
        parameters = [p for _, p in one_rule.named_params]
        decayed = [p for p in parameters if should_decay(p, decay_filter)]
        if not has_weight_decay or not decayed or len(decayed) == len(parameters):
            # `apply_decay_filter` sets the weight decay of a group without decayed parameters
            rule_groups.append({"params": parameters})
        else:
            rule_groups.append({"params": decayed})
            undecayed = [p for p in parameters if not should_decay(p, decay_filter)]
            undecayed_groups.append({"params": undecayed, "weight_decay": 0.0})
    return rule_groups + undecayed_groups


def scale_lr(lr: Any, scale: float) -> Any:
    """Return the scaled learning rate of a group; a tensor is cloned, as groups may share it."""
    if isinstance(lr, Tensor):
        return lr.clone() * scale if scale != 1 else lr.clone()
    return lr * scale if scale != 1 else lr


def check_lr(lr: Any, optimizer: Optimizer) -> None:
    """Raise UsageError for an invalid lr, because some optimizers do not check it."""
    if isinstance(lr, list | tuple):  # several rates, as the class defines them
        return
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < math.inf:
        raise UsageError(
            f"{type(optimizer).__name__}: lr={lr!r} is not a learning rate",
            ["a finite number, 0 or more"],
            hint="use lr=0.001",
            flag="in the config lr: 0.001",
        )


def same_factory(left: OptimizerFactory | None, right: OptimizerFactory | None) -> bool:
    """Whether two factories make the same optimizer; partials are compared by their contents."""
    if isinstance(left, partial) and isinstance(right, partial):
        return (left.func, left.args, left.keywords) == (right.func, right.args, right.keywords)
    return left is right


def call_factory(factory: OptimizerFactory | None, parameters: Sequence[Any]) -> Optimizer:
    """Build the optimizer; raise UsageError for unknown or refused constructor arguments.

    Args:
        factory: a class, a partial of one, or a function of the parameters.
        parameters: tensors or param groups.
    """
    optimizer_type = get_optimizer_class(factory)
    name = optimizer_type.__name__ if optimizer_type is not None else "the optimizer"
    keywords = getattr(factory, "keywords", {})  # of a partial
    signature = _constructor_parameters(optimizer_type)
    # names of unknown arguments are reported only if the class takes no `**kwargs`
    if signature and not any(a.kind is a.VAR_KEYWORD for a in signature.values()):
        _, *allowed = signature  # the first argument is the parameters
        for keyword in keywords:
            if keyword not in allowed:
                # names with a similarity of at least 0.3, from 0 to 1
                closest = suggest_names(keyword, allowed, least=0.3) or allowed
                raise UsageError(
                    f"{name} has no argument {keyword!r}",
                    closest,
                    hint=f"use {closest[0]}={keywords[keyword]!r}",
                    label="nearest",
                )
    assert factory is not None  # OptimizerPlan checks it
    try:
        built = factory(parameters)
    except Exception as error:  # torch: ValueError "Invalid learning rate: -1.0"
        if optimizer_errors.wants_traceback():
            raise
        changed_args = [
            f"{k}={v}"
            for k, v in keywords.items()
            if k not in signature or signature[k].default != v
        ]
        problem, hint = _explain_error(error, parameters)
        raise UsageError(
            f"{name} refuses {', '.join(changed_args) or 'its arguments'}: {problem}", hint=hint
        ) from error
    if not isinstance(getattr(built, "param_groups", None), list):
        raise UsageError(
            f"OptimizerPlan: {type(built).__name__} has no param_groups, so it is not an optimizer",
            ["a class of optimizers", "a function of the parameters that returns an optimizer"],
            hint="use optimizer=torch.optim.AdamW",
        )
    return built


def describe_factory(factory: OptimizerFactory | None) -> str:
    """Return an optimizer with lr and the arguments that differ from its defaults: SGD(lr=0.1)."""
    optimizer_type = get_optimizer_class(factory)
    if optimizer_type is None:
        return getattr(factory, "__name__", "an optimizer")
    signature = _constructor_parameters(optimizer_type)
    # the arguments of a partial
    keywords = getattr(factory, "keywords", {})
    arguments = {
        name: value
        for name, value in keywords.items()
        if name == "lr" or name not in signature or signature[name].default != value
    }
    default_lr = signature["lr"].default if "lr" in signature else None
    if "lr" not in arguments and isinstance(default_lr, int | float):
        arguments = {"lr": default_lr, **arguments}
    return f"{optimizer_type.__name__}({format_arguments(arguments)})"


def _constructor_parameters(cls: type | None) -> dict[str, inspect.Parameter]:
    """Return the constructor arguments of a class by name; {} without a signature."""
    try:
        return dict(inspect.signature(cls).parameters) if cls is not None else {}
    except (TypeError, ValueError):
        return {}


def _explain_error(error: Exception, parameters: Sequence[Any]) -> tuple[str, str]:
    """Return the text of an error of an optimizer's constructor, and a hint; "" for no hint.

    `parameters` are the tensors or groups with which it was called.
    """
    user_frame = optimizer_errors.find_user_frame(error)  # file and line of user code
    is_refusal = type(error) is ValueError or isinstance(error, UsageError)  # its text is enough
    where = f" (at {user_frame})" if user_frame and not is_refusal else ""
    message = str(error) if is_refusal else optimizer_errors.format_exception(error)
    # the constructor of a class that takes a model calls methods of a module on its argument
    wants_model = isinstance(error, AttributeError) and "named_parameters" in str(error)
    wants_model = wants_model or "'parameters'" in str(error) or "'modules'" in str(error)
    if wants_model:
        return (
            f"{message}{where}; it needs the model, and a plan passes the parameters",
            "create it in the module's configure_optimizers, without a plan",
        )
    if is_refusal:
        return message, ""
    return (
        f"{message}{where}; it was called with {len(parameters)} parameters or groups",
        "pass its arguments with functools.partial, or use a function of the parameters that "
        "creates it",
    )


def apply_decay_filter(optimizer: Optimizer, group: dict[str, Any], decay: DecayFilter) -> None:
    """Move tensors without weight decay into a second param group with weight_decay=0."""
    weight_decay = group.get("weight_decay")
    if decay == "all" or not isinstance(weight_decay, int | float) or not weight_decay:
        return
    undecayed = [p for p in group["params"] if not should_decay(p, decay)]
    if len(undecayed) == len(group["params"]):
        group["weight_decay"] = 0.0
    elif undecayed:
        group["params"] = [p for p in group["params"] if should_decay(p, decay)]
        settings = {k: v for k, v in group.items() if k != "params"}
        optimizer.add_param_group({**settings, "params": undecayed, "weight_decay": 0.0})


def make_plan_table(
    rule_params: Sequence[RuleParams], composite: CompositeOptimizer, list_names: bool = False
) -> Table:
    """Return a table of rules and param groups, printed because wrong groups raise no error.

    Args:
        rule_params: the rules with their parameters.
        composite: the optimizers of the rules.
        list_names: list the names of the parameters below each group.
    """
    rich_table = Table(
        Column("rule", overflow="fold"), "tensors", "parameters", "lr", "decay", "optimizer"
    )
    groups_by_label = composite.groups_by_label()
    for one_rule in rule_params:
        member, groups = groups_by_label[one_rule.label]
        for group in groups:
            param_ids = {id(p) for p in group["params"]}
            rich_table.add_row(
                one_rule.label.replace("+", " + "),
                str(len(param_ids)),
                f"{sum(p.numel() for p in group['params']):,}",
                _format_setting(group.get("lr")),
                _format_setting(group.get("weight_decay")),
                type(member).__name__,
            )
            if list_names:
                for name, p in one_rule.named_params:
                    if id(p) in param_ids:
                        rich_table.add_row(f"  {name}")
    return rich_table


def _format_setting(setting: Any) -> str:
    """Format a setting for the table: a short number, or `none` if the optimizer has none."""
    if isinstance(setting, Tensor) and setting.numel() == 1:
        setting = setting.item()
    if setting is None:
        return "none"
    return f"{setting:g}" if isinstance(setting, int | float) else str(setting)
