"""Under sharding, mixed precision gathers and multiplies in half precision, and keeps fp32."""

import lightning as L
import pytest
import torch
from ranks import furthest, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from ravine.errors import UsageError
from ravine.lightning_modules.nn.moe import MixtureOfExperts
from ravine.strategies import MeshStrategy

BF16, FP32 = torch.bfloat16, torch.float32


class Layers(nn.Module):
    """One layer of each kind whose weights mixed precision treats in its own way."""

    full_precision = ("router",)

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        self.norm = nn.LayerNorm(24)
        self.linear = nn.Linear(24, 24)
        self.router = nn.Linear(24, 24)
        self.convolution = nn.Conv1d(24, 24, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(24)
        self.recurrent = nn.GRU(24, 24, batch_first=True)
        self.gain = nn.Parameter(torch.ones(24))
        self.matrix = nn.Parameter(torch.randn(24, 24) / 5)
        self.wide = nn.Parameter(torch.ones(24, dtype=torch.float64))
        self.head = nn.Linear(24, 1)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        x = x + self.linear(x)
        with torch.autocast("cpu", enabled=False):
            x = x + self.router(x.float())
        x = x + self.batch_norm(self.convolution(x.mT)).mT
        x = x + self.recurrent(x)[0] * self.gain + x @ self.matrix + (x * self.wide).float()
        return self.head(x).float()


class Task(L.LightningModule):
    """A net of others, trained on fixed numbers; it notes the dtypes that a step shows."""

    def __init__(self, net=Layers, rows=8):
        super().__init__()
        self.net, self.rows, self.seen = net(), rows, {}

    def note(self, kind, name, tensor):
        self.seen.setdefault(name, {})[kind] = tensor.dtype

    def training_step(self, batch, index):
        def look(layer, inputs):
            if (weight := next(layer.parameters(), None)) is not None:
                self.note("weight", names[layer], weight)
                self.note("input", names[layer], inputs[0])

        names = {layer: name for name, layer in self.net.named_children()}
        handles = [layer.register_forward_pre_hook(look) for layer in names]
        loss = self.net(batch).square().mean()
        for handle in handles:
            handle.remove()
        return loss

    def train_dataloader(self):  # an epoch is one step of all ranks, in whatever order
        tokens = torch.randint(16, (16, 6), generator=torch.Generator().manual_seed(1))
        return DataLoader(tokens, batch_size=self.rows)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module, strategy="auto", devices=1, steps=2, **options):
    trainer = L.Trainer(
        strategy=strategy, devices=devices, accelerator="cpu", max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


class Messages(TorchDispatchMode):
    """The messages of a step by their kind: the larger tensor of each."""

    def __init__(self):
        super().__init__()
        self.found = {"allgather": [], "reducescatter": [], "allreduce": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).replace("_", "")
        for kind, found in self.found.items():
            if name.startswith(f"c10d.{kind}"):
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                found.append(max(tensors, key=torch.Tensor.numel))
        return function(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Keeps the dtypes, the number and the bytes of the messages of each batch."""

    def __init__(self):
        self.dtypes, self.counts, self.bytes = [], [], []

    def on_train_batch_start(self, *_):
        self.mode = Messages()
        self.mode.__enter__()

    def on_train_batch_end(self, *_):
        self.mode.__exit__(None, None, None)
        found = self.mode.found.items()
        self.dtypes.append({kind: {each.dtype for each in sent} for kind, sent in found})
        self.counts.append({kind: len(sent) for kind, sent in found})
        self.bytes.append({kind: sum(each.nbytes for each in sent) for kind, sent in found})
        del self.mode


def dtypes(strategy):
    torch.manual_seed(0)
    watch, module = Watch(), Task()
    trainer = fit(module, strategy, 2, precision="bf16-mixed", callbacks=[watch])
    module.seen["messages"] = watch.dtypes[0]
    for name, p in module.net.named_parameters():
        layer, _, _ = name.partition(".")
        module.note("gradient", layer, p.grad)
        module.note("state", layer, trainer.optimizers[0].state[p]["exp_avg"])
        module.seen[layer]["sharded"] = isinstance(p, DTensor)
    return module.seen


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_weights_are_gathered_in_bf16_and_stay_fp32_elsewhere(ranks, strategy):
    for seen in ranks(dtypes, 2, strategy):
        for name in ("embed", "linear", "convolution", "head"):
            assert seen[name]["weight"] == BF16, name
            assert seen[name]["sharded"], name
        for name in ("norm", "router", "batch_norm", "recurrent"):
            assert seen[name]["weight"] == FP32, name
            assert not seen[name]["sharded"], name
        assert seen["matrix"]["sharded"]
        assert not seen["gain"]["sharded"]
        assert not seen["wide"]["sharded"]
        messages = seen.pop("messages")
        assert messages["allgather"] == {BF16}
        assert messages["reducescatter"] == {FP32}
        assert messages["allreduce"] == {FP32, torch.float64}  # parameters that are whole
        for name, found in seen.items():
            wide = torch.float64 if name == "wide" else FP32
            assert found["gradient"] == found["state"] == wide, name
        assert seen["embed"]["input"] == torch.int64
        assert seen["norm"]["input"] == FP32  # embeddings are looked up in fp32
        assert seen["router"]["input"] == FP32


def trained(strategy, devices, precision):
    torch.manual_seed(0)
    module = Task(rows=16 // devices)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    module.net.batch_norm = nn.Identity()  # its statistics are those of a rank
    fit(module, strategy, devices, precision=precision)
    return whole(module)


def off(one, other):
    """The root of the mean square of all differences."""
    square = sum((one[name] - other[name]).double().square().sum() for name in one)
    return (square / sum(p.numel() for p in one.values())).sqrt().item()


def test_two_steps_in_mixed_precision_are_as_far_from_exact_ones_as_in_one_process(ranks):
    exact, half = trained("auto", 1, "32-true"), trained("auto", 1, "bf16-mixed")
    rounding = off(exact, half)
    assert 3e-4 < rounding < 3e-3  # of 0.16 that they move
    for strategy in ("zero2", "zero3"):
        for weights in ranks(trained, 2, strategy, 2, "bf16-mixed"):
            assert 0.7 * rounding < off(weights, exact) < 1.2 * rounding
            assert off(weights, half) < 1.7 * rounding


class Bag(nn.Module):
    """A weighted sum of rows, an operation that autocast does not cast: it needs fp32 weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 24))
        self.bag = nn.EmbeddingBag(16, 24, mode="sum")
        self.head = nn.Linear(24, 1)

    def forward(self, tokens):
        self.dtypes = (
            self.weight.dtype,
            self.bag(tokens).dtype,
            (self.weight @ self.weight.mT).dtype,
        )
        weights = torch.ones(tokens.shape)
        rows = nn.functional.embedding_bag(
            tokens, self.weight, mode="sum", per_sample_weights=weights
        )
        return self.head(rows + self.bag(tokens, per_sample_weights=weights)).float()


