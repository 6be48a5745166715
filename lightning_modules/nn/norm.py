"""RMSNorm: unit root mean square (Zhang, Sennrich, 2019), with a custom backward on CPUs.

    y = x r,  r = (mean x² + ε)^(-1/2)        dx = r (dy - y mean(dy y)) - dr r² y / d

ε is an argument; the default is the machine epsilon of fp32 (of fp64 for fp64 inputs).

torch's CPU kernel has no fused backward: autograd runs its steps one after the other. In bf16 this
is seven times slower, and was a sixth of a whole training step of the small models.

Axes: b batch, t time, h heads, d channels, always the last axis.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit_rms(x: Tensor, eps: float | None = None) -> Tensor:
    """Divide x (... d) by the root mean square of its channels, with `eps` under the root."""
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return _UnitRMS.apply(x, eps)[0]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with a gain for each channel: (... d) -> (... d).

    Args:
        d_model: channels d.
        eps: added to the mean square, in training and in evaluation; by default the machine epsilon
            of fp32, 1.19e-7 (Llama uses 1e-5). The attribute `eps` may be changed later.
    """

    def __init__(self, d_model: int, eps: float | None = None) -> None:
        """Initialize the gains to one."""
        super().__init__(d_model, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (... d)."""
        use_custom_backward = x.device.type == "cpu" and torch.is_grad_enabled()
        return unit_rms(x, self.eps) * self.weight if use_custom_backward else super().forward(x)


class _UnitRMS(torch.autograd.Function):
    """Both results are outputs, so that the backward can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
        accum_dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 would lose small squares
        l2_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accum_dtype)
        eps = torch.finfo(accum_dtype).eps if eps is None else eps
        r = torch.rsqrt(l2_norm.square() / x.shape[-1] + eps).to(x.dtype)
        y = x * r
        ctx.save_for_backward(y, r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:  # pyright: ignore
        (d_y, d_r), (y, r) = gradients, ctx.saved_tensors
        if d_y is None:
            return (None if d_r is None else -d_r * r.square() * y / y.shape[-1]), None
        d_x = torch.addcmul(d_y, y, (d_y * y).mean(-1, keepdim=True), value=-1) * r
        return (d_x if d_r is None else d_x - d_r * r.square() * y / y.shape[-1]), None
