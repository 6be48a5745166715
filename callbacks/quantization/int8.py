"""Int8 a channel: the largest weight of each output is 127, the others are rounded to its steps."""

import torch
from torch import Tensor


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Codes (o, d) int8 and scales (o) float32 of a weight (o, d)."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return {"codes": codes, "scales": scale}


def dequantize(shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Tensor:
    """The weight (o, d)."""
    made = torch.float32 if dtype == torch.float64 else dtype
    return (codes.to(made) * scale.to(made)[:, None]).to(dtype)
