"""Samplers: from noise to an image along dx = x0 dα + ε dσ, one paper's algorithm a function.

The net says x0 at any point of the way, and ε = (x - α x0) / σ. Held still over a step, both give
Euler's method, which is DDIM; with two points a step, Heun's; extrapolated from the last step in
log(α/σ), DPM-Solver++(2M). Ancestral sampling is a walk with noise instead. Nothing is divided by
α, so that flow matching may start at α = 0; the last step, to σ = 0, is Euler's everywhere.

Every sampler takes (denoise, x, path, noise): `denoise(x, t)` estimates x0 at time t, a number;
`noise(k)` is fresh noise like x for step k. Coefficients are of float64, on the host: no step waits
for a device.

Axes: b batch, s noise steps; x has any shape.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from .noise_schedules import Path

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]
Sampler = Callable[[Denoise, Tensor, Path, Noise], Tensor]
Name = Literal["ddim", "ancestral", "euler", "heun", "dpm"]


class Step(NamedTuple):
    """From time t with levels α, σ (`a`, `s`) to time `to` with levels `a2`, `s2`."""

    number: int
    t: float
    a: float
    s: float
    to: float
    a2: float
    s2: float


def steps(path: Path) -> Iterator[Step]:
    """The steps of a path."""
    rows = list(zip(*(values.tolist() for values in path), strict=True))
    for number, (here, there) in enumerate(pairwise(rows)):
        yield Step(number, *here, *there)


def _kept(step: Step) -> float:
    """The share of ε's variance at the end of a step that is old, by DDPM's posterior."""
    return (step.a * step.s2 / (step.a2 * step.s)) ** 2


def ddim(denoise: Denoise, x: Tensor, path: Path, noise: Noise, eta: float = 0.0) -> Tensor:
    """Back the noise out, and put it on again at the next level (Song et al. 2021, eq. 12).

        x' = α' x0 + √(σ'² - η²β) ε + η √β z,    β = σ'² (1 - (α σ' / α' σ)²)

    eta 0 is the lecture's sampler: the same noise all the way; eta 1 is ancestral sampling.
    """
    for step in steps(path):
        x0 = denoise(x, step.t)
        eps = (x - step.a * x0) / step.s
        fresh = eta**2 * (1 - _kept(step))
        x = step.a2 * x0 + step.s2 * math.sqrt(1 - fresh) * eps
        if fresh and step.s2:
            x = x + step.s2 * math.sqrt(fresh) * noise(step.number)
    return x


def ancestral(denoise: Denoise, x: Tensor, path: Path, noise: Noise) -> Tensor:
    """Draw from q(x' | x, x0), as DDPM does (Ho et al. 2020, eq. 7).

    x' = (α/α') (σ'/σ)² x + α' (1 - (α σ' / α' σ)²) x0 + √β z,    β as in `ddim`
    """
    for step in steps(path):
        x0, kept = denoise(x, step.t), _kept(step)
        x = (step.a / step.a2) * (step.s2 / step.s) ** 2 * x + step.a2 * (1 - kept) * x0
        if step.s2:
            x = x + step.s2 * math.sqrt(1 - kept) * noise(step.number)
    return x


def euler(denoise: Denoise, x: Tensor, path: Path, noise: Noise) -> Tensor:
    """x' = x + x0 Δα + ε Δσ: order 1; the same points as DDIM's."""
    for step in steps(path):
        x = _euler(x, denoise(x, step.t), step)
    return x


def heun(denoise: Denoise, x: Tensor, path: Path, noise: Noise) -> Tensor:
    """Euler's step, and then the mean of both ends' x0 and ε: order 2, two calls of the net a step.

    With α = 1 this is EDM's sampler (Karras et al. 2022, algorithm 1, no churn).
    """
    for step in steps(path):
        x0 = denoise(x, step.t)
        ahead = _euler(x, x0, step)
        if step.s2:
            eps = (x - step.a * x0) / step.s
            second = denoise(ahead, step.to)
            eps = (eps + (ahead - step.a2 * second) / step.s2) / 2
            x = x + (step.a2 - step.a) / 2 * (x0 + second) + (step.s2 - step.s) * eps
        else:
            x = ahead
    return x


def dpm(denoise: Denoise, x: Tensor, path: Path, noise: Noise) -> Tensor:
    """DPM-Solver++(2M): order 2 with one call of the net a step (Lu et al. 2022, algorithm 2).

    x' = (σ'/σ) x + (α' - α σ'/σ) D,    D = x0 + h'/(2h) (x0 - the last x0)

    h and h' are the steps in log(α/σ), the last one's and this one's. Where one of them has no
    end (the first step of flow matching, the last step of all), D is x0.
    """
    before: Tensor | None = None
    last = math.inf
    for step in steps(path):
        x0 = denoise(x, step.t)
        ends = step.a > 0 and step.s2 > 0
        h = math.log(step.a2 * step.s / (step.a * step.s2)) if ends else math.inf
        ahead = x0 if before is None or not ends else x0 + h / (2 * last) * (x0 - before)
        x = step.s2 / step.s * x + (step.a2 - step.a * step.s2 / step.s) * ahead
        before, last = x0, h
    return x


def _euler(x: Tensor, x0: Tensor, step: Step) -> Tensor:
    eps = (x - step.a * x0) / step.s
    return x + (step.a2 - step.a) * x0 + (step.s2 - step.s) * eps


SAMPLERS: dict[Name, Sampler] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "euler": euler,
    "heun": heun,
    "dpm": dpm,
}
