"""Give a layer another class where it stands, and its own back: names and keys stay as they were.

    layer.__class__ = LoRALinear        a subclass of Linear made from a mixin and the layer's class

Wrapping the layer instead would rename `query.weight` to `query.base.weight` in every checkpoint,
and `isinstance(layer, nn.Linear)` would no longer hold. Swaps stack: adapters over a quantized
layer are `LoRA(NF4(Linear))`.
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
    """Base of mixins; the tensors named in `keeps` stay in their dtype when the module is cast.

    `module.to(torch.bfloat16)`, which `precision: bf16-true` does, would round them.
    """

    class_prefix: str
    keeps: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [name for cls in type(self).__mro__ for name in cls.__dict__.get("keeps", ())]
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
    """Put `mixin` before the layer's own class."""
    layer.__class__ = _mixed_class(mixin, type(layer))


def remove_mixin(layer: nn.Module) -> None:
    """Undo the latest `add_mixin`."""
    layer.__class__ = type(layer).__bases__[1]


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map takes x: autocast's, or that of x itself."""
    device_type = x.device.type
    return (
        torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    )


def check_not_sharded(module: nn.Module, caller: str) -> None:
    """Raise if parameters are spread over a mesh already."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise UsageError(
                f"{caller}: {name} is spread over ranks already; do it to the whole module, before "
                "the strategy shards it (as a callback in trainer.callbacks)"
            )


def check_plain_layer(
    name: str, layer: nn.Module, layer_type: type[nn.Module], caller: str
) -> None:
    """Raise for a layer that does not compute what `layer_type` does from a weight of its own.

    Its change would then be no change of the weight: seen in training, and gone when merged.
    """
    layer_class = next(c for c in type(layer).__mro__ if not issubclass(c, LayerMixin))
    key = "in_proj_weight" if issubclass(layer_type, nn.MultiheadAttention) else "weight"
    weight = layer._parameters.get(key)
    reason = None
    if layer_class.forward is not layer_type.forward:
        reason = f"is a {layer_class.__name__}, which computes in a way of its own"
    elif weight is None and not hasattr(layer, "dequantize"):
        reason = "makes its weight anew at each use (weight_norm, another parametrization, pruning)"
    elif isinstance(weight, UninitializedParameter):
        reason = "has no weight before its first input (a lazy layer)"
    elif weight is not None and weight.is_meta and deferred_values(weight) is None:
        reason = "has no numbers yet: it is on the device meta"
    if reason:
        raise UsageError(
            f"{caller}: {name} {reason}; allowed: a plain {layer_type.__name__} that holds its "
            "weight; "
            f"type --trainer.callbacks.exclude={name}"
        )
