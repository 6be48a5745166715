"""Gradients of the last optimizer step are freed before the forward pass of the next one."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from tensor_bytes import tensor_bytes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine.cli import trainer as trainer_module
from ravine.cli.trainer import Trainer
from ravine.lightning_modules import TaskModule
from ravine.strategies import MeshStrategy, gradient_readers

QUIET = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


class Net(L.LightningModule):
    """Layers of one width, so that gradients and activations are as large as the batch is wide."""

    def __init__(self, width=16, layers=3, batch=4, batches=8):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(layers))
        )
        self.data = TensorDataset(torch.randn(batches * batch, width))
        self.batch = batch

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Watch(L.Callback):
    """Record whether the first weight has a gradient: when a forward begins, and after a batch."""

    def __init__(self):
        self.forward, self.end = [], []

    def on_train_start(self, trainer, module):
        def record(*_):
            if module.training:
                self.forward.append(module.net[0][0].weight.grad is not None)

        module.net.register_forward_pre_hook(record)

    def on_train_batch_end(self, trainer, module, *_):
        self.end.append(module.net[0][0].weight.grad is not None)


def fit(module, *callbacks, kind=Trainer, **options):
    watch = Watch()
    options = {"max_steps": 4, "limit_val_batches": 0, "devices": 1} | options
    trainer = kind(accelerator="cpu", callbacks=[watch, *callbacks], **QUIET, **options)
    trainer.fit(module)
    return watch


LOOPS = {
    "the lean loop": {},
    "Lightning's loop": {"profiler": "simple"},
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_forward_pass_begins_without_gradients_and_a_batch_ends_with_them(tmp_path, loop):
    watch = fit(Net(), default_root_dir=tmp_path, **LOOPS[loop])
    assert watch.forward == [False] * 4
    assert watch.end == [True] * 4


def test_micro_batches_of_one_step_keep_their_gradients(tmp_path):
    schedule = GradientAccumulationScheduler({0: 2, 1: 4})
    watch = fit(Net(batches=6), schedule, max_steps=5, default_root_dir=tmp_path)
    first, second = [False, True] * 3, [False, True, True, True, False, True]  # 4 and the last 2
    assert watch.forward == first + second


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_are_bitwise_those_of_lightnings_order(tmp_path, monkeypatch, loop):
    def trained(frees):
        torch.manual_seed(0)
        for place in (trainer_module, gradient_readers):
            monkeypatch.setattr(place, "can_free_gradients_early", lambda trainer: frees)
        options = {"max_steps": 6, "val_check_interval": 3, "limit_val_batches": 1}
        options |= {"accumulate_grad_batches": 3, "default_root_dir": tmp_path}
        fit(module := Skipping(), **options, **LOOPS[loop])
        return [p.detach().clone() for p in module.parameters()]

    assert all(torch.equal(*pair) for pair in zip(trained(True), trained(False), strict=True))


class Skipping(Net):
    """Skips some micro-batches, once all of a step."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (0, 3, 4, 5) else super().training_step(batch, batch_idx)


def test_the_peak_of_a_step_is_that_of_the_larger_of_its_two_phases(tmp_path):
    width, layers, rows = 256, 8, 256
    module = Net(width, layers, batch=rows)
    weights = sum(p.numel() for p in module.parameters()) * 4
    one = rows * width * 4
    with tensor_bytes() as activations:  # one for each layer is kept, and the batch is another's
        kept = module.net(torch.zeros(rows, width))
    del kept
    with tensor_bytes() as found:
        fit(module, max_steps=3, default_root_dir=tmp_path)
    must = weights + 2 * weights + max(activations.peak, weights + one)
    assert weights + found.peak <= 1.10 * must


class OverridesZeroGrad(Net):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)


class ReadsBeforeZeroGrad(Net):
    def on_before_zero_grad(self, optimizer):
        pass


