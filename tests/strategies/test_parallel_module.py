"""Unusual modules are sharded correctly or refused with a reason before the first step."""

import os
import re
from itertools import combinations

import lightning as L
import pytest
import torch
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import furthest, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import ExactResume, GradientClipping, LoRA
from ravine.callbacks.transforms.base import Transform
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.nn.attention import LEARNED_PROJECTIONS, PROJECTIONS
from ravine.strategies import MeshStrategy


class Block(nn.Module):
    def __init__(self, shared: nn.Linear | None = None) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(8, 8)])})
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.shared = shared

    def forward(self, x):
        x = x + self.scale * torch.tanh(self.inner["a"][0](x))
        return x if self.shared is None else x + self.shared(x)


class Head(nn.Linear):
    def forward(self, x):
        return super().forward(x)[:, 0]  # a view


class Odd(L.LightningModule):
    """Everything at once: tied children, a layer in two blocks, scalars, parameters and buffers
    of the module itself, frozen parts, a list in a dict, an unused container."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8), Head(8, 5)
        self.head.weight = self.embed.weight
        both = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(both), Block(), Block(both)])
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.shift = nn.Parameter(torch.randn(8))
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("noise", torch.randn(8))
        self.empty = nn.ModuleDict()
        self.batch_size = batch_size

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.embed(x[:, None]) + self.shift + self.noise  # (b, 1, d)
        for block in self.blocks:
            x = block(x)
        x = self.head(self.frozen(x))
        x += 1.0  # in place on the output of a sharded unit, which is a view
        return nn.functional.cross_entropy(x / self.temperature, y)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)

    def train_dataloader(self):
        x = torch.arange(8) % 5
        return DataLoader(TensorDataset(x, (x + 1) % 5), batch_size=self.batch_size)


def fit(module, strategy="auto", devices=1, *callbacks, **options):
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        strategy=strategy,
        devices=devices,
        **options,
    )
    trainer.fit(module)
    return trainer


def fit_irregular(strategy="auto", devices=1):
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # rank 0's values must reach the others
    module = Odd(8 // devices)
    fit(module, strategy, devices)
    replicated_names = {n for n, p in module.named_parameters() if not isinstance(p, DTensor)}
    return whole(module), replicated_names, module.head.weight is module.embed.weight


def test_an_unusual_module_under_zero3_equals_one_process(ranks):
    single, _, _ = fit_irregular()
    for weights, kept_whole, tied in ranks(fit_irregular, 2, "zero3", 2):
        assert furthest(weights, single) < 2e-6
        assert kept_whole == {
            *("shift", "temperature", "embed.weight"),
            *("blocks.0.shared.weight", "blocks.0.shared.bias"),
            *(f"blocks.{i}.scale" for i in range(3)),
        }
        assert tied


class Late(NetInInit):
    """Its optimizer starts before its net: there is nothing to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None
        self.weight = nn.Parameter(torch.zeros(4))


class OnOneMesh(NetInConfigureModel):
    """Shards itself, as stock ModelParallelStrategy wants it."""

    def configure_model(self):
        super().configure_model()
        torch.distributed.fsdp.fully_shard(self.head, mesh=self.device_mesh["data_parallel"])


class Net(L.LightningModule):
    """A transformer on random tokens, with a plan that a test may spoil."""

    def __init__(self, plan=None, **shape) -> None:
        super().__init__()
        shape = {"num_layers": 1, "d_model": 12, "zero_init_residual": False} | shape
        self.net = Transformer(5, 8, **shape)
        if plan is not None:
            self.net.tensor_parallel_plan = lambda: plan

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(32).reshape(4, 8) % 5), batch_size=4)


class Bare(NetInInit):
    """One linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)


class Forgetful(Net):
    """Its stream is dropped now and then, its attention weights are not."""

    def __init__(self, **shape) -> None:
        super().__init__(**shape)
        self.net.dropout = nn.Dropout(0.1)


class Careless(Net):
    """It drops tokens by a function."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * nn.functional.dropout(torch.ones(())).sum()


