"""Denoising: an exact prediction has zero loss for every prediction type."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ravine.lightning_modules.diffusion_core.counter_rng import derive_key, normals
from ravine.lightning_modules.diffusion_core.denoiser import Denoiser
from ravine.lightning_modules.diffusion_core.noise_schedules import NoiseSchedule, compute_alpha_bar
from ravine.lightning_modules.diffusion_core.samplers import SAMPLERS
from ravine.lightning_modules.diffusion_core.sampling import SamplerConfig, sample_images

KINDS: Any = ("linear", "cosine", "flow", "edm")
PREDICTIONS = ("x0", "eps", "v", "velocity")
ASKED = [(p, k) for p in KINDS for k in PREDICTIONS if (p, k) != ("flow", "eps")]
TIMES = torch.linspace(100, 900, 9, dtype=torch.float64)


def right_answers(
    process: Any, prediction: Any, x0: Tensor, eps: Tensor
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Written out from the papers: the data's spread is 1/2 for EDM and 1 for all others."""
    d = 0.5 if process == "edm" else 1.0

    def net(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        a, s = (level[:, None, None, None] for level in NoiseSchedule(process).alpha_sigma(t))
        r = ((d * a) ** 2 + s**2).sqrt()
        torch.testing.assert_close(x, (a * x0 + s * eps) / r)
        v = (d * a * eps - s * x0 / d) / r
        return {"x0": x0 / d, "eps": eps, "v": v, "velocity": eps - x0 / d}[prediction]

    return net


@pytest.mark.parametrize(("process", "prediction"), ASKED)
def test_the_exact_prediction_has_zero_loss_and_gives_the_image(
    process: Any, prediction: Any
) -> None:
    denoising = Denoiser(NoiseSchedule(process), prediction, "edm")
    x0, eps = torch.randn(2, 9, 1, 4, 4, dtype=torch.float64)
    net = right_answers(process, prediction, x0, eps)
    error, x, _ = denoising.training_loss(net, x0, TIMES, None, eps)
    assert error.dtype == torch.float64
    assert error.max() < 1e-10
    assert (denoising.denoise(net, x, TIMES) - x0).abs().max() < 1e-10
    assert denoising.training_loss(lambda *a: net(*a) + 1, x0, TIMES, None, eps)[0].min() > 1e-6


def test_the_first_attempt_is_trained_at_pure_noise_alone() -> None:
    u = torch.linspace(0.001, 0.999, 7)
    assert Denoiser(NoiseSchedule("linear"), time_conditioning="one_step").sample_t(
        u
    ).unique().tolist() == [1000]
    assert len(Denoiser(NoiseSchedule("linear")).sample_t(u).unique()) == 7


@pytest.mark.parametrize("u", [0.0, 1e-9, 1.0])
def test_a_time_at_the_ends_of_its_range_has_a_finite_loss(u: float) -> None:
    for process in KINDS[:2] + KINDS[3:]:
        denoising = Denoiser(NoiseSchedule(process), "v", "edm")
        t = denoising.sample_t(torch.full((4,), u))
        assert t.min() > 0
        x0, eps = torch.randn(2, 4, 1, 4, 4)
        assert denoising.training_loss(lambda x, t, y: x, x0, t, None, eps)[0].isfinite().all()


def test_integer_times_have_the_noise_levels_of_the_table() -> None:
    for process in KINDS:
        t = torch.tensor([0, 500, 1000])  # as the docstring has it
        actual, floats = (
            NoiseSchedule(process).alpha_sigma(t),
            NoiseSchedule(process).alpha_sigma(t.float()),
        )
        assert all(torch.equal(one, other) for one, other in zip(actual, floats, strict=True))
    alpha, _ = NoiseSchedule("linear").alpha_sigma(t)
    torch.testing.assert_close(alpha, compute_alpha_bar("linear")[t].sqrt().float())


@pytest.mark.parametrize("process", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_images_are_the_samplers_of_their_own_noise(name: Any, process: Any) -> None:
    def denoise(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return (x * 0.3 + t[:, None, None, None] / 5000).tanh()

    schedule, numbers, shape = NoiseSchedule(process), torch.tensor([4, 0, 9]), (1, 4, 4)
    path = schedule.timesteps(6)
    made = SAMPLERS[name](
        lambda x, t: denoise(x, x.new_full((3,), t), None),
        normals(derive_key(5, "start"), numbers, shape) * path.sigma[0].item(),
        path,
        lambda step: normals(derive_key(5, "step", step), numbers, shape),
    )
    torch.testing.assert_close(
        sample_images(denoise, schedule, SamplerConfig(name, 6), numbers, None, shape, 5), made
    )
