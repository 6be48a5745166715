"""Every strategy equals one process: a transformer, five steps of SGD, by name.

SGD without clipping, because Adam and clipping hide a wrong scale of the gradient.
"""

import os
from functools import partial

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from ranks import furthest, whole
from torch import nn
from torch.distributed.fsdp import FSDPModule

import ravine.strategies.mesh_strategy as mesh_strategy
from ravine.callbacks import ActivationCheckpointing, Compile
from ravine.datamodules import TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import LanguageModel
from ravine.strategies import (
    STRATEGY_PRESETS,
    MeshStrategy,
    context_parallel,
    expert_parallel,
    parallel_module,
    pipeline_parallel,
    tensor_parallel,
    zero1,
)
from ravine.strategies.activation_checkpointing import apply_activation_checkpointing

# a validation loss that was reduced already is logged by each rank
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use .self.log")

QUICK = {"num_layers": 4, "d_model": 32, "num_heads": 4}
EXPERTS = QUICK | {"num_layers": 2, "num_experts": 8}
OTHER = {  # what QUICK has not
    "num_layers": 2,
    "d_model": 32,
    "num_heads": 4,
    "tie_embeddings": True,
    "bias": "all",
    "norm": "layernorm",
    "positional_encoding": "learned",
    "activation": "swiglu",
}


def mesh(**how):
    return {"strategy": MeshStrategy(**how)}


STRATEGIES = {
    "single": lambda: {"strategy": "auto"},
    "ddp": lambda: {"strategy": "ddp"},
    **{name: partial(dict, strategy=name) for name in STRATEGY_PRESETS},
    "hsdp x sp": lambda: mesh(dp_replicate=2, tp=2, sequence_parallel=True),
    "gpipe": lambda: mesh(dp_shard=1, pp=2, pipeline_schedule="gpipe", num_microbatches=2),
    "interleaved": lambda: mesh(dp_shard=1, pp=2, pipeline_schedule="interleaved"),
    "hsdp x pp": lambda: mesh(dp_replicate=2, pp=2, num_microbatches=2),
    "zero3 x ep": lambda: mesh(ep=2),
    "hsdp x ep": lambda: mesh(dp_replicate=2, ep=2),
    "hsdp x cp": lambda: mesh(dp_replicate=2, cp=2, zero_stage=2),
    "cp x tp": lambda: mesh(dp_shard=1, cp=2, tp=2, activation_checkpointing="full"),
    "zero1 x tp": lambda: mesh(zero_stage=1, tp=2),
    "zero1 x cp": lambda: mesh(zero_stage=1, cp=2),
    "zero1 x pp": lambda: mesh(zero_stage=1, pp=2, num_microbatches=2),
    "zero3 x sp": lambda: mesh(tp=2, sequence_parallel=True),
    "zero3 of one unit": lambda: mesh(min_unit_bytes=2**20),  # the default; in ranks here it is 0
    "zero3 recompute": lambda: mesh(activation_checkpointing="full"),
    "sp recompute": lambda: mesh(
        tp=-1, dp_shard=1, sequence_parallel=True, activation_checkpointing="selective"
    ),
}
WORLDS = [  # and the micro-batches of a step
    *(("ddp", 2, 1), ("zero1", 2, 1), ("zero1", 4, 2), ("zero2", 2, 2), ("zero3", 2, 1)),
    *(("zero3", 2, 2), ("hsdp", 4, 2), ("tp", 2, 1), ("sp", 2, 2), ("2d", 4, 1)),
    ("zero3 of one unit", 2, 2),
    *(
        ("hsdp x sp", 8, 1),
        ("zero1 x tp", 4, 1),
        ("zero1 x cp", 2, 1),
        ("zero1 x pp", 4, 1),
        ("zero3 x sp", 4, 2),
    ),
    *(("cp", 2, 1), ("cp", 4, 2), ("hsdp x cp", 4, 1), ("cp x tp", 4, 1)),
    *(("pp", 2, 1), ("pp", 2, 2), ("pp", 4, 1), ("gpipe", 2, 2), ("interleaved", 2, 2)),
    *(("3d", 8, 1), ("hsdp x pp", 4, 1)),
    *(("zero3 recompute", 2, 1), ("sp recompute", 2, 1)),
]


class Model(LanguageModel):
    """The language model with plain SGD."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Losses(L.Callback):
    """The loss of each step, the mean over ranks and micro-batches."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone())
        if index % trainer.accumulate_grad_batches == 0:
            self.losses.append(torch.zeros(()))
        self.losses[-1] += loss  # each is divided by their number already


