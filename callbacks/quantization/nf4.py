"""NF4 (QLoRA, 2023): four bits a weight, in levels that normally distributed weights use alike.

    block of 64 weights:  code = nearest of 16 levels to w / max|w|       two codes in a byte
    scales max|w|:        int8 of (scale - mean of all), 256 of them share max|scale - mean|
    bits a weight:        4 + 8/64 + 32/(64·256) = 4.127; with float32 scales 4.5

The levels are quantiles of N(0, 1), eight above zero, seven below, and zero, over their largest.
Of normal weights the error is 0.0920 of their RMS; sixteen even steps would make it 0.1004.
"""

from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE, SCALE_GROUP_SIZE = 64, 256  # weights that share a scale, scales that share one
CHUNK_SIZE = 4096 * BLOCK_SIZE  # weights that are rounded at once
TAIL_QUANTILE = 0.9677083  # the outermost quantile, of the paper's code


@cache
def levels() -> tuple[float, ...]:
    """The sixteen, rising from -1 to 1."""
    normal = NormalDist()
    above = [normal.inv_cdf(TAIL_QUANTILE + (0.5 - TAIL_QUANTILE) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(TAIL_QUANTILE + (0.5 - TAIL_QUANTILE) * i / 7) for i in range(7)]
    return tuple(level / above[0] for level in sorted([*below, 0.0, *above]))


@cache
def _pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two weights of each byte as one number of twice the size: 256 of them.

    One look-up then yields two weights: 0.3 ms a million, against 4.6 for unpacking first.
    """
    level = torch.tensor(levels(), dtype=torch.float64).to(dtype)
    pairs = torch.cartesian_prod(level, level)  # (256, 2)
    wide = {2: torch.float32, 4: torch.float64}[dtype.itemsize]
    return pairs.contiguous().view(wide).flatten().to(device)


def quantize(weight: Tensor, double_quant: bool = True) -> dict[str, Tensor]:
    """Codes (n/64, 32) and scales (n/64) of a weight of n numbers, any shape.

    With `double_quant` the scales are int8, and `outer` (n/64/256) and `mean` (1) make them scales
    again.
    """
    flat, device = weight.detach().flatten(), weight.device
    count = -(-flat.numel() // BLOCK_SIZE)
    scale = torch.empty(count, dtype=torch.float32, device=device)
    codes = torch.empty(count, BLOCK_SIZE // 2, dtype=torch.uint8, device=device)
    level = torch.tensor(levels(), dtype=torch.float64)
    edges = ((level[1:] + level[:-1]) / 2).float().to(device)
    for start in range(0, flat.numel(), CHUNK_SIZE):
        chunk = flat[start : start + CHUNK_SIZE].float()
        blocks = F.pad(chunk, (0, -chunk.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
        block_slice = slice(start // BLOCK_SIZE, start // BLOCK_SIZE + len(blocks))
        scale[block_slice] = largest = blocks.abs().amax(1)
        of_largest = blocks / largest.clamp_min(1e-30)[:, None]
        code = torch.bucketize(of_largest, edges, out_int32=True).to(torch.uint8)
        codes[block_slice] = (code[:, ::2] << 4) | code[:, 1::2]
    if not double_quant:
        return {"codes": codes, "scales": scale}
    mean = scale.double().mean().float()  # in double: the same on every device
    deviations = F.pad(scale - mean, (0, -len(scale) % SCALE_GROUP_SIZE)).view(-1, SCALE_GROUP_SIZE)
    outer = deviations.abs().amax(1)
    inner = (deviations / outer.clamp_min(1e-30)[:, None] * 127).round().to(torch.int8).flatten()
    return {
        "codes": codes,
        "scales": inner[: len(scale)].contiguous(),
        "outer": outer,
        "mean": mean[None],
    }


def block_scales(scale: Tensor, outer: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """The scale of each block in float32, (n/64)."""
    if outer is None or mean is None:
        return scale
    step = (
        (outer / 127).repeat_interleave(SCALE_GROUP_SIZE)[: len(scale)]
        if len(outer) > 1
        else outer / 127
    )
    return torch.addcmul(mean, scale.float(), step)


def dequantize(
    shape: torch.Size,
    dtype: torch.dtype,
    codes: Tensor,
    scale: Tensor,
    outer: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """The weight of this shape; products are made in `dtype`, or in float32 for a float64."""
    compute_dtype = torch.float32 if dtype == torch.float64 else dtype
    wide = _pair_table(codes.device, compute_dtype).index_select(0, codes.flatten().int())
    blocks = (
        wide.view(compute_dtype)
        .view(-1, BLOCK_SIZE)
        .mul_(block_scales(scale, outer, mean).to(compute_dtype)[:, None])
    )
    count = shape.numel()
    flat = blocks.flatten() if blocks.numel() == count else blocks.flatten()[:count]
    return flat.view(shape).to(dtype)


def iter_dequantized(
    shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor, *more: Tensor
) -> Iterator[Tensor]:
    """The numbers of `dequantize` in their order, as flat tensors of at most PIECE numbers."""
    scale, count = block_scales(scale, *more), shape.numel()
    for start in range(0, count, CHUNK_SIZE):
        size = torch.Size([min(CHUNK_SIZE, count - start)])
        block_slice = slice(start // BLOCK_SIZE, -(-(start + size[0]) // BLOCK_SIZE))
        yield dequantize(size, dtype, codes[block_slice], scale[block_slice])
