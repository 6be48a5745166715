"""A common LightningModule: the net in __init__, its own AdamW, its own loaders."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class NetInInit(L.LightningModule):
    """Regression on 32 fixed samples."""

    def __init__(self, width: int = 16, lr: float = 0.01, batch_size: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.lr, self.batch_size = lr, batch_size

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.net(x), y), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return self.loader()

    def val_dataloader(self):
        return self.loader()

    def loader(self):
        x = torch.linspace(-1, 1, 32 * 4).reshape(32, 4).sin()
        return DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=self.batch_size)
