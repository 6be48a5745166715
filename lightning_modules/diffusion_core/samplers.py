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

from .noise_schedules import Timesteps

DenoiseFn = Callable[[Tensor, float], Tensor]
NoiseFn = Callable[[int], Tensor]
SamplerFn = Callable[[DenoiseFn, Tensor, Timesteps, NoiseFn], Tensor]
SamplerName = Literal["ddim", "ancestral", "euler", "heun", "dpm"]


class SamplerStep(NamedTuple):
    """From time t with levels α, σ (`alpha`, `sigma`) to time `t_next` with levels `alpha_next`,
    `sigma_next`."""

    step_index: int
    t: float
    alpha: float
    sigma: float
    t_next: float
    alpha_next: float
    sigma_next: float


def iter_steps(timesteps: Timesteps) -> Iterator[SamplerStep]:
    """The steps of a path."""
    rows = list(zip(*(values.tolist() for values in timesteps), strict=True))
    for index, (current, following) in enumerate(pairwise(rows)):
        yield SamplerStep(index, *current, *following)


def _retained_variance(step: SamplerStep) -> float:
    """The share of ε's variance at the end of a step that is old, by DDPM's posterior."""
    return (step.alpha * step.sigma_next / (step.alpha_next * step.sigma)) ** 2


def ddim(
    denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn, eta: float = 0.0
) -> Tensor:
    """Back the noise out, and put it on again at the next level (Song et al. 2021, eq. 12).

        x' = α' x0 + √(σ'² - η²β) ε + η √β z,    β = σ'² (1 - (α σ' / α' σ)²)

    eta 0 is the lecture's sampler: the same noise all the way; eta 1 is ancestral sampling.
    """
    for step in iter_steps(timesteps):
        x0 = denoise(x, step.t)
        eps = (x - step.alpha * x0) / step.sigma
        noise_fraction = eta**2 * (1 - _retained_variance(step))
        x = step.alpha_next * x0 + step.sigma_next * math.sqrt(1 - noise_fraction) * eps
        if noise_fraction and step.sigma_next:
            x = x + step.sigma_next * math.sqrt(noise_fraction) * noise(step.step_index)
    return x


def ancestral(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """Draw from q(x' | x, x0), as DDPM does (Ho et al. 2020, eq. 7).

    x' = (α/α') (σ'/σ)² x + α' (1 - (α σ' / α' σ)²) x0 + √β z,    β as in `ddim`
    """
    for step in iter_steps(timesteps):
        x0, retained = denoise(x, step.t), _retained_variance(step)
        x = (step.alpha / step.alpha_next) * (
            step.sigma_next / step.sigma
        ) ** 2 * x + step.alpha_next * (1 - retained) * x0
        if step.sigma_next:
            x = x + step.sigma_next * math.sqrt(1 - retained) * noise(step.step_index)
    return x


def euler(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """x' = x + x0 Δα + ε Δσ: order 1; the same points as DDIM's."""
    for step in iter_steps(timesteps):
        x = _euler_step(x, denoise(x, step.t), step)
    return x


def heun(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """Euler's step, and then the mean of both ends' x0 and ε: order 2, two calls of the net a step.

    With α = 1 this is EDM's sampler (Karras et al. 2022, algorithm 1, no churn).
    """
    for step in iter_steps(timesteps):
        x0 = denoise(x, step.t)
        x_pred = _euler_step(x, x0, step)
        if step.sigma_next:
            eps = (x - step.alpha * x0) / step.sigma
            x0_next = denoise(x_pred, step.t_next)
            eps = (eps + (x_pred - step.alpha_next * x0_next) / step.sigma_next) / 2
            x = (
                x
                + (step.alpha_next - step.alpha) / 2 * (x0 + x0_next)
                + (step.sigma_next - step.sigma) * eps
            )
        else:
            x = x_pred
    return x


def dpm(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """DPM-Solver++(2M): order 2 with one call of the net a step (Lu et al. 2022, algorithm 2).

    x' = (σ'/σ) x + (α' - α σ'/σ) D,    D = x0 + h'/(2h) (x0 - the last x0)

    h and h' are the steps in log(α/σ), the last one's and this one's. Where one of them has no
    end (the first step of flow matching, the last step of all), D is x0.
    """
    x0_prev: Tensor | None = None
    h_prev = math.inf
    for step in iter_steps(timesteps):
        x0 = denoise(x, step.t)
        is_finite = step.alpha > 0 and step.sigma_next > 0
        h = (
            math.log(step.alpha_next * step.sigma / (step.alpha * step.sigma_next))
            if is_finite
            else math.inf
        )
        x0_extrapolated = (
            x0 if x0_prev is None or not is_finite else x0 + h / (2 * h_prev) * (x0 - x0_prev)
        )
        x = (
            step.sigma_next / step.sigma * x
            + (step.alpha_next - step.alpha * step.sigma_next / step.sigma) * x0_extrapolated
        )
        x0_prev, h_prev = x0, h
    return x


def _euler_step(x: Tensor, x0: Tensor, step: SamplerStep) -> Tensor:
    eps = (x - step.alpha * x0) / step.sigma
    return x + (step.alpha_next - step.alpha) * x0 + (step.sigma_next - step.sigma) * eps


SAMPLERS: dict[SamplerName, SamplerFn] = {
    "ddim": ddim,
    "ancestral": ancestral,
    "euler": euler,
    "heun": heun,
    "dpm": dpm,
}
