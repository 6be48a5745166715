"""Find code that reads gradients, which decides how early gradients may be freed.

A gradient is needed by the optimizer step. Hooks of modules and callbacks may read it too: before
the step (`on_before_optimizer_step`), after it, or where gradients are zeroed. Hooks are found by
name; the bytecode of other methods is searched for `.grad` and functions of gradients.
"""

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from ravine.lightning_compat import replace_method

READING = ("on_after_backward", "on_before_optimizer_step")
ZEROING = ("on_before_zero_grad", "optimizer_zero_grad")
PACKAGES = ("torch", "lightning", "pytorch_lightning")
FUNCTIONS = {  # that are given parameters, and read their gradients
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_gradients",
    "get_total_norm",
    "grad_norm",
}
SIZES = {  # attributes of a gradient that are equal whatever its numbers are
    *("numel", "element_size", "nbytes", "itemsize", "shape", "size", "stride", "ndim", "dim"),
    *("dtype", "device", "layout", "is_sparse", "untyped_storage", "data_ptr", "to_local"),
    *("_local_tensor", "is_contiguous", "__class__"),
}
NUMBERS = {  # names by which code reads the numbers of a tensor, or changes them
    *("norm", "vector_norm", "square", "pow", "abs", "std", "var", "sum", "mean", "max", "min"),
    *("isfinite", "isnan", "isinf", "histogram", "histc", "add_histogram", "quantile", "flatten"),
    *("mul_", "add_", "div_", "copy_", "clamp_", "zero_", "cat", "stack", "dot", "full_tensor"),
}
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
SKIPPED = ("CACHE", "RESUME", "PRECALL", "EXTENDED_ARG")
HOLDERS = {"parameters", "named_parameters", "optimizers", "lightning_module", "model", "modules"}


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
    for hook in ("configure_gradient_clipping", *ZEROING):
        own = getattr(module, hook)
        if is_overridden(hook, module) and not getattr(own, "takes_partial_gradients", False):
            found.append(f"{type(module).__name__}.{hook}")
    for owner, base in ((module, None), *((each, Callback) for each in trainer.callbacks)):
        if getattr(owner, "takes_partial_gradients", False):
            continue
        hooks = [each for each in READING if is_overridden(each, owner, base)]
        hooks = [each for each in hooks if _may_read(getattr(owner, each), owner)]
        if base is not None and is_overridden(ZEROING[0], owner, base):
            hooks.append(ZEROING[0])
        if hooks or reads_gradients(owner):
            found.append(".".join([type(owner).__name__, *hooks[:1]]))
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
    """Whether `zero_grad` does more than set the gradient of each parameter to None.

    Of several optimizers joined as one (`members`), whether any of them does.
    """
    members = getattr(optimizer, "members", None)
    if isinstance(members, list):
        return any(has_own_zero_grad(member) for member in members)
    own = "zero_grad" in vars(optimizer) or not isinstance(optimizer, Optimizer)
    return own or type(optimizer).zero_grad is not Optimizer.zero_grad


