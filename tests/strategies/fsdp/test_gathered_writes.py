"""Weights that a module changes, hooks and marks: sharded, they act as in one process."""

import copy
import re

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from ranks import furthest, whole
from torch import nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from ravine.strategies import MeshStrategy

ROWS, SHAPE = 16, (10, 6)
LAYOUTS = [
    {"zero_stage": 2, "min_unit_bytes": 1},
    {"zero_stage": 3, "min_unit_bytes": 1},
    {"zero_stage": 3},
    {"zero_stage": 1},
]


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

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        x = torch.linspace(-2, 2, ROWS * 6).reshape(ROWS, 6).mul(3.1).sin()
        data = TensorDataset(x, (x.sum(1) > 0).long())
        return DataLoader(data, batch_size=ROWS // self.ranks)


def train(kind, layout=None, devices=1):
    L.seed_everything(0, verbose=False)
    module = kind()
    module.ranks = devices
    trainer = L.Trainer(
        max_epochs=3,  # of one step each
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=MeshStrategy(**layout) if layout else "auto",
        devices=devices,
    )
    trainer.fit(module)
    return whole(module), getattr(module, "found", {})


def mask():
    return (torch.arange(60).reshape(SHAPE) % 3 > 0).float()


def thirds(w):
    return w.abs() > w.abs().mean()


# each is applied to the weight that those before have left; w is (10, 6), its rows are shared
WRITES = {
    "a row": lambda w: w.__setitem__(0, 0.25),
    "a column": lambda w: w.data.__setitem__((slice(None), 1), 0.25),
    "by a mask": lambda w: w.__setitem__(thirds(w), 0.5),
    "by a mask of data": lambda w: w.data.__setitem__(thirds(w.data), 0.3),
    "some rows": lambda w: w.data[:7].mul_(0.9),
    "a flat view": lambda w: w.data.view(-1)[:7].add_(0.1),
    "a view of a view": lambda w: w.narrow(0, 1, 8)[2:].T[1:].mul_(0.8),
    "rows one by one": lambda w: [row.mul_(1 + 0.01 * i) for i, row in enumerate(w)],
    "unbound rows": lambda w: [row.sub_(row.mean()) for row in w.data.unbind(0)],
    "the first chunk": lambda w: w.data.chunk(2)[0].mul_(0.9),
    "a view of a changed weight": lambda w: (lambda rows: (w.add_(0.1), rows.mul_(2)))(w[:4]),
    "a view and its weight": lambda w: w[:5].copy_(w[5:]),
    "the diagonal": lambda w: w.fill_diagonal_(0.5),
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([1, 7]), 0.5),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([1, 7]), mask()[:2]),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([1, 7]), mask()[:2], alpha=0.1),
    "renorm_": lambda w: w.data.renorm_(2, 0, 0.7),
    "a list": lambda w: torch._foreach_add_([w], [mask()], alpha=0.1),
    "a sum of rows": lambda w: w.sub_(w.sum(0).div_(20)),
    "sorted": lambda w: w.copy_(w.sort(0)[0]),
    "constant_": lambda w: nn.init.constant_(w, 0.4),
    "a vector": lambda w: vector_to_parameters(parameters_to_vector([w]) * 0.9, [w]),
    "into a plain tensor": lambda w: w.copy_(torch.zeros(SHAPE).lerp_(w, 0.9)),
    "normal_": lambda w: w.normal_(),
    "randn_like": lambda w: w.add_(torch.randn_like(w)),
    "zeros_like and normal_": lambda w: w.data.add_(torch.zeros_like(w).normal_()),
    "dropout": lambda w: w.copy_(F.dropout(w, 0.5)),
    "bernoulli": lambda w: w.mul_(torch.bernoulli(torch.full_like(w, 0.5))),
    "kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "orthogonal_": lambda w: nn.init.orthogonal_(w),
}


