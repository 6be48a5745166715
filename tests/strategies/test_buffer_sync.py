"""Statistics and random numbers of modules under MeshStrategy equal those of DDP."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from ranks import furthest, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from ravine.strategies import MeshStrategy
from ravine.strategies.sharding_errors import ShardingError


class Statistics(L.LightningModule):
    """BatchNorm, dropout, and a queue that is assigned anew in each step and read in the next."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.3), nn.Linear(10, 3)
        )
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("table", torch.ones(4))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([self.net[1].running_mean.clone(), self.queue.clone()])
        logits = self.net(batch[0]) + 0.1 * torch.randn(3)
        loss = F.cross_entropy(logits + self.queue, batch[1])
        self.queue = 0.5 * self.queue + logits.detach().mean(0)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        x = torch.linspace(-2, 2, 240).reshape(40, 6).mul(3.1).sin()
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)


def train(kind, strategy):
    L.seed_everything(0, verbose=False)
    module = kind()
    trainer = L.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=strategy,
        devices=2,
    )
    trainer.fit(module)
    return whole(module), module.seen, getattr(trainer.strategy, "buffer_sync", None)


def on_each_layout():
    found = {"ddp": train(Statistics, "ddp")[:2]}
    for zero in (1, 2, 3):
        weights, seen, sync = train(Statistics, MeshStrategy(zero_stage=zero))
        found[zero] = weights, seen
        assert "queue" in sync.broadcast_names
        assert "table" in sync.unchanged_fingerprints
    return found


def test_buffers_and_random_numbers_equal_those_of_ddp(ranks):
    results = ranks(on_each_layout, 2)
    for layout, (weights, _) in results[0].items():
        expected = results[0]["ddp"]
        assert furthest(weights, expected[0]) < 1e-6, layout
        for rank in results:
            pairs = zip(rank[layout][1], expected[1], strict=True)
            for actual, stock in pairs:
                for one, other in zip(actual, stock, strict=True):
                    assert torch.allclose(one, other, atol=1e-6), layout


class CallsOperator(Statistics):
    """Mixes plain tensors with a DTensor of its own."""

    def training_step(self, batch, batch_idx):
        mesh = init_device_mesh("cpu", (2,))
        own = distribute_tensor(torch.ones(6, 3), mesh, [Shard(0)])
        return (batch[0] @ own).sum()


def refused():
    with pytest.raises(ShardingError) as error:
        train(CallsOperator, MeshStrategy(min_unit_bytes=1))
    return str(error.value)


def test_an_error_of_sharded_tensors_names_module_line_and_strategies(ranks):
    for text in ranks(refused, 2):
        assert text.startswith("CallsOperator: an operation in its step (test_buffer_sync.py:")
        assert text.endswith('; use Trainer(strategy="ddp")')
        assert "mixed torch.Tensor and DTensor" in text
        assert "\n" not in text