def train(name, text, shape, *callbacks, accumulate=1):
    L.seed_everything(0, verbose=False)
    module, losses = Model(zero_init_residual=False, **shape), Losses()
    trainer = L.Trainer(
        max_steps=5,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        logger=False,
        callbacks=[losses, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5 * accumulate,
        num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate,
        **STRATEGIES[name](),
    )
    trainer.fit(module, TextDataModule(text, context_length=64, batch_size=8))
    return whole(module), torch.stack([*losses.losses, trainer.callback_metrics["val/loss"]])


def off(found, single):
    """The largest difference of any weight or loss; a rank of a pipeline has some of the names."""
    weights, losses = single
    assert {name for local_value, _ in found for name in local_value} == weights.keys()
    far = [furthest(local_value, {n: weights[n] for n in local_value}) for local_value, _ in found]
    return max(*far, *((local_value - losses).abs().max() for _, local_value in found))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("".join(python_docs_text())[:3000])
    return path


@pytest.fixture(scope="module")
def single(text):
    return train("single", text, QUICK)


def test_five_steps_of_sgd_move_every_parameter(single, text):
    L.seed_everything(0, verbose=False)
    start = Model(len(set(text.read_text())), 64, zero_init_residual=False, **QUICK)
    start.configure_model()
    moved = {n: (p.detach() - single[0][n]).abs().max() for n, p in start.named_parameters()}
    assert min(moved.values()) > 1e-4


def test_every_preset_has_a_row_of_worlds_or_experts():
    assert {name for name in STRATEGY_PRESETS if name not in {row[0] for row in WORLDS}} <= {"ep"}


@pytest.mark.parametrize(("name", "world", "accumulate"), WORLDS)
def test_five_steps_of_sgd_equal_one_process(ranks, text, single, name, world, accumulate):
    found = ranks(accumulated, world, name, text, accumulate)
    assert off(found, single) < 2e-6


def accumulated(name, text, accumulate):
    return train(name, text, QUICK, accumulate=accumulate)


@pytest.mark.parametrize(
    ("name", "world"), [("zero1", 2), ("2d", 4), ("zero3 x sp", 4), ("cp", 2), ("pp", 2)]
)
def test_a_net_of_other_layers_equals_one_process(ranks, text, name, world):
    assert off(ranks(train, world, name, text, OTHER), train("single", text, OTHER)) < 2e-6


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_bit_of_a_net_with_dropout(text, mode):
    shape = QUICK | {"dropout": 0.2}
    weights, losses = train("single", text, shape)
    again, their_losses = train("single", text, shape, ActivationCheckpointing(mode))
    assert furthest(again, weights) == 0
    assert torch.equal(losses, their_losses)


class Sequence(NetInInit):
    """No list of blocks, buffers that move, and a count of what is computed."""

    def __init__(self, compiled: bool) -> None:
        super().__init__(batch_size=8)
        parts = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh()
        self.net, self.passes = nn.Sequential(*parts, nn.Linear(16, 4), nn.Linear(4, 1)), 0
        if not compiled:  # a graph would be cut in two there
            nn.utils.parametrizations.spectral_norm(self.net[4])  # it moves as it is used
            self.net[0].register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.passes += self.training


def pass_through(*callbacks, compiled=False):
    L.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "logger"), False)
    trainer = L.Trainer(max_steps=3, accelerator="cpu", callbacks=list(callbacks), **quiet,
                        enable_model_summary=False)  # fmt: skip
    trainer.fit(module := Sequence(compiled))
    return module.state_dict(), module.passes


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_sequence_is_recomputed_as_one_block_and_its_buffers_move_once(mode):
    (default_run, once), (again, twice) = (
        pass_through(),
        pass_through(ActivationCheckpointing(mode)),
    )
    assert (once, twice) == (3, 6)
    assert all(torch.equal(again[name], default_run[name]) for name in default_run)


def test_a_net_that_learns_in_evaluation_mode_is_recomputed_too():
    module = Sequence(compiled=False).eval()  # a policy, whose sampler has no dropout
    passes = []
    module.net[3].register_forward_hook(lambda *_: passes.append(1))
    apply_activation_checkpointing(module, "full")
    with torch.no_grad():
        module.net(torch.ones(2, 4))
    assert len(passes) == 1
    module.net(torch.ones(2, 4)).sum().backward()
    assert len(passes) == 3


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.filterwarnings("ignore:Detected that context_fn is passed")
def test_a_recomputed_block_may_be_compiled(mode):
    again = pass_through(
        ActivationCheckpointing(mode), Compile(backend="aot_eager"), compiled=True
    )[0]
    assert furthest(again, pass_through(compiled=True)[0]) < 1e-6


