"""ZeRO-1: 2 W are sent, less is held than with ddp, and readers of gradients see all of them."""

import os
import re
import time
from contextlib import ExitStack

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import grad_norm
from ranks import furthest, run_ranks, whole
from tensor_bytes import tensor_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import GradientClipping, NaNGuard
from ravine.callbacks.optimizers.newton import NewtonOptimizer
from ravine.strategies import zero1, zero1_messages
from ravine.strategies.gradient_readers import find_gradient_readers

WIDTH = 640  # a matrix of 1.6 MB, which is sent from its own memory


class Net(L.LightningModule):
    """Large and small parameters, and a scalar."""

    def __init__(self, width=WIDTH, layers=4, optimizer=torch.optim.AdamW, **how):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
        )
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(width, 3)
        self.optimizer, self.how, self.batch = optimizer, {"lr": 1e-3} | how, 8

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0])

    def loss(self, x):
        return (self.scale * self.head(self.net(x))).square().mean()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(48, self.head.in_features, generator=generator)
        ranks = self.trainer.world_size
        size = self.batch // (ranks * self.trainer.accumulate_grad_batches)
        return DataLoader(TensorDataset(x[self.trainer.global_rank :: ranks]), batch_size=size)

    def configure_optimizers(self):
        return self.optimizer((p for p in self.parameters() if p.requires_grad), **self.how)


def fit(module, strategy="zero1", *callbacks, **options):
    """Train for four steps; the weights."""
    torch.manual_seed(0)
    options = {"max_steps": 4, "accumulate_grad_batches": 1} | options
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy,
        callbacks=list(callbacks),
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module)
    return whole(module)


def built(kind, **how):
    torch.manual_seed(0)
    return kind(**how)


def trained(kind, strategy, how, options, *callbacks):
    return fit(built(kind, **how), strategy, *callbacks, **options)


class Messages(L.Callback):
    """Count the bytes of all messages that this rank sends in the third step."""

    def __init__(self):
        self.sent, self.largest, self.counts = 0, 0, {}

    def on_train_batch_start(self, trainer, module, batch, index):
        if index != 2:
            return
        self.stack = ExitStack()
        for name in ("isend", "all_reduce", "broadcast", "reduce", "all_gather_into_tensor"):
            self.stack.callback(setattr, dist, name, getattr(dist, name))
            setattr(dist, name, self.counting(name, getattr(dist, name)))

    def counting(self, name, function):
        def counted(tensor, *args, **how):
            size = tensor.numel() * tensor.element_size()
            self.counts[name] = self.counts.get(name, 0) + 1
            self.sent += size * (2 if name == "all_reduce" else 1)
            self.largest = max(self.largest, size)
            return function(tensor, *args, **how)

        return counted

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 2:
            self.stack.close()


class Kept(L.Callback):
    """Before each step: the parameters without a gradient here, and those of other owners."""

    takes_partial_gradients = True

    def __init__(self):
        self.without, self.of_others = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named, own = dict(module.named_parameters()), trainer.strategy.zero1_reducer
        self.without.append({name for name, p in named.items() if p.grad is None})
        self.of_others.append({name for name, p in named.items() if own.owner_of[p] != own.rank})


def counted(reads=False):
    messages, kept = Messages(), Kept()
    more = [Norms()] if reads else []
    module = built(Net)
    fit(module, "zero1", messages, kept, *more)
    weights = sum(p.numel() * 4 for p in module.parameters())
    return messages.sent, messages.largest, messages.counts, kept, weights


class Norms(L.Callback):
    """Lightning's norm of all gradients, as its users read it."""

    def __init__(self):
        self.norms, self.later = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.norms.append(float(grad_norm(module, 2)["grad_2.0_norm_total"]))

    def on_train_batch_end(self, trainer, module, *_):
        self.later.append(float(grad_norm(module, 2)["grad_2.0_norm_total"]))


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_sends_two_times_the_weights_and_frees_gradients_of_other_owners(ranks, world):
    everywhere = ranks(counted, world)
    weights = everywhere[0][-1]
    for *_, kept, _ in everywhere:
        assert kept.without == kept.of_others
        assert all(kept.of_others)
    ideal = 2 * weights * (world - 1) / world  # of each rank, if all owned equally much
    sent = sum(sent for sent, *_ in everywhere) / world
    assert ideal <= sent < 1.001 * ideal + 100
    assert all(set(counts) == {"isend"} for _, _, counts, *_ in everywhere)
    assert max(largest for _, largest, *_ in everywhere) <= zero1_messages.MAX_MESSAGE_BYTES