def free_gradients(optimizer: Optimizer) -> None:
    """Set the gradient of each parameter to None."""
    with torch._C.DisableTorchFunctionSubclass():  # sharded parameters take 2 µs each otherwise
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def free_before_forward(trainer: Any) -> None:
    """Let the trainer free old gradients before the first forward pass of an optimizer step.

    Whether it may is decided once an epoch, by `frees_early`. A MeshStrategy does it by itself.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy):
        return
    if hasattr(strategy, "frees"):
        return
    start_run, start_batch, frees = strategy.on_train_start, strategy.on_train_batch_start, False

    def decide_and_start() -> None:
        nonlocal frees
        start_run()
        frees = frees_early(trainer)

    def free_and_start(batch: Any, batch_idx: int) -> None:
        nonlocal frees
        start_batch(batch, batch_idx)
        if batch_idx == 0:
            frees = frees_early(trainer)
        if frees and batch_idx % trainer.accumulate_grad_batches == 0:
            free_gradients(trainer.optimizers[0])

    replace_method(strategy, "on_train_start", decide_and_start)
    replace_method(strategy, "on_train_batch_start", free_and_start)


@dataclass
class _Uses:
    """How code uses gradients, as far as it can be followed."""

    mentions: bool = False  # `.grad`, or a function of gradients
    reads: bool = False  # numbers of gradients, if it mentions them
    passes: bool = False  # the module, an optimizer or parameters to code that is not followed


def mentions_gradients(owner: Any, method: Any) -> bool:
    """Whether a method of an object, or what it calls, mentions gradients."""
    return _uses(method, owner).mentions


def reads_gradients(owner: Any) -> bool:
    """Whether any method of an object's class reads numbers of gradients; sizes do not count."""
    functions = [
        *(each for each in vars(owner).values() if isinstance(each, FunctionType)),
        *(each for base in type(owner).__mro__ if not _is_known(base) for each in _functions(base)),
    ]
    found = [_uses(each, owner) for each in functions]
    return any(uses.mentions and uses.reads for uses in found)


def _may_read(hook: Any, owner: Any) -> bool:
    """Whether a hook that is called when gradients are complete can read their numbers."""
    uses = _uses(hook, owner)
    return uses.reads if uses.mentions else uses.passes


def _is_known(kind: Any) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in PACKAGES


def _functions(kind: type) -> Iterator[FunctionType]:
    for value in vars(kind).values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        function = inspect.unwrap(function) if callable(function) else function
        if isinstance(function, FunctionType):
            yield function


def _uses(function: Any, owner: Any) -> _Uses:
    uses = _Uses()
    function = inspect.unwrap(getattr(function, "__func__", function))
    if isinstance(function, FunctionType):
        _follow(function, type(owner), uses, set())
    else:
        uses.passes = True  # a partial, a compiled function
    return uses


def _follow(function: FunctionType, owner: type, uses: _Uses, seen: set[CodeType]) -> None:
    if function.__code__ in seen or _is_known(function):
        return
    seen.add(function.__code__)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = set(names[1:]) - {"trainer", "batch", "batch_idx", "outputs", "loss"}
    for code in _nested(function.__code__):
        steps = [step for step in dis.get_instructions(code) if step.opname not in SKIPPED]
        for before, step, after in zip([None, *steps], steps, [*steps[1:], None], strict=False):
            name = step.argval if isinstance(step.argval, str) else ""
            attribute = step.opname in ATTRIBUTE
            if name in FUNCTIONS:
                uses.mentions = uses.reads = True
            elif name == "grad" and (attribute or step.opname == "LOAD_CONST"):
                if before is None or before.argval != "autograd":
                    uses.mentions = True
                    uses.reads |= _reads_next(step, after)
            elif attribute or step.opname == "LOAD_GLOBAL":
                uses.reads |= name in NUMBERS and step.opname != "LOAD_GLOBAL"
                uses.passes |= name in HOLDERS
            elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
                loaded = step.argval if isinstance(step.argval, tuple) else (name,)
                uses.passes |= not given.isdisjoint(loaded)
                is_passed = after is None or after.opname not in ATTRIBUTE
                uses.passes |= loaded[-1] in names[:1] and is_passed
            called: Any = getattr(owner, name, None) if attribute else None
            if step.opname == "LOAD_GLOBAL":
                called = function.__globals__.get(name)
            if isinstance(called, FunctionType):
                _follow(called, owner, uses, seen)


def _reads_next(step: dis.Instruction, after: dis.Instruction | None) -> bool:
    """Whether the instruction after `.grad` works with its numbers."""
    if step.opname in ("STORE_ATTR", "LOAD_CONST"):
        return True
    if after is None:
        return False
    if after.opname in ATTRIBUTE:
        return after.argval not in SIZES
    return after.opname.startswith(("BINARY", "INPLACE", "UNARY", "COMPARE"))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
