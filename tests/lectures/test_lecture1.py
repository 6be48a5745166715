"""Claims of lecture 1: gradient descent in one dimension, on w^2/2 and on the double well."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from member_runs import plan, run, sweep
from torch.optim import SGD

from ravine.callbacks import LRSchedule, OptimizerPlan, StepsToTarget
from ravine.callbacks.optimizers.sweep import LinearGrid, OptimizerSweep
from ravine.lightning_modules import Objective


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def objective(function: Any = "quadratic", start: float = 5.0, **arguments: Any) -> Objective:
    return Objective(function, start=[start], **arguments)


def descend(module: Objective, steps: int, *lrs: float) -> torch.Tensor:
    """Points (k m) of gradient descent."""
    return run(module, steps, sweep(*lrs)).stacked_points()[..., 0]


def test_descent_contracts_by_one_minus_the_step():
    rates = (0.1, 0.5, 1.0, 1.5)
    w = descend(objective(num_members=4), 10, *rates)
    for member, lr in enumerate(rates):
        assert w[10, member].item() == pytest.approx((1 - lr) ** 10 * 5, abs=1e-14)
    assert w[10, 1].item() == 0.0048828125
    assert w[10, 1].item() ** 2 / 2 == pytest.approx(1.1920929e-5, rel=1e-8)
    assert (w[:11, 1] ** 2 / 2)[:4].tolist() == [12.5, 3.125, 0.78125, 0.1953125]


def test_descent_on_the_quadratic_is_stable_below_a_step_of_two():
    w = descend(objective(num_members=3), 50, 1.99, 2.0, 2.01).abs()
    assert w[50, 0] < w[0, 0]
    assert w[50, 1] == 5
    assert w[50, 2] > w[0, 2]


def test_the_time_to_a_target_is_a_quotient_of_logarithms():
    rates = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 1.9)
    module = objective(num_members=8, objective_target=1e-5)
    run(module, 200, sweep(*rates))
    assert module.stop_steps == [137, 67, 25, 11, 6, 1, 11, 67]
    for lr, steps in zip(rates, module.stop_steps, strict=True):
        if lr != 1:
            ratio = math.log(math.sqrt(2e-5) / 5) / math.log(abs(1 - lr))
            assert steps == math.ceil(ratio)
    # the smallest step of figure 1.5, without a run of 7,016 steps
    assert math.ceil(math.log(math.sqrt(2e-5) / 5) / math.log(0.999)) == 7016


def steps_to_target(module: Objective, grid: LinearGrid, steps: int) -> list[int | None]:
    plot = StepsToTarget(1e-5)
    paths = run(module, steps, OptimizerSweep(SGD, grid))
    plot.steps, plot.points, plot.lrs = paths.steps, paths.points, paths.lrs
    return plot.find_steps(module)


def test_the_sweep_of_the_quadratic_is_figure_1_6():
    module = objective(num_members=80, objective_target=1e-5)
    steps = steps_to_target(module, LinearGrid(0.001, 1.9, 80), 200)
    reached = [k for k in steps if k is not None]
    assert reached[:4] == [140, 93, 69, 55]
    assert reached[-2:] == [54, 67]
    assert min(reached) == 2


def test_the_sweep_of_the_double_well_is_figure_1_7_at_all_22_points():
    module = objective(
        "double_well", 2.0, num_members=22, objective_target=1e-5, max_objective=1e20
    )
    steps = steps_to_target(module, LinearGrid(0.001, 0.336, 22), 1300)
    assert steps == [
        1279, 72, 36, 23, 15, 8, 11, 12, 12, 13, 16, 13, 9, 7, 5, 3, 3, 4, 5, 10, 4, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "center", "lr", "dtype", "iterations", "weight", "value"),
    [
        ("quadratic", 0.0, 0.5, "float64", 37, 7.275958e-11, 2.646978e-21),
        ("quadratic", 0.0, 0.5, "float32", 37, 7.275958e-11, 2.646978e-21),
        ("quadratic", 1.0, 0.5, "float32", 27, 1.0, 0.0),
        ("quadratic", 1.0, 0.5, "float64", 37, 1.0, 2.646e-21),
        ("double_well", 0.0, 0.02, "float32", 200, 0.9999991, 1.818989e-12),
    ],
)
def test_a_printed_run_is_reproduced_to_the_last_digit(
    function: Any,
    center: float,
    lr: float,
    dtype: Any,
    iterations: int,
    weight: float,
    value: float,
) -> None:
    """The 27 iterations of (w - 1)^2 / 2 belong to float32: in float64 there are 37."""
    module = objective(function, center=center, dtype=dtype, gradient_tolerance=1e-10)
    paths = run(module, 80 if function == "quadratic" else 200, OptimizerPlan(partial(SGD, lr=lr)))
    (stop,) = module.stop_steps
    last = 199 if stop is None else stop  # the last point whose update was due
    assert last + 1 == iterations
    assert paths.stacked_points()[last].item() == pytest.approx(weight, rel=1e-7)
    objective_value = paths.compute_metric(module, "objective")[last].item()
    assert objective_value == pytest.approx(value, rel=1e-3 if dtype == "float64" else 1e-6)


def test_the_first_step_of_the_double_well_from_five_goes_to_a_fifth():
    assert descend(objective("double_well"), 1, 0.02)[1].item() == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize(("start", "below", "above"), [(2.0, 0.3333, 0.334), (5.0, 0.0416, 0.0417)])
def test_the_double_well_diverges_above_one_over_the_start_squared_less_one(start, below, above):
    module = objective("double_well", start, num_members=2, max_objective=1e20)
    w = descend(module, 300, below, above)
    assert module.stop_steps[0] is None
    assert module.stop_steps[1] is not None
    assert module.stop_steps[1] <= 12
    assert w[-1, 0].abs() < 2


def test_the_best_step_near_a_well_is_a_quarter_and_the_limit_a_half():
    """The distance to the well is multiplied by 1 - 4 lr; at 1/4 it is squared."""
    rates = (0.1, 0.25, 0.45, 0.55)
    errors = (descend(objective("double_well", 1.001, num_members=4), 3, *rates) - 1).abs()
    for member in (0, 2, 3):
        ratio = (errors[2, member] / errors[1, member]).item()
        assert ratio == pytest.approx(abs(1 - 4 * rates[member]), abs=6e-3)
    assert errors[1, 1] < 2e-6


def test_one_step_leads_from_two_to_either_well():
    w = descend(objective("double_well", 2.0, num_members=2), 1, 1 / 12, 1 / 4)
    assert w[1].tolist() == pytest.approx([1.0, -1.0], abs=1e-15)


def test_a_stationary_point_is_not_a_minimum():
    module = objective("double_well", 0.5)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert module.compute_gradients(zero).item() == 0
    assert module.evaluate_points(zero).item() == 0.5
    start = objective("double_well", 0.0)
    assert descend(start, 5, 0.1)[-1].item() == 0  # descent stays at the maximum


def test_the_fastest_steps_of_the_double_well_lead_to_the_other_well():
    """Not said in the lecture: from 2, steps of 0.24 to 0.26 end at -1."""
    w = descend(objective("double_well", 2.0, num_members=4), 60, 0.1, 0.24, 0.25, 0.26)
    assert w[-1].tolist() == pytest.approx([1, -1, -1, -1], abs=1e-9)


def test_gradients_accumulate_until_they_are_cleared():
    w = torch.tensor(2.0, requires_grad=True)
    (w**2 / 2).backward()
    assert w.grad is not None
    assert w.grad.item() == 2
    loss = w**2 / 2 + w  # the gradient 3 of another function, added: 2 + 3
    loss.backward()
    assert w.grad.item() == 5
    w.grad = None
    (w - 1).backward()
    assert w.grad.item() == 1
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_assignment_replaces_the_leaf_tensor():
    w = torch.tensor(2.0, requires_grad=True)
    (w**2 / 2).backward()
    stepped = w - 0.5 * w.grad
    assert not stepped.is_leaf
    with torch.no_grad():
        w -= 0.5 * w.grad
    assert w.is_leaf
    assert w.item() == stepped.item() == 1


def test_a_sublinear_and_a_linear_rate_cross_at_step_34():
    """Figure 1.2, from real runs: the step 1/(k+2) gives the distance 1/(k+1)."""
    module = objective(start=1.0, num_members=2)
    schedule = LRSchedule("power", timescale=2.0)
    descent = plan(partial(SGD, lr=0.5), partial(SGD, lr=0.1), schedules=[schedule])
    w = run(module, 60, descent).stacked_points()[..., 0]
    k = torch.arange(61, dtype=torch.float64)
    assert torch.allclose(w[:, 0], 1 / (k + 1), atol=1e-14)
    assert torch.allclose(w[:, 1], 0.9**k, atol=1e-14)
    assert int((w[1:, 1] < w[1:, 0]).int().argmax()) + 1 == 34