def graphs(name, text):
    torch._dynamo.utils.counters.clear()
    trained = train(name, text, QUICK, Compile(backend="eager"))
    counted = torch._dynamo.utils.counters
    return *trained, (counted["stats"]["unique_graphs"], dict(counted["graph_break"]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["zero3", "pp"])
def test_separate_blocks_are_compiled_fully_and_once(ranks, text, single, name):
    found = ranks(graphs, 2, name, text)
    assert off([each[:2] for each in found], single) < 2e-6
    forms = {"zero3": 2, "pp": 3}[name]  # with and without gradients; a whole batch, unscheduled
    assert [counted for *_, counted in found] == [(forms, {})] * 2


@pytest.mark.parametrize(
    ("name", "world"), [("zero3", 2), ("ep", 2), ("ep", 4), ("zero3 x ep", 4), ("hsdp x ep", 4)]
)
def test_a_mixture_of_experts_equals_one_process(ranks, text, name, world):
    assert off(ranks(train, world, name, text, EXPERTS), train("single", text, EXPERTS)) < 2e-6


def mail_that_stays_at_home():
    expert_parallel.dist.all_to_all_single = lambda received, x, group: received.copy_(x)


def experts_that_are_not_averaged():
    parallel_module.reduce_expert_gradients = lambda *args: None


@pytest.mark.parametrize("fault", [mail_that_stays_at_home, experts_that_are_not_averaged])
def test_a_planted_fault_in_an_expert_is_caught(ranks, text, fault):
    found = ranks(faulty, 2, fault, "ep", text, 1, EXPERTS)
    assert off(found, train("single", text, EXPERTS)) > 1e-4


def summed_instead_of_averaged():
    shard = parallel_module.shard_module

    def fault(module, *args, **how):
        replicated = shard(module, *args, **how)
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_gradient_divide_factor(1.0)
        return replicated

    parallel_module.shard_module = fault


def replicas_that_never_meet():
    accumulate = parallel_module.ParallelModule.set_requires_all_reduce
    parallel_module.ParallelModule.set_requires_all_reduce = lambda self, is_accumulating: (
        accumulate(self, is_accumulating=True)
    )


def replicas_that_meet_too_late():
    accumulate = parallel_module.ParallelModule.set_requires_all_reduce
    parallel_module.ParallelModule.set_requires_all_reduce = lambda self, is_accumulating: (
        accumulate(self, is_accumulating=not is_accumulating)
    )


def parameters_not_handed_out():
    zero1.Zero1Reducer.all_gather_params = lambda self, parameters: None


def owned_gradients_summed_instead_of_averaged():
    zero1._foreach_mul_ = lambda gradients, factor: None


def gradients_of_a_bucket_that_are_not_sent():
    launch = zero1.Zero1Reducer._launch_bucket

    def fault(self):
        if self._num_launched == 0:
            self._num_launched = 1
        else:
            launch(self)

    zero1.Zero1Reducer._launch_bucket = fault


def gradients_that_are_not_added():
    zero1.add_gradients = lambda data, message: None


def partial_gradients_not_summed():
    parallel_module.ParallelModule.reduce_gradients = lambda self: None


def the_columns_of_another_rank():
    split, draw, cut = tensor_parallel.parallelize_module, mesh_strategy.materialize_params, []

    def noted(module, mesh, style):
        split(module, mesh, style)
        if isinstance(style, tensor_parallel.RowwiseParallel):
            cut.append((module, mesh))

    def fault(*args):  # the values come after the cut
        found = draw(*args)
        for module, mesh in cut:
            parts = module.weight.full_tensor().chunk(mesh.size(), 1)
            module.weight.to_local().copy_(parts[mesh.get_local_rank() - 1])
        return found

    tensor_parallel.parallelize_module, mesh_strategy.materialize_params = (
        noted,
        torch.no_grad()(fault),
    )


def keys_that_do_not_go_round():
    received = context_parallel._RingSendRecv.wait
    context_parallel._RingSendRecv.wait = lambda self: received(self).zero_()


def tokens_in_the_plain_order():
    context_parallel.zigzag_positions = lambda length, rank, ranks: torch.arange(length).chunk(
        ranks
    )[rank]


def gradients_not_divided_by_their_number():
    step = pipeline_parallel.Pipeline.step

    def fault(self, *args):
        loss = step(self, *args)
        return loss * self.num_microbatches

    pipeline_parallel.Pipeline.step = fault


def each_rank_its_own_values():
    import ravine.strategies.mesh_strategy

    ravine.strategies.mesh_strategy.broadcast_from_rank_zero = lambda module, device: None
    configure = Model.configure_model

    def configure_model(self):
        torch.manual_seed(int(os.environ["RANK"]))
        configure(self)

    Model.configure_model = configure_model


FAULTS = [
    ("zero3", 2, 1, summed_instead_of_averaged),
    ("zero2", 2, 1, summed_instead_of_averaged),
    ("zero1", 2, 1, parameters_not_handed_out),
    ("zero1", 2, 1, owned_gradients_summed_instead_of_averaged),
    ("zero1", 2, 1, gradients_of_a_bucket_that_are_not_sent),
    ("zero1", 2, 1, gradients_that_are_not_added),
    ("hsdp", 4, 1, replicas_that_never_meet),
    ("hsdp", 4, 2, replicas_that_meet_too_late),
    ("tp", 2, 1, the_columns_of_another_rank),
    ("sp", 2, 1, partial_gradients_not_summed),
    ("cp", 2, 1, keys_that_do_not_go_round),
    ("pp", 2, 1, gradients_not_divided_by_their_number),
    ("cp", 2, 1, tokens_in_the_plain_order),
    ("zero3", 2, 1, each_rank_its_own_values),
]


def faulty(fault, name, text, accumulate, shape=QUICK):
    fault()
    return train(name, text, shape, accumulate=accumulate)


@pytest.mark.parametrize(("name", "world", "accumulate", "fault"), FAULTS)
def test_a_planted_fault_is_caught(ranks, text, single, name, world, accumulate, fault):
    found = ranks(faulty, world, fault, name, text, accumulate)
    assert off(found, single) > 1e-4
