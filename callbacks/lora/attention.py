"""LoRA for nn.MultiheadAttention, whose kernels read weights instead of calling layers.

`F.multi_head_attention_forward` reads `in_proj_weight` and `out_proj.weight` directly. An adapter
on the layer `out_proj` would never run, and no error would show it. So the attention is one adapted
layer that passes W + s B A to the kernels. In evaluation the fast path of
`nn.TransformerEncoderLayer` reads weights of layers too. It is disabled in a layer with adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Adapter, block_diag_matmul


class AttentionAdapter(Adapter, nn.MultiheadAttention):
    """nn.MultiheadAttention with low-rank adapters of the q, k, v and output projections."""

    lora_param_names = keep_dtype = ("lora_in_a", "lora_in_b", "lora_out_a", "lora_out_b")
    lora_in_a: nn.Parameter
    lora_in_b: nn.Parameter
    lora_out_a: nn.Parameter
    lora_out_b: nn.Parameter

    def lora_shapes(self, rank: int, num_blocks: int) -> list[tuple[int, ...]]:
        """Return A (3r, d) and B (3d, r) of stacked q, k, v; A (r, d), B (d, r) of the output."""
        d = self.embed_dim
        return [(3 * rank, d), (3 * d, rank), (rank, d), (d, rank)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute torch's attention with the merged weights W + s B A."""
        if not self.lora_enabled:
            return nn.MultiheadAttention.forward(self, *args, **kwargs)
        self.lora_was_called = True
        self.lora_called_with_grad |= torch.is_grad_enabled()
        with self._merged_weights():
            return nn.MultiheadAttention.forward(self, *args, **kwargs)

    def lora_delta_weights(self) -> dict[str, Tensor]:
        """Return s B A of the stacked q, k, v (3d, d) and of the output projection (d, d)."""
        return {
            "in_proj_weight": self.lora_scale
            * block_diag_matmul(self.lora_in_a, self.lora_in_b, 3),
            "out_proj.weight": self.lora_scale
            * block_diag_matmul(self.lora_out_a, self.lora_out_b, 1),
        }

    def extra_repr(self) -> str:
        """Return rank and scale for the repr."""
        return f"rank={self.lora_rank}, scale={self.lora_scale:g}"

    @contextmanager
    def _merged_weights(self) -> Iterator[None]:
        """Within the context, the layer has the weights W + s B A instead of its base weights W.

        The sum is computed with autograd, so A and B get gradients. s is `lora_scale`, d the width,
        r the rank. The weight of the input projection (3 d, d) stacks those of queries, keys and
        values.
        """
        # the dicts are changed directly, because setattr accepts only Parameters for these names
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
    """Disable the fast path of encoders with adapters, so that their adapted layers are called.

    nn.TransformerEncoder then builds no nested tensors from padded inputs.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    if not any(isinstance(submodule, Adapter) for layer in layers for submodule in layer.modules()):
        return
    for layer in layers:  # 0 disables the fast path, as for an unknown activation
        layer.__dict__.setdefault("_fast_path", layer.activation_relu_or_gelu)
        layer.activation_relu_or_gelu = 0
    for stack in module.modules():
        if isinstance(stack, nn.TransformerEncoder):
            stack.__dict__.setdefault("_fast_path", stack.use_nested_tensor)
            stack.use_nested_tensor = False


def enable_fastpath(module: nn.Module) -> None:
    """Restore the fast path after the adapters are removed."""
    for submodule in module.modules():
        if "_fast_path" in submodule.__dict__:
            is_encoder = isinstance(submodule, nn.TransformerEncoder)
            name = "use_nested_tensor" if is_encoder else "activation_relu_or_gelu"
            setattr(submodule, name, submodule.__dict__.pop("_fast_path"))
