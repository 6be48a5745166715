"""Ranks that differ in configuration or steps end with one line that names the difference."""

import os
import signal
import time
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import RankError, started
from torch.utils.data import DataLoader, IterableDataset

from ravine.callbacks import RankWatchdog
from ravine.callbacks.stability import rank_watchdog
from ravine.callbacks.stability.rank_watchdog import (
    LOADER_ENDED,
    STEP_BEGUN,
    STEP_DONE,
    describe_ended_loader,
)
from ravine.cli.command import run_argv
from ravine.strategies import RankMismatchError
from ravine.strategies.rank_agreement import flatten_config

SMALL = [
    *(
        "fit",
        "--model=LanguageModel",
        "--model.num_layers=1",
        "--model.d_model=8",
        "--model.num_heads=2",
    ),
    *("--data=TextDataModule", "--data.source=embedded", "--data.context_length=8"),
    *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"),
    *("--trainer.max_steps=2", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
]


class Stream(IterableDataset):
    """A number of rows without a length that a loader could ask for."""

    def __init__(self, rows: int):
        self.rows = rows

    def __iter__(self):
        return iter(torch.ones(self.rows, 3))


class Linear(L.LightningModule):
    def __init__(self, loader: Any, stuck_at: int = -1):
        super().__init__()
        self.net, self.loader, self.stuck_at = torch.nn.Linear(3, 1), loader, stuck_at

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == self.stuck_at:
            time.sleep(1000)
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return self.loader


def train(
    module: L.LightningModule, limit: float = 6, report_after_s: float = 30, **options: Any
) -> L.Trainer:
    rank_watchdog.POLL_INTERVAL_S = 0.2  # in this rank's process
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[RankWatchdog(limit, report_after_s)],
        **{"max_epochs": 2, **options},
    )
    trainer.fit(module)
    return trainer


class Absent(L.LightningModule):
    """A module whose rank does not reach the collectives of batch 2."""

    def __init__(self, rank: int, way: str):
        super().__init__()
        self.net, self.rank, self.way = torch.nn.Linear(3, 1), rank, way

    def training_step(self, batch, batch_idx):
        is_absent = self.global_rank == self.rank and batch_idx == 2
        if batch_idx == 1:
            time.sleep(0.5)  # for a first report
        if is_absent and self.way == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if is_absent and self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if is_absent and self.way == "locked":
            sum(range(10**11))  # keeps Python's lock: no other thread runs
        if self.way == "skipped" and not is_absent:
            dist.barrier()
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        rows = Asleep(self.rank) if self.way == "asleep" else torch.ones(3, 3)
        return DataLoader(rows)


class Asleep(torch.utils.data.Dataset):
    """Three rows, of which a rank does not return the last."""

    def __init__(self, rank: int):
        self.rank = rank

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 2 and os.environ["RANK"] == str(self.rank):
            time.sleep(1000)
        return torch.ones(3)


def train_without_a_rank(rank: int, way: str) -> None:
    train(Absent(rank, way), limit=3, report_after_s=1.0, max_epochs=1)


def wait_for_line(rank: int, way: str) -> str:
    """Train on two ranks of which one does not arrive; return the line that is printed."""
    with started(train_without_a_rank, 2, rank, way, timeout=60) as (_, _, logs):
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            text = "".join(log.read_text() for log in logs if log.exists())
            lines = [line for line in text.splitlines() if line.startswith("ravine: ")]
            if lines:
                return lines[0]
            time.sleep(0.1)
    raise AssertionError(f"no line within 40 s: {text}")


