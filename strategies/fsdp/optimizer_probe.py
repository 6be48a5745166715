"""Measure whether an optimizer steps each number, or each tensor, independently of the others.

    elementwise    three steps on a tensor whole = three steps on its halves, to the last bit
    per tensor     three steps on two tensors together = three steps on each apart
    coupled        neither: one rate for all parameters (Prodigy, D-Adaptation)

An elementwise optimizer may step shards. One that is not would train on shards without an error,
with other norms, trust ratios or factors than on whole tensors. So a copy of the optimizer is tried
on small random tensors before training.
"""

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from .original_parameters import nested_optimizers

Kind = Literal["elementwise", "per tensor", "coupled"]
SCALES = (1.0, 1e-2, 1e-5)  # of the gradients, step by step: a rule may act on large or small ones
# Some optimizers treat tensors of less than 4096 numbers, or of less than 128 rows or columns,
# otherwise: where a parameter is larger, the trial is. Halves have 32 times an odd number of
# numbers. That is a multiple of a processor's vectors: fused kernels round the numbers after the
# last whole vector in another way, in the last bit. It is no multiple of the usual blocks, from 64
# numbers on, which some optimizers compute with.
SMALL: dict[int, tuple[int, ...]] = {1: (320,), 2: (40, 24)}
LARGE: dict[int, tuple[int, ...]] = {1: (5056,), 2: (164, 144)}


Shaped = dict[tuple[int, str], bool]


class Verdict(NamedTuple):
    """What was measured.

    Args:
        kind: see the top of this file.
        reason: of a coupled optimizer, what it does; a part of an error message.
        shaped: for parameters of so many axes and an entry of their state, by its path: whether it
            has the shape of the parameter.
    """

    kind: Kind
    reason: str = ""
    shaped: Shaped = {}  # noqa: RUF012 (it is not changed)


def measure(optimizer: Optimizer) -> Verdict:
    """Try a copy of an optimizer for each kind of group and number of axes of its parameters.

    Random states of torch, numpy and Python are as before; the optimizer is not changed.
    """
    kinds = set()
    shaped: Shaped = {}
    for number, example in _cases(optimizer):
        kind, reason = _measure(optimizer, number, example, shaped)
        if kind == "coupled":
            return Verdict(kind, reason)
        kinds.add(kind)
    return Verdict("per tensor" if "per tensor" in kinds else "elementwise", "", shaped)