def test_reading_gradients_sends_those_of_other_owners_once_more(ranks):
    everywhere = ranks(counted, 2, True)
    weights = everywhere[0][-1]
    assert all(without == set() for *_, kept, _ in everywhere for without in kept.without)
    sent = sum(sent for sent, *_ in everywhere) / 2
    assert sent == pytest.approx(2 * weights + weights / 2, rel=1e-3)  # half is another's
    assert all(set(counts) == {"isend", "all_reduce"} for _, _, counts, *_ in everywhere)


class LogsNorms(Net):
    """Reads gradients in its own hooks, once by code that cannot be followed."""

    def __init__(self, **how):
        super().__init__(**how)
        self.norms, self.tool = [], Tool()

    def on_after_backward(self):
        self.norms.append(self.tool.norm(self))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.norms.append(norm_of(self))


class Tool:
    """An object whose methods are not searched for what they read."""

    def norm(self, module):
        return norm_of(module)


def norm_of(module):
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]))


def norms(strategy):
    first = Norms()
    trained(Net, strategy, SGD, {}, first)
    module = built(LogsNorms, **SGD)
    fit(module, strategy, max_steps=2)
    clipping = Clipped()
    trained(Net, strategy, SGD, {"log_every_n_steps": 1}, GradientClipping(0.05), clipping)
    return torch.tensor([*first.norms, *first.later, *module.norms, *clipping.norms])


