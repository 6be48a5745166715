"""The monitor names the rank for which others wait, and the share of the time that they wait."""

import csv
import os
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ravine.callbacks.monitoring.straggler_monitor import summarize_ranks
from ravine.cli.trainer import Trainer


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SlowRows(Dataset):
    """Rows that rank 1 reads slowly."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.05 if os.environ["RANK"] == "1" else 0)
        return torch.ones(3)


def log_slowest_rank(folder: str, strategy: str) -> list[dict[str, str]]:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=3,
        log_every_n_steps=3,
        logger="csv",
        default_root_dir=folder,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Linear(), DataLoader(SlowRows()))
    with Path(str(trainer.log_dir), "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_share_is_the_mean_wait_divided_by_the_window():
    assert summarize_ranks([1.0, 3.0, 1.0, 1.0], 6.0) == {
        "throughput/wait_for_slowest_rank": 0.25,
        "throughput/slowest_rank": 1.0,
    }
    assert summarize_ranks([2.0, 2.0], 4.0)["throughput/wait_for_slowest_rank"] == 0.0


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_rank_with_a_slow_loader_is_the_slowest(ranks, tmp_path, strategy):
    (row,) = ranks(log_slowest_rank, 2, str(tmp_path), strategy)[0]
    assert float(row["throughput/slowest_rank"]) == 1
    assert 0.1 < float(row["throughput/wait_for_slowest_rank"]) <= 0.5
