"""Random numbers by name: each a pure function of (key, number of the sample, place in it).

    u64 = SplitMix64(key, sample, place),    two normals of each by Box and Muller

No state is kept, so a sample's noise does not depend on its batch, on the ranks, or on what was
drawn before; a million numbers take some twenty elementwise operations on the device they are for.
Two devices differ by rounding only.

Axes: b batch.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1  # SplitMix64's (Steele et al. 2014)
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def key(*names: int | str) -> int:
    """64 bits that depend on all of the names: key(seed, "training", step)."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little")


def uniforms(key: int, samples: Tensor) -> Tensor:
    """Numbers in (0, 1), fp32 (b), one for each number of a sample, int64 (b)."""
    return _unit(_stream(key, samples) >> 8)


def normals(key: int, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, fp32 (b, *shape), an image for each number of a sample (b)."""
    size = math.prod(shape)
    places = torch.arange(-(-size // 2), device=samples.device) * _signed(GOLDEN)
    bits = _mix(_stream(key, samples)[:, None] + places)  # (b, size/2)
    length = (-2 * _unit(bits >> 40).log()).sqrt()
    angle = 2 * math.pi * _unit(bits)
    both = torch.cat((length * angle.cos(), length * angle.sin()), 1)  # (b, size)
    return both[:, :size].reshape(-1, *shape)


def _stream(key: int, samples: Tensor) -> Tensor:
    return _mix(_mix(samples * _signed(GOLDEN) + _signed(key)) + _signed(GOLDEN))


def _mix(z: Tensor) -> Tensor:
    """64 bits in, 64 well-mixed bits out; int64 arithmetic that wraps around."""
    for shift, factor in MIXING:
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return z


def _unit(bits: Tensor) -> Tensor:
    """The lowest 23 bits as a number in (0, 1), exact in fp32."""
    return ((bits & 0x7FFFFF).float() + 0.5) / 2**23


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class Draws(NamedTuple):
    """What a training step draws for its images (b)."""

    u: Tensor  # (b) in (0, 1): spread evenly over the whole step
    label: Tensor  # (b) in (0, 1)
    noise: Tensor  # (b c y x)


def of_step(names: tuple[int | str, ...], places: Tensor, total: int, x0: Tensor) -> Draws:
    """Draws for the images x0 (b c y x) at places (b) among the `total` of a step."""
    u = (places + uniforms(key(*names, "times"), places)) / total
    label = uniforms(key(*names, "labels"), places)
    return Draws(u, label, normals(key(*names, "noise"), places, tuple(x0.shape[1:])))
