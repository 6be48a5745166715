"""Find code that reads gradients, which decides how early gradients can be freed.

The optimizer step needs gradients. Hooks of modules and callbacks may read them too: before the
step (`on_before_optimizer_step`), after it, or when gradients are zeroed. Hooks are found by name.
The bytecode of other methods is searched for `.grad` and functions that use gradients.
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

GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step")
ZEROING_HOOKS = ("on_before_zero_grad", "optimizer_zero_grad")
LIBRARY_PACKAGES = ("torch", "lightning", "pytorch_lightning")
GRADIENT_FUNCTIONS = {  # functions that take parameters and read their gradients
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_gradients",
    "get_total_norm",
    "grad_norm",
}
VALUE_INDEPENDENT_ATTRS = {  # attributes of a gradient that do not depend on its values
    *("numel", "element_size", "nbytes", "itemsize", "shape", "size", "stride", "ndim", "dim"),
    *("dtype", "device", "layout", "is_sparse", "untyped_storage", "data_ptr", "to_local"),
    *("_local_tensor", "is_contiguous", "__class__"),
}
VALUE_DEPENDENT_NAMES = {  # functions and methods that read or change the values of a tensor
    *("norm", "vector_norm", "square", "pow", "abs", "std", "var", "sum", "mean", "max", "min"),
    *("isfinite", "isnan", "isinf", "histogram", "histc", "add_histogram", "quantile", "flatten"),
    *("mul_", "add_", "div_", "copy_", "clamp_", "zero_", "cat", "stack", "dot", "full_tensor"),
}
NON_PARAM_ARGUMENTS = {"trainer", "batch", "batch_idx", "outputs", "loss"}  # of hooks
ATTRIBUTE_OPCODES = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
SKIPPED_OPCODES = ("CACHE", "RESUME", "PRECALL", "EXTENDED_ARG")
PARAM_HOLDER_NAMES = {
    "parameters",
    "named_parameters",
    "optimizers",
    "lightning_module",
    "model",
    "modules",
}


def can_free_gradients_early(trainer: Any) -> bool:
    """Whether old gradients can be freed before the forward pass of the next optimizer step.

    Lightning zeroes gradients between `training_step` and the backward pass. If they are freed
    earlier, they do not add to the memory of the forward pass. The result is false with manual
    optimization, and with DDP, whose gradients are views of its buckets. It is also false if other
    code may read old gradients later: a zeroing hook, `training_step`, or an optimizer with its own
    `zero_grad`.
    """
    module, strategy = trainer.lightning_module, trainer.strategy
    return (
        module.automatic_optimization
        and isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy)
        # true for strategies that accumulate gradients themselves
        and not strategy.handles_gradient_accumulation
        # ZEROING_HOOKS: on_before_zero_grad, which callbacks have too, and optimizer_zero_grad
        and not any(is_overridden(hook, module) for hook in ZEROING_HOOKS)
        and not any(
            is_overridden(ZEROING_HOOKS[0], callback, Callback) for callback in trainer.callbacks
        )
        # references_gradients: whether the step, or code that it calls, mentions gradients
        and not references_gradients(module, module.training_step)
        and not any(overrides_zero_grad(optimizer) for optimizer in trainer.optimizers)
    )


def find_gradient_readers(trainer: Any) -> list[str]:
    """Return names of code besides the optimizers that may read the gradients of all parameters.

    With ZeRO-1 each rank then keeps all gradients. Callbacks and hooks with the attribute
    `takes_partial_gradients = True` are left out. They work if a rank has the gradients of some
    parameters only, and None for other parameters.
    """
    module, reader_names = trainer.lightning_module, []
    if not module.automatic_optimization:
        reader_names.append(f"{type(module).__name__}, which steps its own optimizers")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        reader_names.append("the gradient scaler")
    plugin = type(trainer.precision_plugin)
    # a plugin that clips in another way than Lightning, whose clipping MeshStrategy replaces
    if trainer.gradient_clip_val and plugin.clip_grad_by_norm is not Precision.clip_grad_by_norm:
        reader_names.append(plugin.__name__)
    pipeline = getattr(trainer.strategy, "pipeline", None)
    if pipeline is not None and pipeline.tied_params:
        reader_names.append("the pipeline, whose first and last stage share a parameter")
    # ZEROING_HOOKS: on_before_zero_grad and optimizer_zero_grad
    for hook in ("configure_gradient_clipping", *ZEROING_HOOKS):
        module_hook = getattr(module, hook)
        if is_overridden(hook, module) and not getattr(
            module_hook, "takes_partial_gradients", False
        ):
            reader_names.append(f"{type(module).__name__}.{hook}")
    # the class that declares a hook, to find overrides; of the module by default
    owners = [(module, None), *((callback, Callback) for callback in trainer.callbacks)]
    for owner, base in owners:
        if getattr(owner, "takes_partial_gradients", False):
            continue
        hooks = [
            hook
            # GRADIENT_HOOKS: on_after_backward and on_before_optimizer_step
            for hook in GRADIENT_HOOKS
            # _may_read_gradients: searches the bytecode of the hook and of code that it calls
            if is_overridden(hook, owner, base) and _may_read_gradients(getattr(owner, hook), owner)
        ]
        # only of callbacks: those of the module were added above
        if base is not None and is_overridden(ZEROING_HOOKS[0], owner, base):
            hooks.append(ZEROING_HOOKS[0])
        # reads_gradients: whether the bytecode of any of its methods reads gradients
        if hooks or reads_gradients(owner):
            # the class, and its first hook if there is one
            reader_names.append(".".join([type(owner).__name__, *hooks[:1]]))
    for optimizer in trainer.optimizers:
        # every rank steps all of its parameters, so every rank needs all gradients anyway
        if getattr(optimizer, "needs_full_gradient", False):
            continue
        # a `zero_grad` of its own may read gradients
        if overrides_zero_grad(optimizer):
            reader_names.append(f"{type(optimizer).__name__}.zero_grad")
        if getattr(optimizer, "_optimizer_step_pre_hooks", None):
            reader_names.append(f"a hook before the step of {type(optimizer).__name__}")
    if reader_names:
        rank_zero_info(
            f"zero1: {', '.join(reader_names)} may read gradients. So each rank keeps all "
            "gradients, and a step sends 3 times the bytes of the parameters instead of 2 times."
        )
    return reader_names


def overrides_zero_grad(optimizer: Any) -> bool:
    """Whether an optimizer, or any member of a composite one, has its own `zero_grad`."""
    if getattr(optimizer, "is_composite", False):
        return any(overrides_zero_grad(member) for member in optimizer.optimizers)
    is_custom = "zero_grad" in vars(optimizer) or not isinstance(optimizer, Optimizer)
    return is_custom or type(optimizer).zero_grad is not Optimizer.zero_grad


def free_gradients(optimizer: Optimizer) -> None:
    """Set the gradient of each parameter to None."""
    with torch._C.DisableTorchFunctionSubclass():  # saves 2 µs per sharded parameter
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def free_before_forward(trainer: Any) -> None:
    """Make a trainer free old gradients before the first forward pass of an optimizer step.

    It replaces two methods of the trainer's strategy. `can_free_gradients_early` is evaluated at
    the start of each epoch. MeshStrategy frees gradients itself, so it is not changed.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | ModelParallelStrategy):
        return
    # an attribute of MeshStrategy
    if hasattr(strategy, "should_free_gradients"):
        return
    original_train_start = strategy.on_train_start
    original_batch_start = strategy.on_train_batch_start
    should_free = False

    def on_train_start() -> None:
        nonlocal should_free
        original_train_start()
        should_free = can_free_gradients_early(trainer)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        nonlocal should_free
        original_batch_start(batch, batch_idx)
        if batch_idx == 0:
            should_free = can_free_gradients_early(trainer)
        if should_free and batch_idx % trainer.accumulate_grad_batches == 0:
            free_gradients(trainer.optimizers[0])  # automatic optimization has one optimizer

    replace_method(strategy, "on_train_start", on_train_start)
    replace_method(strategy, "on_train_batch_start", on_train_batch_start)