class Adapter(Transform):
    phase = "adapt"

    def transform(self, module):
        module.adapted = True


class Manual(Net):
    """Steps by itself."""

    def __init__(self, **shape) -> None:
        super().__init__(**shape)
        self.automatic_optimization = False


class Newtonian(Net):
    """Calls its closure as often as it likes."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


SUBSETS = [names for size in range(4) for names in combinations(PROJECTIONS, size)]


def weights_of_variants(strategy="auto", devices=1):
    """Weights after training with each attention variant and with each that a user may add."""
    added = {"own_" + "_".join(names): names for names in SUBSETS}
    LEARNED_PROJECTIONS.update(added)
    try:
        found = {}
        for variant in LEARNED_PROJECTIONS:
            torch.manual_seed(0)
            module = Net(num_heads=2, attention_variant=variant)
            fit(module, strategy, devices)
            found[variant] = whole(module)
        return found
    finally:
        for variant in added:
            del LEARNED_PROJECTIONS[variant]


def test_every_attention_variant_trains_under_tp_as_on_one_process(ranks):
    single = weights_of_variants()
    assert {*LEARNED_PROJECTIONS, "own_key_value", "own_query_value"} < single.keys()
    for weights_by_variant in ranks(weights_of_variants, 2, "tp", 2):
        far = {
            variant: furthest(weights, single[variant])
            for variant, weights in weights_by_variant.items()
        }
        assert max(far.values()) < 2e-6, far


def first_line(kind, strategy, devices, callbacks=(), arguments=(), options=()):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the caller matches
        fit(kind(**dict(arguments)), strategy, devices, *callbacks, **dict(options))
    return str(error.value)


REFUSED = {
    "nothing to shard": (
        (Late, "zero3", 2),
        "Late has nothing to shard: no child module holds a parameter; allowed: .*; use .* as ddp$",
    ),
    "no plan": (
        (NetInInit, "tp", 2),
        "tp=2: NetInInit has no tensor-parallel plan; .*tensor_parallel_plan.*; use .*zero3$",
    ),
    "a plan that splits nothing": (
        (Net, "tp", 2, (), {"num_heads": 2, "attention_variant": "qk", "activation": "none"}),
        "tp=2: Transformer.tensor_parallel_plan splits no matrix of this net; .* as zero3$",
    ),
    "heads": (
        (Net, "tp", 2, (), {"num_heads": 3, "positional_encoding": "none"}),
        r"tp=2 does not divide the 3 heads of .*query; allowed: 1, 3; use MeshStrategy\(tp=1\)$",
    ),
    "a pattern that matches nothing": (
        (Net, "tp", 2, (), {"num_heads": 2, "plan": {"block.*.mlp.up": "colwise"}}),
        r"_plan: 'block.\*.mlp.up' matches no module; modules: blocks, ",
    ),
    "a sequence that is cut nowhere": (
        (Net, "sp", 2, (), {"num_heads": 2, "plan": {"blocks.*.mlp.up": "colwise"}}),
        "_plan does not mark where the sequence is split and gathered; allowed: .*; use seq",
    ),
    "an attention of whole heads and a cut sequence": (
        (Net, "sp", 2, (), {"num_heads": 2, "attention_variant": "qk"}),
        "_plan does not mark where the sequence is split and gathered; allowed: .*; use seq",
    ),
    "a sequence that does not divide": (
        (Net, "sp", 3, (), {"num_heads": 3, "positional_encoding": "none"}),
        "tp=3 does not divide the 8 tokens .*; allowed: multiples of 3; use sequences of 6 tokens$",
    ),
    "manual optimization of a cut sequence": (
        (Manual, "sp", 2, (), {"num_heads": 2}),
        'Manual steps its own optimizers .*, which sequence_parallel does not support; .*="tp"\\)$',
    ),
    "an optimizer that ranks cannot share": (
        (Newtonian, "zero1", 2, (), {"num_heads": 2}),
        "LBFGS computes the gradient of all parameters several times a step",
    ),
    "fewer layers than stages": (
        (Net, "pp", 2, (), {"num_heads": 2}),
        r"Net has 1 blocks, fewer than the 2 pipeline stages \(1 on each of 2 ranks\); allowed: "
        r"up to 1 stages; use MeshStrategy\(pp=1\)$",
    ),
    "a batch smaller than its micro-batches": (
        (
            Net,
            MeshStrategy(dp_shard=1, pp=2, num_microbatches=5),
            2,
            (),
            {"num_heads": 2, "num_layers": 2},
        ),
        "num_microbatches=5 does not divide the 4 samples of a rank's batch; allowed: .* of 4; "
        "use .*num_microbatches=4",
    ),
    "no stages": (
        (NetInInit, "pp", 2),
        "pp=2: NetInInit has no network that can be split .*; allowed: .* with blocks, embed",
    ),
    "a sequence that is not cut into equal pieces": (
        (Net, "cp", 3, (), {"num_heads": 3, "positional_encoding": "none"}),
        "cp=3 does not split 8 tokens into 6 equal pieces; allowed: .* of 6; use .* 6 tokens$",
    ),
    "no attention to go round": (
        (NetInInit, "cp", 2),
        "cp=2: NetInInit has no modules with the attributes attention_fn and position_ids",
    ),
    "attention weights that are dropped": (
        (Net, "cp", 2, (), {"num_heads": 2, "dropout": 0.1}),
        "cp=2: Net applies dropout to attention weights, .*; use dropout=0",
    ),
    "experts of sequences that are cut": (
        (Net, "cp", 2, (), {"num_heads": 2, "num_experts": 4}),
        "cp=2: the capacity and the load balancing loss of experts need whole sequences",
    ),
    "tokens that are dropped": (
        (Forgetful, "cp", 2, (), {"num_heads": 2}),
        "cp=2: Forgetful has dropout .net.dropout., and the ranks would draw the same mask",
    ),
    "tokens that are dropped by a function": (
        (Careless, "cp", 2, (), {"num_heads": 2}),
        r"cp=2: Careless.training_step draws random numbers .*, and the ranks would draw the same",
    ),
    "an unknown way to recompute": (
        (Net, MeshStrategy(activation_checkpointing="all"), 2, (), {"num_heads": 2}),
        "activation_checkpointing is 'all'; allowed: none, selective, full; use \"full\"$",
    ),
    "no blocks to recompute": (
        (Bare, MeshStrategy(activation_checkpointing="full"), 2),
        "activation_checkpointing=full: Bare has no blocks",
    ),
    "an unknown style": (
        (Net, "tp", 2, (), {"num_heads": 2, "plan": {"blocks.*.mlp.up": "col"}}),
        r"the style 'col' of 'blocks.\*.mlp.up' does not exist; allowed: colwise, rowwise, shared",
    ),
    "an adapter that does not divide": (
        (Net, "tp", 2, (LoRA(rank=1),), {"num_heads": 2}),
        "tp=2 does not divide the 1 rows of blocks.0.attention.query.lora_a; allowed: .* of 2",
    ),
    "not a matrix": (
        (Net, "tp", 2, (), {"num_heads": 2, "plan": {"blocks.*.mlp": "colwise"}}),
        "'blocks.0.mlp' is a MLP, which has no matrix to split; allowed: ",
    ),
    "a tied matrix split": (
        (Net, "tp", 2, (), {"num_heads": 2, "tie_embeddings": True, "plan": {"head": "rowwise"}}),
        "net.embed.weight and net.head.weight share one parameter and cannot .*; leave them out",
    ),
    "stock clipping of experts on different ranks": (
        (Net, "ep", 2, (), {"num_heads": 2, "num_experts": 4}, {"gradient_clip_val": 0.5}),
        r"gradient_clip_val=0.5 .* with ep=2 .*; allowed: .*, .* GradientClipping\(max_norm=0.5",
    ),
    "stock clipping of stages whose parameters are all sharded": (
        (
            Net,
            MeshStrategy(pp=2),
            4,
            (),
            {"num_heads": 2, "num_layers": 2},
            {"gradient_clip_val": 1.0},
        ),
        r"gradient_clip_val=1 .* with pp=2 .*; allowed: .*, .* GradientClipping\(max_norm=1",
    ),
    "stock clipping beside whole parameters": (
        (Net, "pp", 2, (), {"num_heads": 2, "num_layers": 2}, {"gradient_clip_val": 1.0}),
        r"gradient_clip_val=1 .* with pp=2 .*; allowed: .*, .* GradientClipping\(max_norm=1",
    ),
    "stock ModelParallelStrategy, which shards nothing": (
        (NetInInit, ModelParallelStrategy(2, 1), 2, (Adapter(),)),
        "ModelParallelStrategy does not shard parameters, and neither does NetInInit",
    ),
    "a transform of what shards itself": (
        (OnOneMesh, "zero3", 2, (Adapter(),)),
        "Adapter: OnOneMesh shards its parameters in configure_model, which is too early for",
    ),
}


def refusals():
    world = int(os.environ["WORLD_SIZE"])
    return {n: first_line(*case) for n, (case, _) in REFUSED.items() if case[2] == world}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_cannot_be_sharded_is_refused_in_one_line(ranks, world):
    first, *others = ranks(refusals, world)
    assert all(other == first for other in others)
    assert {n: said for n, said in first.items() if not re.search(REFUSED[n][1], said)} == {}
    assert not any("\n" in said for said in first.values())


@pytest.mark.parametrize(
    ("degrees", "devices", "words"),
    [
        ({"tp": 3}, 4, r"MeshStrategy\(dp_shard=-1, tp=3\) needs a multiple of 3 processes, and"),
        (
            {"dp_shard": 2, "tp": 4},
            4,
            r"needs 8 processes, and there are 4 .*; use Trainer\(devices=8\)$",
        ),
        ({"dp_shard": -1, "tp": -1}, 4, "more than one degree is -1; allowed: .*-1 for one degree"),
        ({"dp_shard": 0}, 1, "a degree is less than 1, .*; allowed: 1 or more"),
        (
            {"dp_replicate": 3},
            4,
            r"\(dp_shard=-1, dp_replicate=3\) needs a multiple of 3 processes",
        ),
        (
            {"sequence_parallel": True},
            2,
            r"sequence_parallel=True .*, and tp is 1; allowed: .*; use MeshStrategy\(tp=2\)$",
        ),
        ({"num_microbatches": 0}, 2, "num_microbatches is 0; allowed: 1 or more"),
        (
            {"pipeline_schedule": "1f2b"},
            2,
            "pipeline_schedule is '1f2b'; allowed: gpipe, 1f1b, interleaved; use .*=\"1f1b\"$",
        ),
        (
            {"dp_shard": 1, "pp": 2, "num_microbatches": 1},
            2,
            r"num_microbatches=1 .* of 2 ranks \(1f1b\); allowed: 2 or more; use .*batches=2",
        ),
        (
            {"dp_shard": 1, "pp": 2, "num_microbatches": 5, "pipeline_schedule": "interleaved"},
            2,
            r"num_microbatches=5 .* \(interleaved\); allowed: multiples of 2; use .*batches=4",
        ),
        (
            {"zero_stage": 4},
            2,
            "zero_stage is 4; allowed: 1, 2, 3; use zero_stage=3$",
        ),
        ({"min_unit_bytes": -1}, 2, "min_unit_bytes is -1; allowed: a number of bytes, 0 or more"),
        ({"min_unit_bytes": "1MB"}, 2, "min_unit_bytes is '1MB'; allowed: a number of bytes"),
        (
            {"zero_stage": 1, "gather_once": True},
            2,
            "gather_once has no effect with zero_stage=1, .*, or remove gather_once$",
        ),
        (
            {"zero_stage": 1, "min_unit_bytes": 0},
            2,
            "min_unit_bytes has no effect with zero_stage=1, .*, or remove min_unit_bytes$",
        ),
    ],
)
def test_degrees_that_do_not_fit_are_refused_when_the_trainer_is_made(degrees, devices, words):
    with pytest.raises(ValueError, match=words):
        L.Trainer(strategy=MeshStrategy(**degrees), devices=devices, accelerator="cpu")


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_a_strategy_takes_the_same_precisions_by_name_and_as_an_object(precision):
    for strategy in ("zero3", MeshStrategy()):
        trainer = L.Trainer(strategy=strategy, precision=precision, devices=2, accelerator="cpu")
        assert trainer.precision == precision


def clipped(strategy="auto", devices=1, bound=0.05, stock=True):
    """Train with Lightning's clipping, or with the callback."""
    torch.manual_seed(0)
    module = Net(num_heads=2, num_layers=2, tie_embeddings=True)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
    how = {"gradient_clip_val": bound} if stock else {}
    fit(module, strategy, devices, *([] if stock else [GradientClipping(bound)]), **how)
    return whole(module)


