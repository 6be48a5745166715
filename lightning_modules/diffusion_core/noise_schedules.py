"""Noise schedules: how an image x0 is drowned in noise ε as time t goes from 0 to 1000 (lecture 6).

    x(t) = α(t) x0 + σ(t) ε

    linear   α² = Π (1 - β),  β from 1e-4 to 0.02 in 1000 steps,  σ² = 1 - α²   (the lecture)
    cosine   α² = cos²((t/1000 + 0.008) / 1.008 π/2) / cos²(the same at 0),  β at most 0.999
    flow     α = 1 - t/1000,  σ = t/1000
    edm      α = 1,  σ = 80 (t/1000)⁷, trained where ln σ ~ N(-1.2, 1.2²)

The first is DDPM's, the others are iDDPM's, that of flow matching and that of Karras et al. Linear
and cosine are sequences: their times are whole numbers, and a sampler's are rounded to them.

Axes: b batch, s noise steps.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError

T = 1000
Kind = Literal["linear", "cosine", "flow", "edm"]


class Path(NamedTuple):
    """The way of a sampler: times (s+1) falling to 0 and their levels, float64 on the CPU."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


def alpha_bar(kind: Literal["linear", "cosine"]) -> Tensor:
    """The share of the image in the variance, α², after 0..1000 steps (1001), float64."""
    if kind == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        place = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008
        left = (place * math.pi / 2).cos().square()
        beta = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return torch.cat((torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)))


@cache
def _table(
    kind: Literal["linear", "cosine"], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # it may be made in validation, and is used in training
        kept = alpha_bar(kind)
        return kept.sqrt().to(device, dtype), (1 - kept).sqrt().to(device, dtype)


@dataclass(frozen=True)
class Schedule:
    """One of the four, as functions of time.

    alpha, sigma = Schedule("linear").levels(torch.tensor([0, 500, 1000]))
    """

    kind: Kind = "linear"

    @property
    def whole(self) -> bool:
        """Whether times are whole numbers."""
        return self.kind in ("linear", "cosine")

    @property
    def spread(self) -> float:
        """The standard deviation of the data that the net's in- and outputs are scaled for."""
        return 0.5 if self.kind == "edm" else 1.0

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times t (b), of t's dtype if it is a float; linear and cosine round t."""
        if not t.is_floating_point():
            t = t.to(torch.get_default_dtype())
        if self.kind == "flow":
            return 1 - t / T, t / T
        if self.kind == "edm":
            return torch.ones_like(t), 80 * (t / T) ** 7
        alpha, sigma = _table(self.kind, t.dtype, t.device)
        step = t.round().long()
        return alpha[step], sigma[step]

    def draw(self, u: Tensor) -> Tensor:
        """Times to train at (b), above 0, by numbers u (b) uniform in [0, 1]."""
        if self.whole:
            return (u * T).floor().clamp(max=T - 1) + 1
        if self.kind == "flow":
            return u * T
        inside = u.clamp(1e-6, 1 - 1e-6)  # erfinv has no end at 0 and 1, to which floats round
        log_sigma = -1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * inside - 1)
        return T * ((log_sigma - math.log(80)) / 7).exp().clamp(max=1)

    def path(self, steps: int) -> Path:
        """From pure noise to the image in so many steps; edm's are those of Karras et al."""
        most = T if self.whole else 10 * T
        if not 1 <= steps <= most:
            raise UsageError(
                f"steps is {steps}; allowed: 1 to {most}; type --steps={min(max(steps, 1), most)}"
            )
        t = torch.linspace(T, 0, steps + 1, dtype=torch.float64)
        if self.kind == "edm":  # evenly in σ^(1/7) down to 0.002, and then to 0
            t[:-1] = torch.linspace(T, T * (0.002 / 80) ** (1 / 7), steps, dtype=torch.float64)
        t = t.round() if self.whole else t
        return Path(t, *self.levels(t))
