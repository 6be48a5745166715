"""Counter-based random numbers: each is a function of (key, sample id, position in the sample).

    u64 = SplitMix64(key, sample, position),    two normals from each by Box-Muller

There is no state. So a sample's noise does not depend on its batch, on the ranks, or on earlier
draws. A million numbers take about twenty elementwise operations on their device. Two devices
differ by rounding only.

Axes: b batch.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN_GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1  # SplitMix64's (Steele et al. 2014)
MIX_CONSTANTS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def derive_key(*names: int | str) -> int:
    """Derive a 64-bit key from names: derive_key(seed, "training", step)."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little")


def uniforms(key: int, sample_ids: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), fp32 (b), one for each sample id, int64 (b)."""
    return _to_unit_interval(_random_bits(key, sample_ids) >> 8)


def normals(key: int, sample_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, fp32 (b, *shape), one array for each sample id (b)."""
    size = math.prod(shape)
    counters = torch.arange(-(-size // 2), device=sample_ids.device) * _to_signed64(GOLDEN_GAMMA)
    bits = _mix(_random_bits(key, sample_ids)[:, None] + counters)  # (b, size/2)
    radius = (-2 * _to_unit_interval(bits >> 40).log()).sqrt()
    angle = 2 * math.pi * _to_unit_interval(bits)
    pairs = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)  # (b, size)
    return pairs[:, :size].reshape(-1, *shape)


def _random_bits(key: int, sample_ids: Tensor) -> Tensor:
    return _mix(
        _mix(sample_ids * _to_signed64(GOLDEN_GAMMA) + _to_signed64(key))
        + _to_signed64(GOLDEN_GAMMA)
    )


def _mix(z: Tensor) -> Tensor:
    """Mix 64 bits to 64 well-mixed bits by int64 arithmetic that wraps around."""
    for shift, factor in MIX_CONSTANTS:
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * _to_signed64(factor)
    return z


def _to_unit_interval(bits: Tensor) -> Tensor:
    """Map the lowest 23 bits to a number in (0, 1), exact in fp32."""
    return ((bits & 0x7FFFFF).float() + 0.5) / 2**23


def _to_signed64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class StepNoise(NamedTuple):
    """Random numbers of a training step for its images (b)."""

    uniform_t: Tensor  # (b) in (0, 1), stratified over the images of the step
    uniform_label: Tensor  # (b) in (0, 1)
    noise: Tensor  # (b c y x)


def draw_step_noise(
    names: tuple[int | str, ...], sample_indices: Tensor, total: int, x0: Tensor
) -> StepNoise:
    """Draw the noise of images x0 (b c y x) with indices (b) among the `total` images of a step."""
    u = (sample_indices + uniforms(derive_key(*names, "times"), sample_indices)) / total
    uniform_label = uniforms(derive_key(*names, "labels"), sample_indices)
    return StepNoise(
        u, uniform_label, normals(derive_key(*names, "noise"), sample_indices, tuple(x0.shape[1:]))
    )
