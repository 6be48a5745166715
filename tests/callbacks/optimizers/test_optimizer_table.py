"""The common table: tests of every optimizer, of Ravine and of torch, on every layout.

A new optimizer is one row of OPTIMIZERS; one that is written here is also a row of FORMULAS.
"""

import copy
import re
from functools import partial
from typing import ClassVar

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import furthest, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import ravine.callbacks
from ravine.callbacks import (
    AdaGradOptimizer,
    ExactResume,
    LionOptimizer,
    MuonOptimizer,
    NewtonOptimizer,
    OptimizerPlan,
    ParamRule,
    SignSGDOptimizer,
)
from ravine.callbacks.optimizers.composite import CompositeOptimizer
from ravine.callbacks.optimizers.elementwise import ElementwiseOptimizer
from ravine.datamodules.loaders import DataParallelInfo, ResumableLoader
from ravine.datamodules.samplers import EpochSampler
from ravine.errors import UsageError
from ravine.strategies import MeshStrategy


class CountingAdam(ElementwiseOptimizer):
    """Adam, whose state has a count of steps and, by another name, a product of its betas."""

    state_names = ("mean", "square")
    scalars: ClassVar = {"step": 0.0, "left": 1.0}

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def update(self, group, weights, gradients, *states):
        means, squares, steps, left = states
        torch._foreach_add_(steps, 1)
        torch._foreach_mul_(left, 0.9)
        torch._foreach_lerp_(means, gradients, 0.1)
        torch._foreach_mul_(squares, 0.999)
        torch._foreach_addcmul_(squares, gradients, gradients, 0.001)
        squared = [s / (1 - 0.999 ** k.item()) for s, k in zip(squares, steps, strict=True)]
        rates = [group["lr"] / (1 - k.item()) for k in left]
        divided = torch._foreach_mul(means, rates)
        roots = torch._foreach_sqrt(squared)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_div_(divided, roots)
        torch._foreach_sub_(weights, divided)


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "AdamW": partial(torch.optim.AdamW, lr=0.05),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "SignSGD": partial(SignSGDOptimizer, lr=0.02),
    "Signum": partial(SignSGDOptimizer, lr=0.02, momentum=0.9),
    "AdaGrad": partial(AdaGradOptimizer, lr=0.5),
    "Lion": partial(LionOptimizer, lr=0.02),
    "counting Adam": partial(CountingAdam, lr=0.05),
    "Muon": partial(MuonOptimizer, lr=0.05, iteration_dtype="float64"),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
TARGET = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def matrix(fill=0.0):
    return nn.Parameter(torch.full((4, 3), fill, dtype=torch.float64))


def descend(optimizer, weights, steps):
    """Steps on the quadratic 1/2 |w - target|^2."""
    for _ in range(steps):
        for w in weights:
            w.grad = w.detach() - TARGET
        optimizer.step()


def test_every_optimizer_of_ravine_has_a_row_here():
    own = {n for n in ravine.callbacks.__all__ if n.endswith("Optimizer")}
    rows = {factory.func.__name__ for factory in OPTIMIZERS.values()}
    assert own - rows == {"NewtonOptimizer"}  # which needs a closure: its tests are below


@every
def test_every_optimizer_descends_a_quadratic(name):
    w = matrix()
    descend(OPTIMIZERS[name]([w]), [w], 100)
    assert (w - TARGET).norm() < 0.2 * TARGET.norm()


@every
def test_with_lr_zero_nothing_moves(name):
    w = matrix(0.5)
    optimizer = OPTIMIZERS[name]([w])
    descend(optimizer, [w], 3)
    before = w.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    descend(optimizer, [w], 3)
    assert torch.equal(w, before)


