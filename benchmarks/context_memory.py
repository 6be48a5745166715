"""Context parallelism beside one process: memory, work and differences of attention and of a net.

python benchmarks/context_memory.py                           T = 4096 and 16384, cp 2 and 4
python benchmarks/context_memory.py --length 4096 --only net  a part of that
python benchmarks/context_memory.py --dry                     print, store nothing

One row a length, a size and a number of ranks into rows/context_memory.jsonl.

    attention   one attention, b=1 h=8 k=32: forward and backward
    net         4 layers of width 256, 8 heads, 3.2 M parameters, tokens are characters: forward
                and backward of a step of the trainer, with the strategy cp

    peak        MiB of tensors of the largest rank over what it held before (tests/tensor_bytes.py)
    ratio       of that to one process's; at most 0.65 on 2 ranks and 0.40 on 4
    work        CPU seconds of all threads of all ranks over those of one process, median of rounds;
                as many processes run at once when one process is timed; the aim is 1.15
    far         the largest difference from one process, of outputs (the loss of a net) and of the
                gradients, over the largest magnitude: of each tensor by itself, and the worst;
                at most 2e-6 in fp32 and 1e-12 in fp64 (a net's `far_together`: of all gradients
                over the largest of all)
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import append, machine
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import run_ranks
from tensor_bytes import tensor_bytes

from ravine.cli.trainer import Trainer
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.strategies.context_parallel import _RingAttention, zigzag_positions

MIB = 2**20
SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "d_model": 256,
    "num_heads": 8,
    "zero_init_residual": False,
}
PRECISIONS = {"fp32": ("32-true", torch.float32), "fp64": ("64-true", torch.float64)}


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def attention(length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One attention on this rank's tokens, and the whole of it on this process alone."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 8, length, 32, generator=generator, dtype=dtype) for _ in "qkvd"]
    here = zigzag_positions(length, rank, ranks)
    local = [each[:, :, here] for each in tensors]

    def ring(*parts: Tensor) -> Tensor:
        return _RingAttention.apply(*parts, dist.group.WORLD)

    def both(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in given[:3]]
        out = function(*leaves)
        out.backward(given[3])
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    found, expected = both(ring, local), both(causal, tensors)
    far = max(distance(a, b[:, :, here]) for a, b in zip(found, expected, strict=True))
    del found, expected
    peaks = []
    for function, given in ((ring, local), (causal, tensors)):
        with tensor_bytes() as bytes:
            both(function, given)
        peaks.append(bytes.peak)
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for row, function, given in zip(seconds, (ring, causal), (local, tensors), strict=True):
            dist.barrier()
            start_s = time.process_time()
            both(function, given)
            row.append(time.process_time() - start_s)
    return {"far": far, "peak": peaks[0], "one_peak": peaks[1], "seconds": seconds}


class Watch(L.Callback):
    """Keeps the first step's gradients, the second one's peak and the others' seconds."""

    def __init__(self) -> None:
        self.loss, self.peak = 0.0, 0
        self.gradients: dict[str, Tensor] = {}
        self.seconds: list[float] = []
        self.measure: Any = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 1:
            self.measure = tensor_bytes()
            self.found = self.measure.__enter__()
        self.start_s = time.process_time()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        worked = time.process_time() - self.start_s
        if self.measure is not None:
            self.measure.__exit__(None, None, None)
            self.measure, self.peak = None, self.found.peak
        elif trainer.global_step:
            self.seconds.append(worked)
        else:
            for name, p in module.named_parameters():
                whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                self.gradients[name] = whole.clone()

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        if i == 0:
            self.loss = trainer.strategy.reduce(out["loss"].detach().clone())