CLIPPED = {  # the layout, and whether Lightning clips or the callback
    ("zero1", True): "zero1",
    ("zero2", True): "zero2",
    ("zero3", True): "zero3",
    ("tp", True): "tp",
    ("tp", False): "tp",
    ("pp", False): "pp",
    ("hsdp", True): "hsdp",
    ("2d", True): "2d",
    ("zero1 x tp", True): {"zero_stage": 1, "tp": 2},
}
FOUR = ("hsdp", "2d", "zero1 x tp")


def clipped_all(names, devices):
    found = {}
    for name, stock in names:
        how = CLIPPED[name, stock]
        strategy = MeshStrategy(**how) if isinstance(how, dict) else how
        found[name, stock] = clipped(strategy, devices, stock=stock)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_gradient_clipping_equals_one_process(ranks, world):
    names = [each for each in CLIPPED if (each[0] in FOUR) == (world == 4)]
    single = clipped()
    assert furthest(single, clipped(bound=1e6)) > 1e-2  # the bound is exceeded
    for found in ranks(clipped_all, world, names, world):
        for name, weights in found.items():
            assert furthest(weights, {n: single[n] for n in weights}) < 2e-6, name


def one_device():
    torch.manual_seed(0)
    fit(module := NetInInit(batch_size=32), "zero3", 1)
    trainer = fit(module, "zero3", 1)  # again: it is sharded by now
    return whole(module), trainer.strategy.distributed_sampler_kwargs


