"""Runs of Objective and Regression with the trainer of the command line, for tests."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
from torch.optim import SGD

from ravine.callbacks import LRSchedule, OptimizerPlan, OptimizerSweep, ParamRule
from ravine.callbacks.monitoring.member_paths import RecordedPaths
from ravine.cli.trainer import Trainer


class Paths(RecordedPaths):
    """Records the points and draws nothing."""

    def __init__(self, num_replicas: int = 1, every_n_steps: int = 1) -> None:
        super().__init__(None, num_replicas, every_n_steps)

    def save_plot(self, folder: Any, module: Any) -> None: ...


def run(
    module: L.LightningModule,
    steps: int,
    *callbacks: L.Callback,
    data: Any = None,
    num_replicas: int = 1,
    every_n_steps: int = 1,
) -> Paths:
    """Train, and return the recorded points of the members."""
    paths = Paths(num_replicas, every_n_steps)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, paths],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir="runs",
        log_every_n_steps=10_000,
    )
    trainer.fit(module, datamodule=data)
    return paths


def sweep(*lrs: float, num_replicas: int = 1, **settings: Any) -> OptimizerSweep:
    """Gradient descent with these learning rates, a member each."""
    return OptimizerSweep(partial(SGD, **settings), lrs, num_replicas)


def plan(*rules: Any, schedules: Sequence[LRSchedule | None] = ()) -> OptimizerPlan:
    """An optimizer for each member, and maybe a schedule."""
    schedules = [*schedules, *[None] * (len(rules) - len(schedules))]
    return OptimizerPlan(
        rules=[
            ParamRule(pattern=f"*members.{i}", optimizer=rule, schedule=schedule)
            for i, (rule, schedule) in enumerate(zip(rules, schedules, strict=True))
        ]
    )
