"""Mixed precision of FSDP units: compute in half precision, store and reduce in fp32.

    shard (fp32) -> gathered in bf16 or fp16 -> forward, backward -> gradient reduced in fp32

With autocast only, a unit is gathered in fp32, and autograd keeps the half-precision copy of every
weight from the forward to the backward pass. With torch's MixedPrecisionPolicy the gathered weight
itself has half precision and is freed with the unit, and a gather sends half the bytes.

Some parameters stay in fp32, because autocast in one process does not cast them either:

    weights of norms and recurrent layers
    weights of routers: a module names such children in its attribute `full_precision`
    vectors and scalars that no matrix product uses
    complex and double-precision parameters

These parameters belong to no unit: every rank holds them in full. Embeddings return fp32 rows.

A layer of another kind, such as nn.EmbeddingBag or a layer with a matrix of its own, may use its
weights in operations that need fp32. So its forward reads an fp32 copy of the gathered weights,
which autocast rounds in matrix products as it does in one process. The same holds for a subclass of
nn.Linear whose own methods name a weight, and for a layer with torch's weight_norm, spectral_norm
or pruning. A class that uses its weights in matrix products only sets the class attribute
`only_matmul_weights = True`, and needs no copy.
"""

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

HALF_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # by Lightning precision
MATMUL_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.Embedding, _ConvNd)
NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
REPARAMETRIZED = ("_g", "_v", "_orig")  # ends of the parameter names of torch.nn.utils
PARAM_LISTS = {"parameters", "named_parameters", "_parameters"}
# methods that a forward does not call
SETUP_METHODS = {"__init__", "reset_parameters", "extra_repr", "_load_from_state_dict"}
RECURRENT_LAYERS = (nn.RNNBase, nn.RNNCellBase)  # kernels need all weights in one dtype


def half_precision_dtype(precision: Any) -> torch.dtype | None:
    """Return the half dtype of a Lightning precision plugin; None for other precisions."""
    return HALF_DTYPES.get(str(getattr(precision, "precision", "")))


def build_mp_policy(half_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Build the MixedPrecisionPolicy of a unit; inputs are not cast, because autocast does it."""
    if half_dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(half_dtype, torch.float32, cast_forward_inputs=False)


def full_precision_params(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of `module` that are not cast to half precision."""
    kept_modules = set()
    for owner in module.modules():
        for name in getattr(owner, "full_precision", ()):
            kept_modules |= set(owner.get_submodule(name).modules())
    for owner in module.modules():
        is_kept = owner in kept_modules or isinstance(owner, (*NORM_LAYERS, *RECURRENT_LAYERS))
        for parameter in owner.parameters(recurse=False):
            is_vector = parameter.ndim < 2 and not isinstance(owner, MATMUL_LAYERS)
            if is_kept or is_vector or parameter.dtype != torch.float32:
                yield parameter


class Fp32Weights:
    """Hooks that show the forward of a layer its half-precision weights in fp32."""

    def __init__(self, layer: nn.Module, names: list[str]) -> None:
        """Register the hooks; must be called before fully_shard registers its own."""
        self.names = names
        self.num_calls = 0
        enter, leave = (torch.compiler.disable(f) for f in (self.show_fp32, self.show_original))
        # before the hooks of weight_norm and pruning, which compute a weight from parameters
        layer.register_forward_pre_hook(cast(Any, enter), prepend=True)
        layer.register_forward_hook(cast(Any, leave), always_call=True)

    def show_fp32(self, layer: nn.Module, inputs: Any) -> None:
        """Set an attribute of the layer, which Python finds before the parameter of that name."""
        for name in self.names:
            weight = layer._parameters.get(name)
            if weight is not None and weight.dtype in HALF_DTYPES.values():
                layer.__dict__[name] = weight.float()

    def show_original(self, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        """Remove the fp32 copies after a forward, and write changes of a copy into the weight.

        A write through `.data` does not increment the version counter of a copy. So after the calls
        1, 2, 4, 8, ... the values are compared as well.
        """
        self.num_calls += 1
        compares_values = self.num_calls & (self.num_calls - 1) == 0  # a power of two
        for name in self.names:
            # a hook before the forward has put the copies into __dict__, which hides the weights
            weight, copy = layer._parameters.get(name), layer.__dict__.pop(name, None)
            if weight is None or copy is None:
                continue
            if not copy._version and not compares_values:
                continue
            with torch.no_grad():
                rounded = copy.to(weight.dtype)
                if not torch.equal(rounded, weight):
                    weight.copy_(rounded)


def uses_weights_in_matmul_only(layer: nn.Module) -> bool:
    """Whether a layer uses its weights in matrix products (or as rows of a table) only.

    Layers of torch do, unless parameters were replaced, as by weight_norm. A subclass does unless
    its own methods name a parameter. Classes with `only_matmul_weights = True` are not searched.
    """
    # MATMUL_LAYERS: torch's linear, convolution, attention and embedding layers
    if not isinstance(layer, MATMUL_LAYERS):
        return getattr(layer, "only_matmul_weights", False)
    names = {name for name, p in layer._parameters.items() if p is not None}
    # REPARAMETRIZED: ends of the names that weight_norm and spectral_norm give
    if any(name.endswith(REPARAMETRIZED) for name in names):
        return False
    # A forward that was replaced on this object may use the weights in another way, except for the
    # forward of keep_embeddings_in_fp32.
    forward = layer.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not _embedding_forward_fp32:
        return False
    for owner in type(layer).__mro__:
        is_of_torch = owner.__module__.partition(".")[0] == "torch"
        if owner is object or is_of_torch or getattr(owner, "only_matmul_weights", False):
            continue
        for name, attribute in vars(owner).items():
            # SETUP_METHODS: __init__ and others that a forward does not call
            if name in SETUP_METHODS:
                continue
            # the function of a property, class method or decorated method
            function = getattr(attribute, "fget", None) or attribute
            function = inspect.unwrap(getattr(function, "__func__", function))
            # the names that its bytecode mentions
            used = _names_in(function.__code__) if isinstance(function, FunctionType) else set()
            # PARAM_LISTS: names such as `parameters`, which give access to all of them
            if not used.isdisjoint(names | PARAM_LISTS):
                return False
    return True


def _names_in(code: CodeType) -> set[str]:
    """Return the names of attributes and globals in a function and in functions within it."""
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, nested))