@pytest.fixture(autouse=True)
def folder_of_heartbeats(monkeypatch, tmp_path):
    """Ranks that are killed leave their files here."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def rows_of_this_rank(rows: list[int]) -> int:
    return rows[int(os.environ["RANK"])]


def train_on_streams(rows: list[int]) -> int:
    loader = DataLoader(Stream(rows_of_this_rank(rows)), batch_size=1)
    return train(Linear(loader)).global_step


def train_on_lengths(rows: list[int], max_steps: int) -> int | str:
    loader = DataLoader(torch.ones(rows_of_this_rank(rows), 3))
    try:
        return train(Linear(loader), max_steps=max_steps).global_step
    except RankMismatchError as error:
        return str(error)


def train_until_stuck() -> None:
    train(Linear(DataLoader(torch.ones(9, 3)), stuck_at=2), limit=2)


def refusals_of_commands(words: list[str], folder: str) -> list[str]:
    """The refusals of commands of which the second rank has one argument more."""
    said = []
    for word in words:
        own = [word] if os.environ["RANK"] == "1" else []
        try:
            run_argv([*SMALL, f"--trainer.default_root_dir={folder}", *own])
        except RankMismatchError as error:
            said.append(str(error))
    return said


class Chosen(Linear):
    def __init__(self, width: int):
        super().__init__(DataLoader(torch.ones(2, 3)))
        self.save_hyperparameters()


def setups_of_a_script(seeds: list[int], widths: list[int]) -> str:
    L.seed_everything(rows_of_this_rank(seeds))
    try:
        train(Chosen(rows_of_this_rank(widths)))
    except RankMismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            {0: (0, 26, STEP_BEGUN), 1: (0, 25, LOADER_ENDED)},
            "rank 1 ended epoch 0 after 25 batches",
        ),
        (
            {0: (3, 25, LOADER_ENDED), 1: (3, 60, LOADER_ENDED)},
            "rank 0 ended epoch 3 after 25 batches",
        ),
        ({0: (0, 25, STEP_BEGUN), 1: (0, 25, LOADER_ENDED)}, ""),
        ({0: (0, 25, STEP_DONE), 1: (0, 25, LOADER_ENDED)}, ""),
        ({0: (0, 25, LOADER_ENDED), 1: (0, 25, LOADER_ENDED)}, ""),
        ({0: (1, 1, STEP_BEGUN), 1: (0, 25, LOADER_ENDED)}, ""),
        ({0: (0, 24, STEP_BEGUN), 1: (0, 25, LOADER_ENDED)}, ""),
    ],
)
def test_a_loader_that_ended_before_another_is_named_and_nothing_else(places, said):
    assert said in describe_ended_loader(places)
    assert bool(describe_ended_loader(places)) == bool(said)


def test_a_rank_between_two_steps_counts_only_where_all_ranks_wait():
    places = {0: (0, 25, STEP_DONE), 1: (0, 25, LOADER_ENDED)}
    assert "rank 1 ended epoch 0 after 25" in describe_ended_loader(places, between_steps=True)
    assert describe_ended_loader({**places, 0: (0, 25, STEP_BEGUN)}, between_steps=True) == ""


def test_a_configuration_is_flattened_to_its_leaves():
    config = {"a": {"b": [1, {"c": None}]}, "d": {}, "e": []}
    assert flatten_config(config) == {"a.b.0": 1, "a.b.1.c": None, "d": {}, "e": []}


def test_a_rank_whose_stream_ends_early_is_named_and_the_job_ends(ranks):
    with pytest.raises(RankError, match="rank 1 ended epoch 0 after 3 batches, and that of rank 0"):
        ranks(train_on_streams, 2, [7, 3], timeout=60)


def test_streams_of_one_length_train_to_the_end(ranks):
    assert ranks(train_on_streams, 2, [4, 4]) == [8, 8]


def test_loaders_of_unequal_length_are_refused_on_all_ranks_unless_the_run_ends_before(ranks):
    for said in ranks(train_on_lengths, 2, [5, 3], -1):
        assert "has 3 batches on rank 1 and 5 on rank 0" in said
        assert "limit_train_batches=3" in said
    assert ranks(train_on_lengths, 2, [5, 3], 3) == [3, 3]


def test_a_rank_that_does_not_join_the_collective_is_named_with_its_stack(ranks):
    with pytest.raises(
        RankError, match=r"1 has been in training_step \(test_rank_watchdog.py:\d+\)"
    ):
        ranks(train_until_stuck, 2, timeout=60)


def test_ranks_started_with_different_arguments_are_refused_before_the_first_step(ranks, tmp_path):
    words = ["--seed_everything=7", "--data.batch_size=8", "--trainer.strategy=zero3"]
    for said in ranks(refusals_of_commands, 2, words, str(tmp_path)):
        assert [text.partition(" is ")[0].rpartition(": ")[2] for text in said] == [
            "seed_everything",
            "data.init_args.batch_size",
            "trainer.strategy",
        ]
        assert "is 0 on rank 0 and 7 on rank 1" in said[0]


def test_a_script_whose_ranks_have_different_settings_is_refused(ranks):
    assert "seed is" in ranks(setups_of_a_script, 2, [1, 2], [3, 3])[0]
    assert (
        "module.width is 3 on rank 0 and 4 on rank 1"
        in ranks(setups_of_a_script, 2, [1, 1], [3, 4])[1]
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_with_its_last_phase_and_collectives(ranks, rank):
    line = wait_for_line(rank, "stopped")
    assert f"rank {rank} has been stopped by a signal since " in line
    assert "in the forward pass of step 3, after " in line
    assert f"; rank {1 - rank} has waited for " in line
    assert "in the backward pass of step 3" in line


def test_a_rank_asleep_in_its_loader_is_named_with_the_line_of_its_dataset(ranks):
    line = wait_for_line(1, "asleep")
    assert "rank 1 has been in __getitem__ (test_rank_watchdog.py:" in line
    assert "in the loader of step 3" in line


def test_a_rank_that_skipped_a_collective_is_named_with_the_numbers_of_collectives(ranks):
    line = wait_for_line(1, "skipped")
    assert "in collectives that do not match" in line
    assert "rank 1 has skipped at least 1: it has begun " in line


def test_a_rank_that_keeps_the_lock_of_python_is_named_with_its_stack(ranks):
    line = wait_for_line(1, "locked")
    assert "rank 1 has not reported since " in line
    assert "in training_step (test_rank_watchdog.py:" in line
