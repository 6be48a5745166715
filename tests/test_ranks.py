"""The harness of multi-process tests: results, failures, hangs and warnings."""

import os
import time
import warnings

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel


def total(value: int) -> int:
    dist.init_process_group("gloo")
    tensor = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return int(tensor)


def fail_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        print("last words")
        raise ValueError("no such thing")
    time.sleep(60)


def hang_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(60)


def die() -> None:
    os._exit(7)


def warn() -> None:
    warnings.warn("a warning", UserWarning, stacklevel=1)


def fit_twice(strategy: str) -> list[float]:
    for _ in range(2):
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model := BoringModel())
    return [trainer.world_size, trainer.global_rank, float(model.layer.weight.detach().sum())]


def test_ranks_form_one_job_and_return_results_in_order(ranks):
    assert ranks(total, 3, 10) == [60, 60, 60]


def test_a_stock_trainer_joins_the_job_twice(ranks):
    first, second = ranks(fit_twice, 2, "ddp")
    assert first[:2] == [2, 0]
    assert second[:2] == [2, 1]
    assert first[2] == second[2]


def test_a_failing_rank_is_named_with_its_traceback_and_output(ranks):
    with pytest.raises(AssertionError, match="rank 1 failed") as error:
        ranks(fail_on, 2, 1)
    assert "ValueError: no such thing" in str(error.value)
    assert "last words" in str(error.value)
    assert "rank 0 killed because another failed" in str(error.value)


def test_a_hanging_rank_is_killed_and_its_stack_is_shown(ranks):
    with pytest.raises(AssertionError, match="rank 1 hung: killed after 3 s") as error:
        ranks(hang_on, 2, 1, timeout=3)
    assert "in hang_on" in str(error.value)
    assert "rank 0" not in str(error.value)


def test_a_rank_that_exits_is_named_with_its_exit_status(ranks):
    with pytest.raises(AssertionError, match=r"rank 0 failed \(exit 7\)"):
        ranks(die, 1)


def test_warnings_are_errors_in_ranks_too(ranks):
    with pytest.raises(AssertionError, match="UserWarning: a warning"):
        ranks(warn, 1)


def test_a_local_function_is_refused(ranks):
    with pytest.raises(TypeError, match="module level"):
        ranks(lambda: None, 2)


def read_variable(name: str) -> str | None:
    return os.environ.get(name)


def test_ranks_have_the_environment_of_the_caller_not_that_of_the_first_one(ranks, monkeypatch):
    for value in ("one", "other"):
        monkeypatch.setenv("RAVINE_TEST", value)
        assert ranks(read_variable, 1, "RAVINE_TEST") == [value]
    monkeypatch.delenv("RAVINE_TEST")
    assert ranks(read_variable, 1, "RAVINE_TEST") == [None]
