"""Optimizers that know nothing of shards: each kind trains as on one process, or is refused."""

import random
from functools import partial

import lightning as L
import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import furthest, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import ExactResume, OptimizerPlan
from ravine.strategies import AtomicCheckpointIO, CheckpointError, MeshStrategy
from ravine.strategies.fsdp.optimizer_probe import probe_optimizer
from ravine.strategies.fsdp.sharded_optimizer import shard_optimizer_steps


class Base(Optimizer):
    """w <- w - lr * move(gradient)."""

    def __init__(self, params, lr=0.05, **settings):
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] * self.move(p, p.grad, self.state[p], group)
        return loss

    def begin(self):
        pass


class Plain(Base):
    """Elementwise, by operations that mix parameters and tensors of its own."""

    def move(self, p, gradient, state, group):
        if not state:
            state["mean"], state["count"] = torch.zeros(p.shape), torch.zeros(1)
            state["nested"] = {"last": torch.zeros(p.shape)}
        state["count"] += 1
        state["mean"].lerp_(gradient, 0.1)
        state["nested"]["last"].copy_(gradient)
        return state["mean"].sign() + 0.1 * state["nested"]["last"]


class TrustRatio(Base):
    """LARS and LAMB: the norm of each tensor sets its rate."""

    def move(self, p, gradient, state, group):
        mean = state.setdefault("mean", torch.zeros(p.shape)).lerp_(gradient, 0.1)
        state["ratio"] = p.norm() / mean.norm().clamp(min=1e-6)
        return mean * state["ratio"].clamp(max=10)


class Factored(Base):
    """Adafactor: means of rows and columns, in other shapes than the parameter's."""

    def move(self, p, gradient, state, group):
        if p.ndim < 2:
            return gradient
        rows = state.setdefault("rows", torch.zeros(p.shape[0], 1))
        rows.lerp_(gradient.square().mean(1, keepdim=True), 0.1)
        return gradient / rows.add(1e-3).sqrt()


class OneRate(Base):
    """Prodigy and D-Adaptation: one number for all parameters."""

    def begin(self):
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.total = sum(float((p.grad * p).sum()) for p in found)

    def move(self, p, gradient, state, group):
        return gradient * (1 + min(abs(self.total), 1.0))


