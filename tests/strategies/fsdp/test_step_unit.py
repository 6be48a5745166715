"""Small children of a module are one unit, gathered around each step, as for any small network."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from ranks import furthest, run_ranks, whole
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import EMA, ExactResume, GradientClipping
from ravine.strategies import AtomicCheckpointIO, MeshStrategy, parallel_module

ROWS = 16
SMALLEST = parallel_module.DEFAULT_MIN_UNIT_BYTES  # in ranks of tests it is 0
# rows divide by the ranks, and an epoch is an optimizer step
pytestmark = pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")


class Small(L.LightningModule):
    """Several small children; with `norm`, statistics that each rank computes from its own rows."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 10)
        self.norm = nn.BatchNorm1d(10) if norm else nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.norm(self.second(self.first(x).tanh())))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    def train_dataloader(self):
        x = torch.linspace(-2, 2, ROWS * 6).reshape(ROWS, 6).mul(3.1).sin()
        size = ROWS // (self.trainer.world_size * self.trainer.accumulate_grad_batches)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=size)

    val_dataloader = train_dataloader


class SaveAt(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and batch_idx == 1:
            trainer.save_checkpoint(self.path)


def train(strategy, norm=False, save=None, resume=None):
    """Four clipped steps of two micro-batches: weights, average, statistics and loss; norms."""
    L.seed_everything(0, verbose=False)
    parallel_module.DEFAULT_MIN_UNIT_BYTES = SMALLEST
    module, ema, clipping, norms = Small(norm), EMA(0.5), GradientClipping(0.2), []

    class Norms(L.Callback):
        def on_train_batch_end(self, *_):
            if clipping._norm is not None:  # a step was taken
                norms.append(clipping._norm)

    callbacks = [ExactResume(), ema, *([SaveAt(save)] if save else [])]
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=MeshStrategy(**strategy) if isinstance(strategy, dict) else strategy,
        callbacks=callbacks if norm else [*callbacks, Norms(), clipping],
        gradient_clip_val=0.2 if norm else None,
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True if resume else None)
    unit = module.__dict__.get("_step_unit")
    found = whole(module) | {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name, raw in ema.weights_outside_model.items():
        raw = raw.full_tensor() if isinstance(raw, DTensor) else raw
        found[f"raw {name}"] = raw.detach().clone()
    found["val_loss"] = trainer.callback_metrics["val_loss"]
    return found, norms, 0 if unit is None else len(unit.members)


LAYOUTS = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "parts": {"zero_stage": 3, "save_distributed_checkpoint": True},
}


def runs(folder):
    """With statistics on each layout and ddp; without: straight, and resumed from two files."""
    found = {"ddp": train("ddp", norm=True)}
    for name, how in LAYOUTS.items():
        found[name] = {
            "statistics": train(how, norm=True),
            "straight": train(how, save=folder / f"{name}.ckpt"),
            "resumed": train(how, resume=folder / f"{name}.ckpt"),
            "of one process": train(how, resume=folder / "one.ckpt"),
        }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def one(folder):
    return train("auto", save=folder / "one.ckpt")


@pytest.fixture(scope="module")
def everywhere(folder, one):
    return run_ranks(runs, 2, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_children_are_one_unit_by_default(everywhere, layout):
    assert SMALLEST == 2**20
    for found in everywhere:
        assert [members for *_, members in found[layout].values()] == [4] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_children_train_clipped_and_averaged_as_one_process(one, everywhere, layout):
    weights, norms, _ = one
    assert len(norms) == 4
    assert min(norms) > 0.2
    for found in everywhere:
        there, norms_there, _ = found[layout]["straight"]
        assert furthest(there, weights) < 2e-6
        torch.testing.assert_close(torch.stack(norms_there), torch.stack(norms), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_normalization_in_small_children_equal_those_of_ddp(everywhere, layout):
    for found in everywhere:
        weights, expected = found[layout]["statistics"][0], found["ddp"][0]
        assert weights["norm.running_mean"].abs().max() > 0.01
        assert furthest(weights, expected) < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_children_resume_from_their_own_file_and_from_that_of_one_process(
    folder, one, everywhere, layout
):
    for found in everywhere:
        straight, resumed = found[layout]["straight"][0], found[layout]["resumed"][0]
        assert furthest(straight, resumed) == 0
        assert furthest(found[layout]["of one process"][0], one[0]) < 2e-6
    assert furthest(train("auto", resume=folder / f"{layout}.ckpt")[0], one[0]) < 2e-6


class CallsOutside(Small):
    """Calls a child after a step; `trains` says whether gradients are recorded."""

    trains = True

    def on_train_batch_end(self, *_):
        with torch.set_grad_enabled(self.trains):
            self.called = self.head(torch.ones(1, 10)).sum()


def calls_outside():
    CallsOutside.trains = False
    inside = fit(CallsOutside(False))
    CallsOutside.trains = True
    with pytest.raises(RuntimeError, match="outside of training_step") as error:
        fit(CallsOutside(False))
    return bool(inside.called.isfinite()), str(error.value)


def fit(module, **how):
    parallel_module.DEFAULT_MIN_UNIT_BYTES = SMALLEST
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy=MeshStrategy(**how), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module)
    return module


def test_a_call_with_gradients_outside_of_a_step_is_refused_in_one_line(ranks):
    for works, text in ranks(calls_outside, 2):
        assert works
        assert text.startswith("Linear is called with gradients outside of training_step")
        assert "allowed: " in text
        assert text.endswith('; use Trainer(strategy="ddp")')
        assert "\n" not in text


def units_of(together):
    parallel_module.MAX_JOINT_UNIT_BYTES = together
    module = fit(Small(False))
    units = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    return units, "_step_unit" in module.__dict__, whole(module)


def test_children_that_are_too_many_bytes_together_are_units_of_their_own(ranks):
    size = 4 * sum(p.numel() for p in Small(False).parameters())
    (few, one_unit, together), (many, others, separate) = (
        ranks(units_of, 2, bound)[0] for bound in (size, size - 1)
    )
    assert (few, one_unit) == ([], True)
    assert (many, others) == (["first", "second", "norm", "head"], False)
    assert furthest(together, separate) < 1e-6


def test_members_that_are_too_many_bytes_together_are_units_of_their_own(monkeypatch):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    size = 2 * 4 * (16 + 4)
    for bound, expected in ((size, []), (size - 1, [net[0], net[2]])):
        monkeypatch.setattr(parallel_module, "MAX_JOINT_UNIT_BYTES", bound)
        found = parallel_module._fsdp_blocks(net, SMALLEST)
        assert sorted(map(id, found)) == sorted(map(id, expected))
