"""Samplers and schedules against closed forms: Gaussian data, where x0 is known at any x.

For x0 ~ N(m, S):   E[x0 | x(t)] = m + α S (α² S + σ²)⁻¹ (x - α m),   and along dx = x0 dα + ε dσ
x(t) - α m is stretched in each eigendirection of S by √(α² λ + σ²).
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ravine.errors import UsageError
from ravine.lightning_modules.diffusion_core.captured_denoiser import GraphCache
from ravine.lightning_modules.diffusion_core.counter_rng import derive_key, normals, uniforms
from ravine.lightning_modules.diffusion_core.denoiser import Denoiser
from ravine.lightning_modules.diffusion_core.noise_schedules import (
    NoiseSchedule,
    Timesteps,
    compute_alpha_bar,
)
from ravine.lightning_modules.diffusion_core.parameterization import (
    compute_loss_weight,
    compute_target,
    predict_x0,
    x0_error_gain,
)
from ravine.lightning_modules.diffusion_core.samplers import SAMPLERS, ddim
from ravine.lightning_modules.diffusion_core.sampling import SamplerConfig, sample_images

# A new sampler is one row: its order (0 where it draws noise), and how near it comes to the mean
# and covariance of the data in 250 steps.
METHODS = {
    "ddim": (1, 0.02),
    "euler": (1, 0.02),
    "heun": (2, 0.002),
    "dpmpp_2m": (2, 0.002),
    "ddpm": (0, 0.05),
}
D = 8
KINDS = ("linear", "cosine", "flow", "edm")
DOUBLE = {"dtype": torch.float64}
MEAN = torch.linspace(-1, 2, D, **DOUBLE)
EIGEN = torch.logspace(-1.3, 0.5, D, **DOUBLE)
AXES = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), **DOUBLE))[0]
COVARIANCE = AXES * EIGEN @ AXES.T


def levels(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule.alpha_sigma(torch.tensor([t], **DOUBLE))
    return alpha.item(), sigma.item()


def denoiser(schedule: NoiseSchedule) -> Callable[[Tensor, float], Tensor]:
    def denoise(x: Tensor, t: float) -> Tensor:
        a, s = levels(schedule, t)
        return MEAN + (x - a * MEAN) @ (AXES * (a * EIGEN / (a**2 * EIGEN + s**2)) @ AXES.T)

    return denoise


def solution(schedule: NoiseSchedule, x: Tensor, t: float, to: float) -> Tensor:
    (a, s), (a2, s2) = levels(schedule, t), levels(schedule, to)
    stretch = ((a2**2 * EIGEN + s2**2) / (a**2 * EIGEN + s**2)).sqrt()
    return a2 * MEAN + (x - a * MEAN) @ (AXES * stretch @ AXES.T)


def no_noise(step: int) -> Tensor:
    raise AssertionError("this sampler draws nothing")


@pytest.mark.parametrize("name", [name for name, (order, _) in METHODS.items() if order])
@pytest.mark.parametrize("kind", KINDS)
def test_errors_fall_with_the_order_of_the_method(kind: str, name: str) -> None:
    """Between two levels where log(α/σ) is finite, over five step counts."""
    order = METHODS[name][0]
    schedule = NoiseSchedule(kind)
    first, last = (1000.0, 250.0) if kind == "edm" else (900.0, 50.0)
    counts = (25, 34, 50, 85, 170)  # divide 850: whole times for linear and cosine
    counts = counts if schedule.is_discrete else (40, 80, 160, 320, 640)
    x = torch.randn(64, D, **DOUBLE) * levels(schedule, first)[1]
    errors = []
    for count in counts:
        t = torch.linspace(first, last, count + 1, **DOUBLE)
        made = SAMPLERS[name](
            denoiser(schedule), x, Timesteps(t, *schedule.alpha_sigma(t)), no_noise
        )
        errors.append((made - solution(schedule, x, first, last)).square().mean().sqrt())
    steps, errors = torch.tensor(counts, **DOUBLE).log(), torch.stack(errors).log()
    slope = ((steps - steps.mean()) * errors).sum() / (steps - steps.mean()).square().sum()
    assert abs(-slope - order) < 0.15


def test_every_sampler_has_a_row_here() -> None:
    assert set(METHODS) == set(SAMPLERS)


def moments(name: str, kind: str, count: int, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what a sampler makes, exactly: all it does is linear in the noise.

    A row of the batch is the answer to one unit of noise, the start's or a step's, or to none.
    """
    schedule = NoiseSchedule(kind)
    path, units = schedule.timesteps(count), torch.eye(D, **DOUBLE)
    blocks = torch.zeros(count + 1, D, count + 1, D, **DOUBLE)
    blocks[range(count + 1), :, range(count + 1), :] = units
    rows = torch.cat((blocks.reshape(-1, count + 1, D), torch.zeros(1, count + 1, D, **DOUBLE)))
    sampler = SAMPLERS[name] if name != "ddim" else lambda *a: ddim(*a, eta=eta)
    (a, s), noise = levels(schedule, 1000.0), lambda step: rows[:, step]
    scale = AXES * (a**2 * EIGEN + s**2).sqrt() @ AXES.T  # of the images left at t = 1000, too
    made = sampler(denoiser(schedule), a * MEAN + rows[:, -1] @ scale, path, noise)
    mean, answers = made[-1], made[:-1] - made[-1]
    return mean, answers.T @ answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "within"), [(name, row[1]) for name, row in METHODS.items()])
