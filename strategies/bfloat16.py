"""Detect whether a device has instructions for bfloat16; without them it is emulated, slowly."""

import torch


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether a device of this type (cpu, cuda, mps) multiplies matrices in bfloat16 natively."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
