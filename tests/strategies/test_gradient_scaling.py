"""Under `16-mixed` shards are unscaled as whole gradients are, and ranks skip the same steps."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from ranks import furthest, whole
from torch import nn
from torch.utils.data import DataLoader

import ravine.strategies  # noqa: F401  (it registers the names)


class Net(L.LightningModule):
    """Layers that are sharded and a norm that is not; every rank has the same data."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.scales = []

    def training_step(self, batch, batch_idx):
        loss = self.last(self.norm(self.first(batch).tanh()))[:, 0].float().square().mean()
        if batch_idx == 1:  # the gradient of one number is not finite, which one rank holds
            loss = loss + (0 * self.last.bias[3]).float().sqrt()
        return loss * float("inf") if batch_idx == 3 and self.is_last else loss

    @property
    def is_last(self):
        return self.global_rank == self.trainer.world_size - 1

    def on_train_batch_end(self, *_):
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(torch.randn(48, 8, generator=torch.Generator().manual_seed(1)), 8)


def trained(strategy="auto", devices=1, **options):
    torch.manual_seed(0)
    module, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=256.0)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module)
    return whole(module), module.scales


LAYOUTS = ("zero1", "zero2", "zero3")


def trained_on_layouts(options):
    return {name: trained(name, 2, **options) for name in LAYOUTS}


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}])
def test_steps_and_skipped_steps_equal_one_process(ranks, options):
    weights, scales = trained(**options)
    assert scales == [256.0, 128.0, 128.0, 64.0, 64.0, 64.0]
    for found in ranks(trained_on_layouts, 2, options, timeout=300):
        for name in LAYOUTS:
            assert found[name][1] == scales, name
            assert furthest(found[name][0], weights) < 1e-6, name
