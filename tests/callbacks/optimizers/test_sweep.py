"""OptimizerSweep, schedules of rules, and MomentumSchedule on real optimizers."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from external_modules.net_in_init import NetInInit
from member_runs import run, sweep
from torch.optim import SGD, Adam

from ravine.callbacks import LinearGrid, MomentumSchedule, OptimizerPlan, OptimizerSweep
from ravine.cli.trainer import Trainer
from ravine.datamodules import RegressionDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import Objective, Regression


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_members_share_one_optimizer_and_replicas_a_group():
    data = RegressionDataModule(sampling_seed=[0, 0], num_replicas=3)
    module = Regression()
    paths = run(module, 2, sweep(0.3, 0.1, num_replicas=3), data=data, num_replicas=3)
    assert paths.lrs[0] == [0.3] * 3 + [0.1] * 3
    (composite,) = module.trainer.optimizers
    assert len(composite.optimizers) == 1  # type: ignore[attr-defined]
    assert [len(group["params"]) for group in composite.param_groups] == [3, 3]
    assert paths.stacked_points()[-1, :3].unique().numel() == 3  # other draws in each replica


def test_a_grid_has_both_ends():
    plan = OptimizerSweep(Adam, LinearGrid(0.001, 1.9, 80))
    assert plan.lrs[0] == 0.001
    assert plan.lrs[-1] == 1.9
    assert len(plan.rules) == 80


def test_the_state_of_an_optimizer_is_kept_for_each_member():
    """Adam's first steps are lr times the sign of the gradient, whatever its size."""
    module = Objective("quadratic", start=[5.0], num_members=2)
    descent = OptimizerSweep(partial(Adam, eps=1e-12), [0.1, 0.01])
    points = run(module, 1, descent).stacked_points()[1, :, 0]
    assert points.tolist() == pytest.approx([4.9, 4.99], abs=1e-9)


def test_a_module_without_members_and_an_empty_sweep_are_refused():
    trainer = Trainer(accelerator="cpu", max_steps=2, callbacks=[sweep(0.1)], logger=False)
    with pytest.raises(UsageError, match="NetInInit has no members of a sweep; allowed: Objective"):
        trainer.fit(NetInInit())
    with pytest.raises(UsageError, match=r"lrs=\[\] with num_replicas=1 makes no member"):
        sweep()


class Momenta(MomentumSchedule):
    """Notes the momentum with which the optimizer steps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        (group,) = optimizer.param_groups
        self.values.append(group["momentum"] if "momentum" in group else group["betas"][0])


@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.01, momentum=0.9), Adam])
@pytest.mark.parametrize("steps_per_batch", [1, 3])
def test_the_momentum_rises_linearly_and_stays(optimizer: Any, steps_per_batch: int) -> None:
    schedule = Momenta(0.5, 0.9, 4)
    module = Objective("quadratic", start=[1.0], steps_per_batch=steps_per_batch)
    run(module, 6, OptimizerPlan(optimizer), schedule)
    assert schedule.values == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])


def test_a_momentum_schedule_changes_the_path_as_heavy_ball_does():
    """v <- mu_k v + g, w <- w - lr v, with mu_k of the schedule."""
    module = Objective("quadratic", start=[1.0])
    descent = OptimizerPlan(partial(SGD, lr=0.1, momentum=0.5))
    points = run(module, 5, descent, MomentumSchedule(0.5, 0.9, 4)).stacked_points().flatten()
    w, v = 1.0, 0.0
    for k in range(5):
        v = (0.5 + 0.1 * k) * v + w if k else w
        w -= 0.1 * v
        assert points[k + 1].item() == pytest.approx(w, abs=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.0}, "start=1.0 is not a momentum; allowed: above 0, below 1"),
        ({"num_steps": 0}, "num_steps=0 is too small"),
    ],
)
def test_a_wrong_momentum_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        MomentumSchedule(**arguments)


def test_an_optimizer_without_momentum_is_refused():
    module = Objective("quadratic", start=[1.0])
    with pytest.raises(UsageError, match="no param group of SGD has momentum"):
        run(module, 2, OptimizerPlan(SGD), MomentumSchedule())
    assert torch.equal(module.member_points(), module.start_points())
