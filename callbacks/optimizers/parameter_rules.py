"""Parameter rules: ordered rules assign each parameter to an optimizer by kind or by name.

The first match wins. The kind of a parameter follows from the type of its module, not from its
number of axes. An embedding is a table of rows: an optimizer that orthogonalizes it like a matrix
is wrong, and no error would show it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Muon, Optimizer

from ravine.errors import UsageError, suggest_names

from .lr_schedules import LRSchedule

ParamKind = Literal["hidden_matrix", "embedding", "head", "norm", "bias", "convolution", "scalar"]
RuleKind = ParamKind | Literal["rest"]
DecayFilter = Literal["none", "matrices", "all"]
OptimizerFactory = Callable[[Iterable], Optimizer]
NamedParam = tuple[str, nn.Parameter]

REST_HINT = "add a last rule ParamRule('rest', optimizer=AdamW)"
REST_FLAG = "in the config a last rule {kind: rest, optimizer: AdamW}"
HEAD_NAMES = ("head", "lm_head")  # attribute names of the Linear that computes the predictions


@dataclass(frozen=True)
class ParamRule:
    """One rule of an OptimizerPlan: which parameters it takes, and their optimizer.

    Example: `ParamRule("embedding", optimizer=partial(AdamW, lr=3e-3), lr_scale=2.0)`

    Args:
        kind: one or several kinds of parameters; `rest` takes all that earlier rules left.
        pattern: a glob that the parameter names must match as well, such as `*.gate.*`.
        optimizer: the optimizer of these parameters; by default the plan's `optimizer`.
        lr_scale: a factor on the optimizer's learning rate.
        decay: which tensors get weight decay; by default the plan's `decay`.
        allow_embeddings: allow embeddings and heads for an optimizer of matrices.
        schedule: the learning-rate schedule of these parameters; by default the plan's `schedule`.
    """

    kind: RuleKind | list[RuleKind] = "rest"
    pattern: str = "*"
    optimizer: OptimizerFactory | None = None
    lr_scale: float = 1.0
    decay: DecayFilter | None = None
    allow_embeddings: bool = False
    schedule: LRSchedule | None = None

    @property
    def kinds(self) -> list[str]:
        """The kinds as a list."""
        return [self.kind] if isinstance(self.kind, str) else list(self.kind)

    @property
    def label(self) -> str:
        """The name of the rule in tables and logs."""
        return "+".join(self.kinds) if self.pattern == "*" else self.pattern

    def matches(self, kind: str, name: str) -> bool:
        """Whether the rule matches a parameter of this kind and name."""
        return bool({kind, "rest"} & set(self.kinds)) and fnmatchcase(name, self.pattern)


def classify_params(module: nn.Module) -> dict[str, str]:
    """Return the kind of every parameter by name; `other` if no module type determines it.

    A weight tied between an embedding and a head is an embedding. The head is a Linear named `head`
    or `lm_head`. Without such a Linear and without a tied embedding, the last Linear is the head.
    """
    # kinds of a parameter by its id, one for each layer that has it
    candidate_kinds: dict[int, list[str | None]] = {}
    for path, layer in module.named_modules():
        layer_name = path.rpartition(".")[2]
        for param_name, parameter in layer.named_parameters(recurse=False):
            kind = _classify_param(layer_name, param_name, layer, parameter.ndim)
            candidate_kinds.setdefault(id(parameter), []).append(kind)
    param_kinds: dict[str, str] = {}
    has_tied_embedding = False
    for name, parameter in module.named_parameters():
        candidates = candidate_kinds[id(parameter)]
        if "embedding" in candidates:
            param_kinds[name] = "embedding"
            has_tied_embedding |= len(candidates) > 1
        else:
            param_kinds[name] = next(filter(None, candidates), "other")
    hidden_names = [n for n, kind in param_kinds.items() if kind == "hidden_matrix"]
    if hidden_names and not has_tied_embedding and "head" not in param_kinds.values():
        param_kinds[hidden_names[-1]] = "head"
    return param_kinds


def _classify_param(
    layer_name: str, param_name: str, layer: nn.Module, ndim: int
) -> ParamKind | None:
    """Return the kind of a layer's parameter with `ndim` axes; None if the layer is unknown.

    `layer_name` is the last part of the layer's name in the module.
    """
    type_name = type(layer).__name__.lower()
    # in this order: a bias of a normalization layer is `norm`
    if isinstance(layer, nn.EmbeddingBag | nn.Embedding):
        return "embedding"
    if "norm" in type_name:
        return "norm"
    if "bias" in param_name:
        return "bias"
    if ndim < 2:
        return "scalar"
    if isinstance(layer, _ConvNd):
        return "convolution"
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) or "linear" in type_name:
        return "head" if layer_name in HEAD_NAMES else "hidden_matrix"
    return None


def assign_params(module: nn.Module, rules: Sequence[ParamRule]) -> list[list[NamedParam]]:
    """Return the trainable parameters that each rule takes, in the order of the rules.

    A parameter belongs to the first rule that matches its kind and name.

    Raises:
        UsageError: a rule takes no parameter, a parameter has no rule, or a rule gives a parameter
            of another kind to an optimizer of matrices.
    """
    kind_of = classify_params(module)
    # (name, parameter) pairs of each rule
    params_by_rule: list[list[NamedParam]] = [[] for _ in rules]
    unassigned: list[str] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rule_index = next((i for i, r in enumerate(rules) if r.matches(kind_of[name], name)), None)
        if rule_index is None:
            unassigned.append(f"{name} ({kind_of[name]})")
        else:
            params_by_rule[rule_index].append((name, parameter))
    for number, (rule, named_params) in enumerate(zip(rules, params_by_rule, strict=True), 1):
        if not named_params and rule.label != "rest":  # a `rest` rule may be empty
            raise _unmatched_rule_error(number, rule, kind_of)
        _check_matrices_only(number, rule, named_params, kind_of)
    if unassigned:
        raise UsageError(
            f"OptimizerPlan: no rule matches {', '.join(unassigned)}",
            hint=REST_HINT,
            flag=REST_FLAG,
        )
    return params_by_rule


def assign_added_params(
    module: nn.Module, rules: Sequence[ParamRule], parameters: Iterable[Any]
) -> list[tuple[ParamRule, list[NamedParam]]]:
    """Return the rules that take these newly trained parameters, in order, with the parameters.

    Called for `add_param_group`. A parameter that is not of the module has the kind `other` and an
    empty name.

    Raises:
        UsageError: no rule matches, or a matrix optimizer gets a parameter of another kind.
    """
    kind_of = classify_params(module)
    names = {id(p): name for name, p in module.named_parameters()}
    params_by_rule: list[list[NamedParam]] = [[] for _ in rules]
    for parameter in parameters:
        name = names.get(id(parameter), "")
        kind = kind_of.get(name, "other")
        rule_index = next((i for i, r in enumerate(rules) if r.matches(kind, name)), None)
        if rule_index is None:
            raise UsageError(
                f"add_param_group: no rule of the plan matches "
                f"{name or 'a parameter outside of the module'} ({kind})",
                hint=REST_HINT,
                flag=REST_FLAG,
            )
        params_by_rule[rule_index].append((name, parameter))
    for number, (rule, named_params) in enumerate(zip(rules, params_by_rule, strict=True), 1):
        _check_matrices_only(number, rule, named_params, kind_of | {"": "other"})
    return [
        (rule, named_params)
        for rule, named_params in zip(rules, params_by_rule, strict=True)
        if named_params
    ]


def _unmatched_rule_error(number: int, rule: ParamRule, kind_of: dict[str, str]) -> UsageError:
    if rule.pattern != "*":
        label = "nearest names"
        candidates = suggest_names(rule.pattern, kind_of, least=0.1, dotted=True) or [*kind_of]
    else:
        label, candidates = "kinds in this module", [*dict.fromkeys(kind_of.values())]
    return UsageError(
        f"OptimizerPlan: rule {number} ({rule.label}) matches no trainable parameter that earlier "
        "rules left",
        candidates,
        hint="change the rule, or remove it",
        label=label,
    )


def _check_matrices_only(
    number: int, rule: ParamRule, named_params: list[NamedParam], kind_of: dict[str, str]
) -> None:
    """Raise UsageError if an optimizer of matrices gets a parameter of another kind.

    Such an optimizer has `matrices_only = True` or is torch.optim.Muon, which lacks the attribute.

    Args:
        number: number of the rule, from 1, for the message.
        rule: the rule.
        named_params: names and parameters that it takes.
        kind_of: kind of each parameter by name.
    """
    # the class, also if the rule has a partial of it; None for another function
    optimizer_type = get_optimizer_class(rule.optimizer)
    is_torch_muon = optimizer_type is Muon
    if not (is_torch_muon or getattr(optimizer_type, "matrices_only", False)):
        return
    assert optimizer_type is not None
    allowed = {"hidden_matrix", "convolution"}
    if rule.allow_embeddings:
        allowed |= {"embedding", "head"}
    misplaced = [f"{n} ({kind_of[n]})" for n, _ in named_params if kind_of[n] not in allowed]
    if misplaced:
        raise UsageError(
            f"OptimizerPlan: rule {number} ({rule.label}) assigns {', '.join(misplaced)} to "
            f"{optimizer_type.__name__}",
            ["hidden matrices", "convolutions", "with allow_embeddings also embeddings and heads"],
            hint="use kind='hidden_matrix' in this rule, and a last rule "
            "ParamRule('rest', optimizer=AdamW)",
            flag="in the config {kind: hidden_matrix}, and a last rule "
            "{kind: rest, optimizer: AdamW}",
        )


def get_optimizer_class(factory: OptimizerFactory | None) -> type[Optimizer] | None:
    """Return the optimizer class of a factory if it is a class or a partial of one, else None."""
    candidates: list[Any] = [factory]
    if isinstance(factory, partial):
        candidates += [factory.func, *factory.args]  # jsonargparse passes the class in args
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Optimizer)), None)
