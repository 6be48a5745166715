"""NF4 dequantization with the CUDA kernels of bitsandbytes: the same bits, but faster.

Codes and blocks have the same layout as in nf4.py, so checkpoints do not depend on the backend.
"""

import torch
from torch import Tensor

from . import nf4


def dequantize(
    shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor, *more: Tensor
) -> Tensor:
    """Return the dequantized weight (o, d), with the same arguments as `nf4.dequantize`.

    Args:
        shape: shape of the weight.
        dtype: dtype of the weight.
        codes: (n/64, 32), two codes in a byte.
        scale: scale of each block of 64 weights, (n/64).
        more: with double quantization, `outer` and `mean` for the scales.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit  # pyright: ignore

    # the 16 values that a code stands for, in units of the block's scale
    level_table = torch.tensor(nf4.levels(), dtype=torch.float64).float().to(codes.device)  # (16)
    state = QuantState(
        # in float32, dequantized first if the scales are int8
        absmax=nf4.block_scales(scale, *more),
        shape=shape,
        code=level_table,
        blocksize=nf4.BLOCK_SIZE,
        quant_type="nf4",
        dtype=dtype,
    )
    return dequantize_4bit(codes.reshape(-1, 1), state)