class ReadsInItsStep(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * self.last_norm()

    def last_norm(self):
        return norm_of(self.net[0][0].weight)


def norm_of(weight):
    return 0.0 if weight.grad is None else weight.grad.norm()


class ReadsInADecoratedHelper(ReadsInItsStep):
    @torch.no_grad()
    def last_norm(self):
        return norm_of(self.net[0][0].weight)


class ReadsInAProperty(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * self.last_norm

    @property
    def last_norm(self):
        return norm_of(self.net[0][0].weight)


class ReadsInAClassMethod(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * self.norm_of_weights(self.net)

    @classmethod
    def norm_of_weights(cls, net):
        return norm_of(net[0][0].weight)


class OwnZeroGrad(Net):
    def configure_optimizers(self):
        class Keeps(torch.optim.Adam):
            def zero_grad(self, set_to_none=True):
                super().zero_grad(set_to_none=False)

        return Keeps(self.parameters(), lr=1e-3)


class Reader(L.Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        pass


@pytest.mark.parametrize(
    ("kind", "callbacks"),
    [
        (OverridesZeroGrad, ()),
        (ReadsBeforeZeroGrad, ()),
        (ReadsInItsStep, ()),
        (ReadsInADecoratedHelper, ()),
        (ReadsInAProperty, ()),
        (ReadsInAClassMethod, ()),
        (OwnZeroGrad, ()),
        (Net, (Reader(),)),
    ],
)
def test_gradients_stay_where_they_are_read_later(tmp_path, kind, callbacks):
    assert fit(kind(), *callbacks, default_root_dir=tmp_path).forward == [False, *[True] * 3]


class LogsItsGradients(Net):
    """Reads gradients before the step alone."""

    def on_before_optimizer_step(self, optimizer):
        assert self.net[0][0].weight.grad is not None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert self.net[0][0].weight.grad is not None


def test_gradients_that_are_read_within_the_step_are_freed_too(tmp_path):
    assert not any(fit(LogsItsGradients(), default_root_dir=tmp_path).forward)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


def test_gradients_of_manual_optimization_stay(tmp_path):
    assert fit(Manual(), default_root_dir=tmp_path).forward == [False, *[True] * 3]


def watched(strategy, kind):
    strategy = MeshStrategy() if strategy == "zero3" else strategy
    module, watch = Net(), None
    watch = fit(module, kind=kind, devices=int(os.environ["WORLD_SIZE"]), strategy=strategy)
    return watch.forward


def test_a_stock_trainer_frees_the_gradients_of_shards(ranks):
    assert ranks(watched, 2, "zero3", L.Trainer) == [[False] * 4] * 2


def test_ddp_keeps_the_views_of_its_buckets(ranks):
    assert ranks(watched, 2, "ddp", Trainer) == [[False, *[True] * 3]] * 2


class OneMatrix(TaskModule):
    """A task with the default optimizer."""

    def build_net(self):
        return nn.Linear(512, 512, bias=False)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(3, 512)), batch_size=1)


def step_of(optimizer, weight):
    """Bytes above those before it at the peak of the third step, and the weights after it."""
    for _ in range(3):
        weight.grad = torch.full_like(weight, 0.5)
        with tensor_bytes() as found:
            optimizer.step()
    return found.peak, weight.detach().clone()


def test_the_default_optimizer_keeps_no_temporary_tensor_of_the_size_of_a_parameter():
    module = OneMatrix()
    module.configure_model()
    weight = module.net.weight
    other = nn.Parameter(weight.detach().clone())
    peak, params = step_of(module.configure_optimizers(), weight)
    stock_peak, stock_params = step_of(torch.optim.AdamW([other], lr=module.lr), other)
    assert torch.equal(params, stock_params)
    assert stock_peak >= 4 * weight.numel()
    assert peak < 0.01 * stock_peak


DTYPES = {torch.float32: True, torch.float64: True, torch.bfloat16: None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_optimizer_is_fused_where_its_values_are_those_of_the_loop(dtype):
    module = OneMatrix()
    module.configure_model()
    optimizer = module.to(dtype).configure_optimizers()
    assert optimizer.defaults["fused"] is DTYPES[dtype]


def test_the_default_optimizer_clips_with_a_gradient_scaler(tmp_path):
    module = OneMatrix()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = Trainer(
        max_steps=2, plugins=[precision], gradient_clip_val=1.0, accelerator="cpu",
        default_root_dir=tmp_path, **QUIET,
    )  # fmt: skip
    trainer.fit(module)
    assert trainer.global_step == 2
    assert trainer.optimizers[0].defaults["fused"] is None