def _cases(optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """A group and one of its parameters, for all that differ in settings, axes or dtype."""
    found: dict[Any, tuple[int, Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        settings = tuple(
            (key, value == 0 if type(value) is float else repr(value)[:100])
            for key, value in sorted(group.items(), key=lambda item: str(item[0]))
            if key not in ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
        )
        for parameter in group["params"]:
            if not (parameter.is_floating_point() or parameter.is_complex()):
                continue  # codes of quantized weights: nothing trains them
            case = (settings, parameter.ndim, parameter.dtype)
            known = found.setdefault(case, (number, parameter))
            if parameter.numel() > known[1].numel():
                found[case] = (number, parameter)
    yield from found.values()


def _measure(
    optimizer: Optimizer, number: int, example: Tensor, shaped: Shaped
) -> tuple[Kind, str]:
    """The kind for one group and parameters like `example`; adds to `shaped`."""
    if needs_closure(optimizer):
        return "coupled", "computes the gradient of all parameters several times a step"
    if example.ndim == 0:
        return "elementwise", ""
    large = example.numel() > 4096 or (example.ndim > 1 and max(example.shape) >= 128)
    usual = (LARGE if large else SMALL)[min(example.ndim, 2)]
    shape = (*usual[:2], *([3] * (example.ndim - 2)))
    half = shape[0] // 2
    with _random_states_kept():
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            numbers = torch.randn(shape, generator=generator)
            numbers[half:] *= 30  # so that the halves differ in norm
            return numbers.to(example.dtype)

        whole, gradients = draw(), [draw() * scale for scale in SCALES]
        other, other_gradients = draw(), [draw() * scale / 7 for scale in SCALES]

        found: Shaped = {}

        def run(*tensors: tuple[Tensor, list[Tensor]]) -> list[Any]:
            return _run(optimizer, number, tensors, found)

        try:
            (together,) = run((whole, gradients))
        except _Outside:
            return "coupled", "keeps tensors outside of its state"
        except Exception as error:
            said = " ".join(str(error).split())[:150]
            return "coupled", f"failed in a trial ({type(error).__name__}: {said})"
        shaped |= found
        try:
            parts = [
                run((whole[rows], [g[rows] for g in gradients]))[0]
                for rows in (slice(0, half), slice(half, None))
            ]
            if _joined(together, parts):
                return "elementwise", ""
        except Exception:  # it does not take halves
            pass
        both = run((whole, gradients), (other, other_gradients))
        apart = [together, *run((other, other_gradients))]
        if all(_same(one, two, counts=False) for one, two in zip(both, apart, strict=True)):
            return "per tensor", ""
    return "coupled", "computes the update of a parameter from other parameters, too"


def _run(
    optimizer: Optimizer,
    number: int,
    tensors: tuple[tuple[Tensor, list[Tensor]], ...],
    shaped: Shaped,
) -> list[Any]:
    """Weights, state and settings for each tensor after the steps of one copy."""
    parameters = [nn.Parameter(values.clone()) for values, _ in tensors]
    trial = _copy(optimizer, number, parameters)
    torch.default_generator.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    if callable(getattr(trial, "train", None)) and callable(getattr(trial, "eval", None)):
        with suppress(AttributeError, NotImplementedError):  # a wrapper of one without
            trial.train()  # schedule-free optimizers require it
    for step in range(len(SCALES)):
        for parameter, (_, gradients) in zip(parameters, tensors, strict=True):
            parameter.grad = gradients[step].clone()
        trial.step()
    _check_saved(trial, parameters[0], shaped)
    all_optimizers = list(nested_optimizers(trial))
    results = []
    for parameter in parameters:
        states = [o.state.get(parameter, {}) for o in all_optimizers]
        settings = [
            {k: v for k, v in g.items() if k != "params"}
            for o in all_optimizers
            for g in o.param_groups
        ]
        results.append((parameter.detach(), [dict(s) for s in states], settings))
    return results


class _Outside(Exception):
    """The state_dict has a tensor that belongs to no parameter, so shards of it would be lost."""


def _check_saved(trial: Any, parameter: Tensor, shaped: Shaped) -> None:
    """Note which saved entries have the parameter's shape; refuse those of no parameter."""
    saved = trial.state_dict()
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        raise _Outside
    others = {k: v for k, v in state.items() if not isinstance(k, int)}
    rest = {k: v for k, v in saved.items() if k != "state"}
    if any(isinstance(x, Tensor) and x.numel() > 1 for x in tree_flatten((others, rest))[0]):
        raise _Outside
    for path, leaf in tree_flatten_with_path(state.get(0, {}))[0]:
        if isinstance(leaf, Tensor):
            shaped[parameter.ndim, keystr(path)] = leaf.shape == parameter.shape


def _copy(optimizer: Optimizer, number: int, parameters: list[nn.Parameter]) -> Any:
    """A copy with one group and other parameters; `deepcopy` alone would copy the real ones."""
    memo: dict[int, Any] = {}
    old = list(nested_optimizers(optimizer))
    for each in old:
        for group in each.param_groups:
            memo |= dict.fromkeys(map(id, group["params"]), parameters[0])
    new = [object.__new__(type(each)) for each in old]
    memo |= {id(each): made for each, made in zip(old, new, strict=True)}
    for each, made in zip(old, new, strict=True):
        own = {  # without methods that were replaced on this object
            k: v for k, v in vars(each).items() if not (callable(v) and hasattr(type(each), k))
        }
        hooks = {k: OrderedDict() for k, v in own.items() if k.startswith("_optimizer_")}
        made.__dict__ = copy.deepcopy({**own, **hooks}, memo)
    for each, made in zip(old, new, strict=True):
        _set_group(made, number, parameters)
        _set_state(each, made, parameters)
    return new[0]


def _set_group(made: Any, number: int, parameters: list[nn.Parameter]) -> None:
    groups = made.param_groups
    if len(groups) > number:
        groups[:] = [groups[number]]
    for group in groups:
        group["params"] = list(parameters)
        usual = group.get("initial_lr", getattr(made, "defaults", {}).get("lr"))
        if isinstance(group.get("lr"), int | float) and not group["lr"]:
            group["lr"] = usual or 1e-3  # a schedule may begin at zero, where nothing moves


def _set_state(old: Optimizer, made: Any, parameters: list[nn.Parameter]) -> None:
    """State from the constructor (torch's Adagrad), in the shapes of the trial's parameters."""
    keys = [key for key in old.state if isinstance(key, Tensor)]
    if not keys:
        return
    first = keys[0]
    for parameter in parameters:
        made.state[parameter] = {
            name: torch.full(parameter.shape, float(_first(value)), dtype=value.dtype)
            if isinstance(value, Tensor) and value.shape == first.shape and value.ndim
            else copy.deepcopy(value)
            for name, value in old.state[first].items()
        }


def _first(value: Tensor) -> Any:
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.flatten()[0] if local.numel() else 0.0


def _joined(whole: Any, halves: list[Any]) -> bool:
    """Whether the halves, one below the other, are the whole, and all else is the same."""
    leaves, spec = tree_flatten(whole)
    parts = [tree_flatten(half) for half in halves]
    if any(other != spec for _, other in parts):
        return False
    shape = leaves[0].shape  # the weights come first
    for leaf, *each in zip(leaves, *(found for found, _ in parts), strict=True):
        if isinstance(leaf, Tensor) and leaf.shape == shape:
            if any(not isinstance(p, Tensor) or p.ndim != leaf.ndim for p in each):
                return False
            rows = torch.cat(each) if all(p.shape[1:] == shape[1:] for p in each) else None
            if rows is None or not _same(leaf, rows):
                return False
        elif not all(_same(leaf, part) for part in each):
            return False
    return True


def _same(one: Any, two: Any, counts: bool = True) -> bool:
    """Equal to the last bit, NaN included; other objects by their type.

    Without `counts` whole numbers may differ: some settings count an optimizer's parameters.
    """
    leaves, spec = tree_flatten(one)
    others, other_spec = tree_flatten(two)
    if spec != other_spec:
        return False
    pairs = zip(leaves, others, strict=True)
    return all((type(a) is type(b) is int and not counts) or _same_leaf(a, b) for a, b in pairs)


def _same_leaf(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        return torch.equal(one.nan_to_num(7e7), two.nan_to_num(7e7))
    if isinstance(one, bool | int | float | str | None):
        return type(one) is type(two) and (one == two or (one != one and two != two))
    return type(one) is type(two)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` requires a function that computes the loss again (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the random states of torch (CPU), numpy and Python at the end."""
    ours, theirs, numbers = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(ours)
        random.setstate(theirs)
        numpy.random.set_state(numbers)