@dataclass
class _GradientUses:
    """How code uses gradients, as far as its bytecode can be followed."""

    has_gradient: bool = False  # it mentions `.grad` or a function that uses gradients
    reads_values: bool = False  # it reads values of gradients
    passes_params: bool = False  # it passes module, optimizer or parameters to unfollowed code


def references_gradients(owner: Any, method: Any) -> bool:
    """Whether a method of an object, or a function that it calls, mentions gradients."""
    return _find_uses(method, owner).has_gradient


def reads_gradients(owner: Any) -> bool:
    """Whether any method of an object reads values of gradients; shapes do not count."""
    functions = [
        *(item for item in vars(owner).values() if isinstance(item, FunctionType)),
        *(
            item
            for base in type(owner).__mro__
            if not _is_library_code(base)
            for item in _methods_of(base)
        ),
    ]
    gradient_uses = [_find_uses(item, owner) for item in functions]
    return any(uses.has_gradient and uses.reads_values for uses in gradient_uses)


def _may_read_gradients(hook: Any, owner: Any) -> bool:
    """Whether a hook that runs when gradients are complete can read their values."""
    uses = _find_uses(hook, owner)
    return uses.reads_values if uses.has_gradient else uses.passes_params


def _is_library_code(owner: Any) -> bool:
    return owner is object or owner.__module__.partition(".")[0] in LIBRARY_PACKAGES


def _methods_of(owner_class: type) -> Iterator[FunctionType]:
    for value in vars(owner_class).values():
        if (function := _plain_function(value)) is not None:
            yield function


