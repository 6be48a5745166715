"""Denoiser: preconditioning of the net, training loss and classifier-free guidance.

    x(t) = α x0 + σ ε,    the net's input is x / √(α² + σ²), with variance near 1,
    loss = weight(t) mean (net(x(t), t, y) - target)²

The time conditioning selects one of the lecture's three attempts. `one_step`: trained at pure noise
only, it predicts the mean image. `none`: all noise levels, no time input. `time`: conditioned
on t.

Axes: b batch, c y x images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ravine.errors import UsageError

from .noise_schedules import NUM_TRAIN_TIMESTEPS, NoiseSchedule
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
    """Noise schedule, prediction type, loss weighting and time conditioning of a denoising net.

    For example:

        Denoiser(NoiseSchedule("cosine"), prediction_type="v").denoise(net, x, t)
    """

    noise_schedule: NoiseSchedule
    prediction_type: PredictionType = "x0"
    loss_weighting: LossWeighting = "uniform"
    time_conditioning: TimeConditioning = "time"
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for eps with flow, which would divide by zero."""
        if self.prediction_type == "eps" and self.noise_schedule.name == "flow":
            raise UsageError(
                "Denoiser: prediction_type='eps' cannot be used with noise_schedule='flow': its "
                "first step is pure noise, and ε does not determine the image there",
                ["x0", "v", "velocity"],
                "use prediction_type='velocity'",
                flag="--model.prediction_type=velocity",
            )

    def sample_t(self, u: Tensor) -> Tensor:
        """Training times (b) from uniform numbers u (b) in (0, 1)."""
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
        """Estimate the images x0 from x (b c y x) at times t (b), with labels y (b).

        With classifier-free guidance w the output is cond + w (cond - uncond), where uncond is the
        output for the label `null_class` (Ho & Salimans 2022). One call of the net computes both.

        Args:
            net: maps x (b c y x), t (b) and y (b) or None to its output (b c y x).
            x: noisy images.
            t: their times.
            y: their labels; None for images without labels.
            guidance_scale: w; 0 is plain conditional.
            null_class: the label of images without class.
        """
        if not guidance_scale:
            return self.to_x0(self._net_output(net, x, t, y), x, t)
        null_labels = torch.full_like(t, null_class, dtype=torch.int64)
        labels = torch.cat((null_labels if y is None else y, null_labels))
        cond, uncond = self._net_output(net, torch.cat((x, x)), torch.cat((t, t)), labels).chunk(2)
        # to_x0: the net may predict x0, the noise or a velocity
        return self.to_x0(cond + guidance_scale * (cond - uncond), x, t)

    def training_loss(
        self, net: DenoiserNet, x0: Tensor, t: Tensor, y: Tensor | None, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of each image (b), the noisy images and the net's output for them."""
        alpha, sigma = self._alpha_sigma(t)
        d = self.noise_schedule.sigma_data
        x = alpha * x0 + sigma * eps
        target = compute_target(self.prediction_type, x0 / d, eps, d * alpha, sigma)
        scale = compute_loss_weight(self.loss_weighting, self.prediction_type, d * alpha, sigma)
        output = self._net_output(net, x, t, y)
        return (scale * (output - target).square()).mean((1, 2, 3)), x, output

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Convert the net's output for x at times t to images x0, (b c y x)."""
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
        # at least fp32: the three digits of bf16 are too few for a sum of squares
        return net(x, t_input, y).to(torch.promote_types(x.dtype, torch.float32))
