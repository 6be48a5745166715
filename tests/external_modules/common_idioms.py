"""Fifteen modules as tutorials write them, one idiom each; they import only lightning and torch.

Each has its samples in `samples()` and its optimizer in `optimizer(parameters)`, so that a plan can
be given the same one.
"""

import copy

import lightning as L
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset


def features():
    """32 rows of 8 numbers."""
    return torch.linspace(-2, 2, 256).reshape(32, 8).mul(3.1).sin()


def labelled():
    x = features()
    return TensorDataset(x, (x.sum(1) > 0).long())


def images():
    x = features()
    return TensorDataset(x.repeat(1, 8).reshape(32, 1, 8, 8), (x.sum(1) > 0).long())


def sentences():
    return TensorDataset((features() * 5).long() % 11, (features().sum(1) > 0).long())


class Idiom(L.LightningModule):
    """What all share: labelled rows and Adam."""

    samples = staticmethod(labelled)

    @staticmethod
    def optimizer(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Autoencoder(Idiom):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0])
        self.log("train_loss", loss)
        return loss


class VAE(Idiom):
    """Methods other than forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.mean, self.log_var = nn.Linear(16, 2), nn.Linear(16, 2)
        self.outer = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8))

    def encode(self, x):
        h = self.inner(x).relu()
        return self.mean(h), self.log_var(h)

    def decode(self, z):
        return self.outer(z)

    def training_step(self, batch, batch_idx):
        mean, log_var = self.encode(batch[0])
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).mean()
        loss = F.mse_loss(self.decode(z), batch[0]) + 0.1 * divergence
        self.log("train_loss", loss)
        return loss


class GAN(Idiom):
    """Manual optimization of two networks."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        self.toggle_optimizer(first)
        loss = F.softplus(-self.critic(fake)).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        real = F.softplus(-self.critic(batch[0])).mean()
        loss = real + F.softplus(self.critic(fake.detach())).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def configure_optimizers(self):
        return [self.optimizer(net.parameters()) for net in (self.generator, self.critic)]


class LSTM(Idiom):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.lstm(x[..., None])[0][:, -1])


class TransformerClassifier(Idiom):
    samples = staticmethod(sentences)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Transfer(Idiom):
    """A frozen backbone and a new classifier."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.backbone.requires_grad_(False)
        self.classifier = nn.Linear(16, 2)

    def forward(self, x):
        return self.classifier(self.backbone(x))


class ConvBN(Idiom):
    samples = staticmethod(images)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(128, 2)

    def forward(self, x):
        return self.head(self.net(x))


class Tied(Idiom):
    """The embedding is the output matrix too."""

    samples = staticmethod(sentences)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight

    def training_step(self, batch, batch_idx):
        tokens = batch[0]
        logits = self.out(self.mix(self.embed(tokens[:, :-1])).relu())
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss


class Lazy(Idiom):
    """Layers that learn their width from a first batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(2))
        self(torch.zeros(1, 8))

    def forward(self, x):
        return self.net(x)


class WeightNorm(Idiom):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 16))
        self.head = weight_norm(nn.Linear(16, 2))

    def forward(self, x):
        return self.head(self.net(x).relu())


class SkipsBatches(Idiom):
    """No loss for every other batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class DictOutput(SkipsBatches):
    """The step gives a dictionary, which a hook reads."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(outputs["logits"].shape)


class Teacher(Idiom):
    """A teacher follows its student, parameter by parameter."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        with torch.no_grad():
            target = self.teacher(x.flip(1))
        loss = -F.cosine_similarity(self.head(self.student(x)), target).mean()
        self.log("train_loss", loss)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for new, old in pairs:
            old.lerp_(new, 0.1)


class OwnSchedule(SkipsBatches):
    """Reads the rate of its own scheduler in each step."""

    def training_step(self, batch, batch_idx):
        self.log("rate", self.lr_schedulers().get_last_lr()[0])
        return Idiom.training_step(self, batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 1)]


class LogsMetrics(SkipsBatches):
    """A metric of torchmetrics in the module, logged each step and each epoch."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        return F.cross_entropy(logits, batch[1])


IDIOMS = [
    Autoencoder, VAE, GAN, LSTM, TransformerClassifier, Transfer, ConvBN, Tied, Lazy, WeightNorm,
    SkipsBatches, DictOutput, Teacher, OwnSchedule, LogsMetrics,
]  # fmt: skip