class Writing(Bag):
    """It changes its weight within the forward, as a codebook of running means does."""

    def forward(self, tokens):
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(tokens)


def trained_net(kind, strategy="auto", devices=1, precision="32-true"):
    torch.manual_seed(0)
    module = Task(kind, rows=16 // devices)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.001)
    fit(module, strategy, devices, precision=precision)
    return whole(module), module.net.dtypes


def test_weights_of_other_layers_are_read_in_fp32_as_in_one_process(ranks):
    exact, half = trained_net(Bag), trained_net(Bag, "auto", 1, "bf16-mixed")
    rounding = off(exact[0], half[0])
    assert rounding > 0
    for strategy in ("zero2", "zero3"):
        for weights, dtypes in ranks(trained_net, 2, Bag, strategy, 2, "bf16-mixed"):
            assert dtypes == half[1] == (FP32, FP32, BF16)
            # the fp32 copies are of gathered weights, which are rounded to bf16
            assert off(weights, exact[0]) < 3 * rounding


class Centred(nn.Linear):
    """It computes its weight from a parameter, as layers of weight standardization do."""

    def forward(self, x):
        self.is_copied = "weight" in vars(self)
        return nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class First(nn.Linear):
    """It leaves the use of its weight to nn.Linear."""

    def forward(self, x):
        self.is_copied = "weight" in vars(self)
        return super().forward(x)[:, :24]


class Reparametrized(nn.Module):
    """Layers whose weights torch computes from parameters before each forward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        self.centred, self.first, self.head = Centred(24, 24), First(24, 32), nn.Linear(24, 1)
        self.spectral = nn.utils.spectral_norm(nn.Linear(24, 24))
        self.normed = nn.utils.weight_norm(nn.Linear(24, 24))
        self.pruned = nn.utils.prune.l1_unstructured(nn.Linear(24, 24), "weight", 0.5)

    def forward(self, tokens):
        x = self.spectral(self.centred(self.embed(tokens).mean(1)))
        x = self.head(self.pruned(self.normed(self.first(x)))).float()
        self.dtypes = (self.centred.is_copied, self.first.is_copied, self.normed.weight.dtype)
        return x


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
def test_weights_that_are_computed_from_parameters_are_computed_in_fp32(ranks):
    exact, half = trained_net(Reparametrized), trained_net(Reparametrized, "auto", 1, "bf16-mixed")
    rounding = off(exact[0], half[0])
    assert rounding > 0
    for strategy in ("zero2", "zero3"):
        for weights, seen in ranks(trained_net, 2, Reparametrized, strategy, 2, "bf16-mixed"):
            assert seen == (True, False, FP32)
            assert off(weights, exact[0]) < 3 * rounding


def written(strategy):
    try:
        fit(Task(Writing), strategy, 2, precision="bf16-mixed", steps=1)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_write_into_a_copy_in_fp32_is_refused_and_not_lost(ranks, strategy):
    for message in ranks(written, 2, strategy):
        assert "net.weight was changed within a step" in message


class Deep(nn.Module):
    """Products of odd shapes: no activation has the shape of a weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        blocks = [nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)) for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return x.float()