class Clipped(L.Callback):
    """What GradientClipping logs."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, module, *_):
        self.norms.append(trainer.callback_metrics["train/grad_norm"].item())


def test_readers_of_gradients_get_the_norm_of_all_gradients(ranks):
    expected = norms("auto")
    for found in ranks(norms, 2, "zero1"):
        assert torch.allclose(found, expected, rtol=1e-5)


class Poisoned(Net):
    """Its last parameter gets a gradient that is not finite in the second step."""

    def loss(self, x):
        loss = super().loss(x)
        zero = 0 * self.head.bias.sum()
        return loss + zero.sqrt() if self.global_step == 1 else loss


def guarded():
    module, guard = built(Poisoned, **SGD), NaNGuard(max_skips=1)
    weights = fit(module, "zero1", guard, max_steps=3)
    return guard.num_skipped, all(p.isfinite().all() for p in weights.values())


@pytest.mark.filterwarnings("ignore:the gradient of head.bias is not finite at step 1")
def test_a_gradient_that_is_not_finite_on_its_owner_is_seen_by_all(ranks):
    assert ranks(guarded, 2) == [(1, True)] * 2


class Phases(L.Callback):
    """Looks at memory and sizes, and at no number of a gradient."""

    def __init__(self):
        self.sizes, self.times = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.times.append(torch.initial_seed())

    def on_train_batch_end(self, trainer, module, *_):
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        self.sizes.append(sum(g.untyped_storage().nbytes() for g in grads))


class Assigns(L.Callback):
    def on_train_batch_start(self, trainer, module, *_):
        for p in module.parameters():
            p.grad = None


class Scales(L.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        self.mean = sum(p.grad * 2 for p in module.parameters())


READERS = {Norms: True, Phases: False, Assigns: True, Scales: True, Messages: False}


@pytest.mark.parametrize("kind", READERS)
def test_code_that_reads_numbers_of_gradients_is_found(kind):
    trainer = L.Trainer(accelerator="cpu", callbacks=[kind()], logger=False, max_steps=1,
                        enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.strategy.connect(module := Net(width=4))
    module.trainer = trainer
    found = find_gradient_readers(trainer)
    assert (kind.__name__ in "".join(found)) is READERS[kind]


class Odd(Net):
    """Parameters that are frozen, tied, unused, complex, of another dtype or memory format, and
    some that a rank uses only for some samples."""

    def __init__(self, **how):
        super().__init__(width=16, layers=2, **how)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.net[0][0].weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.unused = nn.Linear(600, 600)
        self.some, self.many = nn.Linear(16, 3), nn.Linear(16, 70_000)  # the second is sent alone
        self.turn = nn.Parameter(torch.randn(16, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(16, dtype=torch.float64))
        self.filter = nn.Conv2d(4, 4, 1).to(memory_format=torch.channels_last)

    def loss(self, x):
        y = self.frozen(self.tied(x)) * self.wide.float()
        y = torch.view_as_real(y * self.turn).sum(-1)
        y = y + self.filter(y.view(-1, 4, 2, 2)).flatten(1)
        chosen = x[x[:, 0] > 1]
        loss = super().loss(y)
        if len(chosen):
            both = self.some(chosen).sum() + self.many(chosen).square().mean(1).sum()
            loss = loss + both / len(x)
        return loss


class Toggled(Net):
    """Two optimizers in turn, by hand; accumulates over two backward passes in one of them."""

    def __init__(self):
        super().__init__(width=16, layers=2)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net, self.head)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(self.loss(batch[0]), retain_graph=True)
        self.manual_backward(self.loss(batch[0].flip(1)))
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.loss(batch[0]).backward()  # not by manual_backward
        self.clip_gradients(second, 0.1, "norm")
        second.step()
        second.zero_grad()


class Added(Net):
    """Unfreezes its head before the third step."""

    def __init__(self, **how):
        super().__init__(width=16, layers=2, **how)
        self.head.requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 2 and not self.head.weight.requires_grad:
            self.head.requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters())})


class Twice(Net):
    """A layer that is used in two re-entrant checkpoints: its gradient arrives in two parts."""

    def __init__(self, **how):
        super().__init__(width=16, layers=2, **how)

    def loss(self, x):
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.net, x, use_reentrant=True)
        return super().loss(x)


class TwoBackwards(Net):
    """Goes backward twice in a step."""

    def __init__(self, **how):
        super().__init__(width=16, layers=2, **how)

    def backward(self, loss):
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()


SGD = {"optimizer": torch.optim.SGD, "lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
TWO = {"accumulate_grad_batches": 2}
CASES = {
    "large and small": (Net, {}, {}),
    "accumulation": (Net, SGD, TWO),
    "odd parameters": (Odd, SGD, {}),
    "odd parameters, accumulation": (Odd, SGD, TWO),
    "clipping": (Net, SGD, {}, GradientClipping(0.05), NaNGuard()),
    "clipping of odd parameters": (Odd, SGD, {}, GradientClipping(0.05)),
    "clipping by value": (Odd, SGD, {}, GradientClipping(max_value=0.001)),
    "Lightning's clipping": (Net, SGD, {"gradient_clip_val": 0.05}),
    "two optimizers by hand": (Toggled, {}, {}),
    "a group that is added": (Added, SGD, {}),
    "a gradient in two parts": (Twice, SGD, {}),
    "two backward passes": (TwoBackwards, SGD, TWO),
    "double precision": (Net, SGD, {"precision": "64-true"}),
}


class Few(Net):
    """So few numbers that every rank can take the whole step of Newton's method."""

    def __init__(self, **how):
        super().__init__(width=2, layers=1, **how)


NEWTON = {"optimizer": NewtonOptimizer, "lr": 1.0, "damping": 5.0}
CASES["Newton's method"] = (Few, NEWTON, {})
CASES["Newton's method, clipping"] = (Few, NEWTON, {}, GradientClipping(0.05))
CASES["Newton's method, Lightning's clipping"] = (Few, NEWTON, {"gradient_clip_val": 0.05})


class TwoModes(torch.optim.SGD):
    """Shows other weights in evaluation, where it has states, as a schedule-free optimizer."""

    def eval(self):
        for p, state in self.state.items():
            p.data += state["momentum_buffer"]

    def train(self):
        for p, state in self.state.items():
            p.data -= state["momentum_buffer"]


class Shows(Net):
    """Ends in the mode of evaluation."""

    def on_train_end(self):
        self.trainer.optimizers[0].eval()


CASES["weights to show"] = (Shows, SGD | {"optimizer": TwoModes}, {})
UNPAIRED = ("large and small", "odd parameters, accumulation", "weights to show")


def all_cases(strategy, paired=True):
    found = {}
    zero1.POINT_TO_POINT_BACKENDS = {"gloo"} if paired else set()  # as with nccl
    for name in CASES if paired else UNPAIRED:
        kind, how, options, *callbacks = CASES[name]
        found[name] = trained(kind, strategy, how, options, *callbacks)
    return found


@pytest.fixture(scope="module")
def single():
    return all_cases("auto")


