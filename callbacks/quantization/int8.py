"""Int8 a channel: the largest weight of each output is 127, the others are rounded to its steps."""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**18  # weights that are rounded at once


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Codes (o, d) int8 and scales (o) float32 of a weight (o, d)."""
    weight = weight.detach()
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _rows(weight.shape):
        piece = weight[rows].float()
        scale[rows] = step = piece.abs().amax(1) / 127
        codes[rows] = (piece / step.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return {"codes": codes, "scales": scale}


def dequantize(shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Tensor:
    """The weight (o, d)."""
    made = torch.float32 if dtype == torch.float64 else dtype
    return (codes.to(made) * scale.to(made)[:, None]).to(dtype)


def pieces(shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """The numbers of `dequantize` in their order, as flat tensors of at most PIECE numbers."""
    for rows in _rows(shape):
        part = codes[rows]
        yield dequantize(part.shape, dtype, part, scale[rows]).flatten()


def _rows(shape: torch.Size) -> Iterator[slice]:
    step = max(1, PIECE // max(1, shape[1]))
    return (slice(first, first + step) for first in range(0, shape[0], step))
