"""Figures of a diffusion model: the reverse process, x0 estimates and interpolations.

Each function takes `denoise(x, t)`, which estimates images (b c y x) from noisy ones at a time t,
and returns a matplotlib figure.

Axes: b batch, c y x images, s noise steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ravine.datamodules.images import to_uint8

from ..diffusion_core.counter_rng import derive_key, normals
from ..diffusion_core.noise_schedules import NoiseSchedule, Timesteps
from ..diffusion_core.samplers import ddim
from ..diffusion_core.sampling import SamplerConfig

if TYPE_CHECKING:  # importing matplotlib takes half a second, and few runs plot
    from matplotlib.figure import Figure

DenoiseFn = Callable[[Tensor, float], Tensor]
NUM_POINTS = 11  # columns of a figure


def _plot_image_sheet(
    rows: Sequence[Tensor],
    titles: Sequence[str],
    row_names: Sequence[str],
    title: str,
    x_label: str = "",
) -> "Figure":
    """Plot rows of images, each (s c y x), with column titles, row names and a title.

    Axes: r rows, s images of a row, c channels, y x pixels. Values are in [-1, 1], and 1 is white.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    images = torch.stack(list(rows))  # (r s c y x)
    height, width = images.shape[-2:]
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)  # white between images
    sheet = rearrange(to_uint8(images).cpu(), "r s c y x -> (r y) (s x) c")
    sheet = sheet.squeeze(-1)  # matplotlib wants no axis of channels for grayscale images
    figure = Figure(figsize=(len(titles), len(rows) + 0.7), layout="constrained", dpi=120)
    axis: Any = figure.subplots()  # one axis for all images: one for each takes minutes to lay out
    axis.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    # in pixels, the middle of each image with its border of one pixel; a pixel's center is at 0
    tick_positions = [(i + 0.5) * (width + 2) - 0.5 for i in range(len(titles))]
    axis.set_xticks(tick_positions, titles, fontsize=11)
    axis.set_yticks(
        [(i + 0.5) * (height + 2) - 0.5 for i in range(len(row_names))], row_names, fontsize=11
    )
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=14)
    axis.set_xlabel(x_label, fontsize=11)
    return figure


def no_noise(step: int) -> Tensor:
    """Raise RuntimeError: the noise function of a sampler that needs no noise."""
    raise RuntimeError(f"no noise was expected at step {step}")


@torch.no_grad()
def plot_reverse_process(denoise: DenoiseFn, timesteps: Timesteps, x: Tensor) -> "Figure":
    """Plot the samples x(t) from noise x (b c y x) to images, above the x0 estimates.

    `denoise(x, t)` estimates x0 from x at time t. NUM_POINTS of the sampler's steps are shown.
    """
    recorded: list[tuple[float, Tensor, Tensor]] = []  # t, x(t), x0 estimate of each step

    def record_denoise(x: Tensor, t: float) -> Tensor:
        x0 = denoise(x, t)
        recorded.append((t, x, x0))
        return x0

    # the deterministic sampler, which adds no fresh noise
    last = ddim(record_denoise, x, timesteps, no_noise)
    recorded.append((0.0, last, last))
    selected = [
        recorded[round(i)] for i in torch.linspace(0, len(recorded) - 1, NUM_POINTS).tolist()
    ]
    rows, names = [], []
    for b in range(len(x)):
        rows += [torch.stack([noisy[b] for _, noisy, _ in selected])]  # (s c y x)
        rows += [torch.stack([estimate[b] for _, _, estimate in selected])]
        names += ["x(t)", "estimate"]
    title = "reverse process: x(t) from noise to image, and the estimate of x0 at each step"
    return _plot_image_sheet(rows, [f"t = {t:.0f}" for t, _, _ in selected], names, title)


