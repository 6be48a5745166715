"""Layer mixins: change the class of a layer in place, without new names in the state_dict.

    layer.__class__ = LoRALinear        a subclass of Linear made from a mixin and the layer's class

Wrapping the layer instead would rename `query.weight` to `query.base.weight` in every checkpoint,
and `isinstance(layer, nn.Linear)` would be false. Mixins stack: a quantized layer with adapters is
`LoRA(NF4(Linear))`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from ravine.errors import UsageError
from ravine.strategies.materialize import deferred_values


class LayerMixin(nn.Module):
    """Base of layer mixins; tensors named in `keep_dtype` keep their dtype when the module is cast.

    Otherwise `module.to(torch.bfloat16)`, as under `precision: bf16-true`, would round them.
    """

    class_prefix: str
    keep_dtype: tuple[str, ...] = ()
    only_matmul_weights = True  # of the mixin; needs no fp32 copies of half-precision weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [name for cls in type(self).__mro__ for name in cls.__dict__.get("keep_dtype", ())]
        kept_tensors = [getattr(self, name) for name in names if hasattr(self, name)]

        def apply_keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(
                tensor is kept_tensor for kept_tensor in kept_tensors
            ):
                return tensor.to(moved.device)
            return moved

        return super()._apply(apply_keeping_dtype, recurse)


@cache
def _mixed_class(mixin: type[LayerMixin], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.class_prefix}{base.__name__}", (mixin, base), {})


def add_mixin(layer: nn.Module, mixin: type[LayerMixin]) -> None:
    """Change the layer's class to a subclass of `mixin` and its current class."""
    layer.__class__ = _mixed_class(mixin, type(layer))


def remove_mixin(layer: nn.Module) -> None:
    """Undo the last `add_mixin`."""
    layer.__class__ = type(layer).__bases__[1]


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matmul with x: that of autocast, else that of x."""
    device_type = x.device.type
    return (
        torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    )


def check_not_sharded(module: nn.Module, caller: str) -> None:
    """Raise UsageError if parameters are already sharded over a mesh."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise UsageError(
                f"{caller}: {name} is already sharded over ranks",
                ["a module that is not sharded"],
                hint="call it before the strategy shards the module, or use the callback",
            )


def check_plain_layer(
    name: str, layer: nn.Module, layer_type: type[nn.Module], caller: str
) -> None:
    """Raise UsageError for a layer that does not compute like `layer_type` from its own weight.

    An adapter of such a layer would affect training but be lost on merge.

    Args:
        name: name of the layer, for the message.
        layer: an instance of `layer_type`, possibly with mixins.
        layer_type: class of torch, such as nn.Linear.
        caller: class or function that changes the layer, for the message.
    """
    # the layer's class without mixins, which have their own forward
    layer_class = next(c for c in type(layer).__mro__ if not issubclass(c, LayerMixin))
    weight_name = "in_proj_weight" if issubclass(layer_type, nn.MultiheadAttention) else "weight"
    weight = layer._parameters.get(weight_name)  # None if a property or a quantized layer has it
    reason = None
    if layer_class.forward is not layer_type.forward:
        reason = f"is a {layer_class.__name__}, which has its own forward"
    # a quantized layer, which has `dequantize`, is accepted
    elif weight is None and not hasattr(layer, "dequantize"):
        reason = "computes its weight at each use (weight_norm, a parametrization, pruning)"
    elif isinstance(weight, UninitializedParameter):
        reason = "has no weight before its first input (a lazy layer)"
    elif weight is not None and weight.is_meta and deferred_values(weight) is None:
        reason = "has no values yet, because it is on the meta device"
    if reason:
        raise UsageError(
            f"{caller}: {name} {reason}",
            [f"a {layer_type.__name__} that stores its weight"],
            hint=f"use exclude=[{name!r}]",
            flag=f"--trainer.callbacks.{caller}.exclude={name}",
        )
