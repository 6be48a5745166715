"""Modules that use parameters outside of a layer's forward: sharded, they train as one process."""

import re

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import grad_norm
from ranks import furthest, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from ravine.strategies import MeshStrategy

ROWS = 16
# stage and smallest unit: each layer gathered by itself, or small ones together around a step
LAYOUTS = [(2, 1), (3, 1), (2, 2**20), (3, 2**20)]


class Classifier(L.LightningModule):
    """Two layers, all rows in each step."""

    def __init__(self):
        super().__init__()
        self.ranks = 1
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        x = torch.linspace(-2, 2, ROWS * 6).reshape(ROWS, 6).mul(3.1).sin()
        data = TensorDataset(x, (x.sum(1) > 0).long())
        return DataLoader(data, batch_size=ROWS // self.ranks)

    val_dataloader = train_dataloader


class OptimizerOfInit(Classifier):
    """torch's Adagrad makes its state in its constructor, before anything is sharded."""

    def __init__(self):
        super().__init__()
        self.made = torch.optim.Adagrad(self.net.parameters(), lr=0.1)

    def configure_optimizers(self):
        return self.made


class ListOfInit(Classifier):
    """A plain list of weights, made before anything is sharded."""

    def __init__(self):
        super().__init__()
        self.regularized = {"l2": [self.net[0].weight, self.net[2].weight]}

    def training_step(self, batch, batch_idx):
        penalty = sum(w.square().sum() for w in self.regularized["l2"])
        return super().training_step(batch, batch_idx) + 0.1 * penalty


class AssignsData(Classifier):
    def on_train_batch_end(self, *_):
        for p in self.parameters():
            p.data = p.data.clamp(-0.2, 0.2)


class TiedByFunction(Classifier):
    """The embedding is used as a matrix, outside of its forward."""

    def __init__(self):
        super().__init__()
        self.net, self.mix = nn.Embedding(3, 5), nn.Linear(5, 5)

    def forward(self, x):
        mean = self.net((x * 9).long() % 3).mean(1)
        return F.linear(self.mix(mean).tanh(), self.net.weight)


class Coder(nn.Module):
    """Layers that methods other than forward call; one of them also in forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
        self.outer, self.scale = nn.Linear(10, 3), nn.Parameter(torch.ones(10))

    def encode(self, x):
        return self.inner(x) * self.scale

    def forward(self, h):
        return self.outer(h) + self.scale.sum()


class CallsMethods(Classifier):
    def __init__(self):
        super().__init__()
        self.net = Coder()

    def forward(self, x):
        return self.net(self.net.encode(x)) + self.net.outer(self.net.encode(-x))


class Lists(Classifier):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(10), torch.ones(3)])
        self.shifts = nn.ParameterDict({"a": torch.zeros(3)})

    def forward(self, x):
        h = self.net[1](self.net[0](x)) * self.scales[0]
        return self.net[2](h) * self.scales[1] + self.shifts["a"]


class PenaltyBefore(Classifier):
    """A term that is computed before the layers run, so that its gradient comes after theirs."""

    def training_step(self, batch, batch_idx):
        penalty = sum(p.abs().sum() for p in self.parameters())
        return super().training_step(batch, batch_idx) + 0.05 * penalty


class PenaltyByRank(Classifier):
    """A term that weighs the weights by the data: ranks have other gradients."""

    def training_step(self, batch, batch_idx):
        weight = batch[0].abs().mean()
        penalty = sum(p.square().sum() for p in self.parameters())
        return super().training_step(batch, batch_idx) + weight * penalty


class LogsNorms(Classifier):
    def on_before_optimizer_step(self, optimizer):
        norms = grad_norm(self, norm_type=2)
        self.norm = float(norms["grad_2.0_norm_total"])
        self.log_dict(norms)


class GradientPenalty(Classifier):
    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return super().training_step(batch, batch_idx) + slope.square().sum(1).mean()


class TeacherInStep(Classifier):
    """A teacher by assignment, moved within the step, whose method is called."""

    def __init__(self):
        super().__init__()
        self.net, self.teacher = Coder(), Coder().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.data = old.data * 0.9 + new.data * 0.1
            target = self.teacher.encode(batch[0])
        other = self.teacher(self.net.encode(batch[0]))  # with gradients, of frozen weights
        self.teacher.scale.mul_(0.99)
        h = self.net.encode(batch[0])
        return F.mse_loss(h, target) + F.cross_entropy(self.net(h) + other, batch[1])

    def forward(self, x):
        return self.net(self.net.encode(x))


class StepsByHand(CallsMethods):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            optimizer.step()


class WritesInStep(Classifier):
    """Writes into copies that are gathered for the step; large layers are gathered one by one."""

    def training_step(self, batch, batch_idx):
        self.net[2].weight.data.mul_(0.9)
        loss = super().training_step(batch, batch_idx)
        self.net[0].bias.data.clamp_(-0.01, 0.01)
        self.net[2].bias.data = self.net[2].bias.data * 0.9
        return loss


KINDS = [
    OptimizerOfInit, ListOfInit, AssignsData, TiedByFunction, CallsMethods, Lists, PenaltyBefore,
    PenaltyByRank, LogsNorms, GradientPenalty, TeacherInStep, StepsByHand, WritesInStep,
]  # fmt: skip


def train(kind, strategy="auto", devices=1, precision="32-true"):
    L.seed_everything(0, verbose=False)
    module = kind()
    module.ranks = devices
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        strategy=strategy
        if strategy == "auto"
        else MeshStrategy(zero_stage=strategy[0], min_unit_bytes=strategy[1]),
        devices=devices,
        log_every_n_steps=1,
        precision=precision,
    )
    trainer.fit(module)
    shards = any(isinstance(p, DTensor) for p in module.parameters())
    metrics = {"val_loss": trainer.callback_metrics["val_loss"].item()}
    return whole(module), metrics | {"norm": getattr(module, "norm", 0.0)}, shards


def train_all(strategies):
    return {(kind.__name__, s): train(kind, s, 2) for kind in KINDS for s in strategies}


# the rows divide by the ranks: no row is seen twice
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_parameters_may_be_used_outside_of_a_forward(ranks):
    expected = {kind.__name__: train(kind)[:2] for kind in KINDS}
    for found in ranks(train_all, 2, LAYOUTS):
        for (kind, strategy), (weights, metrics, shards) in found.items():
            whole_weights, one = expected[kind]
            assert shards
            assert furthest(weights, whole_weights) < 2e-6, (kind, strategy)
            assert metrics == pytest.approx(one, rel=1e-5), (kind, strategy)


class CallsBackward(CallsMethods):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        Classifier.training_step(self, batch, batch_idx).backward()
        self.optimizers().step()


class StrayTensor(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), torch.zeros(7, requires_grad=True)], lr=0.1)


class OtherShape(Classifier):
    def on_train_batch_end(self, *_):
        self.net[0].bias.data = torch.zeros(4)


class WritesOnce(Classifier):
    """In its third step: no search for changed values would happen by then."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 2:
            with torch.no_grad():
                self.net[0].bias.clamp_(-0.01, 0.01)
        return loss


REFUSED = {
    (
        CallsBackward,
        (3, 1),
        "32-true",
    ): r"weights that are used .*; use self.manual_backward\(loss\)$",
    (StrayTensor, (3, None), "32-true"): r"a tensor of shape \(7,\) that is not a parameter of Stra"
    ".*; register the tensor as an nn.Parameter of the module$",
    (OtherShape, (3, None), "32-true"): r"\(4,\) to a sharded parameter of shape \(10,\); .*; use"
    r" Trainer\(strategy=\"ddp\"\)$",
    (WritesOnce, (2, 1), "bf16-mixed"): r"net\.0\.bias was changed within a step, .*; change it in"
    " on_train_batch_end$",
}


def errors_of_all():
    found = []
    for kind, strategy, precision in REFUSED:
        with pytest.raises(ValueError, match="allowed: ") as error:
            train(kind, strategy, 2, precision)
        found.append(str(error.value))
    return found


def test_uses_that_sharding_would_break_are_refused_in_one_line(ranks):
    for texts in ranks(errors_of_all, 2):
        for text, expected in zip(texts, REFUSED.values(), strict=True):
            assert re.search(expected, text)
            assert "\n" not in text