@torch.no_grad()
def plot_x0_estimates(
    denoise: DenoiseFn, noise_schedule: NoiseSchedule, x0: Tensor, eps: Tensor
) -> "Figure":
    """Plot images x0 (b c y x) with increasing noise eps, and the x0 estimates.

    `denoise(x, t)` estimates x0 from x at time t. The noisy image at time t is α x0 + σ eps.
    """
    t = torch.linspace(0, 1000, NUM_POINTS)[1:]
    alpha, sigma = noise_schedule.alpha_sigma(t)
    noisy = [a * x0 + s * eps for a, s in zip(alpha.tolist(), sigma.tolist(), strict=True)]
    estimates = [denoise(x, time) for x, time in zip(noisy, t.tolist(), strict=True)]
    rows, names = [], []
    for b in range(len(x0)):
        rows += [torch.stack([x0[b], *(x[b] for x in row)]) for row in (noisy, estimates)]
        names += ["x(t)", "estimate"]
    titles = ["image", *(f"t = {time:.0f}" for time in t)]
    title = "estimates of x0 in one step: x(t) is the image with increasing noise"
    return _plot_image_sheet(rows, titles, names, title)


@torch.no_grad()
def plot_interpolation(
    denoise: DenoiseFn,
    timesteps: Timesteps,
    first_noise: Tensor,
    second_noise: Tensor,
    row_names: Sequence[str] = (),
) -> "Figure":
    """Plot images of the noises between two noises (b c y x), along the great circle.

    By default the rows are named "pair 1", "pair 2", ... A great circle keeps the noises normal:
    cos² + sin² is 1. Images are sampled by DDIM, which adds no fresh noise.
    """
    angles = torch.linspace(0, math.pi / 2, NUM_POINTS)
    rows = []
    for angle in angles.tolist():
        x = math.cos(angle) * first_noise + math.sin(angle) * second_noise
        rows.append(ddim(denoise, x * timesteps.sigma[0].item(), timesteps, no_noise))
    sheet = rearrange(torch.stack(rows), "s b c y x -> b s c y x")
    return _plot_image_sheet(
        list(sheet),
        [f"{angle / angles[-1]:.1f}" for angle in angles],
        row_names or [f"pair {number + 1}" for number in range(len(first_noise))],
        "interpolation: images sampled from noises between two noises",
        "position between the first noise (0.0) and the second noise (1.0)",
    )


def _class_label(name: str) -> str:
    return f"class {name}" if name.isdecimal() else name


def plot_all(
    denoise: Callable[..., Tensor],
    noise_schedule: NoiseSchedule,
    sampler_config: SamplerConfig,
    x0: Tensor,
    num_classes: int,
    class_names: Sequence[str] = (),
) -> dict[str, "Figure"]:
    """Create all three figures, by name: reverse, estimates and interpolation.

    Args:
        denoise: estimates x0 from x (b c y x), t (b), y (b) and the guidance scale.
        noise_schedule: noise schedule of the model.
        sampler_config: number of steps and guidance scale.
        x0: images (b c y x) to which the second figure adds noise, at most three.
        num_classes: number of classes; 0 for a model without labels.
        class_names: names of the classes, for the rows of the third figure.
    """
    image_ids = torch.arange(3, device=x0.device)  # images sampled in a figure
    y = image_ids % num_classes if num_classes else None
    row_names: list[str] = []
    if class_names and y is not None:
        row_names = [_class_label(class_names[int(number)]) for number in y.tolist()]

    # of the samples: with labels y and guidance; x0 estimates lie in [-1, 1]
    def denoise_conditional(x: Tensor, t: float) -> Tensor:
        return denoise(x, x.new_full((len(x),), t), y, sampler_config.guidance_scale).clamp(-1, 1)

    # of the images x0, which come without labels
    def denoise_unconditional(x: Tensor, t: float) -> Tensor:
        return denoise(x, x.new_full((len(x),), t)).clamp(-1, 1)

    timesteps = noise_schedule.timesteps(sampler_config.num_steps)
    # standard normal noise, the same in each call: the keys are constant
    first_noise, second_noise = (
        normals(derive_key(name), image_ids, tuple(x0.shape[1:])) for name in ("one", "other")
    )
    return {
        "reverse": plot_reverse_process(
            denoise_conditional, timesteps, first_noise * timesteps.sigma[0].item()
        ),
        "estimates": plot_x0_estimates(
            denoise_unconditional, noise_schedule, x0, first_noise[: len(x0)]
        ),
        "interpolation": plot_interpolation(
            denoise_conditional,
            timesteps,
            first_noise,
            second_noise,
            row_names,
        ),
    }
