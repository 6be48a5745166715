"""Sampling: how images are asked for, and made each by its number, in batches of one size.

Image number i starts from the noise of (seed, i) and nothing else, so the same images come out of
any batch size and any number of ranks.

Axes: n images, b batch, c y x images.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ravine.datamodules.image_set import class_numbers
from ravine.errors import UsageError

from .captured_denoiser import Denoise, Estimator, Record, plainly
from .counter_rng import key, normals
from .noise_schedules import Schedule
from .samplers import SAMPLERS, Name, Sampler, ddim


@dataclass(frozen=True)
class Way:
    """How images are made: by which sampler, in how many steps, how strongly guided."""

    sampler: Name = "ddim"
    steps: int = 50
    guidance: float = 0.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        names = ", ".join(SAMPLERS)
        rules = {
            "sampler": (self.sampler in SAMPLERS, names, "ddim"),
            "steps": (self.steps >= 1, "1 or more", 50),
            "guidance": (0 <= self.guidance < math.inf, "0 (none) or more", 0.5),
            "eta": (0 <= self.eta <= 1, "0 (no fresh noise) to 1", 0),
        }
        for name, (fine, allowed, typical) in rules.items():
            if not fine:
                raise UsageError(
                    f"{name} is {getattr(self, name)}; allowed: {allowed}; type --{name}={typical}"
                )
        if self.eta and self.sampler != "ddim":
            raise UsageError(
                f"eta is {self.eta} and the sampler {self.sampler}, which takes none; "
                "allowed with it: 0; type --sampler=ddim"
            )

    def of(self, withheld: bool, one_step: bool, **given: Any) -> "Way":
        """As given (None is not), and as a model can go it: guided, if labels were withheld.

        One that knows pure noise only goes in one step.
        """
        way = replace(self, **{name: value for name, value in given.items() if value is not None})
        if one_step and given.get("steps") not in (None, 1):
            raise UsageError(
                f"steps is {way.steps}, and this model knows pure noise only, conditioning "
                "one_step; allowed: 1; type --steps=1"
            )
        if way.guidance and not withheld:
            raise UsageError(
                f"guidance is {way.guidance}, and the model was trained without labels that are "
                "sometimes withheld; allowed: 0; type --guidance=0, or train with "
                "--model.labels=true --model.label_dropout=0.1"
            )
        return replace(way, steps=1) if one_step else way

    def function(self) -> Sampler:
        """The sampler."""
        return partial(ddim, eta=self.eta) if self.sampler == "ddim" else SAMPLERS[self.sampler]


def pick(labels: Iterable[int | str] | str | None, names: Sequence[str]) -> list[int]:
    """The class numbers of "3", "0-4,7", "cat,dog" or [3, "5"]; None stands for all."""
    if labels is None:
        return list(range(len(names)))
    if not names:
        raise UsageError(
            f"labels are {labels}, and this model was trained without any; leave --labels away"
        )
    return class_numbers(labels, names, "--labels")


@torch.no_grad()
def sample(
    denoise: Denoise,
    schedule: Schedule,
    way: Way,
    numbers: Tensor,
    labels: Tensor | None,
    shape: tuple[int, int, int],
    seed: int,
    batch_size: int = 256,
    record: Record = plainly,
) -> Tensor:
    """The images of these numbers (n), of these labels (n), as the sampler left them, (n c y x).

    Args:
        denoise: (x (b c y x), t (b), y (b) or None) to x0 (b c y x).
        schedule: of the noise.
        way: to go.
        numbers: of the images, one at least; they alone decide the noise.
        labels: what they shall show, if the net knows labels.
        shape: c y x.
        seed: of all.
        batch_size: images made at once, at most.
        record: what makes an estimator that repeats `denoise`: plainly, or as `Recordings` do.
    """
    total, path, sampler = len(numbers), schedule.path(way.steps), way.function()
    parts = -(-total // batch_size)
    each = -(-total // parts)  # all of one size, so that one recording serves them
    places = torch.arange(parts * each, device=numbers.device).clamp(max=total - 1)
    made: list[Tensor] = []
    estimator: Estimator | None = None
    for place in places.split(each):
        number, label = numbers[place], None if labels is None else labels[place]
        x = normals(key(seed, "start"), number, shape) * path.sigma[0].item()
        if estimator is None:
            estimator = record(denoise, x, label, way)
        estimator.label(label)

        def fresh(step: int, number: Tensor = number) -> Tensor:
            return normals(key(seed, "step", step), number, shape)

        made.append(sampler(estimator, x, path, fresh))
    return torch.cat(made)[:total]