def test_zero3_runs_on_one_device_and_twice(ranks):
    torch.manual_seed(0)
    fit(module := NetInInit(batch_size=32))
    fit(module)
    ((weights, share),) = ranks(one_device, 1)
    assert furthest(weights, whole(module)) < 2e-6
    assert share == {"num_replicas": 1, "rank": 0}


def with_dropout(resume):
    torch.manual_seed(int(os.environ["RANK"]))
    module = Net(num_heads=2, dropout=0.5)
    fit(module, "tp", 2, *([ExactResume()] if resume else []))
    return whole(module)


@pytest.mark.parametrize("resume", [False, True], ids=["stock", "ExactResume"])
def test_ranks_that_split_matrices_draw_the_same_dropout(ranks, resume):
    first, second = ranks(with_dropout, 2, resume)
    assert furthest(first, second) == 0


class UsedByOneRank(NetInInit):
    """A scalar that the loss of rank 0 alone depends on, and one that no loss depends on."""

    def __init__(self, batch_size):
        super().__init__(batch_size=batch_size)
        self.scale, self.idle = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.scale if self.global_rank == 0 else loss


def scales(strategy):
    torch.manual_seed(0)
    module = UsedByOneRank(batch_size=16)
    fit(module, strategy, 2)
    return module.scale.item(), module.idle.grad


def test_a_replicated_parameter_used_by_one_rank_is_equal_on_all(ranks):
    for strategy in ("zero2", "zero3"):
        (one, idle), (other, also_idle) = ranks(scales, 2, strategy)
        assert one == other != 1.0
        assert idle is also_idle is None
