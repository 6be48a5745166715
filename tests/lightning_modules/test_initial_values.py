"""Initial values: one network on every layout, drawn by name and in shards."""

import lightning as L
import pytest
import torch
from ranks import whole
from tensor_bytes import tensor_bytes
from torch import nn

from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel, TaskModule
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.nn.initial_values import CHUNK_SIZE, InitialValues
from ravine.lightning_modules.nn.unet import UNet

NETS = {
    "transformer": lambda: Transformer(100, 64, num_layers=2, d_model=64, num_heads=4),
    "tied": lambda: Transformer(
        100,
        64,
        num_layers=2,
        d_model=64,
        num_heads=4,
        tie_embeddings=True,
        norm="layernorm",
        bias="all",
        positional_encoding="learned",
    ),
    "sinusoidal": lambda: Transformer(
        100, 64, num_layers=1, d_model=64, num_heads=4, positional_encoding="sinusoidal"
    ),
    "mixture": lambda: Transformer(
        100, 64, num_layers=1, d_model=64, num_heads=4, num_experts=4, zero_init_residual=False
    ),
    "U-Net": lambda: UNet(3, 16, num_classes=4, has_attention=True).to(
        memory_format=torch.channels_last
    ),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Linear(9, 64)),
}


@pytest.mark.parametrize("name", NETS)
def test_values_have_the_distribution_and_the_form_of_the_constructor(name):
    torch.manual_seed(0)
    reference = NETS[name]()
    values = InitialValues.record(NETS[name])
    assert all(p.is_meta for p in values.net.parameters())
    net = values.materialize()
    expected, actual = reference.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        other = actual[key]
        assert (other.dtype, other.stride()) == (tensor.dtype, tensor.stride())
        if isinstance(tensor, nn.Parameter):
            assert other.requires_grad == tensor.requires_grad
            std = tensor.std().item() if tensor.numel() > 1 else 0.0
            error = 6 * std / max(1, tensor.numel()) ** 0.5
            assert abs(other.mean() - tensor.mean()) <= 2 * error + 1e-7
            assert other.numel() < 100 or abs(other.std() - std) <= 2 * error + 1e-7
            assert std == 0.0 or not torch.equal(other, tensor)
            if std and other.numel() >= 100:  # the largest of a normal is 1.5 x of a uniform
                assert 0.75 < other.abs().max() / tensor.abs().max() < 1.33
    shared = [len(list(n.parameters())) for n in (reference, net)]
    assert shared[0] == shared[1]  # tied stay tied


@pytest.mark.parametrize("name", NETS)
def test_buffers_are_computed_as_by_the_constructor(name):
    reference, net = NETS[name](), InitialValues.record(NETS[name]).materialize()
    actual = dict(net.named_buffers())
    for key, buffer in reference.named_buffers():
        assert torch.equal(buffer, actual[key]), key
        assert not actual[key].is_meta


def test_rows_are_equal_on_every_rank_that_draws_them():
    shape = torch.Size([5000, 1024])  # five chunks

    def build():
        return nn.Linear(1024, 5000, bias=False)

    torch.manual_seed(0)
    values = InitialValues.record(build)
    full = values.sample_rows("net.weight", shape, 0, 5000, torch.float32)
    assert full.numel() > 4 * CHUNK_SIZE
    for start, stop in ((0, 1), (1000, 1030), (1023, 2049), (4999, 5000)):
        part = values.sample_rows("net.weight", shape, start, stop, torch.float32)
        assert torch.equal(part, full[start:stop])
    chunks = full.split(1024)
    assert not torch.equal(chunks[0], chunks[1])


def test_initial_values_are_decided_by_seed_and_name():
    def build():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def weights(seed):
        torch.manual_seed(seed)
        return InitialValues.record(build).materialize().state_dict()

    first = weights(0)
    assert all(torch.equal(first[key], value) for key, value in weights(0).items())
    assert not any(torch.equal(first[key], value) for key, value in weights(1).items())
    assert not torch.equal(first["0.weight"], first["1.weight"])


