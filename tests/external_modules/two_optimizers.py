"""A module with manual optimization: two nets, two optimizers, each toggled for its own loss."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TwoOptimizers(L.LightningModule):
    """A critic learns where the predictor errs; the predictor learns the data and from it."""

    def __init__(self, width: int = 16, lr: float = 0.05, batch_size: int = 8) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.predictor = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.critic = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1))
        self.lr, self.batch_size = lr, batch_size

    def training_step(self, batch, batch_idx):
        x, y = batch
        for_predictor, for_critic = self.optimizers()

        self.toggle_optimizer(for_critic)
        guess = self.predictor(x).detach()
        critic_score = self.critic(torch.cat((x, guess), 1))
        for_critic.zero_grad()
        self.manual_backward(F.mse_loss(critic_score, (guess - y).square()))
        for_critic.step()
        self.untoggle_optimizer(for_critic)

        self.toggle_optimizer(for_predictor)
        guess = self.predictor(x)
        critic_score = self.critic(torch.cat((x, guess), 1))
        loss = F.mse_loss(guess, y) + 0.1 * critic_score.mean()
        for_predictor.zero_grad()
        self.manual_backward(loss)
        for_predictor.step()
        self.untoggle_optimizer(for_predictor)
        self.log("train_loss", loss.detach())

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.predictor(x), y), sync_dist=True)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.predictor.parameters(), lr=self.lr, momentum=0.9),
            torch.optim.AdamW(self.critic.parameters(), lr=0.01),
        ]

    def train_dataloader(self):
        return self.loader()

    def val_dataloader(self):
        return self.loader()

    def loader(self):
        x = torch.linspace(-1, 1, 32 * 4).reshape(32, 4).sin()
        return DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=self.batch_size)
