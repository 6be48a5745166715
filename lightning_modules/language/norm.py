"""Unit root mean square (Zhang, Sennrich, 2019), with a backward of its own on processors.

    y = x r,  r = (mean x² + ε)^(-1/2)        dx = r (dy - y mean(dy y)) - dr r² y / d

torch's kernel for CPUs has no backward: autograd goes through its steps one after the other, seven
times slower in bf16, which was a sixth of a whole training step of the small models.

Axes: b batch, t time, h heads, d channels: the last one, whatever stands before it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit_rms(x: Tensor) -> Tensor:
    """x (... d) over the root mean square of its channels; ε as fine as fp32."""
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:])
    return _UnitRMS.apply(x)[0]


class RMSNorm(nn.RMSNorm):
    """torch's norm, with a gain for each channel: (... d) -> (... d)."""

    def __init__(self, width: int) -> None:
        """Start with gains of one."""
        super().__init__(width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (... d)."""
        own = x.device.type == "cpu" and torch.is_grad_enabled()
        return unit_rms(x) * self.weight if own else super().forward(x)


class _UnitRMS(torch.autograd.Function):
    """Both results are outputs, so that the backward can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)  # bf16 would lose small squares
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        r = torch.rsqrt(length.square() / x.shape[-1] + torch.finfo(exact).eps).to(x.dtype)
        y = x * r
        ctx.save_for_backward(y, r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:  # pyright: ignore
        (d_y, d_r), (y, r) = gradients, ctx.saved_tensors
        if d_y is None:
            return None if d_r is None else -d_r * r.square() * y / y.shape[-1]
        d_x = torch.addcmul(d_y, y, (d_y * y).mean(-1, keepdim=True), value=-1) * r
        return d_x if d_r is None else d_x - d_r * r.square() * y / y.shape[-1]