class Modes(Plain):
    """As schedule-free optimizers: two sets of weights, moved by train() and eval()."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr, training=False)

    def begin(self):
        if not all(group["training"] for group in self.param_groups):
            raise RuntimeError("train() was not called")

    def train(self):
        self._move(True, -1)

    def eval(self):
        self._move(False, 1)

    @torch.no_grad()
    def _move(self, training, sign):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "mean" in self.state[p]:
                        p.add_(self.state[p]["mean"], alpha=sign * 0.125)
            group["training"] = training


class NeedsTwo(Base):
    """Fails in a trial, and in any run."""

    def move(self, p, gradient, state, group):
        raise RuntimeError("two of them\nare needed")


class Outside(Base):
    """Its mean is an attribute, saved by its own state_dict."""

    def move(self, p, gradient, state, group):
        means = self.__dict__.setdefault("means", {})
        return means.setdefault(p.shape, torch.zeros(p.shape)).lerp_(gradient, 0.1)

    def state_dict(self):
        return {**super().state_dict(), "means": list(self.__dict__.get("means", {}).values())}


TORCH = {
    "elementwise": [
        *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD"),
    ],
    "per tensor": ["Adafactor", "Muon"],
    "coupled": ["LBFGS"],
}


def parameters(shapes=((8, 6), (8,))):
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in TORCH.items() for n in names])
def test_the_kind_of_each_optimizer_of_torch_is_measured(kind, name):
    made = getattr(torch.optim, name)(parameters([(8, 6)] if name == "Muon" else [(8, 6), (8,)]))
    assert probe_optimizer(made).update_kind == kind


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (Plain, "elementwise"), (Modes, "elementwise"), (TrustRatio, "per tensor"),
        (Factored, "per tensor"), (OneRate, "coupled"), (NeedsTwo, "coupled"), (Outside, "coupled"),
    ],
)  # fmt: skip
def test_the_kind_of_an_external_optimizer_is_measured(optimizer, kind):
    made = optimizer([{"params": parameters(), "lr": 0.0}])  # a schedule may begin at zero
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    before = [p.detach().clone() for group in made.param_groups for p in group["params"]]
    assert probe_optimizer(made).update_kind == kind
    assert all(
        torch.equal(a, b) for a, b in zip(before, made.param_groups[0]["params"], strict=True)
    )
    assert not made.state
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_fused_kernels_are_elementwise_although_they_round_the_last_numbers_otherwise(name, dtype):
    given = [nn.Parameter(p.detach().to(dtype)) for p in parameters([(8, 6), (8,), (200, 130)])]
    made = getattr(torch.optim, name)(given, lr=0.1, fused=True)
    assert probe_optimizer(made).update_kind == "elementwise"


@pytest.mark.parametrize("block", [64, 128, 256, 2048])
def test_an_optimizer_with_blockwise_state_is_not_elementwise(block):
    """8-bit optimizers keep one scale for a block, which the rows of a rank would cut."""

    class Blocks(Base):
        def move(self, p, gradient, state, group):
            flat = F.pad(gradient.flatten(), (0, -gradient.numel() % block)).view(-1, block)
            scaled = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
            return scaled.flatten()[: gradient.numel()].view_as(gradient)

    for shapes in ([(20, 6)], [(300,)], [(200, 130)], [(5000,)]):
        assert probe_optimizer(Blocks(parameters(shapes))).update_kind == "per tensor"


def test_large_tensors_are_probed_at_full_size():
    """An optimizer that factors only what has 128 rows or more is not elementwise there."""

    class Thresholds(Base):
        def move(self, p, gradient, state, group):
            return gradient / gradient.norm() if min(p.shape) >= 128 else gradient

    assert probe_optimizer(Thresholds(parameters([(20, 6)]))).update_kind == "elementwise"
    assert (
        probe_optimizer(Thresholds(parameters([(20, 6), (200, 130)]))).update_kind == "per tensor"
    )


class Net(L.LightningModule):
    def __init__(self, factory, ranks):
        super().__init__()
        self.factory, self.ranks = factory, ranks
        self.net = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim < 2]
        return self.factory([{"params": matrices}, {"params": others}])

    def on_train_start(self):
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, Modes):
                self.optimizers().train()

    def train_dataloader(self):
        x = torch.linspace(-2, 2, 48).reshape(8, 6).mul(3.1).sin()
        data = TensorDataset(x, (x.sum(1) > 0).long())
        return DataLoader(data, batch_size=8 // self.ranks)


class SaveAt(L.Callback):
    def __init__(self, path, step=2):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def train(factory, plan, layout=None, save=None, resume=None, at=2):
    devices = 2 if layout else 1
    L.seed_everything(0, verbose=False)
    module = Net(factory, devices)
    callbacks = [OptimizerPlan(factory, decay="all")] if plan else []
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), *callbacks, *([SaveAt(save, at)] if save else [])],
        plugins=[AtomicCheckpointIO()],
        strategy=MeshStrategy(**layout) if layout else "auto",
        devices=devices,
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    return whole(module)


OPTIMIZERS = {
    "plain": Plain,
    "trust ratio": TrustRatio,
    "factored": Factored,
    "modes": Modes,
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "Rprop": torch.optim.Rprop,
    "Adafactor": partial(torch.optim.Adafactor, lr=0.05),
}
LAYOUTS = {
    "zero3": {"zero_stage": 3},
    "parts": {"zero_stage": 2, "save_distributed_checkpoint": True},
}


def runs(folder):
    """For each optimizer: straight, resumed from its own file, and from one process's."""
    found = {}
    for name, factory in OPTIMIZERS.items():
        for layout, how in LAYOUTS.items():
            for plan in (True, False) if layout == "zero3" else (True,):
                file = folder / f"{name} {layout} {plan}.ckpt"
                straight = train(factory, plan, how, save=file)
                resumed = train(factory, plan, how, resume=file)
                single = train(factory, plan, how, resume=folder / f"{name} {plan}.ckpt")
                found[name, layout, plan] = (straight, resumed, single)
    return found


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_external_optimizers_train_and_resume_on_shards_as_on_one_process(ranks, tmp_path):
    one = {
        (name, plan): train(factory, plan, save=tmp_path / f"{name} {plan}.ckpt")
        for name, factory in OPTIMIZERS.items()
        for plan in (True, False)
    }
    for found in ranks(runs, 2, tmp_path):
        for (name, layout, plan), (straight, resumed, single) in found.items():
            assert furthest(straight, one[name, plan]) < 2e-6, (name, layout, plan)
            assert furthest(straight, resumed) == 0, (name, layout, plan)
            assert furthest(single, one[name, plan]) < 2e-6, (name, layout, plan)
    for name, factory in OPTIMIZERS.items():
        for layout in LAYOUTS:
            file = tmp_path / f"{name} {layout} True.ckpt"
            assert furthest(train(factory, True, resume=file), one[name, True]) < 2e-6, name


