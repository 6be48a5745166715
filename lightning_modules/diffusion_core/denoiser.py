"""Denoising: a net's answers as images, and how wrong they are: the formulas between net and task.

    x(t) = α x0 + σ ε,    the net is given x / √(α² + σ²), so that it sees a variance near 1,
    loss = weight(t) mean (net(x(t), t, y) - right answer)²

The lecture's three attempts differ in what the net is told: `one_step` sees pure noise only and
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

from .noise_schedules import Schedule, T
from .parameterization import Prediction, Weight, from_x0, to_x0, weight

Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x (b c y x), t (b), y (b) to (b c y x)
Conditioning = Literal["one_step", "none", "time"]


@dataclass(frozen=True)
class Denoising:
    """What is asked of a net, at which levels, and with what weight.

    Denoising(Schedule("cosine"), prediction="v").denoise(net, x, t)
    """

    schedule: Schedule
    prediction: Prediction = "x0"
    weight: Weight = "uniform"
    conditioning: Conditioning = "time"
    channels_last: bool = False

    def __post_init__(self) -> None:
        """Refuse to divide by zero."""
        if self.prediction == "eps" and self.schedule.kind == "flow":
            raise UsageError(
                "prediction is eps and process flow, which begins at pure noise, where ε says "
                "nothing of the image; allowed: x0, v, velocity; type --model.prediction=velocity"
            )

    def times(self, u: Tensor) -> Tensor:
        """Times to train at (b), by numbers u (b) uniform in (0, 1)."""
        return torch.full_like(u, T) if self.conditioning == "one_step" else self.schedule.draw(u)

    def denoise(
        self, net: Net, x: Tensor, t: Tensor, y: Tensor | None = None, guidance: float = 0.0,
        unlabelled: int = 0,
    ) -> Tensor:  # fmt: skip
        """The images x0 that x (b c y x) at times t (b), with labels y (b), are taken to be.

        With guidance w the answer is cond + w (cond - uncond), where uncond is the one to the label
        `unlabelled` (Ho & Salimans 2022); both come from one call of the net.
        """
        if not guidance:
            return self.meant(self._answer(net, x, t, y), x, t)
        none = torch.full_like(t, unlabelled, dtype=torch.int64)
        labels = torch.cat((none if y is None else y, none))
        told, free = self._answer(net, torch.cat((x, x)), torch.cat((t, t)), labels).chunk(2)
        return self.meant(told + guidance * (told - free), x, t)

    def errors(
        self, net: Net, x0: Tensor, t: Tensor, y: Tensor | None, eps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each image (b), and the noisy images and the answers that it is of."""
        alpha, sigma = self._levels(t)
        d = self.schedule.spread
        x = alpha * x0 + sigma * eps
        right = from_x0(self.prediction, x0 / d, eps, d * alpha, sigma)
        scale = weight(self.weight, self.prediction, d * alpha, sigma)
        answer = self._answer(net, x, t, y)
        return (scale * (answer - right).square()).mean((1, 2, 3)), x, answer

    def meant(self, answer: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The images that the net's answers to x at times t mean, (b c y x)."""
        alpha, sigma = self._levels(t)
        d = self.schedule.spread
        return d * to_x0(self.prediction, answer, x, d * alpha, sigma)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.levels(t)
        return rearrange(alpha, "b -> b 1 1 1"), rearrange(sigma, "b -> b 1 1 1")

    def _answer(self, net: Net, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        alpha, sigma = self._levels(t)
        x = x / ((self.schedule.spread * alpha) ** 2 + sigma**2).sqrt()
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        told = t if self.conditioning == "time" else torch.zeros_like(t)
        # not in the net's own type: bf16 keeps three digits, too few to sum squares in
        return net(x, told, y).to(torch.promote_types(x.dtype, torch.float32))