def test_an_external_net_is_built_by_the_global_generator():
    class Orthogonal(TaskModule):
        def build_net(self):
            net = nn.Linear(16, 16, bias=False)
            nn.init.orthogonal_(net.weight)
            return net

    class Copied(TaskModule):
        def build_net(self):
            net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            net[1].weight.data.copy_(net[0].weight.data)
            return net

    class FirstRow(TaskModule):
        def build_net(self):
            return nn.Embedding(8, 4, padding_idx=0)

    torch.manual_seed(0)
    weight = nn.Linear(16, 16, bias=False).weight
    nn.init.orthogonal_(weight)
    torch.manual_seed(0)
    (module := Orthogonal()).configure_model()
    assert torch.equal(module.net.weight, weight)  # the global generator is as it was
    (module := Copied()).configure_model()
    assert torch.equal(module.net[0].weight, module.net[1].weight)
    (module := FirstRow()).configure_model()
    assert (module.net.weight[0] == 0).all()
    assert (module.net.weight[1:] != 0).all()


def test_a_constructor_that_computes_with_its_values_is_not_recorded():
    def copied():
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight.data.copy_(net[0].weight.data)
        return net

    def never_filled():
        return nn.ParameterList([nn.Parameter(torch.empty(3))])

    def read():
        net = nn.Linear(4, 4)
        assert net.weight.sum().item() != 0
        return net

    for build in (copied, never_filled, read, lambda: nn.Embedding(8, 4, padding_idx=0)):
        state = torch.get_rng_state()
        assert InitialValues.record(build) is None
        assert torch.equal(torch.get_rng_state(), state)


def start(strategy, devices, shape):
    torch.manual_seed(0)
    module, found = LanguageModel(**{"num_layers": 2, "d_model": 64, "num_heads": 4} | shape), {}

    class Look(L.Callback):
        def on_fit_start(self, trainer, module):
            found.update(whole(module))

    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(
        module, datamodule=TextDataModule(source="embedded", context_length=32, batch_size=8)
    )
    return found


LAYOUTS = [
    *(
        ("ddp", 2, {}),
        ("zero1", 2, {}),
        ("zero2", 2, {}),
        ("zero3", 4, {"d_model": 60, "num_heads": 3}),
    ),
    *(
        ("zero3", 2, {"tie_embeddings": True, "positional_encoding": "learned"}),
        ("tp", 2, {"tie_embeddings": True}),
    ),
    *(("sp", 2, {}), ("2d", 4, {}), ("hsdp", 4, {}), ("ep", 2, {"num_experts": 4}), ("pp", 2, {})),
]


@pytest.mark.parametrize(("strategy", "world", "shape"), LAYOUTS)
def test_every_layout_starts_with_the_bits_of_one_process(ranks, strategy, world, shape):
    single = start("auto", 1, shape)
    seen = set()
    for values in ranks(start, world, strategy, world, shape):
        assert all(torch.equal(value, single[name]) for name, value in values.items())
        seen |= values.keys()
    assert seen == single.keys()


WIDE = {"num_layers": 4, "d_model": 256, "num_heads": 4}  # 3.2 M parameters


class FromSetupOn(L.Callback):
    """Counts the bytes of tensors from before the network is built until the run begins."""

    def setup(self, trainer, module, stage):
        self.measure = tensor_bytes()
        self.found = self.measure.__enter__()

    def on_fit_start(self, trainer, module):
        self.measure.__exit__(None, None, None)
        self.share = sum(p.to_local().nbytes for p in module.parameters())
        self.whole = sum(p.numel() * p.itemsize for p in module.parameters())


def bytes_at_start(devices):
    torch.manual_seed(0)
    look = FromSetupOn()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="zero3", max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[look],
    )  # fmt: skip
    data = TextDataModule(source="embedded", context_length=32, batch_size=8)
    trainer.fit(LanguageModel(**WIDE), datamodule=data)
    return look.found.peak, look.share, look.whole


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_holds_more_than_its_shard_at_the_start(ranks, world):
    largest = 4 * 256 * 1024  # of the tensors, in bytes
    for peak, share, everything in ranks(bytes_at_start, world, world):
        assert share < 1.02 * everything / world
        assert peak < 1.3 * share + 2 * largest < everything