def show_fp32_weights(module: nn.Module) -> None:
    """Let layers that may use weights outside of matrix products read them in fp32."""
    full_precision_ids = {id(p) for p in full_precision_params(module)}
    for layer in module.modules():
        if uses_weights_in_matmul_only(layer):
            continue
        names = [n for n, p in layer._parameters.items() if p is not None]
        names = [n for n in names if id(layer._parameters[n]) not in full_precision_ids]
        if names:
            Fp32Weights(layer, names)


class UnitAutocast:
    """Hooks that run the forward of a unit under autocast, also outside of a step.

    The weights have half precision. A call outside of Lightning's steps (sampling, validation of
    averaged weights, user code) would otherwise mix dtypes.
    """

    def __init__(self, unit: nn.Module, device: torch.device, half_dtype: torch.dtype) -> None:
        """Register the hooks; must be called before fully_shard registers its own."""
        self.device_type, self.half_dtype = device.type, half_dtype
        self.active_contexts: list[torch.autocast | None] = []  # one per running call
        unit.register_forward_pre_hook(cast(Any, torch.compiler.disable(self.enter_autocast)))
        exit_hook = cast(Any, torch.compiler.disable(self.exit_autocast))
        unit.register_forward_hook(exit_hook, always_call=True)

    def enter_autocast(self, module: nn.Module, inputs: Any) -> None:
        """Enter autocast, unless it is enabled."""
        context = None
        if not torch.is_autocast_enabled(self.device_type):
            context = torch.autocast(self.device_type, self.half_dtype, cache_enabled=False)
            context.__enter__()
        self.active_contexts.append(context)

    def exit_autocast(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Exit autocast if `enter_autocast` entered it."""
        if self.active_contexts and (context := self.active_contexts.pop()) is not None:
            context.__exit__(None, None, None)


def keep_embeddings_in_fp32(module: nn.Module) -> None:
    """Make embeddings return fp32 rows, as autocast in one process does.

    The gradient of a row is a sum over its tokens. In half precision small terms would be lost.
    """
    for layer in module.modules():
        is_plain_embedding = (
            type(layer).forward is nn.Embedding.forward and "forward" not in layer.__dict__
        )
        if is_plain_embedding and cast(nn.Embedding, layer).max_norm is None:
            layer.forward = MethodType(_embedding_forward_fp32, layer)


def _embedding_forward_fp32(self: nn.Embedding, input: Tensor) -> Tensor:
    options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
    return F.embedding(input, self.weight.float(), *options)