class Writes(Classifier):
    """Changes one weight in all these ways, and a gradient."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad[:2].mul_(0.5)
        self.net[2].weight.grad = torch.full((3, 10), 0.01)

    @torch.no_grad()
    def on_train_end(self):
        weight = self.net[0].weight
        for name, write in WRITES.items():
            torch.manual_seed(0)
            write(weight)
            self.found[name] = whole(self.net[0])["weight"]


class Halving(nn.Linear):
    """It changes its own parameters in its forward pass."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        self.bias.data += 0.1
        return super().forward(x)


class WritesInForward(Classifier):
    """Under stage 3 the gathered copies are freed after each forward pass of a layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Halving(6, 10), nn.Tanh(), Halving(10, 3))


class HooksOfInit(Classifier):
    """A mask of gradients, and a hook that is removed again."""

    def __init__(self):
        super().__init__()
        self.net[0].weight.register_hook(lambda gradient: gradient * mask())
        self.handle = self.net[2].weight.register_hook(lambda gradient: gradient * 0.1)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.handle.remove()


class HookLater(Classifier):
    def on_train_start(self):
        self.net[0].weight.register_hook(lambda gradient: gradient * 0.1)


class Marks(Classifier):
    """Attributes of parameters that decide their settings."""

    def __init__(self):
        super().__init__()
        self.net[0].weight.no_decay, self.net[2].weight.rate = True, 0.1

    def training_step(self, batch, batch_idx):
        assert self.net[2].weight.rate == 0.1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        decays = [0.0 if hasattr(p, "no_decay") else 0.5 for p in self.parameters()]
        rates = [getattr(p, "rate", 1.0) for p in self.parameters()]
        groups = zip(self.parameters(), rates, decays, strict=True)
        return torch.optim.SGD(
            [{"params": [p], "lr": 0.1 * r, "weight_decay": d} for p, r, d in groups]
        )


class Own(nn.Parameter):
    pass


class ClassOfParameter(Classifier):
    def __init__(self):
        super().__init__()
        self.net[0].weight = Own(self.net[0].weight.data)

    def configure_optimizers(self):
        own = [p for p in self.parameters() if isinstance(p, Own)]
        rest = [p for p in self.parameters() if not isinstance(p, Own)]
        return torch.optim.SGD([{"params": own, "lr": 0.01}, {"params": rest}], lr=0.1)


class OtherWeights(Classifier):
    """The layers are called with other tensors in the place of their parameters."""

    def forward(self, x):
        scaled = {name: p * 1.1 for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, scaled, (x,)) + self.net(x)


class InnerStep(Classifier):
    """A step of SGD within the step (MAML), and gradients of each sample."""

    def training_step(self, batch, batch_idx):
        x, y = batch[0].new_ones(4, 6), batch[1].new_ones(4)  # ranks must have equal ones

        def loss(weights, x, y):
            return F.cross_entropy(torch.func.functional_call(self.net, weights, (x,)), y)

        weights = dict(self.net.named_parameters())
        slopes = torch.autograd.grad(loss(weights, x, y), list(weights.values()), create_graph=True)
        moved = {n: p - 0.1 * d for (n, p), d in zip(weights.items(), slopes, strict=True)}
        each = torch.func.vmap(
            torch.func.grad(lambda w, x, y: loss(w, x[None], y[None])), (None, 0, 0)
        )
        sizes = each({n: p.detach() for n, p in weights.items()}, *batch)["0.weight"]
        sizes = sizes.flatten(1).norm(dim=1)
        own = F.cross_entropy(self(batch[0]), batch[1], reduction="none") / (1 + sizes)
        return own.mean() + loss(moved, *batch)


class SquaredWeights(nn.Linear):
    """Leaves a term of its weight in an attribute."""

    def forward(self, x):
        self.term = self.weight.square().sum()
        return super().forward(x)


class TermsBesideOutputs(Classifier):
    """Terms of weights that hooks and a layer leave beside the output."""

    def __init__(self):
        super().__init__()
        self.terms = []
        self.net = nn.Sequential(SquaredWeights(6, 10), nn.Tanh(), SquaredWeights(10, 3))
        self.net[0].register_forward_hook(self.leave)
        self.net[2].register_forward_pre_hook(self.leave)

    def leave(self, layer, *inputs_and_output):
        self.terms.append((layer.weight * layer.weight.roll(1)).sum())

    def training_step(self, batch, batch_idx):
        self.terms.clear()
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * (sum(self.terms) + self.net[0].term + self.net[2].term)


class OddLayouts(Classifier):
    """A transposed weight, and one in channels_last."""

    def __init__(self):
        super().__init__()
        self.net[0].weight = nn.Parameter(torch.randn(6, 10).t())
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x):
        images = self.conv(torch.stack([x, -x], 1).unflatten(2, (2, 3)))
        return self.net(images.mean(1).flatten(1))


class AliasOfInit(Classifier):
    """The memory of a weight by another name."""

    def __init__(self):
        super().__init__()
        self.alias = [p.data for p in self.net.parameters()]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for values in self.alias:
            values.mul_(0.9)


class OptimizerOfItsOwn(Classifier):
    """An optimizer that Lightning does not know, made before anything is sharded."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.recipe = {"optimizer": torch.optim.Adagrad(self.net.parameters(), lr=0.05)}

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        self.recipe["optimizer"].zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.recipe["optimizer"].step()