def test_samplers_reach_the_mean_and_the_covariance_of_the_data(
    name: str, within: float, kind: str
) -> None:
    """In 250 steps; what is wrong is of the step's size, by the method's order."""
    mean, covariance = moments(name, kind, 250)
    assert (mean - MEAN).norm() < within * MEAN.norm()
    assert (covariance - COVARIANCE).norm() < within * COVARIANCE.norm()
    identity = COVARIANCE.trace() / D * torch.eye(D, **DOUBLE)
    assert (identity - COVARIANCE).norm() > 0.5 * COVARIANCE.norm()  # it could be told from it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [10, 100])
def test_ddim_with_eta_1_is_ancestral_sampling(kind: str, count: int) -> None:
    """In distribution: all of the mean and of the covariance."""
    actual, expected = moments("ddim", kind, count, eta=1.0), moments("ddpm", kind, count)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    half = moments("ddim", kind, count, eta=0.5)[1]
    assert (half - actual[1]).norm() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_eta_is_the_share_of_ancestral_noise_in_standard_deviations(kind: str) -> None:
    schedule = NoiseSchedule(kind)
    path = Timesteps(t := torch.tensor([600.0, 300.0], **DOUBLE), *schedule.alpha_sigma(t))
    (a, s), (a2, s2) = levels(schedule, 600.0), levels(schedule, 300.0)
    beta = s2**2 * (1 - (a * s2 / (a2 * s)) ** 2)
    nothing, one = torch.zeros(1, **DOUBLE), torch.ones(1, **DOUBLE)
    for eta in (0.3, 0.5, 1.0):
        made = ddim(lambda x, t: nothing, nothing, path, lambda step: one, eta)
        assert made.item() == pytest.approx(eta * beta**0.5, rel=1e-9)
        old = ddim(lambda x, t: nothing, one * s, path, lambda step: nothing, eta)
        assert old.item() == pytest.approx((s2**2 - eta**2 * beta) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_method_of_euler_gives_the_points_of_ddim(kind: str) -> None:
    schedule = NoiseSchedule(kind)
    path = schedule.timesteps(20)
    x = torch.randn(5, D, **DOUBLE) * path.sigma[0]
    one, other = (SAMPLERS[n](denoiser(schedule), x, path, no_noise) for n in ("euler", "ddim"))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_sampler_of_the_lecture_is_ddim_with_eta_0() -> None:
    """Back out the noise, and add it again at the next level: 200, 50, 20, 10 of 1000 steps."""
    kept = compute_alpha_bar("linear")
    denoise = denoiser(NoiseSchedule("linear"))
    for count in (200, 50, 20, 10):
        x = start = torch.randn(3, D, **DOUBLE)
        for t in range(1000, 0, -1000 // count):
            x0 = denoise(x, t)
            noise = (x - kept[t].sqrt() * x0) / (1 - kept[t]).sqrt()
            to = t - 1000 // count
            x = kept[to].sqrt() * x0 + (1 - kept[to]).sqrt() * noise
        path = NoiseSchedule("linear").timesteps(count)
        made = SAMPLERS["ddim"](denoise, start * path.sigma[0], path, no_noise)
        torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)  # σ at 1000 is 0.99998


def test_alpha_bar_equals_that_of_the_lecture() -> None:
    """T = 1000, β from 1e-4 to 0.02: multiplied out one by one, and as published."""
    left, actual = 1.0, compute_alpha_bar("linear")
    for t in range(1, 1001):
        left *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
        assert abs(actual[t].item() - left) < 1e-12
    assert actual[0] == 1
    for t, published in ((1, 0.9999), (500, 0.0786), (1000, 4.0358e-5)):
        assert actual[t].item() == pytest.approx(published, rel=2e-3)
    alpha, _ = NoiseSchedule("linear").alpha_sigma(torch.arange(1001, dtype=torch.float32))
    assert (alpha.double().square() - actual).abs().max() < 1e-6
    beta = 1 - compute_alpha_bar("cosine")[1:] / compute_alpha_bar("cosine")[:-1]
    assert beta.max() <= 0.999 + 1e-12
    assert compute_alpha_bar("cosine")[500].item() == pytest.approx(0.4938, abs=1e-3)


PREDICTIONS = ("x0", "eps", "v", "velocity")


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("process", KINDS)
def test_every_prediction_type_gives_the_same_image(kind: str, process: str) -> None:
    t = torch.linspace(50, 950, 19, **DOUBLE)
    alpha, sigma = (level[:, None] for level in NoiseSchedule(process).alpha_sigma(t))
    x0, eps = torch.randn(2, 19, 30, **DOUBLE)
    x = alpha * x0 + sigma * eps
    answer = compute_target(kind, x0, eps, alpha, sigma)
    back = predict_x0(kind, answer, x, alpha, sigma)
    scale = (sigma / alpha.clamp(min=1e-3)).clamp(min=1)  # of a rounding error, through α and σ
    assert ((back - x0).abs() / scale).max() < 1e-12
    off = torch.randn_like(answer)
    moved = predict_x0(kind, answer + off, x, alpha, sigma) - back
    assert (
        (moved.abs() - x0_error_gain(kind, alpha, sigma) * off.abs()).abs() / scale
    ).max() < 1e-12
    if process in ("linear", "cosine"):  # v by its definition
        torch.testing.assert_close(
            compute_target("v", x0, eps, alpha, sigma),
            alpha * eps - sigma * x0,
            rtol=1e-12,
            atol=1e-12,
        )
    one, other = (
        compute_target("eps", x0, eps, alpha, sigma),
        compute_target("x0", x0, eps, alpha, sigma),
    )
    assert (compute_target("velocity", x0, eps, alpha, sigma) - (one - other)).abs().max() < 1e-12


def test_loss_weights_equal_those_of_their_papers() -> None:
    alpha, sigma = NoiseSchedule("cosine").alpha_sigma(torch.arange(100, 1000, 100, **DOUBLE))
    ratio = (alpha / sigma) ** 2
    capped = ratio.clamp(max=5)
    for kind, right in (("x0", capped), ("eps", capped / ratio), ("v", capped / (ratio + 1))):
        torch.testing.assert_close(compute_loss_weight("min_snr", kind, alpha, sigma), right)
    d, (one, sigma) = 0.5, NoiseSchedule("edm").alpha_sigma(torch.arange(300, 900, 100, **DOUBLE))
    # λ(σ) c_out² = 1: EDM's net has an even loss when it predicts v of data scaled by their spread
    torch.testing.assert_close(compute_loss_weight("edm", "v", d * one, sigma), one)
    x, answer = torch.randn(2, 6, **DOUBLE)
    edm = d**2 / (sigma**2 + d**2) * x + sigma * d / (sigma**2 + d**2).sqrt() * -answer
    torch.testing.assert_close(d * predict_x0("v", answer, x, d * one, sigma), edm)


def test_the_noise_levels_of_edm_equal_those_of_its_paper() -> None:
    n = 18
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    sigma = [(ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** 7 for i in range(n)]
    torch.testing.assert_close(
        NoiseSchedule("edm").timesteps(n).sigma,
        torch.tensor([*sigma, 0.0], **DOUBLE),
        rtol=1e-9,
        atol=0,
    )
    t = NoiseSchedule("edm").sample_t(torch.linspace(0.0005, 0.9995, 1000))
    log_sigma = NoiseSchedule("edm").alpha_sigma(t)[1].log()
    assert abs(log_sigma.mean() + 1.2) < 0.02
    assert abs(log_sigma.std() - 1.2) < 0.02


def test_training_times_of_a_sequence_are_1_to_1000() -> None:
    times = NoiseSchedule("linear").sample_t((torch.arange(10_000) + 0.5) / 10_000)
    assert times.unique().tolist() == list(range(1, 1001))
    assert NoiseSchedule("linear").sample_t(torch.tensor([1.0])).item() == 1000


def test_draws_depend_on_key_and_number_alone() -> None:
    numbers = torch.tensor([5, 0, 99])
    whole = normals(derive_key(0, "noise"), torch.arange(100), (3, 5, 7))
    assert torch.equal(normals(derive_key(0, "noise"), numbers, (3, 5, 7)), whole[numbers])
    names = [derive_key(0, "a"), derive_key(1, "a"), derive_key(0, "b"), derive_key(0, "a", 1)]
    firsts = [normals(name, numbers, (50,)) for name in names]
    for one, other in itertools.combinations(firsts, 2):
        assert (one - other).abs().min() > 0


def test_draws_are_independent_and_of_their_distributions() -> None:
    x = (
        normals(derive_key(3), torch.arange(3000), (31, 33)).double().flatten(1)
    )  # an odd number of pixels
    n = x.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        scale = {1: 1, 2: 2, 3: 15, 4: 96, 6: 10170}[power] ** 0.5  # of x^power
        assert abs(x.pow(power).mean() - moment) < 5 * scale / n**0.5
    for one, other in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, 512:], x[:, :-512])):
        assert abs((one * other).mean()) < 5 / one.numel() ** 0.5
    u = uniforms(derive_key(3), torch.arange(100_000))
    assert 0 < u.min() < u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() < 100 + 5 * math.sqrt(200)


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_the_batch_or_on_a_recording(name: str) -> None:
    torch.manual_seed(0)
    net, recorded = torch.nn.Conv2d(1, 1, 3, padding=1), []

    def denoise(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return net(x) + y[:, None, None, None] / 9

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return work

    schedule, way = NoiseSchedule("linear"), SamplerConfig(name, 5)
    numbers = torch.tensor([7, 1, 30, 2, 5])
    labels = numbers % 3
    how = (schedule, way, numbers, labels, (1, 4, 4), 0)
    one = sample_images(denoise, *how)
    captures = GraphCache(capture)
    for size in (1, 2, 3, 5):
        with captures.bind(net) as record:
            for seed in (0, 1):
                made = sample_images(denoise, *how[:-1], seed, size, record)
            again = sample_images(denoise, *how, size, record)
        torch.testing.assert_close(again, one)
        assert (made - again).abs().max() > 0.1
    assert len(recorded) == 4  # a recording a size, for all calls
    net.weight = torch.nn.Parameter(net.weight.clone())  # the same elsewhere
    with captures.bind(net) as record:
        torch.testing.assert_close(
            sample_images(denoise, *how, 5, record), sample_images(denoise, *how)
        )
    assert len(recorded) == 5
    alone = sample_images(denoise, schedule, way, numbers[2:3], labels[2:3], (1, 4, 4), 0)
    torch.testing.assert_close(alone, one[2:3])
    other = sample_images(denoise, schedule, way, numbers, labels, (1, 4, 4), 1)
    assert (other - one).abs().max() > 0.1


def test_guidance_moves_along_the_difference_between_conditional_and_unconditional_prediction() -> (
    None
):
    def net(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return x + y[:, None, None, None]

    x, t, y = torch.zeros(2, 1, 2, 2), torch.tensor([500.0, 500.0]), torch.tensor([3, 1])
    denoising = Denoiser(NoiseSchedule("linear"))
    for w in (0.0, 0.5, 2.0):
        made = denoising.denoise(net, x, t, y, w, null_class=10)
        assert made[:, 0, 0, 0].tolist() == [3 + w * (3 - 10), 1 + w * (1 - 10)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda: SamplerConfig(num_steps=0),
            r"num_steps=0 is out of range; allowed: 1 or more; use num_steps=50",
        ),
        (
            lambda: SamplerConfig(guidance_scale=-1),
            r"guidance_scale=-1 is out of range; allowed: 0 \(none\) or more",
        ),
        (
            lambda: SamplerConfig(eta=2),
            r"eta=2 is out of range; allowed: 0 \(no fresh noise\) to 1; use eta=0",
        ),
        (
            lambda: SamplerConfig("heun", eta=1),
            r"eta=1 has no effect with sampler='heun'; allowed: .*; use sampler='ddim'",
        ),
        (
            lambda: NoiseSchedule("linear").timesteps(1001),
            r"num_steps=1001 is out of range; allowed: 1 to 1000; use num_steps=1000",
        ),
        (
            lambda: Denoiser(NoiseSchedule("flow"), "eps"),
            r"allowed: x0, v, velocity; use prediction_type='velocity'",
        ),
    ],
)
def test_invalid_settings_are_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        wrong()
    assert error.value.flag.startswith("--")