@every
def test_without_a_gradient_nothing_moves_and_the_first_gradient_may_come_later(name):
    moving, waiting, alone = matrix(), matrix(), matrix()
    optimizer = CompositeOptimizer([OPTIMIZERS[name]([moving, waiting])])
    descend(optimizer, [moving], 2)
    assert torch.equal(waiting, matrix())
    moving.grad = None
    descend(optimizer, [waiting], 3)
    descend(OPTIMIZERS[name]([alone]), [alone], 3)
    torch.testing.assert_close(waiting, alone, rtol=0, atol=0)


@every
def test_each_group_has_its_own_settings(name):
    fast, slow, alone = matrix(), matrix(), matrix()
    made = OPTIMIZERS[name]([{"params": [fast]}, {"params": [slow], "lr": 1e-3}])
    other = OPTIMIZERS[name]([alone])
    other.param_groups[0]["lr"] = 1e-3
    descend(made, [fast, slow], 5)
    descend(other, [alone], 5)
    assert torch.equal(slow, alone)
    assert not torch.equal(fast, slow)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every
def test_a_state_that_went_through_distributed_checkpoint_continues_bitwise(name, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = matrix(), matrix(0.5)

    def made(net):
        return CompositeOptimizer([OPTIMIZERS[name]([net.a]), torch.optim.AdamW([net.b], lr=0.1)])

    net = Two()
    optimizer = made(net)
    descend(optimizer, [net.a, net.b], 4)
    net_copy = copy.deepcopy(net)
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=tmp_path)
    restored = made(net_copy)
    state = {"optimizer": get_optimizer_state_dict(net_copy, restored)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(net_copy, restored, state["optimizer"])
    descend(optimizer, [net.a, net.b], 4)
    descend(restored, [net_copy.a, net_copy.b], 4)
    assert torch.equal(net.a, net_copy.a)
    assert torch.equal(net.b, net_copy.b)


# Formulas, one number at a time: (weight, states, gradient) -> the weight, new states in place.


def sign(x):
    return (x > 0) - (x < 0)


def signum(w, s, g, mu=0.9):
    s["m"] = s.get("m", 0.0) * mu + (1 - mu) * g
    return (1 - 0.02 * 0.1) * w - 0.02 * sign(s["m"])


def adagrad(w, s, g):
    s["v"] = s.get("v", 0.0) + g * g
    return w - 0.5 * g / (s["v"] ** 0.5 + 1e-10)


def adagrad_of_cs336(w, s, g):
    s["v"] = s.get("v", 0.0) + g * g
    return w - 0.5 * g / (s["v"] + 1e-5) ** 0.5


def lion(w, s, g):
    m = s.get("m", 0.0)
    s["m"] = 0.99 * m + 0.01 * g
    return (1 - 0.02 * 0.1) * w - 0.02 * sign(0.9 * m + 0.1 * g)


FORMULAS = {
    "SignSGD": (partial(SignSGDOptimizer, lr=0.02, weight_decay=0.1), partial(signum, mu=0.0)),
    "Signum": (partial(SignSGDOptimizer, lr=0.02, momentum=0.9, weight_decay=0.1), signum),
    "AdaGrad": (partial(AdaGradOptimizer, lr=0.5), adagrad),
    "AdaGrad, eps in the root": (
        partial(AdaGradOptimizer, lr=0.5, eps=1e-5, eps_in_root=True),
        adagrad_of_cs336,
    ),
    "Lion": (partial(LionOptimizer, lr=0.02, weight_decay=0.1), lion),
}


def noise(step):
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_hundred_steps_equal_the_formula(name):
    factory, formula = FORMULAS[name]
    w, numbers = matrix(0.5), [(0.5, {}) for _ in range(12)]
    optimizer = factory([w])
    for step in range(100):
        w.grad = noise(step) + w.detach()
        gradients = [
            g + n for g, (n, _) in zip(noise(step).flatten().tolist(), numbers, strict=True)
        ]
        numbers = [(formula(n, s, g), s) for (n, s), g in zip(numbers, gradients, strict=True)]
        optimizer.step()
    expected = torch.tensor([n for n, _ in numbers], dtype=torch.float64).reshape(4, 3)
    torch.testing.assert_close(w.data, expected, rtol=0, atol=1e-12)


def test_a_small_gradient_takes_a_small_step_with_eps_in_the_root():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    w.grad = torch.full_like(w, 1e-3)
    AdaGradOptimizer([w], lr=0.01, eps=1e-5, eps_in_root=True).step()
    assert 1 - w.item() == pytest.approx(0.01 * 1e-3 / (1e-6 + 1e-5) ** 0.5)  # 0.00302


def test_adagrad_equals_the_one_of_torch():
    actual, expected = matrix(), matrix()
    a, b = AdaGradOptimizer([actual], lr=0.5), torch.optim.Adagrad([expected], lr=0.5)
    for step in range(100):
        actual.grad, expected.grad = noise(step), noise(step)
        a.step()
        b.step()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_an_optimizer_with_a_step_count_equals_adam_of_torch_before_and_after_a_saved_state():
    actual, expected = matrix(), matrix()
    a, b = CountingAdam([actual], lr=0.1), torch.optim.Adam([expected], lr=0.1)
    for step in range(50):
        if step == 20:
            saved, a = copy.deepcopy(a.state_dict()), CountingAdam([actual], lr=0.1)
            a.load_state_dict(saved)
        actual.grad, expected.grad = noise(step), noise(step)
        a.step()
        b.step()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_number_of_the_state_is_not_rounded_to_the_dtype_of_its_parameter(dtype):
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    w.grad = torch.ones_like(w)
    optimizer, other = CountingAdam([w]), CountingAdam([w])
    for _ in range(300):  # a bfloat16 counts to 256
        optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state, restored = optimizer.state[w], other.state[w]
    assert {k: v.dtype for k, v in restored.items()} == {k: v.dtype for k, v in state.items()}
    assert restored["step"].item() == 300
    assert restored["left"].item() == state["left"].item() == pytest.approx(0.9**300)
    assert restored["left"] is not state["left"]


def test_a_complex_weight_steps_as_its_real_and_imaginary_parts_and_a_rate_may_be_a_tensor():
    actual = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j], dtype=torch.complex128))
    expected = nn.Parameter(actual.detach().clone())
    a = AdaGradOptimizer([actual], lr=torch.tensor(0.5))
    b = torch.optim.Adagrad([expected], lr=0.5)
    for step in range(1, 4):
        actual.grad = torch.tensor([3 + 4j, 1j], dtype=torch.complex128) / step
        expected.grad = actual.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    SignSGDOptimizer([actual], lr=1.0).step()
    torch.testing.assert_close(actual, expected - torch.tensor([1 + 1j, 1j]), rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"Muon does not support .*; allowed: matrices of real numbers"
    ):
        MuonOptimizer([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("kind", [SignSGDOptimizer, AdaGradOptimizer, LionOptimizer, MuonOptimizer])
def test_a_sparse_gradient_is_refused(kind):
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=f"{kind.__name__} does not support sparse gradients"):
        CompositeOptimizer([kind(table.parameters())]).step()


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_a_schedule_of_momentum_changes_a_composite_as_its_member(kind):
    given = {"OneCycleLR": {"max_lr": 0.1, "total_steps": 9}, "CyclicLR": {"max_lr": 0.1}}[kind]
    given |= {"base_lr": 0.01, "step_size_up": 2} if kind == "CyclicLR" else {}
    alone = torch.optim.AdamW([actual := matrix()], lr=0.01)
    joined = CompositeOptimizer([torch.optim.AdamW([expected := matrix()], lr=0.01)])
    schedules = [getattr(torch.optim.lr_scheduler, kind)(o, **given) for o in (alone, joined)]
    for _ in range(5):
        descend(alone, [actual], 1)
        descend(joined, [expected], 1)
        for schedule in schedules:
            schedule.step()
    assert torch.equal(actual, expected)
    assert joined.param_groups[0]["betas"] == alone.param_groups[0]["betas"] != (0.9, 0.999)
    both = CompositeOptimizer(
        [torch.optim.SGD([matrix()], lr=0.1), torch.optim.Adam([matrix()], lr=0.2)]
    )
    assert both.defaults["lr"] == 0.1
    assert not {"momentum", "betas"} & both.defaults.keys()


def test_sign_steps_of_one_size_stall_and_shrinking_ones_do_not():
    stalled, shrinking = (nn.Parameter(torch.tensor([3.05], dtype=torch.float64)) for _ in "ab")
    a, b = SignSGDOptimizer([stalled], lr=0.1), SignSGDOptimizer([shrinking], lr=0.1)
    for step in range(200):
        stalled.grad, shrinking.grad = 2 * stalled.detach(), 2 * shrinking.detach()
        b.param_groups[0]["lr"] = 0.1 * 0.98**step
        a.step()
        b.step()
    assert abs(stalled.item()) == pytest.approx(0.05)  # 3.05 is half a step off the lattice
    assert abs(shrinking.item()) <= 0.1 * 0.98**199


# Newton: problems of two numbers, where the lecture's figures are closed forms.


def newton(function, start, steps, **settings):
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = CompositeOptimizer([NewtonOptimizer([w], **settings)])
    path = []

    def closure():
        loss = function(w)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        path.append(w.detach().clone())
    return torch.stack(path)


def test_newton_ends_a_coupled_quadratic_in_one_step():
    curvature = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    path = newton(lambda w: w @ curvature @ w / 2 - w.sum(), (5.0, -7.0), 1)
    expected = torch.linalg.solve(curvature, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(path[0], expected, rtol=0, atol=1e-8)


def test_newton_on_a_fourth_power_leaves_two_thirds_each_step():
    path = newton(lambda w: (w**4).sum(), (1.0,), 10)[:, 0]
    torch.testing.assert_close(path[1:] / path[:-1], torch.full((9,), 2 / 3).double())


def test_newton_at_a_flat_minimum_keeps_its_rate():
    path = newton(lambda w: (w**4).sum(), (1.0, 2.0), 60)
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64) * (2 / 3) ** 60
    torch.testing.assert_close(path[-1], expected, rtol=1e-8, atol=0)  # 2.7e-11, not 6e-7


class Cube(torch.autograd.Function):
    """Sum of x^3 with a backward that autograd takes for a constant times the slope."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3 * x.detach() ** 2)
        return (x**3).sum()

    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0]


class OnceOnly(Cube):
    """The same with a backward that refuses to be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0]