class Late(Plain):
    """Has one more tensor in its state from the fourth step on."""

    def move(self, p, gradient, state, group):
        if state.get("count", 0) >= 3:
            state["late"] = torch.zeros(p.shape)
        return super().move(p, gradient, state, group)


def saves_late(folder):
    train(Late, False, LAYOUTS["zero3"], save=folder / "early.ckpt", at=3)
    with pytest.raises(CheckpointError, match="Late") as error:
        train(Late, False, LAYOUTS["zero3"], save=folder / "late.ckpt", at=4)
    return str(error.value)


def test_state_that_the_probe_did_not_have_is_not_saved_as_a_shard(ranks, tmp_path):
    for said in ranks(saves_late, 2, tmp_path):
        assert said == (
            "Late keeps['late'] in its state, which it did not in a trial of three steps, so its "
            "shards cannot be gathered; allowed: entries that the first steps create; use "
            'Trainer(strategy="ddp")'
        )


def split_otherwise():
    """What is said of a whole-tensor optimizer whose parameters are split in these ways."""
    dist.init_process_group("gloo")
    found = []
    for shape, places in (((2,), [Shard(1)]), ((2, 1), [Shard(0), Shard(0)]), ((2,), [Shard(0)])):
        mesh = init_device_mesh("cpu", shape)
        p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, places))
        try:
            shard_optimizer_steps(TrustRatio([p]))
        except ValueError as error:
            found.append(str(error))
    return found


def test_full_tensors_are_refused_for_parameters_that_are_split_by_columns_or_twice(ranks):
    for said in ranks(split_otherwise, 2):
        assert (
            said
            == [
                "TrustRatio needs full tensors, and these are split over more than the "
                "data-parallel ranks; allowed: elementwise optimizers such as AdamW; use "
                'Trainer(strategy="zero3")'
            ]
            * 2
        )


def sent():
    """Numbers that this rank sends to owners and from them, message by message."""
    numbers, send = [], dist.all_to_all_single

    def counted(received, tensor, *args, **how):
        numbers.append(tensor.numel())
        return send(received, tensor, *args, **how)

    dist.all_to_all_single = counted
    train(TrustRatio, False, LAYOUTS["zero3"])
    return numbers


def test_owners_of_whole_tensors_are_sent_three_times_the_weights_in_two_messages_a_step(ranks):
    weights = sum(p.numel() for p in Net(None, 1).parameters())
    first, second = ranks(sent, 2)
    assert len(first) == len(second) == 2 * 4  # of four steps
    for gathered, scattered in zip(range(0, 8, 2), range(1, 8, 2), strict=True):
        assert first[gathered] + second[gathered] == 2 * weights  # values and gradients
        assert first[scattered] + second[scattered] == weights


def refusals():
    """What is said of each optimizer, and the training steps that were begun."""
    found, started = [], []
    Net.training_step = lambda self, *_: started.append(self)
    for factory in (OneRate, NeedsTwo, lambda groups: torch.optim.LBFGS(groups[0]["params"])):
        for zero in (1, 3):
            with pytest.raises(ValueError, match="ddp") as error:
                train(factory, False, {"zero_stage": zero})
            found.append(str(error.value))
    return found, len(started)


def test_coupled_optimizers_are_refused_in_one_line_before_the_first_step(ranks):
    for texts, started in ranks(refusals, 2):
        assert started == 0
        for text, name in zip(
            texts, ["OneRate"] * 2 + ["NeedsTwo"] * 2 + ["LBFGS"] * 2, strict=True
        ):
            assert name in text
            assert "\n" not in text
            assert text.endswith('; use Trainer(strategy="ddp")')
