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
from ravine.strategies.materialize import values_of


class Swapped(nn.Module):
    """Base of mixins; the tensors named in `keeps` stay in their dtype when the module is cast.

    `module.to(torch.bfloat16)`, which `precision: bf16-true` does, would round them.
    """

    prefix: str
    keeps: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        names = [name for kind in type(self).__mro__ for name in kind.__dict__.get("keeps", ())]
        kept = [getattr(self, name) for name in names if hasattr(self, name)]

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is each for each in kept):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)


@cache
def _joined(mixin: type[Swapped], own: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.prefix}{own.__name__}", (mixin, own), {})


def swap(layer: nn.Module, mixin: type[Swapped]) -> None:
    """Put `mixin` before the layer's own class."""
    layer.__class__ = _joined(mixin, type(layer))


def swap_back(layer: nn.Module) -> None:
    """Undo the latest `swap`."""
    layer.__class__ = type(layer).__bases__[1]


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map takes x: autocast's, or that of x itself."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def refuse_sharded(module: nn.Module, what: str) -> None:
    """Raise if parameters are spread over a mesh already."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise UsageError(
                f"{what}: {name} is spread over ranks already; do it to the whole module, before "
                "the strategy shards it (as a callback in trainer.callbacks)"
            )


def refuse_unlike(name: str, layer: nn.Module, kind: type[nn.Module], what: str) -> None:
    """Raise for a layer that does not compute what `kind` does from a weight of its own.

    Its change would then be no change of the weight: seen in training, and gone when merged.
    """
    own = next(c for c in type(layer).__mro__ if not issubclass(c, Swapped))
    key = "in_proj_weight" if issubclass(kind, nn.MultiheadAttention) else "weight"
    weight = layer._parameters.get(key)
    reason = None
    if own.forward is not kind.forward:
        reason = f"is a {own.__name__}, which computes in a way of its own"
    elif weight is None and not hasattr(layer, "dequantize"):
        reason = "makes its weight anew at each use (weight_norm, another parametrization, pruning)"
    elif isinstance(weight, UninitializedParameter):
        reason = "has no weight before its first input (a lazy layer)"
    elif weight is not None and weight.is_meta and values_of(weight) is None:
        reason = "has no numbers yet: it is on the device meta"
    if reason:
        raise UsageError(
            f"{what}: {name} {reason}; allowed: a plain {kind.__name__} that holds its weight; "
            f"type --trainer.callbacks.exclude={name}"
        )
