"""LoRA layers (Hu, 2021): a frozen matrix plus a trainable low-rank update, in one layer.

            x (d_in)
           /        \\
     W frozen       A (r, d_in)       A from a uniform distribution, B = 0:
           \\          |               at the start y = W x
            \\       B (d_out, r)
             \\      /
        y = W x + s B A x             s = alpha / r, or alpha / √r (rank-stabilized)

    trainable: r (d_in + d_out) instead of d_in d_out; 131 K of 16.8 M for d = 4096, r = 16

A convolution is a linear map of patches, with d_in = channels / groups * kernel size and rank r in
each group. An embedding is a linear map of one-hot rows. Each of several maps stacked in one matrix
(q, k, v) has its own A, and B is block-diagonal with `num_blocks` blocks. A, B and their optimizer
state are float32 for any dtype of the layer: bfloat16 loses updates below 1/256 of a weight.

Axes: o outputs, r rank, p blocks (`num_blocks`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ravine.errors import UsageError
from ravine.strategies.materialize import deferred_values

from ..transforms.base import make_param_generator
from ..transforms.layer_mixins import LayerMixin, add_mixin, matmul_dtype


class Adapter(LayerMixin):
    """Base of adapted layers; `lora_disabled()` disables the adapter of one layer."""

    class_prefix = "LoRA"
    keep_dtype = ("lora_a", "lora_b")
    lora_param_names: tuple[str, ...] = ("lora_a", "lora_b")
    lora_enabled: bool
    lora_was_called: bool  # whether it was called since the last reset
    lora_called_with_grad: bool  # whether a call had autograd enabled
    lora_is_copy: bool  # frozen copy (a teacher) of a trained layer; gets no gradient
    lora_rank: int
    lora_num_blocks: int
    lora_scale: float
    lora_dropout: float
    lora_dtype: torch.dtype | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def lora_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors in `lora_param_names`."""
        raise NotImplementedError

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """Disable the adapter inside the context: the layer computes its base layer."""
        previous, self.lora_enabled = self.lora_enabled, False
        try:
            yield
        finally:
            self.lora_enabled = previous

    def lora_delta_weights(self) -> dict[str, Tensor]:
        """Return s B A in float64 by weight name, in the shape of that weight."""
        raise NotImplementedError

    def lora_add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output y plus the adapter's output for the input x."""
        raise NotImplementedError

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Return the layer's output plus the adapter's.

        The argument is named `input` as in torch, because callers may pass it by keyword.
        """
        x, y = input, super().forward(input, *args)
        if not self.lora_enabled:
            return y
        self.lora_was_called = True
        self.lora_called_with_grad |= torch.is_grad_enabled()
        if self.lora_dropout and x.is_floating_point():
            x = F.dropout(x, self.lora_dropout, self.training)
        return self.lora_add_delta(y, x)

    def lora_factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B in the dtype of their matmul."""
        dtype = self.lora_dtype or matmul_dtype(x)
        return self.lora_a.to(dtype), self.lora_b.to(dtype)

    def extra_repr(self) -> str:
        """Return the layer's repr with rank and scale."""
        return f"{super().extra_repr()}, rank={self.lora_rank}, scale={self.lora_scale:g}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.lora_param_names:
            current, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is not None and saved.shape != current.shape:
                raise UsageError(
                    f"LoRA: the adapter of {prefix[:-1]} has the shape {tuple(saved.shape)} in the "
                    f"checkpoint and {tuple(current.shape)} in this run (rank {self.lora_rank})",
                    ["rank, num_blocks and targets of the run that wrote the checkpoint"],
                    hint="use the rank of the checkpoint",
                    flag="--trainer.callbacks.LoRA.rank=RANK",
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearAdapter(Adapter, nn.Linear):
    """y = W x + b + s B A x, x (... d_in)."""

    def lora_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, ...]]:
        """Return the shapes A (p·r, d_in) and B (o, r)."""
        return [(num_blocks * rank, self.in_features), (self.out_features, rank)]

    def lora_add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + s B A x; one block is a single addmm, without a second tensor of y's size."""
        a, b = self.lora_factors(x)
        h = F.linear(x.to(a.dtype), a)  # (... pr)
        if self.lora_num_blocks == 1 and y.dtype == a.dtype:
            flat = torch.addmm(
                y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), b.mT, alpha=self.lora_scale
            )  # (n o)
            return flat.view(y.shape)
        delta = apply_block_diag(h, b, self.lora_num_blocks)
        return y + (self.lora_scale * delta).to(y.dtype)

    def lora_delta_weights(self) -> dict[str, Tensor]:
        """Return s B A of shape (o, d_in)."""
        return {
            "weight": self.lora_scale
            * block_diag_matmul(self.lora_a, self.lora_b, self.lora_num_blocks)
        }


