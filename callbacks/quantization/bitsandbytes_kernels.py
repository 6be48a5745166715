"""NF4 dequantization with the CUDA kernels of bitsandbytes: the same bits, but faster.

Codes and blocks have the same layout as in nf4.py, so checkpoints do not depend on the backend.
"""

import torch
from torch import Tensor

from . import nf4


def dequantize(
    shape: torch.Size, dtype: torch.dtype, codes: Tensor, scale: Tensor, *more: Tensor
) -> Tensor:
    """Return the dequantized weight of this shape."""
    from bitsandbytes.functional import QuantState, dequantize_4bit  # pyright: ignore

    code = torch.tensor(nf4.levels(), dtype=torch.float64).float().to(codes.device)
    state = QuantState(
        absmax=nf4.block_scales(scale, *more),
        shape=shape,
        code=code,
        blocksize=nf4.BLOCK_SIZE,
        quant_type="nf4",
        dtype=dtype,
    )
    return dequantize_4bit(codes.reshape(-1, 1), state)
