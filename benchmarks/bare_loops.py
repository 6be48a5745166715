"""A training step on several ranks, beside the same step in a loop of plain PyTorch.

python benchmarks/bare_loops.py                  appends a row a case to rows/bare_loops.jsonl
python benchmarks/bare_loops.py --case zero3     one case

python benchmarks/bare_loops.py --memory         peaks of a step in tensor bytes, 2 and 4 ranks

Some steps under the Trainer, as many of a bare loop, and of another (the A/A control), in turns in
the same processes. A row holds processor seconds a step, summed over the ranks, of 15 turns.

    ddp          torch's DistributedDataParallel
    zero1        as ddp: the same loop, which ZeRO-1 is to be as fast as
    zero3        torch's fully_shard, a unit a block
    zero3 bf16   the same, with MixedPrecisionPolicy(bf16, fp32) and autocast
    tiny         1,000 layers of 72 parameters: fully_shard over all, AdamW on the local shards
    tiny ddp     the same layers under torch's DistributedDataParallel
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import append, machine
from step_memory import Peak, bytes_of, local
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from versus import Times, compare

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import run_ranks
from tensor_bytes import tensor_bytes

from ravine.cli.trainer import Trainer
from ravine.lightning_modules.nn import Transformer
from ravine.strategies import parallel_module

WARM = 3
VOCABULARY, CONTEXT, ROWS = 104, 64, 4


class Language(L.LightningModule):
    """25 M parameters, 8 blocks, windows of 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Transformer(VOCABULARY, CONTEXT, num_layers=8, d_model=512, num_heads=8)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.net(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    @staticmethod
    def batch() -> torch.Tensor:
        return torch.randint(VOCABULARY, (ROWS, CONTEXT + 1))

    def shard(self, policy: MixedPrecisionPolicy) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in self.net.blocks.values():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh, mp_policy=policy)


