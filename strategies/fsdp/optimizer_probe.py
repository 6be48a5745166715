"""Probe whether an optimizer updates each element, or each tensor, independently.

    elementwise    three steps on a full tensor = three steps on its halves, bit for bit
    per tensor     three steps on two tensors together = three steps on each separately
    coupled        neither, e.g. one learning rate for all parameters (Prodigy, D-Adaptation)

An elementwise optimizer can step shards. Any other optimizer would train on shards without an
error, but with other norms, trust ratios or factors than on full tensors. So a copy of the
optimizer is tested on small random tensors before training.
"""

import copy
import functools
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

from .original_parameters import iter_nested_optimizers

UpdateKind = Literal["elementwise", "per tensor", "coupled"]
GRADIENT_SCALES = (1.0, 1e-2, 1e-5)  # one per step: a rule may depend on the size of gradients
# Some optimizers treat tensors of less than 4096 elements, or of less than 128 rows or columns,
# differently. So large parameters are probed with large tensors. A half has 32 times an odd number
# of elements. This is a multiple of the vector size of a CPU, because fused kernels round the
# elements after the last full vector differently, in the last bit. It is not a multiple of the
# block sizes (64 and more) that some optimizers use.
SMALL_SHAPES: dict[int, tuple[int, ...]] = {1: (320,), 2: (40, 24)}
LARGE_SHAPES: dict[int, tuple[int, ...]] = {1: (5056,), 2: (164, 144)}


StateShapeFlags = dict[tuple[int, str], bool]


class ProbeResult(NamedTuple):
    """The result of a probe.

    Args:
        update_kind: see the top of this file.
        reason: why an optimizer is coupled; a part of an error message.
        has_param_shape: whether a state entry has the shape of its parameter, by the number of axes
            of the parameter and the path of the entry.
    """

    update_kind: UpdateKind
    reason: str = ""
    has_param_shape: StateShapeFlags = {}  # noqa: RUF012 (it is not changed)


def probe_optimizer(optimizer: Optimizer) -> ProbeResult:
    """Probe copies of an optimizer, for each kind of param group and number of axes.

    The optimizer and the random states of torch, numpy and Python are not changed.
    """
    update_kinds = set()
    has_param_shape: StateShapeFlags = {}
    for number, example in _probe_cases(optimizer):
        update_kind, reason = _probe_case(optimizer, number, example, has_param_shape)
        if update_kind == "coupled":
            return ProbeResult(update_kind, reason)
        update_kinds.add(update_kind)
    return ProbeResult(
        "per tensor" if "per tensor" in update_kinds else "elementwise", "", has_param_shape
    )


