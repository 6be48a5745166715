"""Claims of lecture 8: momentum, sign descent, Adam, Newton and schedules on two ravines."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from member_runs import plan, run, sweep
from torch.optim import SGD, Adam, AdamW

from ravine.callbacks import AdaGradOptimizer, LRSchedule, Newton, OptimizerPlan, SignSGDOptimizer
from ravine.callbacks.optimizers.muon import orthogonalize
from ravine.callbacks.stability.gradient_clipping import clip_by_norm
from ravine.datamodules import RegressionDataModule
from ravine.lightning_modules import Objective, Regression


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ravine(start: Sequence[float], members: int = 1, function: Any = "ravine") -> Objective:
    return Objective(function, start=start, num_members=members)


def gradient(w: torch.Tensor) -> torch.Tensor:
    """Of x^2 + y^4."""
    return torch.stack((2 * w[0], 4 * w[1] ** 3))


@pytest.mark.parametrize(("decay", "least", "greatest"), [(1.0, 0.0, 1e-14), (0.98, 0.3, 0.5)])
def test_heavy_ball_is_the_velocity_form_at_a_constant_step_only(decay, least, greatest):
    """w_{k+1} = w_k - lr_k g + mu (w_k - w_{k-1}); with lr 0.01 * 0.98^k they are 0.37 apart."""
    schedule = LRSchedule("exponential", decay_factor=decay)
    descent = OptimizerPlan(partial(SGD, lr=0.01, momentum=0.9), schedule=schedule)
    points = run(ravine([3.0, 2.0]), 200, descent).stacked_points()[:, 0]
    before = w = torch.tensor([3.0, 2.0], dtype=torch.float64)
    distance = 0.0
    for k in range(200):
        before, w = w, w - 0.01 * decay**k * gradient(w) + 0.9 * (w - before)
        distance = max(distance, float((w - points[k + 1]).norm()))
    assert least <= distance <= greatest


def test_momentum_is_nearer_on_the_flat_axis_by_the_root_of_ten():
    """1 / y^2 grows by 8 lr in a step of descent, and by 80 lr with momentum 0.9."""
    descent = plan(partial(SGD, lr=0.003), partial(SGD, lr=0.003, momentum=0.9))
    module = Objective("ravine", start=[3.0, 2.0], num_members=2, steps_per_batch=500)
    points = run(module, 5000, descent, every_n_steps=5000).stacked_points()
    y = points[-1, :, 1].abs()
    assert y.tolist() == pytest.approx([0.0911497, 0.0282646], abs=1e-6)
    assert (y[0] / y[1]).item() == pytest.approx(math.sqrt(10), rel=0.05)
    assert y[0].item() == pytest.approx(1 / math.sqrt(1 / 4 + 8 * 0.003 * 5000), rel=1e-3)
    assert points[-1, :, 0].abs().max() < 1e-12


def test_four_methods_end_where_figure_5_1_has_them():
    descent = plan(
        partial(SGD, lr=0.005),
        partial(SignSGDOptimizer, lr=0.03),
        partial(Adam, lr=0.5),
        partial(SGD, lr=1.0),
    )
    rates = [None, None, None, "ravine"]
    module = Objective("ravine", start=[3.0, 3.0], num_members=4, preconditioners=rates)
    points = run(module, 500, descent).stacked_points()
    assert points[500, 0].tolist() == pytest.approx([0.019711, 0.222096], abs=1e-6)
    assert points[101, 1].abs().tolist() == pytest.approx([0.03, 0.03], abs=1e-12)
    assert points[100, 2].abs().tolist() == pytest.approx([0.0135, 0.0585], abs=2e-4)
    assert points[50, 3].tolist() == pytest.approx([0, 0.160841], abs=1e-6)


@pytest.mark.parametrize(
    ("start", "low", "high"), [([3.0, 3.0], 0.0, 0.1415), ([3.03, 2.03], 0.0424, 0.0991)]
)
def test_sign_descent_alternates_between_two_points(start, low, high):
    """Never nearer than lr, says the lecture: it alternates between a and lr - a on each axis."""
    descent = OptimizerPlan(partial(SignSGDOptimizer, lr=0.1))
    distances = run(ravine(start), 100, descent).stacked_points()[40:, 0].norm(dim=1)
    assert distances.min().item() == pytest.approx(low, abs=1e-4)
    assert distances.max().item() == pytest.approx(high, abs=2e-4)
    assert torch.allclose(distances[2:], distances[:-2], atol=1e-9)


def test_a_geometric_sign_step_ends_at_its_last_step_and_cannot_go_beyond_its_reach():
    schedule = LRSchedule("exponential", decay_factor=0.98)
    descent = OptimizerPlan(partial(SignSGDOptimizer, lr=0.1), schedule=schedule)
    last = run(ravine([3.0, 3.0]), 400, descent).stacked_points()[-1, 0].norm()
    assert last.item() == pytest.approx(4.37e-5, abs=1e-7)
    assert last.item() == pytest.approx(math.sqrt(2) * 0.1 * 0.98**400, rel=0.01)
    far = Objective("quadratic", start=[6.0])
    descent = OptimizerPlan(partial(SignSGDOptimizer, lr=0.1), schedule=schedule)
    assert run(far, 800, descent).stacked_points()[-1].item() == pytest.approx(1.0, abs=1e-6)


def uw(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """u = x + y and w = x - y of points (k m 2)."""
    return points[:, 0, 0] + points[:, 0, 1], points[:, 0, 0] - points[:, 0, 1]


def test_newton_leaves_two_thirds_of_the_quartic_and_nothing_of_the_quadratic():
    """Beyond step 50, 12 u^2 is below the precision of the entries 2 + 12 u^2 of the Hessian.

    The curvature along the eigenvector of u keeps its digits: 4 (2/3)^60 / sqrt(2) at step 60.
    """
    module = ravine([3.0, 1.0], function="coupled_ravine")
    points = run(module, 60, Newton(lr=1.0, damping=0.0)).stacked_points()
    u, w = uw(points)
    assert w[1].abs() < 1e-12
    assert u.tolist() == pytest.approx([4 * (2 / 3) ** k for k in range(61)], rel=1e-4)
    assert points[30, 0].norm().item() == pytest.approx(1.4750516e-5, rel=1e-5)
    assert points[60, 0].norm().item() == pytest.approx(7.6925e-11, rel=1e-4)


def test_newton_reaches_the_flat_minimum_at_its_rate_where_the_axes_are_those_of_the_ravine():
    """The rotated ravine from the rotated start: 4 (2/3)^60 / sqrt(2) = 7.7e-11 at step 60."""
    r = math.sqrt(0.5)
    points = run(ravine([2 * r, 4 * r]), 60, Newton(lr=1.0, damping=0.0)).stacked_points()
    assert points[60, 0].norm().item() == pytest.approx(7.6925e-11, rel=1e-4)


def test_the_newton_of_the_lecture_is_damped_by_a_half():
    module = ravine([3.0, 1.0], function="coupled_ravine")
    points = run(module, 30, Newton(lr=0.5, damping=0.0)).stacked_points()
    assert points[1, 0].tolist() == pytest.approx([2.1667, 1.1667], abs=1e-4)
    assert points[30, 0].norm().item() == pytest.approx(0.01191537, abs=1e-8)
    u, w = uw(points)
    assert u.tolist() == pytest.approx([4 * (5 / 6) ** k for k in range(31)])
    assert w.tolist() == pytest.approx([2 * 0.5**k for k in range(31)])


RATES_AT_LIMITS = (1.9 / 384, 2.1 / 384, 5.9 / 384, 6.1 / 384)


def test_gradient_descent_on_the_coupled_ravine_is_limited_by_the_largest_curvature():
    """24 u^2 = 384 at the start (3, 1): the limit there is 2 / 384, and u - 8 lr u^3 a step."""
    rates = [None, [0.001, 0.0005]]
    module = Objective("coupled_ravine", [3.0, 1.0], num_members=2, preconditioners=rates)
    points = run(module, 1000, sweep(0.0008, 1.0)).stacked_points()
    assert points[1000, :2].norm(dim=1).tolist() == pytest.approx([0.20495, 0.16994], abs=1e-5)
    u = points[:, 0, 0] + points[:, 0, 1]
    assert torch.allclose(u[1:], u[:-1] - 8 * 0.0008 * u[:-1] ** 3, atol=1e-12)
    start = ravine([3.0, 1.0], function="coupled_ravine").start
    hessian = torch.func.jacrev(torch.func.grad(module.function.value))
    assert torch.linalg.eigvalsh(hessian(start)).tolist() == pytest.approx([4, 384])


def test_beyond_two_over_the_curvature_two_near_starts_move_apart():
    """On both sides of 2 / 384 at (3, 1). The run itself diverges above 6 / 384 = 1 / (4 u^2)."""
    shift = 1e-7
    ends = [
        run(
            ravine([3 + d, 1 + d], 4, "coupled_ravine"), 5, sweep(*RATES_AT_LIMITS)
        ).stacked_points()
        for d in (0.0, shift)
    ]
    factors = (ends[1][1] - ends[0][1]).norm(dim=1) / (shift * math.sqrt(2))
    assert factors.tolist()[:2] == pytest.approx([0.9, 1.1], abs=1e-5)
    u = (ends[0][:, :, 0] + ends[0][:, :, 1]).abs()
    assert u[5, 2] < u[0, 2] < u[5, 3]


@pytest.mark.parametrize("slope", [1e-3, 1.0, 1e6])
def test_the_first_steps_of_adam_are_the_rate_times_the_sign(slope: float) -> None:
    module = Objective(lambda w: (slope * w).sum(), start=[0.0])
    points = run(module, 3, OptimizerPlan(partial(Adam, lr=0.003))).stacked_points().flatten()
    assert points.tolist() == pytest.approx([0, -0.003, -0.006, -0.009], rel=2e-5)


def test_without_bias_correction_the_first_step_of_adam_is_too_large():
    """(1 - beta1) g / sqrt((1 - beta2) g^2) = 3.1623: too large, and not too small."""
    assert (1 - 0.9) / math.sqrt(1 - 0.999) == pytest.approx(3.1623, abs=1e-4)


@pytest.mark.parametrize(("is_rare", "ratio"), [(True, 0.3445), (False, 0.995)])
def test_adam_is_the_sign_only_where_the_gradient_varies_little(
    is_rare: bool, ratio: float
) -> None:
    """g = 10 with probability 0.1, else 0.1: mean / root mean square = 0.3445, not 1."""
    p = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
    optimizer = Adam([p], lr=1.0, betas=(0.9, 0.999))
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(())
    for step in range(2600):
        draws = torch.rand(200, generator=generator, dtype=torch.float64)
        rare = torch.where(draws < 0.1, 10.0, 0.1)
        p.grad = (rare if is_rare else 0.9 + 0.2 * (draws > 0.5)).double()
        optimizer.step()
        if step == 1599:
            start = p.detach().clone()
    assert ((start - p.detach()) / 1000).mean().item() == pytest.approx(ratio, rel=0.03)


def test_adam_moves_by_its_rate_times_mean_over_root_mean_square_of_the_gradients():
    """Far from the minimum of the line, g is x^2 times a constant: E g^2 has m4 / B."""
    data = RegressionDataModule(batch_size=[200, 10, 1], replacement=True, num_replicas=8)
    adam = OptimizerPlan(partial(Adam, lr=0.01, betas=(0.9, 0.99)))
    module = Regression(start=100.0)
    paths = run(module, 600, adam, data=data, num_replicas=8, every_n_steps=300)
    moved = (paths.points[1] - paths.points[2]).flatten().unflatten(0, (3, 8)).mean(1)
    m2, m4 = (data.x.flatten() ** 2).mean(), (data.x.flatten() ** 4).mean()
    sizes = torch.tensor([200, 10, 1])
    ratios = m2 / (m2**2 + (m4 - m2**2) / sizes).sqrt()
    assert ratios.tolist() == pytest.approx([0.998, 0.960, 0.735], abs=1e-3)
    assert (moved / (300 * 0.01)).tolist() == pytest.approx(ratios.tolist(), rel=0.03)


def test_adagrad_on_a_constant_gradient_moves_like_the_root():
    """The sum of 1 / sqrt(t) over 10,000 steps is 198.5446, about 2 sqrt(T)."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdaGradOptimizer([p], lr=1.0)
    for _ in range(10_000):
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
    assert -p.item() == pytest.approx(198.5446, abs=1e-3)