@pytest.mark.parametrize("function", [Cube, OnceOnly])
def test_newton_takes_differences_where_a_second_derivative_is_wrong_or_missing(function):
    """x^3 - 3 x has its minimum at 1; the curvature there is 6."""
    cubes = newton(lambda w: function.apply(w) - 3 * w.sum(), (2.0, 1.5), 6)
    plain = newton(lambda w: (w**3).sum() - 3 * w.sum(), (2.0, 1.5), 6)
    torch.testing.assert_close(cubes, plain, rtol=0, atol=1e-7)
    assert plain[-1].tolist() == pytest.approx([1, 1])


def test_newton_sums_the_curvature_of_losses_with_separate_backward_passes():
    w = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
    optimizer = NewtonOptimizer([w])

    def closure():
        for rate in (1.0, 3.0):
            (rate * (w - 1).square().sum()).backward()

    optimizer.step(closure)
    assert w.item() == pytest.approx(1.0)


def test_newton_walks_the_coupled_ravine_of_the_lecture_in_about_thirty_steps():
    ravine = lambda w: (w[0] - w[1]) ** 2 + (w[0] + w[1]) ** 4  # noqa: E731
    path = newton(ravine, (3.0, 1.0), 30)
    values = [ravine(w).item() for w in path]
    assert values[0] > 1 > values[5]
    assert values[29] < 1e-16