class Tiny(Language):
    """A thousand layers of 8 channels in a list."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.net = nn.ModuleList(nn.Linear(8, 8) for _ in range(1000))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        x = batch
        for layer in self.net:
            x = x + layer(x) / 100
        return x.square().mean()

    @staticmethod
    def batch() -> torch.Tensor:
        return torch.randn(4, 8)

    def shard(self, policy: MixedPrecisionPolicy) -> None:
        self.net = nn.Sequential(*self.net)
        self.net.forward = lambda x: Tiny.loss(self, x)  # type: ignore[method-assign]
        fully_shard(self.net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


class Around(nn.Module):
    """What DistributedDataParallel calls."""

    def __init__(self, module: Language) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.module.loss(batch)


KINDS: dict[str, tuple[type[Language], str, str]] = {
    "ddp": (Language, "ddp", "32-true"),
    "zero1": (Language, "zero1", "32-true"),
    "zero3": (Language, "zero3", "32-true"),
    "zero3 bf16": (Language, "zero3", "bf16-mixed"),
    "tiny": (Tiny, "zero3", "32-true"),
    "tiny ddp": (Tiny, "ddp", "32-true"),
}


def bare(case: str) -> Iterator[None]:
    """Steps of the loop by hand."""
    kind, strategy, precision = KINDS[case]
    module = kind()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    if strategy in ("ddp", "zero1"):
        net: Any = DistributedDataParallel(Around(module), gradient_as_bucket_view=True)
        loss_fn = net
    else:
        policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        module.shard(policy)
        loss_fn = module.net if kind is Tiny else module.loss
    parameters = list(module.parameters())
    local = kind is Tiny and strategy == "zero3"
    shards = [p.to_local().detach() if isinstance(p, DTensor) else p for p in parameters]
    optimizer = torch.optim.AdamW(shards if local else parameters, lr=1e-3)
    while True:
        batch = kind.batch()
        for p in parameters:
            p.grad = None
        with autocast:
            loss = loss_fn(batch)
        loss.backward()
        if local:
            for shard, p in zip(shards, parameters, strict=True):
                grad: Any = p.grad
                shard.grad = grad.to_local()
        optimizer.step()
        yield


class Turns(L.Callback):
    """After each turn of the trainer, one of each bare loop; keeps processor seconds a step."""

    def __init__(self, loops: dict[str, Iterator[None]], turn: int, turns: int) -> None:
        self.loops, self.turn, self.turns = loops, turn, turns
        self.times: Times = {name: [] for name in ("ours", *loops)}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        done = trainer.global_step - WARM
        if done < 0 or done % self.turn:
            return
        if done:
            self.times["ours"].append((time.process_time() - self.start_s) / self.turn)
        for name, loop in list(self.loops.items())[:: 1 if done // self.turn % 2 else -1]:
            dist.barrier()
            start_s = time.process_time()
            for _ in range(self.turn if done else WARM):
                next(loop)
            if done:
                self.times[name].append((time.process_time() - start_s) / self.turn)
        trainer.should_stop = len(self.times["ours"]) == self.turns
        dist.barrier()
        self.start_s = time.process_time()


def measure(case: str, turn: int, turns: int) -> Times:
    """All turns, in each rank."""
    warnings.simplefilter("ignore")
    parallel_module.DEFAULT_MIN_UNIT_BYTES = (
        2**20
    )  # as in training; the harness of the tests sets 0
    kind, strategy, precision = KINDS[case]
    module, batch = kind(), kind.batch

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> torch.Tensor:
            return batch()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        clock = Turns({}, turn, turns)
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_steps=10**6, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, precision=precision,
            use_distributed_sampler=False, callbacks=[clock], default_root_dir=folder,
        )  # fmt: skip

        class Late(L.Callback):  # when the job of all ranks is there
            def on_train_start(self, *args: Any) -> None:
                clock.loops |= {"bare": bare(case), "bare again": bare(case)}
                clock.times |= {name: [] for name in clock.loops}

        trainer.callbacks.append(Late())
        trainer.fit(module, DataLoader(Batches(), batch_size=None))
    return clock.times


def peak(case: str, world: int, by_hand: bool) -> int:
    """Bytes at the peak of the third step of one way, in each rank."""
    warnings.simplefilter("ignore")
    parallel_module.DEFAULT_MIN_UNIT_BYTES = 2**20
    kind, strategy, precision = KINDS[case]
    if by_hand:
        dist.init_process_group("gloo")
        loop = bare(case)
        with tensor_bytes() as found:
            next(loop)
            next(loop)
            start = time.time_ns()
            next(loop)
            end = time.time_ns()
        frame_locals = loop.gi_frame.f_locals  # type: ignore[attr-defined]
        states = [t for s in frame_locals["optimizer"].state.values() for t in s.values()]
        grads = [p.grad for p in frame_locals["parameters"]]
        alive = [local(t) for t in [*frame_locals["parameters"], *states, *grads]]
        return bytes_of(alive) + found.peak_over(start, end)
    look = Peak()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu", devices=world, strategy=strategy, max_steps=3, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, precision=precision,
            use_distributed_sampler=False, callbacks=[look], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(kind(), DataLoader([kind.batch() for _ in range(9)], batch_size=None))
    return int(look.row["peak"])


def memory(cases: list[str], dry: bool) -> None:
    """Peaks beside the loop by hand."""
    for case in cases:
        for world in (2, 4):
            both = [
                max(run_ranks(peak, world, case, world, hand, timeout=600))
                for hand in (False, True)
            ]
            own_mib, stock_mib = (round(each / 2**20, 2) for each in both)
            row = {"case": case, "ranks": world, "ours": own_mib, "bare": stock_mib}
            row["ratio"] = round(both[0] / both[1], 4)
            print(row, flush=True) if dry else append("bare_loops_memory", row | machine())


def main() -> None:
    """Run the cases and store their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", default="", choices=["", *KINDS])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--turn", type=int, default=4, help="steps of a turn")
    parser.add_argument("--dry", action="store_true", help="store no rows")
    parser.add_argument("--memory", action="store_true", help="peaks in place of seconds")
    given = parser.parse_args()
    if given.memory:
        memory([given.case] if given.case else list(KINDS), given.dry)
        return
    for case in [given.case] if given.case else KINDS:
        found = run_ranks(measure, 2, case, given.turn, given.turns, timeout=3000)
        times = {
            name: [sum(t) for t in zip(*(r[name] for r in found), strict=True)] for name in found[0]
        }
        if given.dry:
            medians = {name: statistics.median(spent) for name, spent in times.items()}
            print(case, medians, medians["ours"] / medians["bare"], flush=True)
            continue
        compare("bare_loops", case, times, ["lightning"], ranks=2)


if __name__ == "__main__":
    main()
