"""Int8 quantization per output channel: absmax scales that map the largest weight to 127."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_SIZE = 2**18  # weights that are rounded together


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Return codes (o, d) int8 and scales (o) float32 of a weight (o, d)."""
    weight = weight.detach()
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _row_slices(weight.shape):
        chunk = weight[rows].float()
        scale[rows] = step = chunk.abs().amax(1) / 127
        codes[rows] = (chunk / step.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return {"codes": codes, "scales": scale}


def dequantize(shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the dequantized weight (o, d)."""
    compute_dtype = torch.float32 if dtype == torch.float64 else dtype
    return (codes.to(compute_dtype) * scale.to(compute_dtype)[:, None]).to(dtype)


def iter_dequantized(
    shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor
) -> Iterator[Tensor]:
    """Yield the values of `dequantize` in order, as flat tensors of CHUNK_SIZE values or a row."""
    for rows in _row_slices(shape):
        chunk_codes = codes[rows]
        yield dequantize(chunk_codes.shape, dtype, chunk_codes, scale[rows]).flatten()


def _row_slices(shape: torch.Size) -> Iterator[slice]:
    step = max(1, CHUNK_SIZE // max(1, shape[1]))
    return (slice(first, first + step) for first in range(0, shape[0], step))