class MeasuresMemory(Task):
    """Weights that autograd holds at the end of a forward, in bytes that are really there."""

    def training_step(self, batch, index):
        sizes = {}

        def pack(tensor):
            if set(tensor.shape) == {24, 40}:
                sizes[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = super().training_step(batch, index)
        self.alive = sum(tensor.untyped_storage().nbytes() for tensor in sizes.values())
        self.found = len(sizes)
        return loss


def alive(strategy, precision):
    fit(module := MeasuresMemory(Deep), strategy, 2, precision=precision)
    return module.alive, module.found


def test_no_full_weight_is_in_memory_after_the_forward_under_zero3(ranks):
    for precision in ("32-true", "bf16-mixed"):
        for bytes_alive, found in ranks(alive, 2, "zero3", precision):
            assert bytes_alive == 0
            assert found > 0
    kept = 6 * 24 * 40 * BF16.itemsize  # zero2 keeps the gathered ones, in half precision
    for bytes_alive, _ in ranks(alive, 2, "zero2", "bf16-mixed"):
        assert kept <= bytes_alive <= kept + 6 * 40 * BF16.itemsize


class Timed(nn.Module):
    """A net that is told a time, as a denoiser is."""

    def __init__(self):
        super().__init__()
        self.linear, self.times = nn.Linear(24, 24), []

    def forward(self, x, time):
        self.times.append((time.dtype, time.item()))
        return self.linear(x) * time


class Diffusion(Task):
    def training_step(self, batch, index):
        x = torch.nn.functional.one_hot(batch, 24).float()
        return self.net(x, torch.tensor(0.123456)).square().mean()


def times_and_output(strategy):
    fit(module := Diffusion(Timed), strategy, 2, precision="bf16-mixed", steps=1)
    with torch.no_grad():
        outside = module.net(torch.ones(1, 24), torch.tensor(0.5))
    return module.net.times, outside, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_inputs_of_the_net_arrive_unrounded_and_a_call_outside_autocast_works(ranks, strategy):
    for times, outside, autocast_stays in ranks(times_and_output, 2, strategy):
        assert times[0] == (FP32, torch.tensor(0.123456).item())
        assert torch.isfinite(outside).all()
        assert not autocast_stays


def routed():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(24, num_experts=4)
    task = Task(lambda: nn.Sequential(nn.Embedding(16, 24), nn.Sequential(mixture)))
    fit(task, "zero3", 2, precision="bf16-mixed", steps=1)
    return isinstance(mixture.router.weight, DTensor), isinstance(mixture.experts.up, DTensor)


def test_the_router_of_a_mixture_is_replicated(ranks):
    assert ranks(routed, 2) == [(False, True)] * 2


def clipped(devices, strategy="auto"):
    torch.manual_seed(0)
    module = Task(rows=16 // devices)
    module.net.batch_norm = nn.Identity()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=10.0)
    fit(module, strategy, devices, 1, precision="bf16-mixed", gradient_clip_val=1e-2)
    return whole(module)


def test_gradient_clip_val_measures_replicated_and_sharded_gradients_together(ranks):
    torch.manual_seed(0)
    start = whole(Task())
    single = clipped(1)
    moved = {n: single[n] - start[n] for n in single}
    length = torch.stack([d.double().square().sum() for d in moved.values()]).sum().sqrt()
    assert abs(length - 0.1) < 1e-3  # lr x the bound
    for weights in ranks(clipped, 2, 2, "zero3"):
        assert furthest(weights, single) < 4e-4


def tiny_layers():
    return nn.ModuleList(nn.Linear(24, 24) for _ in range(20))


class Tiny(Task):
    def __init__(self, rows=8):
        super().__init__(tiny_layers, rows)

    def training_step(self, batch, index):
        x = torch.nn.functional.one_hot(batch, 24).float()
        for layer in self.net:
            x = x + layer(x)
        return x.square().mean()


def messages(strategy, smallest, rows=8, ranks=2, **options):
    torch.manual_seed(0)
    module = Tiny(rows)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)
    zero = 3 if strategy == "zero3" else 2
    how = MeshStrategy(zero_stage=zero, min_unit_bytes=smallest, **options.pop("how", {}))
    fit(module, "ddp" if strategy == "ddp" else how, ranks, callbacks=[watch := Watch()], **options)
    with torch.no_grad():
        outside = module.net[3](torch.ones(24))
    return whole(module), watch.counts, watch.bytes, outside  # `watch` has the module


