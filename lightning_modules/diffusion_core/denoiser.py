"""Denoising: a net's answers as images, and how wrong they are: the formulas between net and task.

    x(t) = α x0 + σ ε,    the net is given x / √(α² + σ²), so that it sees a variance near 1,
    loss = weight(t) mean (net(x(t), t, y) - right answer)²

The lecture's three attempts differ in what the net is told: `is_one_step` sees pure noise only and
answers with the mean of all images; `none` sees every level and must guess which; `time` knows it.

Axes: b batch, c y x images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ravine.errors import UsageError

from .noise_schedules import NUM_TRAIN_TIMESTEPS, Schedule
from .parameterization import (
    LossWeighting,
    PredictionType,
    compute_loss_weight,
    compute_target,
    predict_x0,
)

DenoiserNet = Callable[
    [Tensor, Tensor, Tensor | None], Tensor
]  # x (b c y x), t (b), y (b) to (b c y x)
TimeConditioning = Literal["one_step", "none", "time"]


@dataclass(frozen=True)
class Denoiser:
    """What is asked of a net, at which levels, and with what weight.

    Denoising(Schedule("cosine"), prediction="v").denoise(net, x, t)
    """

    noise_schedule: Schedule
    prediction_type: PredictionType = "x0"
    loss_weighting: LossWeighting = "uniform"
    time_conditioning: TimeConditioning = "time"
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Refuse to divide by zero."""
        if self.prediction_type == "eps" and self.noise_schedule.name == "flow":
            raise UsageError(
                "prediction is eps and process flow, which begins at pure noise, where ε says "
                "nothing of the image; allowed: x0, v, velocity; type --model.prediction=velocity"
            )

    def sample_t(self, u: Tensor) -> Tensor:
        """Times to train at (b), by numbers u (b) uniform in (0, 1)."""
        return (
            torch.full_like(u, NUM_TRAIN_TIMESTEPS)
            if self.time_conditioning == "one_step"
            else self.noise_schedule.sample_t(u)
        )

    def denoise(
        self, net: DenoiserNet, x: Tensor, t: Tensor, y: Tensor | None = None,
        guidance_scale: float = 0.0,
        null_class: int = 0,
    ) -> Tensor:  # fmt: skip
        """The images x0 that x (b c y x) at times t (b), with labels y (b), are taken to be.

        With guidance w the answer is cond + w (cond - uncond), where uncond is the one to the label
        `null_class` (Ho & Salimans 2022); both come from one call of the net.
        """
        if not guidance_scale:
            return self.to_x0(self._net_output(net, x, t, y), x, t)
        null_labels = torch.full_like(t, null_class, dtype=torch.int64)
        labels = torch.cat((null_labels if y is None else y, null_labels))
        cond, uncond = self._net_output(net, torch.cat((x, x)), torch.cat((t, t)), labels).chunk(2)
        return self.to_x0(cond + guidance_scale * (cond - uncond), x, t)

    def training_loss(
        self, net: DenoiserNet, x0: Tensor, t: Tensor, y: Tensor | None, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each image (b), and the noisy images and the answers that it is of."""
        alpha, sigma = self._alpha_sigma(t)
        d = self.noise_schedule.sigma_data
        x = alpha * x0 + sigma * eps
        target = compute_target(self.prediction_type, x0 / d, eps, d * alpha, sigma)
        scale = compute_loss_weight(self.loss_weighting, self.prediction_type, d * alpha, sigma)
        output = self._net_output(net, x, t, y)
        return (scale * (output - target).square()).mean((1, 2, 3)), x, output

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The images that the net's answers to x at times t mean, (b c y x)."""
        alpha, sigma = self._alpha_sigma(t)
        d = self.noise_schedule.sigma_data
        return d * predict_x0(self.prediction_type, output, x, d * alpha, sigma)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.noise_schedule.alpha_sigma(t)
        return rearrange(alpha, "b -> b 1 1 1"), rearrange(sigma, "b -> b 1 1 1")

    def _net_output(self, net: DenoiserNet, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        alpha, sigma = self._alpha_sigma(t)
        x = x / ((self.noise_schedule.sigma_data * alpha) ** 2 + sigma**2).sqrt()
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        t_input = t if self.time_conditioning == "time" else torch.zeros_like(t)
        # not in the net's own type: bf16 keeps three digits, too few to sum squares in
        return net(x, t_input, y).to(torch.promote_types(x.dtype, torch.float32))
