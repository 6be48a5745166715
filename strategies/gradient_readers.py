"""Who reads gradients, and when: decides how early gradients may be freed.

A gradient is needed by the optimizer step. Hooks of modules and callbacks may read it too: before
the step (`on_before_optimizer_step`), after it, or where gradients are zeroed. Hooks are found by
name; other methods are searched for code that mentions `.grad` or a function of gradients.
"""

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

READING = ("on_after_backward", "on_before_optimizer_step")
ZEROING = ("on_before_zero_grad", "optimizer_zero_grad")
PACKAGES = ("torch", "lightning", "pytorch_lightning")
FUNCTIONS = {
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_gradients",
    "get_total_norm",
    "grad_norm",
}


def frees_early(trainer: Any) -> bool:
    """Whether old gradients can be freed before the forward pass of the next optimizer step.

    Lightning zeroes gradients between `training_step` and the backward pass. Freed earlier, they
    do not add to the memory of the forward pass. False under manual optimization, for DDP, whose
    gradients are views of its buckets, and where old gradients may be read after that moment: by a
    hook of zeroing, by `training_step`, or by an optimizer with its own `zero_grad`.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    return (
        module.automatic_optimization
        and isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy)
        and not strategy.handles_gradient_accumulation
        and not any(is_overridden(hook, module) for hook in ZEROING)
        and not any(is_overridden(ZEROING[0], each, Callback) for each in trainer.callbacks)
        and not mentions_gradients(module, module.training_step)
        and not any(has_own_zero_grad(optimizer) for optimizer in trainer.optimizers)
    )


def find_readers(trainer: Any) -> list[str]:
    """Names of what reads gradients besides the optimizers, and needs those of all parameters.

    A callback whose class has `takes_partial_gradients = True` works where a rank has the gradients
    of some parameters only, and None for the others; so does a hook with that attribute.
    """
    module, found = trainer.lightning_module, []
    if not module.automatic_optimization:
        found.append(f"{type(module).__name__}, which steps its own optimizers")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        found.append("the gradient scaler")
    plugin = type(trainer.precision_plugin)
    if trainer.gradient_clip_val and plugin.clip_grad_by_norm is not Precision.clip_grad_by_norm:
        found.append(plugin.__name__)
    pipeline = getattr(trainer.strategy, "pipeline", None)
    if pipeline is not None and pipeline.tied:
        found.append("the pipeline, whose first and last stage share a parameter")
    for hook in (*READING, "configure_gradient_clipping", *ZEROING):
        own = getattr(module, hook)
        if is_overridden(hook, module) and not getattr(own, "takes_partial_gradients", False):
            found.append(f"{type(module).__name__}.{hook}")
    if not found and mentions_gradients(module):
        found.append(type(module).__name__)
    for callback in trainer.callbacks:
        if getattr(callback, "takes_partial_gradients", False):
            continue
        hooks = [hook for hook in (*READING, ZEROING[0]) if is_overridden(hook, callback, Callback)]
        if hooks or mentions_gradients(callback):
            found.append(".".join([type(callback).__name__, *hooks[:1]]))
    for optimizer in trainer.optimizers:
        if getattr(optimizer, "gathers", False):
            continue
        if has_own_zero_grad(optimizer):
            found.append(f"{type(optimizer).__name__}.zero_grad")
        if getattr(optimizer, "_optimizer_step_pre_hooks", None):
            found.append(f"a hook before the step of {type(optimizer).__name__}")
    if found:
        rank_zero_info(
            f"zero1: {', '.join(found)} may read gradients: each rank keeps all of them, and a step"
            " sends 3 W in place of 2 W"
        )
    return found


def has_own_zero_grad(optimizer: Any) -> bool:
    """Whether zeroing does more than to drop the gradient of each parameter.

    Several optimizers joined as one (`members`) are asked one by one.
    """
    members = getattr(optimizer, "members", None)
    if isinstance(members, list):
        return any(has_own_zero_grad(member) for member in members)
    own = "zero_grad" in vars(optimizer) or not isinstance(optimizer, Optimizer)
    return own or type(optimizer).zero_grad is not Optimizer.zero_grad


def free_gradients(optimizer: Optimizer) -> None:
    """Drop the gradient of each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def mentions_gradients(owner: Any, *methods: Any) -> bool:
    """Whether code of an object's class mentions gradients; functions that it calls count.

    Args:
        owner: the object; its own functions and those of its class are searched
        methods: where the search begins; by default, everywhere
    """
    functions = [*methods] or [
        *(each for each in vars(owner).values() if isinstance(each, FunctionType)),
        *(each for base in type(owner).__mro__ if not _is_known(base) for each in _functions(base)),
    ]
    return any(_mentions(getattr(each, "__func__", each), type(owner), set()) for each in functions)


def _is_known(kind: Any) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in PACKAGES


def _functions(kind: type) -> Iterator[FunctionType]:
    for value in vars(kind).values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        function = inspect.unwrap(function) if callable(function) else function
        if isinstance(function, FunctionType):
            yield function


def _mentions(function: Any, owner: type, seen: set[Any]) -> bool:
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen or _is_known(function):
        return False
    seen.add(code)
    for each in _nested(code):
        before = ""
        for step in dis.get_instructions(each):
            name = step.argval if isinstance(step.argval, str) else ""
            is_attribute = step.opname in ("LOAD_ATTR", "STORE_ATTR", "LOAD_METHOD")
            if name in FUNCTIONS or (
                name == "grad"
                and before != "autograd"
                and (
                    is_attribute or step.opname == "LOAD_CONST"  # getattr(parameter, "grad")
                )
            ):
                return True
            called = None
            if is_attribute:
                called = getattr(owner, name, None)
            elif step.opname == "LOAD_GLOBAL":
                called = function.__globals__.get(name)
            if isinstance(called, FunctionType) and _mentions(called, owner, seen):
                return True
            before = name or before
    return False


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
