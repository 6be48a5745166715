"""Adapters in torch's own attention, whose kernels read weights and call no layer.

`F.multi_head_attention_forward` takes `in_proj_weight` and `out_proj.weight` themselves: an adapter
on the layer `out_proj` would never run, and nothing would say so. So the whole attention is one
adapted layer, which shows its kernels W + s B A. The fast path of `nn.TransformerEncoderLayer`
reads weights of layers as well, when evaluating only; it is switched off where an adapter stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Adapter, block_diag_matmul


class AttentionAdapter(Adapter, nn.MultiheadAttention):
    """A rank-r change of each of query, key and value, and of the output matrix."""

    lora_param_names = keeps = ("lora_in_a", "lora_in_b", "lora_out_a", "lora_out_b")
    lora_in_a: nn.Parameter
    lora_in_b: nn.Parameter
    lora_out_a: nn.Parameter
    lora_out_b: nn.Parameter

    def lora_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, ...]]:
        """A (3r, d) and B (3d, r) of the stacked q, k, v; A (r, d) and B (d, r) of the output."""
        d = self.embed_dim
        return [(3 * rank, d), (3 * d, rank), (rank, d), (d, rank)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As torch computes it, from changed weights."""
        if not self.lora_enabled:
            return nn.MultiheadAttention.forward(self, *args, **kwargs)
        self.lora_was_called = True
        self.lora_called_with_grad |= torch.is_grad_enabled()
        with self._merged_weights():
            return nn.MultiheadAttention.forward(self, *args, **kwargs)

    def lora_delta_weights(self) -> dict[str, Tensor]:
        """(3d, d) and (d, d)."""
        return {
            "in_proj_weight": self.lora_scale
            * block_diag_matmul(self.lora_in_a, self.lora_in_b, 3),
            "out_proj.weight": self.lora_scale
            * block_diag_matmul(self.lora_out_a, self.lora_out_b, 1),
        }

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.lora_rank}, scale={self.lora_scale:g}"

    @contextmanager
    def _merged_weights(self) -> Iterator[None]:
        in_params, out_params = self._parameters, self.out_proj._parameters
        in_weight, out_weight = in_params["in_proj_weight"], out_params["weight"]
        assert in_weight is not None
        assert out_weight is not None
        a, b = self.lora_in_a, self.lora_in_b
        delta = b.unflatten(0, (3, -1)) @ a.unflatten(0, (3, -1))  # (3 d r) @ (3 r d)
        merged_in_weight = in_weight + (self.lora_scale * delta.flatten(0, 1)).to(in_weight.dtype)
        delta = self.lora_out_b @ self.lora_out_a
        merged_out_weight = out_weight + (self.lora_scale * delta).to(out_weight.dtype)
        in_params["in_proj_weight"], out_params["weight"] = merged_in_weight, merged_out_weight  # type: ignore
        try:
            yield
        finally:
            in_params["in_proj_weight"], out_params["weight"] = in_weight, out_weight


def disable_fastpath(module: nn.Module) -> None:
    """Let the encoder layers call their adapted parts; a stack of them also packs no padding."""
    layers = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    if not any(isinstance(submodule, Adapter) for layer in layers for submodule in layer.modules()):
        return
    for layer in layers:  # torch's own flag: an activation of another name has no fast path
        layer.__dict__.setdefault("_fast_path", layer.activation_relu_or_gelu)
        layer.activation_relu_or_gelu = 0
    for stack in module.modules():
        if isinstance(stack, nn.TransformerEncoder):
            stack.__dict__.setdefault("_fast_path", stack.use_nested_tensor)
            stack.use_nested_tensor = False


def enable_fastpath(module: nn.Module) -> None:
    """Give it back when the adapters are gone."""
    for submodule in module.modules():
        if "_fast_path" in submodule.__dict__:
            is_encoder = isinstance(submodule, nn.TransformerEncoder)
            name = "use_nested_tensor" if is_encoder else "activation_relu_or_gelu"
            setattr(submodule, name, submodule.__dict__.pop("_fast_path"))
