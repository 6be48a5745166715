"""Quantized Linear layers: a frozen weight in 4 or 8 bits, dequantized only during each matmul.

    forward     W = dequantize(codes);  y = W x + b;  W is freed
    backward    W = dequantize(codes);  dx = Wᵀ dy;   W is freed

By default autograd would keep W of every layer from forward to backward, which would use the memory
that quantization saves. The codes are parameters without gradients. A sharded strategy shards them.
A replicated strategy broadcasts them once, but would broadcast buffers at every step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.strategies.checkpoint.saving import first_non_finite
from ravine.strategies.materialize import deferred_values

from ..transforms.layer_mixins import LayerMixin, add_mixin, matmul_dtype, remove_mixin
from . import bitsandbytes_kernels, int8, nf4

QUANT_PARAM_NAMES = ("weight_codes", "weight_scales", "weight_outer", "weight_mean")
DEQUANTIZERS = {"nf4": nf4.dequantize, "int8": int8.dequantize}
CHUNKED_DEQUANTIZERS = {"nf4": nf4.iter_dequantized, "int8": int8.iter_dequantized}


class _QuantizedMatmul(torch.autograd.Function):
    """Compute x W^T + b and dequantize W in forward and in backward, without keeping it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, dequantize: Any, *quantized: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*quantized)
        ctx.decode = dequantize
        return F.linear(x, dequantize(x.dtype, *quantized), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients  # (... o)
        quantized = ctx.saved_tensors  # read once: activation checkpointing allows one access
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.decode(dy.dtype, *quantized)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, db, None, *(None for _ in quantized)


class QuantizedLinear(LayerMixin, nn.Linear):
    """A Linear with `weight_codes` and `weight_scales` instead of `weight`."""

    keep_dtype = ("weight_scales", "weight_outer", "weight_mean")  # stay float32 under bf16-true
    scheme: str
    double_quant: bool
    backend: str
    original_dtype: torch.dtype  # dtype of the weight before quantization
    was_trainable: bool  # whether the weight was trainable before quantization

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, computed anew at each access."""
        return self._get_dequantizer()(self.original_dtype, *self._quantized_tensors())

    def forward(self, input: Tensor) -> Tensor:
        """Compute the linear map in the dtype of autocast or of the input."""
        dtype = matmul_dtype(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _QuantizedMatmul.apply(
            input.to(dtype), bias, self._get_dequantizer(), *self._quantized_tensors()
        )

    def dequantize(self) -> None:
        """Convert the layer back to a plain Linear with the rounded weight."""
        weight = nn.Parameter(self.weight, requires_grad=False)
        for name in QUANT_PARAM_NAMES:
            self._parameters.pop(name, None)
        remove_mixin(self)
        bias = self._parameters.pop("bias")
        self._parameters |= {"weight": weight, "bias": bias}  # restore the order of nn.Linear

    def extra_repr(self) -> str:
        """Return the layer's repr with the scheme."""
        return f"{super().extra_repr()}, {self.scheme}"

    def _quantized_tensors(self) -> list[Tensor]:
        tensors = (self._parameters.get(name) for name in QUANT_PARAM_NAMES)
        return [tensor for tensor in tensors if tensor is not None]

    def _get_dequantizer(self) -> Any:
        shape = torch.Size((self.out_features, self.in_features))
        if self.backend == "bitsandbytes":
            return partial(bitsandbytes_kernels.dequantize, shape)
        return partial(DEQUANTIZERS[self.scheme], shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load codes and scales, or quantize a float weight; torch calls it for each layer.

        Args:
            state_dict: of the whole module; a float weight in it is replaced by its codes.
            prefix: the layer's name with a dot at the end.
            args: further arguments of torch.

        Raises:
            UsageError: the codes in the file have another shape or dtype.
        """
        float_weight = state_dict.pop(f"{prefix}weight", None)
        if float_weight is not None:  # a checkpoint of the float net: round on loading
            tensors = quantize_weight(float_weight, self.scheme, self.double_quant)
            # names of `tensors`: codes, scales, and with double quantization outer and mean
            state_dict |= {f"{prefix}weight_{name}": tensor for name, tensor in tensors.items()}
        for name in ("weight_codes", "weight_scales"):
            saved, current = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and (saved.shape, saved.dtype) != (current.shape, current.dtype):
                other = "int8" if self.scheme == "nf4" else "nf4"
                raise UsageError(
                    f"Quantization: {prefix}{name} is {saved.dtype} {tuple(saved.shape)} in the "
                    f"checkpoint and {current.dtype} {tuple(current.shape)} in this run "
                    f"(scheme={self.scheme!r}, double_quant={self.double_quant})",
                    ["scheme and double_quant of the run that wrote the checkpoint"],
                    hint=f"use scheme={other!r}, or double_quant={not self.double_quant}",
                    flag=f"--trainer.callbacks.Quantization.scheme={other}, or "
                    "--trainer.callbacks.Quantization.double_quant="
                    f"{str(not self.double_quant).lower()}",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class NF4(QuantizedLinear):
    """NF4: 4 bits per weight."""

    class_prefix, scheme = "NF4", "nf4"


class Int8(QuantizedLinear):
    """Int8: 8 bits per weight."""

    class_prefix, scheme = "Int8", "int8"


def quantize_weight(weight: Tensor, scheme: str, double_quant: bool) -> dict[str, Tensor]:
    """Return the quantized tensors of a weight (o, d) by name."""
    return nf4.quantize(weight, double_quant) if scheme == "nf4" else int8.quantize(weight)


class DeferredQuantization:
    """Quantize the weight of one layer lazily, after sharding, when its codes are first read.

    Args:
        name: the layer's name, for error messages.
        weight: the weight on the meta device, with deferred values.
        scheme: nf4 or int8.
        double_quant: whether NF4's scales are quantized.
        latest: the layer quantized last and its tensors. All layers of a network share this list,
            so that the tensors of only one layer are in memory.
        report: called once with the RMS error divided by the RMS of the weight.
    """

    def __init__(
        self,
        name: str,
        weight: Tensor,
        scheme: str,
        double_quant: bool,
        latest: list[Any],
        report: Callable[[float], None],
    ) -> None:
        """Store the arguments; quantize nothing yet."""
        self.name, self.values, self.shape = name, deferred_values(weight), weight.shape
        self.dtype, self.scheme, self.double_quant = weight.dtype, scheme, double_quant
        self.latest, self.report, self.is_reported = latest, report, False

    @torch.no_grad()
    def quantized_tensors(self) -> dict[str, Tensor]:
        """Return the quantized tensors of the weight by name, unsharded and on the CPU."""
        if not self.latest or self.latest[0] is not self:
            self.latest.clear()
            weight = self.values.get_rows(0, self.shape[0])
            check_finite_weight(self.name, weight)
            tensors = quantize_weight(weight, self.scheme, self.double_quant)
            if not self.is_reported:
                self.report(compute_quantization_error(weight, tensors, self.scheme))
            self.is_reported = True
            self.latest += [self, tensors]
        return self.latest[1]


class DeferredTensor:
    """Deferred values of one quantized tensor, read after sharding (strategies/materialize.py)."""

    def __init__(self, quantization: DeferredQuantization, tensor_name: str) -> None:
        """Store the layer's quantization and the name of the tensor."""
        self.quantization, self.tensor_name = quantization, tensor_name

    def get_rows(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` (exclusive)."""
        return self.quantization.quantized_tensors()[self.tensor_name][start:stop]


def check_finite_weight(name: str, weight: Tensor) -> None:
    """Raise UsageError for a weight with inf or NaN."""
    if first_non_finite([(name, weight)]):
        raise UsageError(
            f"Quantization: the weight of {name} is not finite", hint="use other weights"
        )


@torch.no_grad()
def quantize_layer(
    layer: nn.Linear,
    scheme: str,
    double_quant: bool,
    backend: str,
    deferred: DeferredQuantization | None,
) -> float | None:
    """Quantize and freeze a Linear in place; return RMS error / RMS weight.

    Args:
        layer: its class becomes a subclass; codes and scales replace the weight.
        scheme: nf4 or int8.
        double_quant: also quantize the scales of NF4.
        backend: torch or bitsandbytes.
        deferred: for a weight on the meta device, computes the tensors later. The result is then
            None, because the error is not known yet.
    """
    weight = layer.weight
    # on the meta device these have shapes and dtypes, and no values
    tensors = quantize_weight(weight, scheme, double_quant)
    del layer.weight
    # the layer's class becomes a subclass, whose forward dequantizes the weight
    add_mixin(layer, {"nf4": NF4, "int8": Int8}[scheme])
    for name, tensor in tensors.items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        if deferred is not None:
            # the attribute from which a parameter on the meta device gets its values later
            parameter.initial_values = DeferredTensor(deferred, name)  # type: ignore[attr-defined]
        layer.register_parameter(f"weight_{name}", parameter)
    assert isinstance(layer, QuantizedLinear)
    layer.double_quant, layer.backend, layer.original_dtype = double_quant, backend, weight.dtype
    layer.was_trainable = weight.requires_grad
    return None if deferred is not None else compute_quantization_error(weight, tensors, scheme)


def compute_quantization_error(weight: Tensor, tensors: dict[str, Tensor], scheme: str) -> float:
    """Return the RMS of the rounding error divided by the RMS of the weight."""
    flat, start = weight.detach().flatten(), 0
    error = size = torch.zeros((), dtype=torch.float64, device=weight.device)
    for rounded in CHUNKED_DEQUANTIZERS[scheme](weight.shape, weight.dtype, *tensors.values()):
        piece = flat[start : start + len(rounded)].float()
        error = error + (rounded.float() - piece).square().sum(dtype=torch.float64)
        size = size + piece.square().sum(dtype=torch.float64)
        start += len(rounded)
    return math.sqrt(error / max(size, 1e-30 * len(flat)))