def _plain_function(value: Any) -> FunctionType | None:
    """Return the function of a method, class method, property or decorated function, else None."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    function = inspect.unwrap(function) if callable(function) else function
    return function if isinstance(function, FunctionType) else None


def _find_uses(function: Any, owner: Any) -> _GradientUses:
    uses = _GradientUses()
    function = inspect.unwrap(getattr(function, "__func__", function))
    if isinstance(function, FunctionType):
        _scan_function(function, type(owner), uses, set())
    else:
        uses.passes_params = True  # a partial or compiled function cannot be followed
    return uses


def _scan_function(
    function: FunctionType, owner: type, uses: _GradientUses, visited: set[CodeType]
) -> None:
    """Search the bytecode of a function, and of functions that it calls, for uses of gradients.

    Args:
        function: the function or method; code of torch and Lightning is not searched.
        owner: the class in which the name of each attribute is looked up, as `self.name` is.
        uses: the uses found so far, updated in place.
        visited: code of the functions searched so far, updated in place.
    """
    if function.__code__ in visited or _is_library_code(function):
        return
    visited.add(function.__code__)
    # _nested_code: the code of the function, and of functions defined in it
    for code in _nested_code(function.__code__):
        instructions = [
            instruction
            for instruction in dis.get_instructions(code)
            # SKIPPED_OPCODES: instructions of the interpreter without a meaning for this search
            if instruction.opname not in SKIPPED_OPCODES
        ]
        for previous, instruction, following in zip(
            [None, *instructions[:-1]], instructions, [*instructions[1:], None], strict=True
        ):
            _record_uses(uses, function, previous, instruction, following)
            called: Any = None
            if instruction.opname in ATTRIBUTE_OPCODES and isinstance(instruction.argval, str):
                called = getattr(owner, instruction.argval, None)
            elif instruction.opname == "LOAD_GLOBAL":
                called = function.__globals__.get(instruction.argval)
            # called: a method or property of the owner, or a global function; searched as well
            if (called_function := _plain_function(called)) is not None:
                _scan_function(called_function, owner, uses, visited)


def _record_uses(
    uses: _GradientUses,
    function: FunctionType,
    previous: dis.Instruction | None,
    instruction: dis.Instruction,
    following: dis.Instruction | None,
) -> None:
    """Record in `uses` how one instruction of a function, between two others, uses gradients.

    It sets attributes of `uses` to true: has_gradient (the code refers to a gradient), reads_values
    (it may read or change values) and passes_params (it gives parameters to other code).
    """
    name = instruction.argval if isinstance(instruction.argval, str) else ""
    is_attribute = instruction.opname in ATTRIBUTE_OPCODES
    # GRADIENT_FUNCTIONS: e.g. clip_grad_norm_, which takes parameters
    if name in GRADIENT_FUNCTIONS:
        uses.has_gradient = uses.reads_values = True
    elif name == "grad" and (is_attribute or instruction.opname == "LOAD_CONST"):
        if previous is None or previous.argval != "autograd":  # not torch.autograd.grad
            uses.has_gradient = True
            # true unless the gradient is only tested, or asked for its shape or dtype
            uses.reads_values |= _next_reads_values(instruction, following)
    elif is_attribute:
        # VALUE_DEPENDENT_NAMES: e.g. `norm` or `mul_`
        uses.reads_values |= name in VALUE_DEPENDENT_NAMES
        # PARAM_HOLDER_NAMES: e.g. `parameters` or `optimizers`
        uses.passes_params |= name in PARAM_HOLDER_NAMES
    elif instruction.opname == "LOAD_GLOBAL":
        uses.passes_params |= name in PARAM_HOLDER_NAMES
    elif instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        argument_names = function.__code__.co_varnames[: function.__code__.co_argcount]
        # arguments besides `self` that may be an optimizer, a module or parameters
        # NON_PARAM_ARGUMENTS: arguments of hooks that are none, e.g. `batch`
        param_arguments = set(argument_names[1:]) - NON_PARAM_ARGUMENTS
        # LOAD_FAST_LOAD_FAST of Python 3.13 loads two variables
        loaded = instruction.argval if isinstance(instruction.argval, tuple) else (name,)
        uses.passes_params |= not param_arguments.isdisjoint(loaded)
        # `self` is passed unless an attribute of it is read
        is_passed = following is None or following.opname not in ATTRIBUTE_OPCODES
        uses.passes_params |= is_passed and argument_names[:1] == (loaded[-1],)


def _next_reads_values(instruction: dis.Instruction, following: dis.Instruction | None) -> bool:
    """Whether the instruction after `.grad` uses the values of the gradient."""
    if instruction.opname in ("STORE_ATTR", "LOAD_CONST"):
        return True
    if following is None:
        return False
    if following.opname in ATTRIBUTE_OPCODES:
        return following.argval not in VALUE_INDEPENDENT_ATTRS
    return following.opname.startswith(("BINARY", "INPLACE", "UNARY", "COMPARE"))


def _nested_code(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object, and those of the functions and lambdas that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested_code(constant)
