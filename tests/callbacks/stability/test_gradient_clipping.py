"""Clipping: the closed form of the norm, and one clipping per optimizer step."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import furthest, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import GradientClipping, OptimizerPlan
from ravine.callbacks.stability.gradient_clipping import clip_by_norm, clip_by_value, global_norm
from ravine.callbacks.stability.nan_guard import NonFiniteError
from ravine.datamodules.loaders import DataParallelInfo, ResumableLoader
from ravine.datamodules.samplers import EpochSampler
from ravine.lightning_modules import LanguageModel
from ravine.strategies import MeshStrategy
from ravine.strategies.dtensor import to_local

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Line(L.LightningModule):
    """A foreign module: its net in __init__, its own SGD."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.scale = scale

    def training_step(self, batch, index):
        return self.scale * self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def data(rows=8, batch_size=4):
    return DataLoader(TensorDataset(torch.randn(rows, 3)), batch_size=batch_size)


def test_the_norm_is_that_of_all_gradients_concatenated():
    gradients = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2, 2)]
    flat = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(global_norm(gradients), flat.norm())


def test_the_norm_of_bf16_gradients_has_the_digits_of_fp32():
    gradients = [torch.randn(30, generator=torch.Generator().manual_seed(n)) for n in range(40)]
    gradients = [g.bfloat16() for g in gradients]
    exact = torch.cat([g.double() for g in gradients]).norm()
    torch.testing.assert_close(global_norm(gradients).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("by", [clip_by_norm, clip_by_value])
def test_no_gradients_have_the_norm_zero(by):
    assert by([], 1.0).item() == 0


@pytest.mark.parametrize("dtypes", [("float64",), ("float64", "float32"), ("complex64", "float32")])
def test_gradients_of_double_precision_beside_others_and_complex_ones_are_clipped(dtypes):
    gradients = [torch.randn(6, dtype=getattr(torch, name)) for name in dtypes]
    exact = sum(g.abs().double().square().sum() for g in gradients) ** 0.5
    before = [g.clone() for g in gradients]
    norm = clip_by_norm(gradients, 0.5)
    digits = 1e-12 if "float64" in dtypes else 1e-6
    torch.testing.assert_close(norm.double(), exact, rtol=digits, atol=0)
    for now, was in zip(gradients, before, strict=True):
        assert now.dtype == was.dtype
        torch.testing.assert_close(now, was * 0.5 / exact.item())


@pytest.mark.parametrize("how", [{"max_norm": 0.1}, {"max_value": 0.01}])
def test_a_run_in_double_precision_is_clipped(how):
    module = Line(scale=100.0)
    before = [p.detach().double() for p in module.parameters()]
    callbacks = [GradientClipping(**how)]
    trainer = L.Trainer(**QUIET, max_steps=1, precision="64-true", callbacks=callbacks)
    trainer.fit(module, data())
    assert next(module.parameters()).dtype == torch.float64
    pairs = zip(module.parameters(), before, strict=True)
    moved = torch.cat([(now.detach() - was).flatten() for now, was in pairs])  # lr is 1
    found = moved.norm() if "max_norm" in how else moved.abs().max()
    torch.testing.assert_close(found.item(), *how.values(), rtol=1e-7, atol=0)


def test_clipping_leaves_the_direction_and_the_largest_norm_allowed():
    gradients = [torch.randn(30, 4), torch.randn(5)]
    before = torch.cat([g.flatten() for g in gradients])
    norm = clip_by_norm(gradients, max_norm=0.5)
    after = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before * 0.5 / before.norm())


def test_clipping_twice_changes_nothing():
    gradients = [torch.randn(30, 4)]
    clip_by_norm(gradients, 0.5)
    once = gradients[0].clone()
    clip_by_norm(gradients, 0.5)
    torch.testing.assert_close(gradients[0], once)


def test_a_small_gradient_is_not_changed():
    gradients = [torch.full((4,), 0.1)]
    clip_by_norm(gradients, 0.5)
    assert torch.equal(gradients[0], torch.full((4,), 0.1))


def test_it_equals_torch():
    params = [nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(7))]
    for p in params:
        p.grad = torch.randn_like(p)
    expected = [p.grad.clone() for p in params]
    norm = clip_by_norm(expected, 1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(params, 1.0))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, expected, strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_clipped_step_moves_the_weights_by_lr_times_max_norm(accumulate):
    module = Line(scale=100.0)
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    trainer = L.Trainer(
        **QUIET, max_steps=1, accumulate_grad_batches=accumulate, callbacks=[GradientClipping(0.25)]
    )
    trainer.fit(module, data())
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.25))


def test_the_norm_before_clipping_and_the_share_of_clipped_steps_are_logged():
    class LargeThrice(Line):
        def training_step(self, batch, index):
            self.scale = 100.0 if index < 3 else 1e-3
            return super().training_step(batch, index)

    trainer = L.Trainer(
        **QUIET, max_steps=4, log_every_n_steps=4, callbacks=[GradientClipping(1.0)]
    )
    trainer.fit(LargeThrice(), data(16))
    assert trainer.callback_metrics["train/frac_steps_clipped"] == 0.75
    assert 0 < trainer.callback_metrics["train/grad_norm"] < 1