@pytest.fixture(scope="module")
def everywhere():
    return run_ranks(all_cases, 2, "zero1", timeout=200)


@pytest.fixture(scope="module")
def unpaired():
    return run_ranks(all_cases, 2, "zero1", False, timeout=200)


@pytest.mark.parametrize("case", UNPAIRED)
def test_backends_that_reduce_to_an_owner_take_the_same_steps(everywhere, unpaired, case):
    for one, other in zip(everywhere, unpaired, strict=True):
        assert furthest(one[case], other[case]) < 2e-6


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", CASES)
def test_four_steps_equal_one_process(single, everywhere, case):
    bound = 1e-13 if case == "double precision" else 2e-6
    for found in everywhere:
        assert furthest(found[case], single[case]) < bound


CLIPPED = {
    "clipping": "accumulation",  # the same steps without it
    "Lightning's clipping": "accumulation",
    "clipping of odd parameters": "odd parameters",
    "clipping by value": "odd parameters",
    "Newton's method, clipping": "Newton's method",
    "Newton's method, Lightning's clipping": "Newton's method",
}


@pytest.mark.parametrize("case", CLIPPED)
def test_clipping_changes_the_weights_in_these_cases(single, case):
    assert furthest(single[case], single[CLIPPED[case]]) > 1e-3


class Sparse(Net):
    """An embedding with sparse gradients."""

    def __init__(self):
        super().__init__(width=16, layers=1, optimizer=torch.optim.SGD)
        self.table = nn.Embedding(5, 16, sparse=True)

    def loss(self, x):
        return super().loss(x + self.table(x.argmax(1) % 5))


class Irregular(Twice):
    """Uses a layer once, and in the third step twice."""

    def loss(self, x):
        again = checkpoint(self.net, x.requires_grad_(), use_reentrant=True)
        loss = Net.loss(self, again)
        if self.global_step == 2:
            loss = Net.loss(self, checkpoint(self.net, again, use_reentrant=True))
        return loss


class ShardsItself(Net):
    """Shards its head over the ranks that own parameters."""

    def __init__(self):
        super().__init__(width=16, layers=1)

    def configure_model(self):
        torch.distributed.fsdp.fully_shard(self.head, mesh=self.device_mesh["data_parallel"])


REFUSED = {
    Sparse: "zero1: the gradient of table.weight is sparse; allowed: dense gradients; use",
    Irregular: "zero1: the gradient of net.* arrives more often than in earlier steps",
    ShardsItself: "zero1: head.weight is sharded over the data-parallel ranks, .*; allowed",
}


def refusals():
    found = {}
    for kind in REFUSED:
        with pytest.raises((ValueError, RuntimeError)) as error:
            fit(built(kind))
        found[kind.__name__] = str(error.value)
    return found


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_unsupported_uses_of_zero1_are_refused_in_one_line(ranks):
    for found in ranks(refusals, 2):
        for kind, words in REFUSED.items():
            assert re.search(words, found[kind.__name__])
            assert "\n" not in found[kind.__name__]


class Peak(L.Callback):
    """The peak of the third step over what is there at the start of training."""

    def on_train_start(self, trainer, module):
        self.stack, self.times = ExitStack(), []
        self.found = self.stack.enter_context(tensor_bytes())

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2:
            self.times.append(time.time_ns())

    def on_train_end(self, trainer, module):
        self.times.append(time.time_ns())
        self.stack.close()
        start, end = self.times
        self.bytes = self.found.alive(start) + self.found.peak_over(start, end)


def peak(strategy):
    """Bytes beyond the parameters, in times of these; ddp has made its buckets before."""
    module, peak = built(Net), Peak()
    zero1_messages.MAX_BUCKET_BYTES = zero1_messages.MIB  # of 6.6, as 25 MB are of a net of 165
    fit(module, strategy, peak, max_steps=3)
    return peak.bytes / sum(p.numel() * 4 for p in module.parameters())


@pytest.mark.parametrize(("world", "bound"), [(2, 0.65), (4, 0.5)])
def test_the_peak_of_a_step_is_below_that_of_ddp(ranks, world, bound):
    zero1_peak, ddp_peak = max(ranks(peak, world, "zero1")), min(ranks(peak, world, "ddp"))
    assert 1 + zero1_peak < bound * (2 + ddp_peak)
    assert zero1_peak < 3 / world + 0.8  # G / n, S / n, and what is on its way