def _probe_cases(optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of a group and its largest parameter, for each case to be probed.

    Cases differ in settings of the group, number of axes or dtype.
    """
    cases: dict[Any, tuple[int, Tensor]] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        settings = tuple(
            # of a float only whether it is 0 counts: a factor of 0 disables a term
            (key, value == 0 if type(value) is float else repr(value)[:100])
            for key, value in sorted(group.items(), key=lambda item: str(item[0]))
            # a learning rate scales the update, and does not change its kind
            if key not in ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr")
        )
        for parameter in group["params"]:
            if not (parameter.is_floating_point() or parameter.is_complex()):
                continue  # codes of quantized weights are not trained
            # groups with equal settings are probed once
            case = (settings, parameter.ndim, parameter.dtype)
            # the largest, because some optimizers treat large tensors differently
            _, largest = cases.setdefault(case, (group_index, parameter))
            if parameter.numel() > largest.numel():
                cases[case] = (group_index, parameter)
    yield from cases.values()


def _probe_case(
    optimizer: Optimizer, group_index: int, example: Tensor, has_param_shape: StateShapeFlags
) -> tuple[UpdateKind, str]:
    """Return the update kind for a group and parameters like `example`, and why it is coupled.

    Args:
        optimizer: the optimizer, which is copied.
        group_index: index of the param group whose settings are used.
        example: a parameter with the number of axes and the dtype to be probed.
        has_param_shape: flags of state entries; those of this case are added.
    """
    # needs_closure: true for LBFGS
    if needs_closure(optimizer):
        return "coupled", "computes the gradient of all parameters several times a step"
    # a scalar is not split over ranks
    if example.ndim == 0:
        return "elementwise", ""
    # _probe_shape: small or large, like the example, because some rules treat the two differently;
    # with the axes of the example and an even number of rows
    shape = _probe_shape(example)
    half = shape[0] // 2
    with _preserve_rng_states():
        generator = torch.Generator().manual_seed(0)

        def draw_values() -> Tensor:
            numbers = torch.randn(shape, generator=generator)
            numbers[half:] *= 30  # the halves differ in norm
            return numbers.to(example.dtype)

        # two parameters, each with a gradient for each step
        # GRADIENT_SCALES: a factor for each step; a rule may depend on the size of gradients
        values, gradients = draw_values(), [draw_values() * scale for scale in GRADIENT_SCALES]
        other_values = draw_values()
        # smaller by a factor that no rounding hides, so that a joint statistic differs
        other_gradients = [draw_values() * scale / 7 for scale in GRADIENT_SCALES]

        new_flags: StateShapeFlags = {}

        def run_trial(*tensors: tuple[Tensor, list[Tensor]]) -> list[Any]:
            return _run_steps(optimizer, group_index, tensors, new_flags)

        try:
            (full_result,) = run_trial((values, gradients))
        except _StateOutsideParamsError:
            return "coupled", "keeps tensors outside of its state"
        except Exception as error:
            error_text = " ".join(str(error).split())[:150]
            return "coupled", f"failed in a trial ({type(error).__name__}: {error_text})"
        # copied here, because trials on halves add other flags to new_flags
        has_param_shape |= new_flags
        try:
            half_results = [
                run_trial((values[rows], [g[rows] for g in gradients]))[0]
                for rows in (slice(0, half), slice(half, None))
            ]
            if _halves_equal_full(full_result, half_results):
                return "elementwise", ""
        except Exception:  # it does not accept tensors of this shape
            pass
        # per tensor: stepping two parameters together gives the same as stepping each alone. The
        # first trial has passed with this shape, so an error here is a fault, and is raised.
        joint_results = run_trial((values, gradients), (other_values, other_gradients))
        separate_results = [full_result, *run_trial((other_values, other_gradients))]
        if all(
            # compare_counts=False: integers may differ, because some settings count the parameters
            _is_equal(joint, separate, compare_counts=False)
            for joint, separate in zip(joint_results, separate_results, strict=True)
        ):
            return "per tensor", ""
    return "coupled", "computes the update of a parameter from other parameters, too"


def _probe_shape(example: Tensor) -> tuple[int, ...]:
    """Return the shape of the tensors with which parameters like `example` are probed."""
    is_large = example.numel() > 4096 or (example.ndim > 1 and max(example.shape) >= 128)
    base_shape = (LARGE_SHAPES if is_large else SMALL_SHAPES)[min(example.ndim, 2)]
    return (*base_shape, *([3] * (example.ndim - 2)))


def _run_steps(
    optimizer: Optimizer,
    group_index: int,
    tensors: tuple[tuple[Tensor, list[Tensor]], ...],
    has_param_shape: StateShapeFlags,
) -> list[Any]:
    """Step a copy of the optimizer on some parameters.

    Args:
        optimizer: the optimizer to be copied.
        group_index: index of its param group whose settings are used.
        tensors: for each parameter its values, and its gradient in each step.
        has_param_shape: flags of state entries; those of the first parameter are added.

    Returns:
        for each parameter its weights, its state in each nested optimizer, and the settings.
    """
    parameters = [nn.Parameter(values.clone()) for values, _ in tensors]
    # the copy has one param group, with these parameters
    trial = _copy_optimizer(optimizer, group_index, parameters)
    # the same random numbers in each trial; _probe_case restores the generators
    torch.default_generator.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    if callable(getattr(trial, "train", None)) and callable(getattr(trial, "eval", None)):
        with suppress(AttributeError, NotImplementedError):  # a wrapped optimizer without it
            trial.train()  # schedule-free optimizers require it
    for step in range(len(GRADIENT_SCALES)):
        for parameter, (_, gradients) in zip(parameters, tensors, strict=True):
            parameter.grad = gradients[step].clone()
        trial.step()
    # notes which state tensors have the shape of the parameter
    _record_saved_shapes(trial, parameters[0], has_param_shape)
    # the optimizer itself, and optimizers that it wraps
    all_optimizers = list(iter_nested_optimizers(trial))
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


class _StateOutsideParamsError(Exception):
    """The state_dict has a tensor that belongs to no parameter, so it cannot be sharded."""


def _record_saved_shapes(trial: Any, parameter: Tensor, has_param_shape: StateShapeFlags) -> None:
    """Record in `has_param_shape` which entries of an optimizer's state have a parameter's shape.

    The keys are the number of axes of the parameter, and the path of the entry in its state.

    Args:
        trial: the optimizer after its steps; the parameter is its first one.
        parameter: the parameter.
        has_param_shape: the flags, updated in place.

    Raises:
        _StateOutsideParamsError: an entry with several elements belongs to no parameter.
    """
    saved = trial.state_dict()
    state = saved.get("state") if isinstance(saved, dict) else None
    # a state_dict of another form cannot be assigned to parameters
    if not isinstance(state, dict):
        raise _StateOutsideParamsError
    non_param_state = {k: v for k, v in state.items() if not isinstance(k, int)}
    other_entries = {k: v for k, v in saved.items() if k != "state"}
    if any(
        isinstance(x, Tensor) and x.numel() > 1
        for x in tree_flatten((non_param_state, other_entries))[0]
    ):
        raise _StateOutsideParamsError
    for path, leaf in tree_flatten_with_path(state.get(0, {}))[0]:  # 0: index of the parameter
        if isinstance(leaf, Tensor):
            has_param_shape[parameter.ndim, keystr(path)] = leaf.shape == parameter.shape


def _copy_optimizer(optimizer: Optimizer, group_index: int, parameters: list[nn.Parameter]) -> Any:
    """Copy an optimizer with one of its param groups, which gets other parameters.

    The memory of the real parameters is not copied; other tensors, such as a state, are. Optimizers
    in attributes (a composite one, a wrapper) are copied as well.

    Args:
        optimizer: the optimizer.
        group_index: index of the group that the copy keeps.
        parameters: the parameters of the copy.
    """
    originals = list(iter_nested_optimizers(optimizer))  # the first is `optimizer` itself
    duplicates = [object.__new__(type(original)) for original in originals]
    pairs = list(zip(originals, duplicates, strict=True))
    # for deepcopy: objects by the id of the object that they replace
    memo: dict[int, Any] = {}
    for original in originals:
        for group in original.param_groups:
            # any new parameter may stand here: _keep_only_group sets the parameters below
            memo |= dict.fromkeys(map(id, group["params"]), parameters[0])
    memo |= {id(original): duplicate for original, duplicate in pairs}
    for original, duplicate in pairs:
        attributes = {  # without methods that were replaced on this instance
            k: v
            for k, v in vars(original).items()
            if not (callable(v) and hasattr(type(original), k))
        }
        # names of torch's dicts of hooks, which a trial must not run
        no_hooks = {k: OrderedDict() for k in attributes if k.startswith("_optimizer_")}
        duplicate.__dict__ = copy.deepcopy({**attributes, **no_hooks}, memo)
    for original, duplicate in pairs:
        # A wrapped optimizer has the same groups as its wrapper, and so the same index. One with
        # fewer groups keeps all of them.
        _keep_only_group(duplicate, group_index, parameters)
        # state that the class creates in its constructor, which was not called
        _init_trial_state(original, duplicate, parameters)
    return duplicates[0]


def _keep_only_group(optimizer: Any, group_index: int, parameters: list[nn.Parameter]) -> None:
    groups = optimizer.param_groups
    # a nested optimizer with fewer groups keeps all of them
    if len(groups) > group_index:
        groups[:] = [groups[group_index]]
    for group in groups:
        group["params"] = list(parameters)
        initial_rate = group.get("initial_lr", getattr(optimizer, "defaults", {}).get("lr"))
        if isinstance(group.get("lr"), int | float) and not group["lr"]:
            group["lr"] = initial_rate or 1e-3  # a schedule may start at 0, which makes no update


def _init_trial_state(old: Optimizer, trial: Any, parameters: list[nn.Parameter]) -> None:
    """Create the state that a constructor creates (torch's Adagrad), for the probe's parameters."""
    keys = [key for key in old.state if isinstance(key, Tensor)]
    if not keys:
        return
    first = keys[0]
    for parameter in parameters:
        trial.state[parameter] = {
            name: torch.full(parameter.shape, float(_first_value(value)), dtype=value.dtype)
            if isinstance(value, Tensor) and value.shape == first.shape and value.ndim
            else copy.deepcopy(value)
            for name, value in old.state[first].items()
        }


def _first_value(value: Tensor) -> Any:
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.flatten()[0] if local.numel() else 0.0


def _halves_equal_full(full: Any, halves: list[Any]) -> bool:
    """Whether steps on the halves of a tensor gave the same result as steps on the full tensor.

    Tensors of the shape of the weights equal the concatenated halves, all other values are equal.

    Args:
        full: the result of `_run_steps` for the full tensor.
        halves: the results for its first and second half of rows.
    """
    leaves, spec = tree_flatten(full)
    flat_halves = [tree_flatten(half) for half in halves]
    if any(half_spec != spec for _, half_spec in flat_halves):
        return False
    weights_shape = leaves[0].shape  # the weights come first
    leaves_of_halves = [half_leaves for half_leaves, _ in flat_halves]
    for leaf, *half_leaves in zip(leaves, *leaves_of_halves, strict=True):
        if isinstance(leaf, Tensor) and leaf.shape == weights_shape:
            can_concatenate = all(
                isinstance(half_leaf, Tensor)
                and half_leaf.ndim == leaf.ndim
                and half_leaf.shape[1:] == weights_shape[1:]
                for half_leaf in half_leaves
            )
            if not can_concatenate or not _is_equal(leaf, torch.cat(half_leaves)):
                return False
        elif not all(_is_equal(leaf, half_leaf) for half_leaf in half_leaves):
            return False
    return True


def _is_equal(one: Any, two: Any, compare_counts: bool = True) -> bool:
    """Whether two trees are equal bit for bit, NaN included; other objects compare by type.

    Without `compare_counts` integers may differ, because some settings count the parameters.
    """
    leaves, spec = tree_flatten(one)
    other_leaves, other_spec = tree_flatten(two)
    if spec != other_spec:
        return False
    pairs = zip(leaves, other_leaves, strict=True)
    return all(
        (type(a) is type(b) is int and not compare_counts) or _is_equal_leaf(a, b) for a, b in pairs
    )


def _is_equal_leaf(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        return torch.equal(one.nan_to_num(7e7), two.nan_to_num(7e7))
    if isinstance(one, bool | int | float | str | None):
        return type(one) is type(two) and (one == two or (one != one and two != two))
    return type(one) is type(two)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` requires a closure that recomputes the loss (LBFGS)."""
    return _class_needs_closure(type(optimizer))


@functools.cache  # it takes 0.1 ms and runs in every training step
def _class_needs_closure(cls: type[Optimizer]) -> bool:
    closure = inspect.signature(cls.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@contextmanager
def _preserve_rng_states() -> Iterator[None]:
    """Restore the random states of torch (CPU), numpy and Python on exit."""
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state(),
    )
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