def test_newton_refuses_what_is_too_large_or_flat():
    with pytest.raises(ValueError, match="at most 256 numbers"):
        NewtonOptimizer([nn.Parameter(torch.zeros(257))])
    with pytest.raises(ValueError, match=r"use damping=1e-3"):
        newton(lambda w: w.sum(), (1.0, 1.0), 1)


# Through Lightning, on every layout. float64: a sign must not hang on the order of a sum.

ROWS = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "single": lambda: {"devices": 1},
    "ddp": lambda: {"strategy": "ddp", "devices": 2},
    "zero3": lambda: {"strategy": "zero3", "devices": 2},
    "folder": lambda: {"strategy": MeshStrategy(save_distributed_checkpoint=True), "devices": 2},
}


class Tiny(L.LightningModule):
    """Shards of 6 rows are even on two ranks, those of 5 are not."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
        self.net = nn.Sequential(*layers).double()

    def training_step(self, rows, index):
        return (self.net(rows) - rows.prod(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Rows(L.LightningDataModule):
    def train_dataloader(self):
        return ResumableLoader(
            EpochSampler(0, 64),
            lambda items: ROWS[items],
            64,
            8,
            DataParallelInfo.from_trainer(self.trainer),
        )


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and self.path and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)


def train(name, layout="single", save=None, resume=None, **arguments):
    L.seed_everything(0, verbose=False)
    module = Tiny()
    # a head for an optimizer of matrices alone: the rest goes to a stateless one
    rules = [ParamRule("hidden_matrix", optimizer=OPTIMIZERS[name]), ParamRule()]
    trainer = L.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        callbacks=[OptimizerPlan(torch.optim.SGD, rules=rules), ExactResume(), Save(save)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **LAYOUTS[layout](),
        **arguments,
    )
    trainer.fit(module, Rows(), ckpt_path=resume, weights_only=True if resume else None)
    return whole(module)


@every
def test_two_micro_batches_equal_one_batch(name):
    assert furthest(train(name), train(name, accumulate_grad_batches=2)) < 1e-12


@every
def test_resume_is_bitwise(name, tmp_path):
    straight = train(name, save=tmp_path / "cut.ckpt")
    assert furthest(train(name, resume=tmp_path / "cut.ckpt"), straight) == 0


def table(layout, folder):
    """In ranks: every optimizer from a single process's file, and files of this layout."""
    found = {}
    for name in OPTIMIZERS:
        if layout != "folder":  # zero3 reads single files the same way
            found[name] = train(name, layout, resume=folder / f"single {name}.ckpt")
        straight = train(name, layout, save=folder / f"{layout} {name}.ckpt")
        found[f"{name} again"] = train(name, layout, resume=folder / f"{layout} {name}.ckpt")
        found[f"{name} straight"] = straight
    return found


