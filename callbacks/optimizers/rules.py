"""Which parameter goes to which optimizer: ordered rules by kind or by name, the first match wins.

The kind of a parameter is what its module is, not how many axes it has: an embedding is a table
of rows, and orthogonalising it like a matrix would be a mistake that no error reveals.
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

Kind = Literal["hidden_matrix", "embedding", "head", "norm", "bias", "convolution", "scalar"]
Choice = Kind | Literal["rest"]
Decay = Literal["none", "matrices", "all"]
OptimizerFactory = Callable[[Iterable], Optimizer]
Named = tuple[str, nn.Parameter]

HEADS = ("head", "lm_head")  # what a Linear that makes the predictions is called


@dataclass(frozen=True)
class Rule:
    """One line of a plan: these parameters, this optimizer.

    Example: `Rule("embedding", optimizer=partial(AdamW, lr=3e-3), lr_scale=2.0)`

    Args:
        kind: what the parameters are, one or several; `rest` is what no earlier rule took.
        name: a pattern that their names match as well, such as `*.gate.*`.
        optimizer: who trains them; without it, the plan's own `optimizer`.
        lr_scale: times the optimizer's learning rate.
        decay: as the plan's `decay`, for this rule alone.
        anywhere: let an optimizer for matrices have embeddings and heads too.
    """

    kind: Choice | list[Choice] = "rest"
    name: str = "*"
    optimizer: OptimizerFactory | None = None
    lr_scale: float = 1.0
    decay: Decay | None = None
    anywhere: bool = False

    @property
    def kinds(self) -> list[str]:
        """The kinds, whether one or several were given."""
        return [self.kind] if isinstance(self.kind, str) else list(self.kind)

    @property
    def label(self) -> str:
        """What tables and logs call the rule."""
        return "+".join(self.kinds) if self.name == "*" else self.name

    def matches(self, kind: str, name: str) -> bool:
        """Whether a parameter is taken."""
        return bool({kind, "rest"} & set(self.kinds)) and fnmatchcase(name, self.name)


def kinds(module: nn.Module) -> dict[str, str]:
    """The kind of every parameter by name; `other` where no module type decides it.

    A weight that an embedding and a head share is an embedding. The head is a Linear named head or
    lm_head; where there is none and none is shared, the last Linear of the module.
    """
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, owner in module.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path.rpartition(".")[2], leaf, owner))
    found: dict[str, str] = {}
    tied = False
    for name, parameter in module.named_parameters():
        of = [_kind(*owner, parameter.ndim) for owner in owners[id(parameter)]]
        found[name] = "embedding" if "embedding" in of else next(filter(None, of), "other")
        tied |= found[name] == "embedding" and len(of) > 1
    linear = [n for n, k in found.items() if k == "hidden_matrix"]
    if linear and not tied and "head" not in found.values():
        found[linear[-1]] = "head"
    return found


def _kind(attribute: str, leaf: str, owner: nn.Module, axes: int) -> Kind | None:
    type_name = type(owner).__name__.lower()
    if isinstance(owner, nn.EmbeddingBag | nn.Embedding):
        return "embedding"
    if "norm" in type_name:
        return "norm"
    if "bias" in leaf:
        return "bias"
    if axes < 2:
        return "scalar"
    if isinstance(owner, _ConvNd):
        return "convolution"
    if isinstance(owner, nn.MultiheadAttention | nn.RNNBase) or "linear" in type_name:
        return "head" if attribute in HEADS else "hidden_matrix"
    return None


def assign(module: nn.Module, rules: Sequence[Rule]) -> list[list[Named]]:
    """The trainable parameters of each rule, in order; or what is wrong with the rules."""
    kind_of = kinds(module)
    shares: list[list[Named]] = [[] for _ in rules]
    missed: list[str] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        place = next((i for i, r in enumerate(rules) if r.matches(kind_of[name], name)), None)
        if place is None:
            missed.append(f"{name} ({kind_of[name]})")
        else:
            shares[place].append((name, parameter))
    for number, (rule, share) in enumerate(zip(rules, shares, strict=True), 1):
        if not share and rule.label != "rest":  # a last rule for what is left may be idle
            raise UsageError(_idle(number, rule, kind_of))
        _refuse_tables(number, rule, share, kind_of)
    if missed:
        raise UsageError(
            f"no rule takes {', '.join(missed)}; add a last rule {{kind: rest, optimizer: ...}}"
        )
    return shares


def choose(
    module: nn.Module, rules: Sequence[Rule], parameters: Iterable[Any]
) -> list[tuple[Rule, list[Named]]]:
    """The rules that take these parameters, which are trained from now on, in the rules' order."""
    kind_of = kinds(module)
    names = {id(p): name for name, p in module.named_parameters()}
    shares: list[list[Named]] = [[] for _ in rules]
    for parameter in parameters:
        name = names.get(id(parameter), "")
        kind = kind_of.get(name, "other")
        place = next((i for i, r in enumerate(rules) if r.matches(kind, name)), None)
        if place is None:
            raise UsageError(
                f"no rule takes {name or 'a parameter of no module'} ({kind}), which "
                "add_param_group brings; add a last rule {kind: rest, optimizer: ...}"
            )
        shares[place].append((name, parameter))
    for number, (rule, share) in enumerate(zip(rules, shares, strict=True), 1):
        _refuse_tables(number, rule, share, kind_of | {"": "other"})
    return [(rule, share) for rule, share in zip(rules, shares, strict=True) if share]


def _idle(number: int, rule: Rule, kind_of: dict[str, str]) -> str:
    if rule.name != "*":
        near = suggest_names(rule.name, kind_of, least=0.1, dotted=True)
        there = f"nearest names: {', '.join(near) or ', '.join(kind_of)}"
    else:
        there = f"kinds here: {', '.join(dict.fromkeys(kind_of.values()))}"
    return (
        f"rule {number} ({rule.label}) takes no trainable parameter that an earlier rule left; "
        f"{there}; change the rule or leave it out"
    )


def _refuse_tables(number: int, rule: Rule, share: list[Named], kind_of: dict[str, str]) -> None:
    """Matrices only, for an optimizer that says so by `matrices_only`; torch's Muon does not."""
    made = optimizer_class(rule.optimizer)
    if made is None or not (getattr(made, "matrices_only", False) or made is Muon):
        return
    allowed = {"hidden_matrix", "convolution"} | ({"embedding", "head"} if rule.anywhere else set())
    wrong = [f"{n} ({kind_of[n]})" for n, p in share if kind_of[n] not in allowed]
    if wrong:
        raise UsageError(
            f"rule {number} ({rule.label}) sends {', '.join(wrong)} to {made.__name__}, which is "
            "for hidden matrices and convolutions; set kind: hidden_matrix and give the others "
            "to a rule {kind: rest, optimizer: AdamW}, or anywhere: true for embeddings and heads"
        )


def optimizer_class(factory: OptimizerFactory | None) -> type[Optimizer] | None:
    """The class that a factory makes, as far as it can be seen: a class or a partial of one."""
    seen: list[Any] = [factory]
    if isinstance(factory, partial):
        seen += [factory.func, *factory.args]  # jsonargparse hides the class among the arguments
    return next((c for c in seen if isinstance(c, type) and issubclass(c, Optimizer)), None)
