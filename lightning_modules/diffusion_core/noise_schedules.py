"""Noise schedules: how noise ε is added to an image x0 as time t goes from 0 to 1000 (lecture 6).

    x(t) = α(t) x0 + σ(t) ε

    linear   α² = Π (1 - β),  β from 1e-4 to 0.02 in 1000 steps,  σ² = 1 - α²   (the lecture)
    cosine   α² = cos²((t/1000 + 0.008) / 1.008 π/2) / cos²(the same at 0),  β at most 0.999
    flow     α = 1 - t/1000,  σ = t/1000
    edm      α = 1,  σ = 80 (t/1000)⁷, trained where ln σ ~ N(-1.2, 1.2²)

Sources: DDPM (linear), iDDPM (cosine), flow matching (flow), Karras et al. (edm). Linear and cosine
are discrete: their times are integers, and a sampler's times are rounded.

Axes: b batch, s noise steps.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError

NUM_TRAIN_TIMESTEPS = 1000
NoiseScheduleName = Literal["linear", "cosine", "flow", "edm"]


class Timesteps(NamedTuple):
    """Timesteps of a sampler: times (s+1) falling to 0 with their α and σ, float64 on the CPU."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


def compute_alpha_bar(name: Literal["linear", "cosine"]) -> Tensor:
    """Compute α² (alpha bar) after 0..1000 steps, float64 (1001)."""
    if name == "linear":
        beta = torch.linspace(1e-4, 0.02, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)
    else:
        angle_fraction = (
            torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS + 0.008
        ) / 1.008
        unnormalized = (angle_fraction * math.pi / 2).cos().square()
        beta = (1 - unnormalized[1:] / unnormalized[:-1]).clamp(max=0.999)
    return torch.cat((torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)))


@cache
def _alpha_sigma_table(
    name: Literal["linear", "cosine"], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # training may use a table cached in validation
        alpha_bars = compute_alpha_bar(name)
        return alpha_bars.sqrt().to(device, dtype), (1 - alpha_bars).sqrt().to(device, dtype)


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise schedule by name: α and σ, training times and sampling times.

    For example:

        alpha, sigma = NoiseSchedule("linear").alpha_sigma(torch.tensor([0, 500, 1000]))
    """

    name: NoiseScheduleName = "linear"

    @property
    def is_discrete(self) -> bool:
        """Whether times are integers."""
        return self.name in ("linear", "cosine")

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data for which the net's inputs and outputs are scaled."""
        return 0.5 if self.name == "edm" else 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at times t (b), in t's dtype if it is floating; linear and cosine round t."""
        if not t.is_floating_point():
            t = t.to(torch.get_default_dtype())
        if self.name == "flow":
            return 1 - t / NUM_TRAIN_TIMESTEPS, t / NUM_TRAIN_TIMESTEPS
        if self.name == "edm":
            return torch.ones_like(t), 80 * (t / NUM_TRAIN_TIMESTEPS) ** 7
        alpha, sigma = _alpha_sigma_table(self.name, t.dtype, t.device)
        step = t.round().long()
        return alpha[step], sigma[step]

    def sample_t(self, u: Tensor) -> Tensor:
        """Training times (b), above 0, from uniform numbers u (b) in [0, 1]."""
        if self.is_discrete:
            return (u * NUM_TRAIN_TIMESTEPS).floor().clamp(max=NUM_TRAIN_TIMESTEPS - 1) + 1
        if self.name == "flow":
            return u * NUM_TRAIN_TIMESTEPS
        clamped = u.clamp(1e-6, 1 - 1e-6)  # erfinv is infinite at 0 and 1
        log_sigma = -1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * clamped - 1)
        return NUM_TRAIN_TIMESTEPS * ((log_sigma - math.log(80)) / 7).exp().clamp(max=1)

    def timesteps(self, num_steps: int) -> Timesteps:
        """Return times (s+1) of a sampler from pure noise to the image, with their α and σ.

        They fall from 1000 to 0 and are evenly spaced; for edm they are those of Karras et al. A
        discrete schedule is defined at integer times only. An image at time t is α x0 + σ ε.
        """
        # continuous times have no limit of their own; this one shows mistakes
        max_steps = NUM_TRAIN_TIMESTEPS if self.is_discrete else 10 * NUM_TRAIN_TIMESTEPS
        if not 1 <= num_steps <= max_steps:
            nearest = min(max(num_steps, 1), max_steps)
            raise UsageError(
                f"NoiseSchedule({self.name!r}): num_steps={num_steps} is out of range",
                [f"1 to {max_steps}"],
                f"use num_steps={nearest}",
                flag=f"--num_steps={nearest}, or --model.num_steps={nearest}",
            )
        t = torch.linspace(NUM_TRAIN_TIMESTEPS, 0, num_steps + 1, dtype=torch.float64)
        if self.name == "edm":  # σ = 80 (t/1000)⁷: even steps in σ^(1/7) down to 0.002, then 0
            t[:-1] = torch.linspace(
                NUM_TRAIN_TIMESTEPS,
                NUM_TRAIN_TIMESTEPS * (0.002 / 80) ** (1 / 7),
                num_steps,
                dtype=torch.float64,
            )
        t = t.round() if self.is_discrete else t
        return Timesteps(t, *self.alpha_sigma(t))
