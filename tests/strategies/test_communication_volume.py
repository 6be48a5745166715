"""The bytes of a step equal the formula, at two depths and on two numbers of ranks."""

from collections import Counter

import lightning as L
import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ravine.datamodules import TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.model_stats import count_collectives
from ravine.strategies import MeshStrategy

KINDS = {  # by what torch calls them, on whichever road a message goes
    "all_gather": ("allgather_base_", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce_scatter_base_", "reduce_scatter_tensor"),
    "all_reduce": ("allreduce_", "all_reduce"),
    "all_to_all": ("alltoall_base_", "all_to_all_single"),
    "broadcast": ("broadcast_", "broadcast"),
}
LAYOUTS = {  # the strategy, and the same for the formula
    "zero1": (lambda n: {"zero_stage": 1}, lambda n: {"zero_stage": 1, "num_shards": n}),
    "zero2": (lambda n: {"zero_stage": 2}, lambda n: {"zero_stage": 2, "num_shards": n}),
    "zero3": (lambda n: {}, lambda n: {"num_shards": n}),
    "hsdp": (lambda n: {"dp_replicate": 2}, lambda n: {"num_replicas": 2, "num_shards": n // 2}),
    "tp": (lambda n: {"dp_shard": 1, "tp": n}, lambda n: {"tp": n}),
    "sp": (
        lambda n: {"dp_shard": 1, "tp": n, "sequence_parallel": True},
        lambda n: {"tp": n, "is_sequence_parallel": True},
    ),
    "2d": (lambda n: {"tp": 2}, lambda n: {"tp": 2, "num_shards": n // 2}),
    "ep": (lambda n: {"ep": -1}, lambda n: {"num_shards": n, "ep": n}),
    "cp": (lambda n: {"dp_shard": 1, "cp": n}, lambda n: {"cp": n}),
    "zero3 x cp": (lambda n: {"cp": 2}, lambda n: {"cp": 2, "num_shards": n // 2}),
    "pp": (
        lambda n: {"dp_shard": 1, "pp": n, "pipeline_schedule": "gpipe", "num_microbatches": 2},
        lambda n: {"num_stages": n, "num_microbatches": 2},
    ),
    "1f1b": (lambda n: {"dp_shard": 1, "pp": n}, lambda n: {"num_stages": n}),
    "interleaved": (
        lambda n: {"dp_shard": 1, "pp": n, "pipeline_schedule": "interleaved"},
        lambda n: {"num_stages": 2 * n},
    ),
}
FOUR = ("hsdp", "2d", "zero3 x cp")  # they have two axes


COUNTED = 2  # a batch after which buffers are not compared (strategies/buffer_sync.py)


class Messages(TorchDispatchMode):
    """Counts messages by their operators; torch 2.11's CommDebugMode fails in some layouts."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors come here
        if "c10d" in function.namespace:
            self.counts[function._schema.name.rpartition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


class Count(L.Callback):
    """Count the messages of the third step, when everything has been set up."""

    def __init__(self):
        self.mode = Messages()
        self.sends, self.send, self.on = 0, dist.isend, False

        def counting(*args, **how):
            self.sends += self.on
            return self.send(*args, **how)

        # from the beginning: a schedule keeps the functions that it has begun with
        dist.isend = distributed_c10d.isend = counting

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == COUNTED:
            self.on = True
            self.mode.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == COUNTED:
            self.on = False
            self.mode.__exit__(None, None, None)

    def teardown(self, *_, **__):
        dist.isend = distributed_c10d.isend = self.send


def count(text, layouts, world, layers):
    found = {}
    for name in layouts:
        experts = {"num_experts": 8} if name == "ep" else {}
        shape = {"num_layers": layers, "d_model": 16, "num_heads": 4} | experts
        counter = Count()
        trainer = L.Trainer(
            max_steps=COUNTED + 1,
            accelerator="cpu",
            devices=world,
            strategy=MeshStrategy(**LAYOUTS[name][0](world)),
            logger=False,
            callbacks=[counter],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(LanguageModel(**shape), TextDataModule(text, context_length=16, batch_size=8))
        counts = dict(counter.mode.counts)
        found[name] = {
            kind: sum(n for op, n in counts.items() if op.strip("_") in map(bare, ops))
            for kind, ops in KINDS.items()
        }
        found[name] |= {"ops": counts, "send": counter.sends}
    return found


def bare(name):
    return name.strip("_")


@pytest.mark.parametrize(("world", "layers"), [(2, 2), (2, 4), (4, 2), (4, 4)])
def test_the_bytes_of_a_step_equal_the_formula(ranks, tmp_path, world, layers):
    text = tmp_path / "text.txt"
    text.write_text("".join(python_docs_text())[:3000])
    expected = {name: count_collectives(layers, **how[1](world)) for name, how in LAYOUTS.items()}
    layouts = [
        name
        for name, (_, how) in LAYOUTS.items()
        if how(world).get("num_stages", 1) <= layers and (world == 4 or name not in FOUR)
    ]
    everywhere = ranks(count, world, text, layouts, world, layers, timeout=300)
    for name in layouts:
        sends = sum(found[name].pop("send") for found in everywhere)
        for found in everywhere:
            ops = found[name].pop("ops")
            assert {**found[name], "send": sends} == expected[name], (name, ops)