def test_clipping_by_the_global_norm_keeps_the_direction():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert clip_by_norm(gradients, 1.0).item() == pytest.approx(5)
    assert gradients[0].tolist() == pytest.approx([0.6, 0])
    assert gradients[1].tolist() == pytest.approx([0.8])


def test_the_four_schedules_have_their_rates_at_30000_steps_of_90000():
    schedules = [
        LRSchedule("constant"),
        LRSchedule("cosine"),
        LRSchedule("cosine", warmup=5000),
        LRSchedule("step", period=30_000, decay_factor=0.1),
    ]
    rates = [0.1 * schedule.factor(30_000, 90_000) for schedule in schedules]
    assert rates == pytest.approx([0.1, 0.075, 0.0801317, 0.01], abs=1e-7)


def test_cosine_annealing_of_torch_is_the_formula():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for k in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            0.1 * LRSchedule("cosine").factor(k, 50), abs=1e-15
        )
        optimizer.step()
        schedule.step()


def test_decoupled_decay_multiplies_the_weight_by_one_less_the_rate_times_lambda():
    """Without a gradient AdamW leaves 0.999 of the weight a step, at lr 0.1 and lambda 0.01."""
    descent = OptimizerPlan(partial(AdamW, lr=0.1, weight_decay=0.01), decay="all")
    points = run(Objective(lambda w: 0 * w.sum(), start=[1.0]), 3, descent).stacked_points()
    assert points.flatten().tolist() == pytest.approx([0.999**k for k in range(4)], abs=1e-12)


def test_the_polar_factor_of_the_second_svd_example():
    """The printed factors multiply to [[1, -1], [0, 0]]: V must be transposed."""
    u, s, vh = torch.linalg.svd(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert s.tolist() == pytest.approx([math.sqrt(2), 0])
    polar = u[:, :1] @ vh[:1]
    assert polar.flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 2 + [0, 0])
    # Muon's iteration approximates it; the singular value 0 stays 0
    approximate = orthogonalize(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert torch.allclose(approximate, polar, rtol=0.1)
    r = math.sqrt(0.5)
    v = torch.tensor([[r, -r], [r, r]])
    scaled = torch.diag(torch.tensor([math.sqrt(2), 0.0]))
    assert (scaled @ v).flatten().tolist() == pytest.approx([1, -1, 0, 0], abs=1e-6)
    assert (scaled @ v.T).flatten().tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)
