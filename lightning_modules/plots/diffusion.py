"""What a diffusion model does, drawn: the way back, its guesses on the way, and what lies between.

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

from ..diffusion_core.counter_rng import key, normals
from ..diffusion_core.noise_schedules import Path, Schedule
from ..diffusion_core.samplers import ddim
from ..diffusion_core.sampling import Way

if TYPE_CHECKING:  # matplotlib takes half a second, and few runs draw
    from matplotlib.figure import Figure

Denoise = Callable[[Tensor, float], Tensor]
SHOWN = 11  # places along a way


def _sheet(rows: Sequence[Tensor], titles: Sequence[str], names: Sequence[str]) -> "Figure":
    """Rows of images, each (s c y x), under titles s, beside names."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    images = torch.stack(list(rows))  # (r s c y x)
    height, width = images.shape[-2:]
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)  # white between them
    sheet = rearrange(to_uint8(images).cpu(), "r s c y x -> (r y) (s x) c").squeeze(-1)
    figure = Figure(figsize=(len(titles), len(rows) + 0.4), layout="constrained", dpi=120)
    axis: Any = figure.subplots()  # one for all: one each takes minutes to lay out
    axis.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    places = [(i + 0.5) * (width + 2) - 0.5 for i in range(len(titles))]
    axis.set_xticks(places, titles, fontsize=8)
    axis.set_yticks([(i + 0.5) * (height + 2) - 0.5 for i in range(len(names))], names, fontsize=8)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    return figure


def unused(step: int) -> Tensor:
    """Noise of a sampler that needs none."""
    raise RuntimeError(f"no noise was expected at step {step}")


@torch.no_grad()
def reverse(denoise: Denoise, path: Path, x: Tensor) -> "Figure":
    """The way from noise x (b c y x) to images, above what is taken for the image at each place."""
    seen: list[tuple[float, Tensor, Tensor]] = []

    def watched(x: Tensor, t: float) -> Tensor:
        x0 = denoise(x, t)
        seen.append((t, x, x0))
        return x0

    last = ddim(watched, x, path, unused)
    seen.append((0.0, last, last))
    shown = [seen[round(i)] for i in torch.linspace(0, len(seen) - 1, SHOWN).tolist()]
    rows, names = [], []
    for b in range(len(x)):
        rows += [torch.stack([way[b] for _, way, _ in shown])]  # (s c y x)
        rows += [torch.stack([guess[b] for _, _, guess in shown])]
        names += ["x(t)", "estimate"]
    return _sheet(rows, [f"t = {t:.0f}" for t, _, _ in shown], names)


@torch.no_grad()
def estimates(denoise: Denoise, schedule: Schedule, x0: Tensor, eps: Tensor) -> "Figure":
    """Images x0 (b c y x) under more and more of the noise eps, and what is made of them."""
    t = torch.linspace(0, 1000, SHOWN)[1:]
    alpha, sigma = schedule.levels(t)
    noisy = [a * x0 + s * eps for a, s in zip(alpha.tolist(), sigma.tolist(), strict=True)]
    guesses = [denoise(x, time) for x, time in zip(noisy, t.tolist(), strict=True)]
    rows, names = [], []
    for b in range(len(x0)):
        rows += [torch.stack([x0[b], *(x[b] for x in row)]) for row in (noisy, guesses)]
        names += ["x(t)", "estimate"]
    return _sheet(rows, ["image", *(f"t = {time:.0f}" for time in t)], names)


@torch.no_grad()
def interpolation(denoise: Denoise, path: Path, one: Tensor, other: Tensor) -> "Figure":
    """Images of noises between two, one and other (b c y x), along the great circle."""
    angles = torch.linspace(0, math.pi / 2, SHOWN)
    rows = []
    for angle in angles.tolist():
        x = math.cos(angle) * one + math.sin(angle) * other
        rows.append(ddim(denoise, x * path.sigma[0].item(), path, unused))
    sheet = rearrange(torch.stack(rows), "s b c y x -> b s c y x")
    return _sheet(list(sheet), [f"{angle / angles[-1]:.1f}" for angle in angles], [""] * len(one))


def everything(
    denoise: Callable[..., Tensor], schedule: Schedule, way: Way, x0: Tensor, classes: int
) -> dict[str, "Figure"]:
    """All three, with images x0 (b c y x); `denoise` takes x, t (b), y (b) and guidance."""
    three = torch.arange(3, device=x0.device)
    y = three % classes if classes else None

    def labelled(x: Tensor, t: float) -> Tensor:
        return denoise(x, x.new_full((len(x),), t), y, way.guidance).clamp(-1, 1)

    def unlabelled(x: Tensor, t: float) -> Tensor:
        return denoise(x, x.new_full((len(x),), t)).clamp(-1, 1)

    path = schedule.path(way.steps)
    one, other = (normals(key(name), three, tuple(x0.shape[1:])) for name in ("one", "other"))
    return {
        "reverse": reverse(labelled, path, one * path.sigma[0].item()),
        "estimates": estimates(unlabelled, schedule, x0, one[: len(x0)]),
        "interpolation": interpolation(labelled, path, one, other),
    }