def net(
    length: int, precision: str, strategy: str, world: int, steps: int, alone: bool = False
) -> dict[str, Any]:
    """Steps of a net by the trainer; `alone`: as the only process of its job."""
    warnings.simplefilter("ignore")
    if alone:
        os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "0"))
        os.environ.update(WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.manual_seed(0)
    module, watch = LanguageModel(**SHAPE), Watch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu", devices=world, strategy=strategy, max_steps=steps, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
            precision=precision, callbacks=[watch], default_root_dir=folder,
        )  # fmt: skip
        data = TextDataModule(source="embedded", context_length=length, batch_size=1)
        trainer.fit(module, datamodule=data)
    results = watch.gradients | {"loss": torch.as_tensor(watch.loss)}
    return {"results": results, "peak": watch.peak, "seconds": watch.seconds}


def work(several: list[list[float]], singles: list[list[float]]) -> dict[str, float]:
    """CPU seconds of all ranks, of one process, and their ratio: medians over the rounds."""
    ring = median(sum(each) for each in zip(*several, strict=True))
    single = median(sum(each) / len(each) for each in zip(*singles, strict=True))
    found = {"seconds": round(ring, 3), "one_seconds": round(single, 3)}
    return found | {"work": round(ring / single, 3)}


def of_attention(world: int, length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The numbers of a row."""
    found = run_ranks(attention, world, length, dtype, rounds, timeout=3600)
    row: dict[str, Any] = {"far": max(each["far"] for each in found)}
    row |= memory(*(max(each[key] for each in found) for key in ("peak", "one_peak")))
    if rounds:
        row |= work(*([each["seconds"][i] for each in found] for i in (0, 1)))
    return row


def of_net(world: int, length: int, precision: str, rounds: int) -> dict[str, Any]:
    """The numbers of a row; in fp64 the differences alone, and without rounds no seconds."""
    steps = 1 if precision == "64-true" else rounds + 2
    copies = world if rounds else 1  # they load the machine as the ranks do
    singles = run_ranks(net, copies, length, precision, "auto", 1, steps, True, timeout=3600)
    found = run_ranks(net, world, length, precision, "cp", world, steps, timeout=3600)
    one = singles[0]
    far = {
        key: max(distance(each["results"][key], whole) for each in found)
        for key, whole in one["results"].items()
    }
    worst = max(far, key=lambda key: far[key])
    row: dict[str, Any] = {"far": far[worst], "far_in": worst}
    gradients = [{k: v for k, v in each["results"].items() if k != "loss"} for each in found]
    largest = max(one["results"][key].abs().max() for key in gradients[0])
    apart = ((each[key] - one["results"][key]).abs().max() for each in gradients for key in each)
    row["far_together"] = (max(apart) / largest).item()
    if steps > 1:
        row |= memory(max(each["peak"] for each in found), one["peak"])
    if rounds:
        row |= work([each["seconds"] for each in found], [each["seconds"] for each in singles])
    return row


def memory(peak: int, one: int) -> dict[str, float]:
    """Peaks in MiB, and their ratio."""
    found = {"peak_mib": round(peak / MIB, 2), "one_mib": round(one / MIB, 2)}
    return found | {"ratio": round(peak / one, 3)}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--only", choices=["attention", "net"])
    parser.add_argument("--precision", nargs="*", default=["fp32", "fp64"], choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=5, help="of CPU seconds in fp32, or 0")
    parser.add_argument("--dry", action="store_true", help="store no rows")
    given = parser.parse_args()
    for length, name, what, world in itertools.product(
        given.length, given.precision, ("attention", "net"), given.ranks
    ):
        if given.only in (None, what):
            precision, dtype = PRECISIONS[name]
            rounds = given.rounds if name == "fp32" else 0
            row: dict[str, Any] = {"what": what, "length": length, "cp": world, "precision": name}
            if what == "attention":
                row |= of_attention(world, length, dtype, rounds)
            else:
                row |= of_net(world, length, precision, rounds)
            if given.dry:
                print(row, flush=True)
            else:
                append("context_memory", row | machine())


if __name__ == "__main__":
    main()