def test_values_are_clamped_one_by_one():
    gradients = [torch.tensor([-3.0, 0.5, 2.0])]
    assert clip_by_value(gradients, 1.0) == torch.tensor([3.0, 0.5, 2.0]).norm()
    assert torch.equal(gradients[0], torch.tensor([-1.0, 0.5, 1.0]))
    gradients = [torch.tensor([3 - 0.5j])]
    assert clip_by_value(gradients, 1.0).item() == pytest.approx(9.25**0.5)
    assert gradients[0].item() == 1 - 0.5j


def test_a_step_clipped_by_value_moves_no_weight_by_more_than_lr_times_the_bound():
    module = Line(scale=1000.0)
    before = [p.detach().clone() for p in module.parameters()]
    clipping = GradientClipping(max_value=0.5)
    trainer = L.Trainer(**QUIET, max_steps=1, log_every_n_steps=1, callbacks=[clipping])
    trainer.fit(module, data())
    moved = [(p - b).abs().max().item() for p, b in zip(module.parameters(), before, strict=True)]
    assert max(moved) == pytest.approx(0.5)
    assert trainer.callback_metrics["train/frac_steps_clipped"] == 1


class Poisoned(Line):
    """The gradients of the steps named are not finite."""

    def __init__(self, poisoned, optimizer=torch.optim.SGD):
        super().__init__()
        self.poisoned, self.optimizer = poisoned, optimizer
        self.after = []

    def training_step(self, batch, index):
        factor = float("nan") if index in self.poisoned else 1.0
        return super().training_step(batch, index) * factor

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *args):
        self.after.append(torch.cat([p.detach().flatten().clone() for p in self.parameters()]))


@pytest.mark.filterwarnings("ignore:optimizer step .* is skipped")
@pytest.mark.parametrize("plan", [[], [OptimizerPlan(partial(torch.optim.AdamW, lr=0.1))]])
def test_a_step_without_a_finite_norm_changes_nothing_and_the_next_step_does(plan):
    module, clipping = Poisoned({1, 2}, torch.optim.AdamW), GradientClipping()
    L.Trainer(**QUIET, max_steps=4, log_every_n_steps=4, callbacks=[clipping, *plan]).fit(
        module, data(16)
    )
    assert torch.equal(module.after[0], module.after[2])
    assert not torch.equal(module.after[2], module.after[3])
    assert module.after[3].isfinite().all()
    assert clipping.skipped_steps.num_skipped == 2
    assert module.trainer.callback_metrics["train/num_skipped_steps"] == 2


@pytest.mark.filterwarnings("ignore:optimizer step .* is skipped")
def test_too_many_skipped_steps_in_a_row_end_the_run():
    module = Poisoned({0, 2, 3})
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[GradientClipping(patience=2)])
    with pytest.raises(NonFiniteError, match="2 optimizer steps in a row, up to step 3"):
        trainer.fit(module, data(16))


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        (range(4), "no optimizer step was taken: the gradient was not finite in the last 4 of 4"),
        ({2, 3}, "^the gradient was not finite in the last 2 of 4 optimizer steps, up to step 4"),
    ],
)
def test_a_run_with_skipped_steps_at_its_end_fails(poisoned, message):
    trainer = L.Trainer(**QUIET, max_steps=4, callbacks=[GradientClipping()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(NonFiniteError, match=message):
            trainer.fit(Poisoned(poisoned), data(16))
    assert sum("is skipped" in str(each.message) for each in said) == 1


@pytest.mark.filterwarnings("ignore:optimizer step .* is skipped")
def test_one_skipped_step_at_the_end_is_accepted():
    module, trainer = Poisoned({3}), L.Trainer(**QUIET, max_steps=4, callbacks=[GradientClipping()])
    trainer.fit(module, data(16))
    assert trainer.global_step == 4
    assert all(p.isfinite().all() for p in module.parameters())


def test_the_module_has_its_own_method_again_after_fit():
    module = Line()
    L.Trainer(**QUIET, max_steps=1, callbacks=[GradientClipping()]).fit(module, data())
    assert "configure_gradient_clipping" not in vars(module)


def test_the_trainers_own_clipping_beside_it_is_refused():
    trainer = L.Trainer(
        **QUIET, max_steps=1, gradient_clip_val=2.0, callbacks=[GradientClipping(1.0)]
    )
    with pytest.raises(
        ValueError, match=r"by GradientClipping\(max_norm=1.0\) and by gradient_clip"
    ):
        trainer.fit(Line(), data())


def test_of_two_clippings_the_last_one_is_used_with_a_line(capsys):
    module = Line(scale=1000.0)
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    callbacks = [GradientClipping(0.25), GradientClipping(0.5)]
    L.Trainer(**QUIET, max_steps=1, callbacks=callbacks).fit(module, data())
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close((after - before).norm(), torch.tensor(0.5))
    said = "is not used, because GradientClipping(max_norm=0.5) comes after it"
    assert said in capsys.readouterr().out


def test_manual_optimization_is_refused_in_words():
    module = Line()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="steps its own optimizers"):
        L.Trainer(**QUIET, max_steps=1, callbacks=[GradientClipping()]).fit(module, data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0}, r"max_norm=0 is not positive; allowed: above 0; use max_norm=1\.0"),
        ({"max_value": float("nan")}, r"max_value=nan is not positive"),
        ({"max_norm": 1.0, "max_value": 1.0}, "exclude each other; .*; remove max_value"),
        ({"patience": -1}, "patience=-1 is negative"),
    ],
)
def test_invalid_bounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientClipping(**arguments)