class OtherOptimizer(Classifier):
    """Another optimizer after the first step."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.optimizers = [torch.optim.AdamW(self.parameters(), lr=0.01)]


class Pruned(Classifier):
    def on_train_start(self):
        prune.l1_unstructured(self.net[0], "bias", 0.3)


KINDS = [
    Writes, WritesInForward, HooksOfInit, HookLater, Marks, ClassOfParameter, OtherWeights,
    InnerStep, AliasOfInit,
    TermsBesideOutputs, OddLayouts, Pruned, OptimizerOfItsOwn, OtherOptimizer,
]  # fmt: skip


def train_all():
    return {
        (kind.__name__, i): train(kind, how, 2) for kind in KINDS for i, how in enumerate(LAYOUTS)
    }


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_writes_hooks_and_marks_act_as_in_one_process(ranks):
    expected = {kind.__name__: train(kind) for kind in KINDS}
    first, second = ranks(train_all, 2)
    for (kind, layout), (weights, found) in first.items():
        assert furthest(weights, second[kind, layout][0]) == 0, (kind, layout)
        one, states = expected[kind]
        for name, state in states.items():
            assert (found[name] - state).abs().max() < 2e-6, (name, layout)
        assert furthest(weights, one) < 2e-6, (kind, layout)


class ViewOfInit(Classifier):
    def __init__(self):
        super().__init__()
        self.rows = self.net[0].weight.data[:3]


class CommonMemory(Classifier):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(6, 10)
        self.other.weight.data = self.net[0].weight.data


class HookAfterwards(Classifier):
    def __init__(self):
        super().__init__()
        self.net[0].weight.register_post_accumulate_grad_hook(lambda p: None)


class CopiesLater(Classifier):
    def on_train_start(self):
        self.teacher = copy.deepcopy(self.net)


class NeverCalled(Classifier):
    def __init__(self):
        super().__init__()
        self.net[0] = nn.LazyLinear(10)


REFUSED = {
    NeverCalled: r"net\.0\.weight belongs to a lazy layer that has not been called",
    ViewOfInit: r"rows is a view of the parameter net\.0\.weight",
    CommonMemory: r"the parameters net\.0\.weight and other\.weight have the same memory",
    HookAfterwards: r"net\.0\.weight has a hook of register_post_accumulate_grad_hook",
    CopiesLater: r"copy\.deepcopy\(Sequential\) is called for a module whose parameters are sh",
}


def errors_of_all():
    found = []
    for kind in REFUSED:
        with pytest.raises(ValueError, match="allowed") as error:
            train(kind, LAYOUTS[1], 2)
        found.append(str(error.value))
    return found


def test_writes_that_shards_would_lose_are_refused_in_one_line(ranks):
    for texts in ranks(errors_of_all, 2):
        for text, expected in zip(texts, REFUSED.values(), strict=True):
            assert re.search(expected, text)
            assert "\n" not in text
