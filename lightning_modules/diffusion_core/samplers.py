"""Diffusion samplers: DDIM, ancestral (DDPM), Euler, Heun and DPM-Solver++(2M).

Each integrates dx = x0 dα + ε dσ from noise to an image. The net estimates x0 at any point, and
ε = (x - α x0) / σ. With both constant over a step the result is Euler's method, which is DDIM.
Two evaluations a step give Heun's method. Extrapolation from the previous step in log(α/σ) gives
DPM-Solver++(2M). Ancestral sampling adds noise in each step. No sampler divides by α, so flow
matching may start at α = 0. The last step, to σ = 0, is an Euler step in all samplers.

Every sampler takes (denoise, x, timesteps, noise): `denoise(x, t)` estimates x0 at time t, a
number; `noise(k)` is fresh noise like x for step k. Coefficients are float64 on the host, so no
step waits for the device.

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
SamplerName = Literal["ddim", "ddpm", "euler", "heun", "dpmpp_2m"]


class SamplerStep(NamedTuple):
    """Step from time t with α, σ to time `t_next` with `alpha_next`, `sigma_next`."""

    step_index: int
    t: float
    alpha: float
    sigma: float
    t_next: float
    alpha_next: float
    sigma_next: float


def iter_steps(timesteps: Timesteps) -> Iterator[SamplerStep]:
    """Yield the steps between consecutive timesteps."""
    rows = list(zip(*(values.tolist() for values in timesteps), strict=True))
    for index, (current, following) in enumerate(pairwise(rows)):
        yield SamplerStep(index, *current, *following)


def _retained_variance(step: SamplerStep) -> float:
    """Fraction of the noise variance after a step that comes from the old ε (DDPM's posterior)."""
    return (step.alpha * step.sigma_next / (step.alpha_next * step.sigma)) ** 2


def ddim(
    denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): remove the noise and add it again at the next level.

        x' = α' x0 + √(σ'² - η²β) ε + η √β z,    β = σ'² (1 - (α σ' / α' σ)²)

    A prime marks the values after the step; ε = (x - α x0) / σ, and z is fresh noise.
    eta 0 is the lecture's sampler with the same noise in all steps; eta 1 is ancestral sampling.

    Args:
        denoise: `denoise(x, t)` estimates x0 at time t.
        x: noise at the first of the timesteps.
        timesteps: times from noise to image with their α and σ.
        noise: `noise(k)` is fresh noise like x for step k.
        eta: amount of fresh noise, 0 to 1.
    """
    for step in iter_steps(timesteps):
        x0 = denoise(x, step.t)
        eps = (x - step.alpha * x0) / step.sigma
        # η²β / σ'²: the fraction of fresh noise in the variance after the step
        noise_fraction = eta**2 * (1 - _retained_variance(step))
        x = step.alpha_next * x0 + step.sigma_next * math.sqrt(1 - noise_fraction) * eps
        if noise_fraction and step.sigma_next:
            x = x + step.sigma_next * math.sqrt(noise_fraction) * noise(step.step_index)
    return x


def ddpm(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """Ancestral sampling from q(x' | x, x0), as in DDPM (Ho et al. 2020, eq. 7).

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
    """Euler's method, x' = x + x0 Δα + ε Δσ: order 1; the same points as DDIM."""
    for step in iter_steps(timesteps):
        x = _euler_step(x, denoise(x, step.t), step)
    return x


def heun(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """Heun's method: order 2 with two net evaluations a step.

    An Euler step, with x0 and ε constant, gives the second point. The step then uses the mean of x0
    and ε at both ends. With α = 1 it is EDM's sampler (Karras et al. 2022, algorithm 1, no churn).

    Args:
        denoise: `denoise(x, t)` estimates x0 at time t.
        x: noise at the first of the timesteps.
        timesteps: times from noise to image with their α and σ.
        noise: not used; all samplers have equal arguments.
    """
    for step in iter_steps(timesteps):
        x0 = denoise(x, step.t)
        x_pred = _euler_step(x, x0, step)
        if step.sigma_next:
            eps = (x - step.alpha * x0) / step.sigma
            x0_next = denoise(x_pred, step.t_next)
            eps_next = (x_pred - step.alpha_next * x0_next) / step.sigma_next
            mean_eps = (eps + eps_next) / 2
            x = (
                x
                + (step.alpha_next - step.alpha) / 2 * (x0 + x0_next)
                + (step.sigma_next - step.sigma) * mean_eps
            )
        else:  # the last step, to the image: ε at its end is not defined
            x = x_pred
    return x


def dpmpp_2m(denoise: DenoiseFn, x: Tensor, timesteps: Timesteps, noise: NoiseFn) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): order 2 with one net evaluation a step.

    x' = (σ'/σ) x + (α' - α σ'/σ) D,    D = x0 + h / (2 h_prev) (x0 - x0_prev)

    A prime marks the values after the step. h_prev and h are the previous and the current step in
    log(α/σ). If one of them is infinite (the first step of flow matching, the last step of any
    schedule), D is x0.

    Args:
        denoise: `denoise(x, t)` estimates x0 at time t.
        x: noise at the first of the timesteps.
        timesteps: times from noise to image with their α and σ.
        noise: not used; all samplers have equal arguments.
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
        if x0_prev is None or not is_finite:
            x0_extrapolated = x0
        else:  # x0 itself if h_prev is infinite
            x0_extrapolated = x0 + h / (2 * h_prev) * (x0 - x0_prev)
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
    "ddpm": ddpm,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}