class EmbeddingAdapter(Adapter, nn.Embedding):
    """An embedding with rows W[i] + s (B A)[:, i]; the padding row does not change."""

    def lora_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, ...]]:
        """Return the shapes A (r, v) and B (d, r)."""
        return [(rank, self.num_embeddings), (self.embedding_dim, rank)]

    def lora_add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        """Look up the columns of A, multiply by B and add the result to y."""
        a, b = self.lora_factors(y)
        # (... r)
        h = F.embedding(x, a.mT, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return y + (self.lora_scale * F.linear(h, b)).to(y.dtype)

    def lora_delta_weights(self) -> dict[str, Tensor]:
        """Return s (B A)^T of shape (v, d)."""
        return {"weight": self.lora_scale * block_diag_matmul(self.lora_a, self.lora_b, 1).mT}


class ConvAdapter(Adapter, nn.Conv2d):
    """Convolution: A maps to r channels per group with the base layer's geometry, B is 1x1."""

    def lora_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, ...]]:
        """Return the shapes A (g·r, c_in / g, y, x) and B (c_out, r, 1, 1)."""
        inner = (self.groups * rank, self.in_channels // self.groups, *self.kernel_size)
        return [inner, (self.out_channels, rank, 1, 1)]

    def lora_add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y plus the adapter's output; F.pad applies the padding modes F.conv2d lacks."""
        a, b = self.lora_factors(x)
        x, padding = x.to(a.dtype), self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        h = F.conv2d(x, a, None, self.stride, padding, self.dilation, self.groups)
        return y + F.conv2d(h, self.lora_scale * b, groups=self.groups).to(y.dtype)

    def lora_delta_weights(self) -> dict[str, Tensor]:
        """Return s B A of shape (c_out, c_in / g, y, x)."""
        a, b = self.lora_a.flatten(1), self.lora_b.flatten(1)  # (gr, c y x), (o, r)
        delta = block_diag_matmul(a, b, self.groups)
        return {"weight": self.lora_scale * delta.view(self.weight.shape)}


def block_diag_matmul(a: Tensor, b: Tensor, num_blocks: int) -> Tensor:
    """Multiply block-diagonal B by A in float64: A (p·r, d), B (o, r) -> (o, d)."""
    a, b = (factor.detach().double().unflatten(0, (num_blocks, -1)) for factor in (a, b))
    return (b @ a).flatten(0, 1)  # (p, o/p, r) @ (p, r, d) -> (o, d)


def apply_block_diag(h: Tensor, b: Tensor, num_blocks: int) -> Tensor:
    """Apply block-diagonal B to h: h (... p·r), B (o, r) -> (... o)."""
    # (... p r), (p, o/p, r)
    h, b = h.unflatten(-1, (num_blocks, -1)), b.unflatten(0, (num_blocks, -1))
    return torch.einsum("...pr,por->...po", h, b).flatten(-2)


def add_adapter(
    layer: nn.Module,
    mixin: type[Adapter],
    name: str,
    rank: int,
    scale: float,
    num_blocks: int = 1,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> None:
    """Make a layer an adapted layer in place: add the mixin class, and register A and B.

    A is uniform and B is 0, so the layer computes the same as before.

    Args:
        layer: a layer of torch; its class becomes a subclass with the mixin.
        mixin: the adapter class for this type of layer.
        name: name of the layer in the module, which with `seed` determines the values of A.
        rank: r.
        scale: factor of the adapter's output.
        num_blocks: number of maps stacked in the layer's outputs.
        dropout: dropout probability of the adapter's input.
        dtype: dtype of the adapter's matmuls; None for that of the layer.
        seed: seed of the run.
    """
    # the layer's main weight; a quantized layer has integer codes instead
    weight = next(p for p in layer.parameters() if p.is_floating_point() or p.numel())
    param_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # a weight whose values are computed later is on the meta device; A and B have values now
    device = "cpu" if deferred_values(weight) is not None else weight.device
    add_mixin(layer, mixin)
    adapter = cast(Adapter, layer)
    shapes = dict(zip(adapter.lora_param_names, adapter.lora_shapes(rank, num_blocks), strict=True))
    for key, shape in shapes.items():
        value = torch.zeros(shape, dtype=param_dtype)
        if key.endswith("a"):  # lora_a; every other factor is a B
            limit = 1 / math.sqrt(value[0].numel())  # torch's default for this fan-in
            # a generator of its own, so that A does not depend on the other layers
            value.uniform_(-limit, limit, generator=make_param_generator(seed, f"{name}.{key}"))
            if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
                # the padding row does not change
                value[:, layer.padding_idx] = 0
        adapter.register_parameter(key, nn.Parameter(value.to(device)))
    adapter.lora_rank, adapter.lora_num_blocks, adapter.lora_scale = rank, num_blocks, scale
    adapter.lora_dropout, adapter.lora_dtype = dropout, dtype
    # `lora_was_called` and `lora_called_with_grad` are reset and checked by the LoRA callback
    adapter.lora_enabled = adapter.lora_was_called = adapter.lora_called_with_grad = True
    adapter.lora_is_copy = False
