"""Image sampling: generate images by their ids, in batches of equal size.

The noise of image i depends on (seed, i) only. So the images are the same for any batch size and
any number of ranks.

Axes: n images, b batch, c y x images.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ravine.datamodules.image_set import parse_class_indices
from ravine.errors import UsageError

from .captured_denoiser import CapturedDenoiser, ConditionalDenoiseFn, DenoiserFactory, no_capture
from .counter_rng import derive_key, normals
from .noise_schedules import NoiseSchedule
from .samplers import SAMPLERS, SamplerFn, SamplerName, ddim


@dataclass(frozen=True)
class SamplerConfig:
    """Sampler settings: sampler, number of steps, guidance scale and eta."""

    sampler: SamplerName = "ddim"
    num_steps: int = 50
    guidance_scale: float = 0.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        """Raise UsageError for a value out of range, and for eta with a sampler that ignores it.

        A message has the problem, the allowed values, and a fix as Python and as a flag.
        """
        # by field: whether the value is valid, the allowed values, a typical value
        rules = {
            "sampler": (self.sampler in SAMPLERS, SAMPLERS, "ddim"),
            "num_steps": (self.num_steps >= 1, ["1 or more"], 50),
            "guidance_scale": (0 <= self.guidance_scale < math.inf, ["0 (none) or more"], 0.5),
            "eta": (0 <= self.eta <= 1, ["0 (no fresh noise) to 1"], 0),
        }
        for name, (is_valid, allowed, typical) in rules.items():
            if not is_valid:
                reason = "does not exist" if name == "sampler" else "is out of range"
                raise UsageError(
                    f"SamplerConfig: {name}={getattr(self, name)!r} {reason}",
                    allowed,
                    f"use {name}={typical!r}",
                    flag=f"--{name}={typical}, or --model.{name}={typical}",
                )
        if self.eta and self.sampler != "ddim":
            raise UsageError(
                f"SamplerConfig: eta={self.eta} has no effect with sampler={self.sampler!r}",
                ["eta=0", "sampler='ddim'"],
                "use sampler='ddim'",
                flag="--sampler=ddim, or --model.sampler=ddim",
            )

    def override(
        self, supports_guidance: bool, is_one_step: bool, **overrides: Any
    ) -> "SamplerConfig":
        """Return a copy with new settings, checked against the model.

        Args:
            supports_guidance: whether the model was trained with class dropout, which guidance
                needs.
            is_one_step: whether the model samples in one step only.
            overrides: new values of fields; None keeps the value of this config.
        """
        config = replace(
            self, **{name: value for name, value in overrides.items() if value is not None}
        )
        if is_one_step and overrides.get("num_steps") not in (None, 1):
            raise UsageError(
                f"generate: num_steps={config.num_steps} cannot be used, because "
                "time_conditioning='one_step' trains on pure noise only",
                ["1"],
                "use num_steps=1",
                flag="--num_steps=1",
            )
        if config.guidance_scale and not supports_guidance:
            raise UsageError(
                f"SamplerConfig: guidance_scale={config.guidance_scale} cannot be used, because "
                "the model is trained without class dropout",
                ["0"],
                "use guidance_scale=0, or train with class_conditional=True and "
                "class_dropout_prob=0.1",
                flag=(
                    "--guidance_scale=0, or --model.class_conditional=true "
                    "--model.class_dropout_prob=0.1"
                ),
            )
        return replace(config, num_steps=1) if is_one_step else config

    def build_sampler(self) -> SamplerFn:
        """Return the sampler function."""
        return partial(ddim, eta=self.eta) if self.sampler == "ddim" else SAMPLERS[self.sampler]


def parse_labels(labels: Iterable[int | str] | str | None, class_names: Sequence[str]) -> list[int]:
    """Parse class ids from "3", "0-4,7", "cat,dog" or [3, "5"]; None selects all classes."""
    if labels is None:
        return list(range(len(class_names)))
    if not class_names:
        raise UsageError(
            f"generate: labels={labels!r} cannot be used, because the model was trained without "
            "labels",
            hint="remove labels",
        )
    return parse_class_indices(labels, class_names, flag="--labels")


@torch.no_grad()
def sample_images(
    denoise: ConditionalDenoiseFn,
    noise_schedule: NoiseSchedule,
    config: SamplerConfig,
    image_ids: Tensor,
    labels: Tensor | None,
    image_shape: tuple[int, int, int],
    seed: int,
    batch_size: int = 256,
    make_denoiser: DenoiserFactory = no_capture,
) -> Tensor:
    """Sample the images with these ids (n) and labels (n): (n c y x), before conversion to bytes.

    Args:
        denoise: maps x (b c y x), t (b), y (b) or None to x0 (b c y x).
        noise_schedule: noise schedule of the model.
        config: sampler settings.
        image_ids: ids of the images, at least one; with the seed they determine the noise.
        labels: classes of the images, if the model is class-conditional.
        image_shape: c y x.
        seed: random seed.
        batch_size: maximum number of images in a batch.
        make_denoiser: factory of the captured denoiser: `no_capture`, or of `GraphCache.bind`.
    """
    total = len(image_ids)
    timesteps, sampler = noise_schedule.timesteps(config.num_steps), config.build_sampler()
    # batches of equal size, so that one CUDA graph serves all; the last image fills the last batch
    num_batches = math.ceil(total / batch_size)
    images_per_batch = math.ceil(total / num_batches)
    indices = torch.arange(num_batches * images_per_batch, device=image_ids.device)
    padded_indices = indices.clamp(max=total - 1)
    batches: list[Tensor] = []
    denoiser: CapturedDenoiser | None = None
    for batch_indices in padded_indices.split(images_per_batch):
        batch_ids = image_ids[batch_indices]
        batch_labels = None if labels is None else labels[batch_indices]
        # normals: standard normal numbers (b c y x), each row determined by the key and its id.
        # sigma[0] is the noise level at which sampling starts
        x = normals(derive_key(seed, "start"), batch_ids, image_shape) * timesteps.sigma[0].item()
        if denoiser is None:  # `config` is its name: equal settings can use one graph
            denoiser = make_denoiser(denoise, x, batch_labels, config)
        denoiser.set_labels(batch_labels)

        # a default argument has the ids of this batch; a variable would change with the loop
        def step_noise(step: int, batch_ids: Tensor = batch_ids) -> Tensor:
            return normals(derive_key(seed, "step", step), batch_ids, image_shape)

        batches.append(sampler(denoiser, x, timesteps, step_noise))
    return torch.cat(batches)[:total]
