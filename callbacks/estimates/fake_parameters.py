"""Parameters without memory: on the meta device while a module is built, fake tensors in a step.

    with parameters_on_meta():          constructors allocate one parameter at a time
        module = MyModule()
    replace_by_fakes(module, mode)      every parameter gets shape, dtype and device, and no values

A parameter on the meta device has the attribute `initial_values`, whose values are zero. So all
transforms that accept deferred parameters (LoRA, Quantization, Pretrained) work as in a sharded
run (strategies/materialize.py).
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class ZeroValues:
    """Deferred values of a parameter on the meta device: zeros, or rows of a stored tensor."""

    def __init__(self, parameter: Tensor) -> None:
        """Store shape and dtype."""
        self.shape, self.dtype = parameter.shape, parameter.dtype
        self.stored: Tensor | None = None

    def set_source(self, stored: Tensor) -> None:
        """Read the values from a tensor, such as a mapped file."""
        self.stored = stored.detach()

    def get_rows(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` (exclusive) on the CPU; a scalar has one row."""
        rows = torch.zeros(stop - start, *self.shape[1:], dtype=self.dtype, device="cpu")
        if self.stored is not None:
            stored = (self.stored if self.shape else self.stored.reshape(1))[start:stop]
            rows[: len(stored)] = stored
        return rows


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it, in a `with` block."""
    original_register = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original_register(self, name, param)
        is_real = param is not None and not param.is_meta and not isinstance(param, FakeTensor)
        if is_real and type(param) is nn.Parameter:
            moved = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            moved.initial_values = ZeroValues(moved)  # type: ignore[attr-defined]
            self._parameters[name] = moved

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original_register  # type: ignore[method-assign]


def copy_on_meta(module: nn.Module, shared: Iterable[Any] = ()) -> Any:
    """Return a copy of a module whose parameters are on the meta device, with deferred values.

    It needs no memory for parameters. The original keeps its own.

    Args:
        module: any module.
        shared: objects that the copy refers to as well, such as the trainer.
    """
    copies: dict[int, Any] = {id(item): item for item in shared}
    for parameter in module.parameters():
        if type(parameter) is nn.Parameter:
            meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            vars(meta).update(vars(parameter))
            meta.initial_values = ZeroValues(meta)  # type: ignore[attr-defined]
            copies[id(parameter)] = meta
    return copy.deepcopy(module, copies)


def replace_by_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the values of all parameters by fake tensors, in place.

    The objects stay the same, so that optimizers and attributes that hold them see the fakes.
    Buffers keep their values unless they are on the meta device.
    """
    # tied parameters are one object, which `parameters()` yields once
    replaced: dict[int, nn.Parameter] = {}
    for parameter in list(module.parameters()):
        if isinstance(parameter, FakeTensor):
            continue
        fake = nn.Parameter(_fake_like(parameter, mode), parameter.requires_grad)
        attributes = dict(vars(parameter))
        try:
            torch.utils.swap_tensors(parameter, fake)
        except RuntimeError:  # something else refers to its memory, e.g. a view
            replaced[id(parameter)] = fake
            parameter = fake
        vars(parameter).update(attributes)
        vars(parameter).pop("initial_values", None)
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None and id(parameter) in replaced:
                submodule._parameters[name] = replaced[id(parameter)]
        for name, buffer in submodule._buffers.items():
            if buffer is not None and buffer.is_meta and not isinstance(buffer, FakeTensor):
                submodule._buffers[name] = _fake_like(buffer, mode)


def _fake_like(tensor: Tensor, mode: FakeTensorMode) -> Any:
    with mode:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
