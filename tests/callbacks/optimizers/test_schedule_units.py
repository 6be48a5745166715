"""Schedules in samples or tokens: equal to those in steps on any layout, and after a resume."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from external_modules.net_in_init import NetInInit
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from torch.optim import SGD

from ravine.callbacks import LRSchedule, OptimizerPlan
from ravine.cli.trainer import Trainer
from ravine.errors import UsageError

BATCH_SIZE = 8  # of NetInInit


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Rates(Callback):
    """Records the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Tokens(NetInInit):
    """Counts four tokens in each sample."""

    unit = "tokens"

    def count_units(self, batch: Any) -> int:
        return batch[0].numel()


def train(
    schedule: LRSchedule,
    steps: int = 8,
    cls: type[NetInInit] = NetInInit,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[list[float], list[float]]:
    """Train, save end.ckpt, and return the rates and the final weights."""
    torch.manual_seed(0)
    module = cls()
    rates = Rates()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[OptimizerPlan(partial(SGD, lr=0.1), schedule=schedule), rates],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    trainer.save_checkpoint("end.ckpt")
    return rates.rates, torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


SCHEDULES = [
    {"kind": "cosine", "warmup": 4},
    {"kind": "step", "warmup": 1, "period": 2, "decay_factor": 0.5},
    {"kind": "power", "timescale": 3.0},
]


def in_units(arguments: dict[str, Any], units: str, units_per_step: int) -> LRSchedule:
    scaled = {
        name: value * units_per_step if name in ("warmup", "period", "timescale") else value
        for name, value in arguments.items()
    }
    return LRSchedule(**scaled, units=units)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_a_schedule_in_samples_equals_the_one_in_steps_bit_for_bit(arguments):
    expected = train(LRSchedule(**arguments))
    assert train(in_units(arguments, "samples", BATCH_SIZE)) == expected
    assert len(set(expected[0])) > 2


def test_tokens_are_those_of_the_module():
    expected = train(LRSchedule("cosine", warmup=4))
    schedule = LRSchedule("cosine", warmup=4 * BATCH_SIZE * 4, units="tokens")
    assert train(schedule, cls=Tokens) == expected


def test_the_batches_of_accumulation_count():
    expected = train(LRSchedule("cosine", warmup=4), accumulate_grad_batches=2)
    schedule = LRSchedule("cosine", warmup=4 * 2 * BATCH_SIZE, units="samples")
    assert train(schedule, accumulate_grad_batches=2) == expected


def test_a_resumed_run_has_the_same_rates_and_weights_bit_for_bit():
    schedule = LRSchedule("power", warmup=16, timescale=16.0, units="samples")
    rates, weights = train(schedule)
    first_rates, _ = train(schedule, steps=3)
    last_rates, resumed = train(schedule, ckpt_path="end.ckpt")
    assert first_rates + last_rates == rates
    assert resumed == weights


def train_ranks(schedule: LRSchedule) -> list[float]:
    return train(schedule, 4, devices=2, strategy="ddp", default_root_dir="runs")[0]


def test_the_samples_of_all_ranks_count():
    schedule = LRSchedule("power", warmup=2 * 2 * BATCH_SIZE, timescale=16.0, units="samples")
    expected = [0.05, 0.1, 0.1, 0.1 / 2]
    for rates in run_ranks(train_ranks, 2, schedule):
        assert rates == pytest.approx(expected)


def test_a_warmup_keeps_one_step_and_a_fraction_remains_a_fraction():
    assert LRSchedule(warmup=3, units="samples").in_steps(8).warmup == 1
    assert LRSchedule(warmup=0.1, units="samples").in_steps(8).warmup == 0.1
    assert LRSchedule(warmup=0, units="tokens").in_steps(8).warmup == 0
    assert LRSchedule(warmup=375_000_000, units="tokens").in_steps(1_000_000).warmup == 375


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (LRSchedule(units="epochs"), "there is no unit 'epochs'; allowed: steps, samples, tokens"),  # type: ignore[arg-type]
        (LRSchedule(warmup=10, units="tokens"), "NetInInit does not count tokens"),
        (LRSchedule("step", period=800, units="samples"), "period=100 does not occur in the 8"),
    ],
)
def test_a_schedule_that_cannot_be_counted_is_one_line(schedule: LRSchedule, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(schedule)