@pytest.mark.parametrize("layout", ["ddp", "zero3", "folder"])
def test_a_run_saved_on_one_layout_continues_on_another(ranks, tmp_path, layout):
    names = list(OPTIMIZERS)
    straight = {n: train(n, save=tmp_path / f"single {n}.ckpt") for n in names}
    for found in ranks(table, 2, layout, tmp_path):
        for name in names:
            assert furthest(found.get(name, straight[name]), straight[name]) < 1e-12, name
            assert furthest(found[f"{name} straight"], straight[name]) < 1e-12, name
            assert furthest(found[f"{name} again"], found[f"{name} straight"]) == 0, name
    if layout != "folder":  # which only its own layout reads
        for name in names:
            continued = train(name, resume=tmp_path / f"{layout} {name}.ckpt")
            assert furthest(continued, straight[name]) < 1e-12, name


def error_on_several_ranks():
    OPTIMIZERS["LBFGS"] = torch.optim.LBFGS
    with pytest.raises(UsageError) as error:
        train("LBFGS", "ddp")
    return str(error.value)


def test_lbfgs_on_several_ranks_is_refused_on_each_rank(ranks):
    first, second = ranks(error_on_several_ranks, 2)
    assert first == second
    assert re.search(r"not possible with other optimizers, .*several ranks", first)
