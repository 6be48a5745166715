"""A Linear whose frozen weight is a few bits, and a float matrix only while it is multiplied.

    forward     W = dequantize(codes);  y = W x + b;  W is dropped
    backward    W = dequantize(codes);  dx = Wᵀ dy;   W is dropped

Left to itself, autograd would keep W from forward to backward, in every layer: the memory that was
to be saved. The bits are parameters that do not train: a sharded strategy shards them, one that
replicates sends them once and not at every step, as it does with buffers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.strategies.checkpoint.saving import non_finite
from ravine.strategies.materialize import values_of

from ..transforms.layer_mixins import Swapped, multiplied_in, swap, swap_back
from . import bitsandbytes_kernels, int8, nf4

PARTS = ("weight_codes", "weight_scales", "weight_outer", "weight_mean")
SCHEMES = {"nf4": nf4.dequantize, "int8": int8.dequantize}
PIECES = {"nf4": nf4.pieces, "int8": int8.pieces}


class _Multiply(torch.autograd.Function):
    """x W^T + b with W made anew for each use; nothing of W's size is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.decode = decode
        return F.linear(x, decode(x.dtype, *parts), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients  # (... o)
        parts = ctx.saved_tensors  # once: under recomputation they can be had once
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.decode(dy.dtype, *parts)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, db, None, *(None for _ in parts)


class QuantizedLinear(Swapped, nn.Linear):
    """A Linear with `weight_codes` and `weight_scales` in the place of `weight`."""

    keeps = ("weight_scales", "weight_outer", "weight_mean")  # float32 under bf16-true too
    scheme: str
    double: bool
    backend: str
    dense: torch.dtype  # of the weight before
    trained: bool  # whether the weight did, before it was rounded

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that is multiplied by; made anew at each look."""
        return self._decode()(self.dense, *self._parts())

    def forward(self, input: Tensor) -> Tensor:
        """As a Linear does, in the dtype autocast or the input asks for."""
        dtype = multiplied_in(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Multiply.apply(input.to(dtype), bias, self._decode(), *self._parts())

    def dequantize(self) -> None:
        """Be a plain Linear again, with the rounded weight."""
        weight = nn.Parameter(self.weight, requires_grad=False)
        for name in PARTS:
            self._parameters.pop(name, None)
        swap_back(self)
        bias = self._parameters.pop("bias")
        self._parameters |= {"weight": weight, "bias": bias}  # in the usual order

    def extra_repr(self) -> str:
        """The layer's own, and the bits."""
        return f"{super().extra_repr()}, {self.scheme}"

    def _parts(self) -> list[Tensor]:
        found = (self._parameters.get(name) for name in PARTS)
        return [part for part in found if part is not None]

    def _decode(self) -> Any:
        shape = torch.Size((self.out_features, self.in_features))
        if self.backend == "bitsandbytes":
            return partial(bitsandbytes_kernels.dequantize, shape)
        return partial(SCHEMES[self.scheme], shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        dense = state_dict.pop(f"{prefix}weight", None)
        if dense is not None:  # a file of the net before: rounded as it comes
            parts = encode(dense, self.scheme, self.double)
            state_dict |= {f"{prefix}weight_{name}": part for name, part in parts.items()}
        for name in PARTS[:2]:
            saved, ours = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (saved.shape, saved.dtype) != (ours.shape, ours.dtype):
                raise UsageError(
                    f"{prefix}{name} is {saved.dtype} {tuple(saved.shape)} in the checkpoint and "
                    f"{ours.dtype} {tuple(ours.shape)} here ({self.scheme}, double={self.double}); "
                    "allowed: the scheme and double that it was saved with; type "
                    "--trainer.callbacks.scheme=nf4, or int8, or --trainer.callbacks.double=false"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class NF4(QuantizedLinear):
    """Four bits a weight."""

    prefix, scheme = "NF4", "nf4"


class Int8(QuantizedLinear):
    """Eight."""

    prefix, scheme = "Int8", "int8"


def encode(weight: Tensor, scheme: str, double: bool) -> dict[str, Tensor]:
    """The tensors that stand for a weight (o, d)."""
    return nf4.quantize(weight, double) if scheme == "nf4" else int8.quantize(weight)


class Rounding:
    """Rounds the weight of one layer when its codes are asked for: sharding comes before it.

    Args:
        name: of the layer, for an error.
        weight: on the meta device, with values that are made later.
        scheme: nf4 or int8.
        double: whether NF4's scales are quantized.
        latest: the layer that was rounded last, with its parts; shared by all layers of a network,
            so that the parts of one layer are in memory.
        report: is called with the error's RMS over the weight's, once.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        scheme: str,
        double: bool,
        latest: list[Any],
        report: Callable[[float], None],
    ) -> None:
        """Nothing is rounded yet."""
        self.name, self.values, self.shape = name, values_of(weight), weight.shape
        self.dtype, self.scheme, self.double = weight.dtype, scheme, double
        self.latest, self.report, self.reported = latest, report, False

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """The tensors that stand for the weight, whole, on the CPU."""
        if not self.latest or self.latest[0] is not self:
            self.latest.clear()
            weight = self.values.rows(0, self.shape[0])
            refuse_non_finite(self.name, weight)
            parts = encode(weight, self.scheme, self.double)
            if not self.reported:
                self.report(rounding_error(weight, parts, self.scheme))
            self.reported = True
            self.latest += [self, parts]
        return self.latest[1]


class RoundedValues:
    """The values of one of the parts, to be read after sharding (strategies/materialize.py)."""

    def __init__(self, rounding: Rounding, part: str) -> None:
        """Of which layer, and which part of it."""
        self.rounding, self.part = rounding, part

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive)."""
        return self.rounding.parts()[self.part][start:stop]


def refuse_non_finite(name: str, weight: Tensor) -> None:
    """ValueError for a weight that cannot be rounded."""
    if non_finite([(name, weight)]):
        raise UsageError(f"Quantization: the weight of {name} has inf or nan; start from another")


@torch.no_grad()
def quantize_layer(
    layer: nn.Linear, scheme: str, double: bool, backend: str, later: Rounding | None
) -> float | None:
    """Change a Linear in place; returns the error's RMS over the weight's.

    With `later` the weight is on the meta device, and so are the parts; the error is not known yet.
    """
    weight = layer.weight
    parts = encode(weight, scheme, double)
    del layer.weight
    swap(layer, {"nf4": NF4, "int8": Int8}[scheme])
    for name, part in parts.items():
        parameter = nn.Parameter(part, requires_grad=False)
        if later is not None:
            parameter.initial_values = RoundedValues(later, name)  # type: ignore[attr-defined]
        layer.register_parameter(f"weight_{name}", parameter)
    assert isinstance(layer, QuantizedLinear)
    layer.double, layer.backend, layer.dense = double, backend, weight.dtype
    layer.trained = weight.requires_grad
    return None if later is not None else rounding_error(weight, parts, scheme)


def rounding_error(weight: Tensor, parts: dict[str, Tensor], scheme: str) -> float:
    """RMS of the rounding over that of the weight."""
    flat, start = weight.detach().flatten(), 0
    error = size = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rounded in PIECES[scheme](weight.shape, weight.dtype, *parts.values()):
        piece = flat[start : start + len(rounded)].float()
        error = error + (rounded.float() - piece).square().sum(dtype=torch.float64)
        size = size + piece.square().sum(dtype=torch.float64)
        start += len(rounded)
    return math.sqrt(error / max(size, 1e-30 * len(flat)))