def gathers_and_scatters(counts):
    return counts["allgather"], counts["reducescatter"]


def test_small_children_are_one_unit_and_train_as_one_process(ranks):
    torch.manual_seed(0)
    single = Tiny(16)
    single.configure_optimizers = lambda: torch.optim.SGD(single.parameters(), lr=0.01)
    fit(single)
    for smallest, expected in ((0, (40, 20)), (2**20, (1, 1))):
        for weights, counts, _, outside in ranks(messages, 2, "zero3", smallest):
            assert furthest(weights, whole(single)) < 2e-6
            assert gathers_and_scatters(counts[1]) == expected
            assert torch.allclose(outside, single.net[3](torch.ones(24)), atol=1e-6)


def accumulated(strategy, once):
    how = {"gather_once": once}
    return messages(strategy, 0, 4, how=how, accumulate_grad_batches=2)[:2]


@pytest.mark.parametrize(("strategy", "num_gathers"), [("zero2", 20), ("zero3", 40)])
def test_gather_once_gathers_each_unit_once_an_optimizer_step(ranks, strategy, num_gathers):
    weights, counts = ranks(accumulated, 2, strategy, False)[0]
    assert [gathers_and_scatters(each) for each in counts] == [(num_gathers, 20)] * 4
    kept, fewer = ranks(accumulated, 2, strategy, True)[0]
    assert [gathers_and_scatters(each) for each in fewer] == [(20, 20), (0, 20)] * 2
    assert furthest(weights, kept) < 1e-7


WEIGHTS = 4 * sum(p.numel() for p in tiny_layers().parameters())  # bytes
SENT = {  # in times of the weights, an optimizer step; a sum of all ranks is sent twice
    ("ddp", 1, False): 2, ("zero2", 1, False): 2, ("zero3", 1, False): 3,
    ("ddp", 2, False): 2, ("zero2", 2, False): 4, ("zero3", 2, False): 6,
    ("zero2", 2, True): 3, ("zero3", 2, True): 3,
}  # fmt: skip


def bytes_sent(cases, ranks):
    """Bytes of the second optimizer step in each case: gathered, scattered, and summed."""
    found = []
    for strategy, number, once, *degrees in cases:
        how = {"gather_once": once} | (degrees[0] if degrees else {})
        _, _, sent, _ = messages(
            strategy, 0, 16 // (ranks * number), ranks, how=how, accumulate_grad_batches=number
        )
        steps = sent[number : 2 * number]
        found.append({kind: sum(step[kind] for step in steps) for kind in steps[0]})
    return found


def test_the_bytes_of_an_optimizer_step_equal_the_documentation(ranks):
    for found in ranks(bytes_sent, 2, list(SENT), 2):
        for times, sent in zip(SENT.values(), found, strict=True):
            total = sent["allgather"] + sent["reducescatter"] + 2 * sent["allreduce"]
            assert total == times * WEIGHTS


def test_copies_of_shards_send_gradients_of_one_shard_whatever_the_micro_batches(ranks):
    cases = [("zero3", number, False, {"dp_replicate": 2}) for number in (1, 2)]
    for found in ranks(bytes_sent, 4, cases, 4):
        for number, sent in zip((1, 2), found, strict=True):
            assert sent["allgather"] + sent["reducescatter"] == 3 * number * WEIGHTS
            assert 2 * sent["allreduce"] == 2 * WEIGHTS / 2  # two ranks share a copy
