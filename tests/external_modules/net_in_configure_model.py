"""A module that builds its net late: a stack of residual layers and an untied head."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class NetInConfigureModel(L.LightningModule):
    """Classification of 32 fixed samples; the parts are children of the module itself."""

    def __init__(self, width: int = 16, depth: int = 2, lr: float = 0.1, batch_size: int = 8):
        super().__init__()
        self.width, self.depth, self.lr, self.batch_size = width, depth, lr, batch_size
        self.layers = None

    def configure_model(self):
        if self.layers is None:
            self.layers = nn.ModuleList(
                nn.Linear(self.width, self.width) for _ in range(self.depth)
            )
            self.norm = nn.LayerNorm(self.width)
            self.head = nn.Linear(self.width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return self.loader()

    def val_dataloader(self):
        return self.loader()

    def loader(self):
        x = torch.linspace(-3, 3, 32 * self.width).reshape(32, self.width).cos()
        y = torch.arange(32) % 3
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)