# Several ranks: 2 x 2 shards one matrix over both axes of the mesh, a norm over one of them alone.
SHAPES = {"matrix": (6, 4), "norm": (5,), "plain": (3,)}
LAYOUTS = {
    "fsdp": (2, {"matrix": [Shard(0)], "norm": [Shard(0)], "plain": [Shard(0)]}),
    "fsdp x tp": (4, {"matrix": [Shard(0), Shard(1)], "norm": [Shard(0)]}),
}


def gradients_of(layout):
    """The same gradients on every layout, as tensors of that layout."""
    generator = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    if layout == "single":
        return list(whole.values())
    world, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    for name, where in placements.items():
        axes = mesh if len(where) == 2 else mesh["data"]
        whole[name] = distribute_tensor(whole[name], axes, where)
    return list(whole.values())


def clipped_in_ranks(layout, by):
    dist.init_process_group("gloo")
    gradients = gradients_of(layout)
    norm = by(gradients, 0.5)
    return norm, [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


@pytest.mark.parametrize("by", [clip_by_norm, clip_by_value])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_clipped_gradients_are_the_same_on_every_layout(ranks, layout, by):
    alone = gradients_of("single")
    norm = by(alone, 0.5)
    for norm_there, there in ranks(clipped_in_ranks, LAYOUTS[layout][0], layout, by):
        torch.testing.assert_close(norm_there, norm, rtol=1e-6, atol=0)
        for g, h in zip(alone, there, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-7)


# Through Lightning: the transformer's norms, embedding and head are outside its tensor plan.

TOKENS = torch.randint(65, (32, 17), generator=torch.Generator().manual_seed(0))
STRATEGIES = {
    "single": lambda: {"devices": 1},
    "ddp": lambda: {"strategy": "ddp", "devices": 2},
    "zero3": lambda: {"strategy": "zero3", "devices": 2},
    "zero3 x tp": lambda: {"strategy": MeshStrategy(tp=2), "devices": 4},
    "zero1 x ep": lambda: {"strategy": MeshStrategy(zero_stage=1, ep=2), "devices": 4},
}


class Tokens(L.LightningDataModule):
    def train_dataloader(self):
        return ResumableLoader(
            EpochSampler(0, 32), self.fetch, 32, 8, DataParallelInfo.from_trainer(self.trainer)
        )

    def fetch(self, items):
        return TOKENS[items, :-1], TOKENS[items, 1:]


class Model(LanguageModel):
    def configure_from_data(self, datamodule):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class OwnShard(GradientClipping):
    """The planted fault: each rank clips by the norm of what it holds."""

    def _clip(self, trainer, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self._norm = clip_by_norm([to_local(g) for g in gradients], self.max_norm)


def clipped_training(layout, clipping=GradientClipping, **shape):
    """Two clipped steps: with lr 1 and no momentum the weights are the sum of the gradients."""
    L.seed_everything(0, verbose=False)
    module = Model(65, 16, num_layers=2, d_model=16, num_heads=4, zero_init_residual=False, **shape)
    norms = []

    class Norms(L.Callback):
        def on_train_batch_end(self, *_):
            norms.append(callback._norm)

    callback = clipping(0.1)
    strategy = STRATEGIES[layout]()
    trainer = L.Trainer(**QUIET, max_steps=3, callbacks=[Norms(), callback], **strategy)
    trainer.fit(module, Tokens())
    return whole(module), torch.stack(norms)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step.")
@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("zero3", 2), ("zero3 x tp", 4)])
def test_clipped_training_equals_one_process(ranks, layout, world):
    weights, norms = clipped_training("single")
    assert norms.min() > 0.1
    for there, norms_there in ranks(clipped_training, world, layout):
        assert furthest(weights, there) < 1e-6
        torch.testing.assert_close(norms_there, norms, rtol=1e-6, atol=0)


def clipped_experts(layout):
    return clipped_training(layout, num_experts=4)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step.")
def test_gradients_of_experts_are_counted_once_although_other_gradients_have_an_owner(ranks):
    weights, norms = clipped_experts("single")
    assert norms.min() > 0.1
    for there, norms_there in ranks(clipped_experts, 4, "zero1 x ep"):
        assert furthest(weights, there) < 1e-6
        torch.testing.assert_close(norms_there, norms, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step.")
def test_a_norm_of_the_own_shard_alone_is_caught(ranks):
    weights, _ = clipped_training("single")
    for there, _ in ranks(clipped_training, 2, "zero3", OwnShard):
        assert furthest(weights, there) > 1e-3
