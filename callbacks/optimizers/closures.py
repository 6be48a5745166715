"""Closures of an optimizer step: which classes use one, and one for several optimizers.

A closure computes the loss and its gradients. An optimizer such as LBFGS calls it several times in
a step; most classes ignore it.
"""

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from ravine.errors import UsageError


def takes_closure(optimizer: Optimizer) -> bool:
    """Whether `step` has a `closure` argument and uses it; many classes ignore theirs."""
    return _class_takes_closure(type(optimizer))


@functools.cache  # it takes 0.1 ms and runs in every training step
def _class_takes_closure(cls: type[Optimizer]) -> bool:
    step = inspect.unwrap(cls.step)
    if "closure" not in inspect.signature(cls.step).parameters:
        return False
    code = getattr(step, "__code__", None)
    if code is None or "closure" not in (*code.co_varnames, *code.co_cellvars):
        return True  # compiled or renamed: the bytecode does not show the use
    loaded = (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD"))
    # an instruction loads one local variable, or two since Python 3.13
    return any("closure" in (name if isinstance(name, tuple) else (name,)) for name in loaded)


class LossOnlyClosure:
    """A closure for one of several members; it returns the loss computed before the step.

    The gradients are those at the weights before the step. A member that evaluates the loss twice
    or at other weights would compute a wrong step, so the closure raises UsageError.
    """

    def __init__(self, loss: Any, groups: list[dict[str, Any]]) -> None:
        """Store the loss and the current gradients."""
        self.loss = loss
        self.gradients = [(p, p.grad) for group in groups for p in group["params"]]

    def for_optimizer(self, member: Optimizer) -> Callable[[], Any]:
        """Return the closure for one of the optimizers.

        It returns the stored loss at its first call. UsageError at a second call, and if a weight
        or gradient of this optimizer has changed.
        """
        # `self.gradients`: pairs of each parameter and its gradient, when the loss was computed
        param_ids = {id(p) for group in member.param_groups for p in group["params"]}
        # torch raises `_version` of a tensor at each in-place change
        before = [(p, p._version, gradient) for p, gradient in self.gradients if id(p) in param_ids]
        was_called = False

        def closure() -> Any:
            nonlocal was_called
            is_changed = any(p._version != version or p.grad is not g for p, version, g in before)
            if was_called or is_changed:
                raise UsageError(
                    f"{type(member).__name__} computes the loss several times in a step, or at "
                    "other weights, which is not possible together with other optimizers",
                    hint="use it as the only optimizer, or use AdamW",
                )
            was_called = True
            return self.loss

        return closure
