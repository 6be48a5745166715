"""The peak of a training step in tensor bytes, on one process and on every layout.

python benchmarks/step_memory.py                     25 M parameters, every layout
python benchmarks/step_memory.py --size 124M         the net of gpt2/124m
python benchmarks/step_memory.py --only zero3,ddp    some layouts

A row a layout into rows/step_memory.jsonl. All numbers are MiB of one rank, the largest of the
ranks, counted by torch's allocator in the third step; what gloo allocates is not counted.

    P, G, S     parameters, gradients and optimizer state that a rank holds, by formula
    A           what is alive at the end of the forward pass beyond P, S and gathered parameters
    must hold   the maximum over the phases of a step of what the strategy has to hold
                    ddp          P + G + S + A
                    single, tp   P + S + max(A, G + largest activation)
                    pp           P + G + S + A of the micro-batches under way + the gradient of the
                                 largest parameter for one micro-batch, which is added to G
                    zero1        P + G + S + max(A, a bucket)
                    zero2        W + P + G + S + A + a reduce buffer
                    zero3        P + G + S + A + two gathered units + a reduce buffer
    peak        of a step; the ratio is peak over must hold
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from record import append, machine
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import fewest_ranks, run_ranks
from tensor_bytes import tensor_bytes

from ravine.cli.trainer import Trainer
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.pretrained.gpt2 import GPT2_KWARGS
from ravine.strategies import STRATEGY_PRESETS, MeshStrategy, parallel_module

MIB = 2**20
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "25M": (
        {"num_layers": 8, "d_model": 512, "num_heads": 8},
        {"context_length": 64, "batch_size": 8},
    ),
    "124M": (
        {"num_layers": 12, "d_model": 768, "num_heads": 12} | GPT2_KWARGS,
        {"context_length": 64, "batch_size": 4, "tokenizer": "gpt2"},
    ),
}
LAYOUTS: dict[str, tuple[str | dict[str, Any], int]] = {
    "single": ("auto", 1),
    "ddp": ("ddp", 2),
    "ddp 4": ("ddp", 4),
    "zero1": ("zero1", 2),
    "zero1 4": ("zero1", 4),
    "zero2": ("zero2", 2),
    "zero3": ("zero3", 2),
    "zero3 4": ("zero3", 4),
    "hsdp": ("hsdp", 4),
    "tp": ("tp", 2),
    "sp": ("sp", 2),
    "cp": ("cp", 2),
    "pp": ("pp", 2),
    "2d": ("2d", 4),
    "tp x pp": ({"dp_shard": 1, "tp": 2, "pp": 2}, 4),
    "ep": ("ep", 2),
}
LAYOUTS |= {
    n: (n, fewest_ranks(STRATEGY_PRESETS[n][1]))
    for n in STRATEGY_PRESETS
    if n not in (*LAYOUTS, "3d")
}
STEP = 2  # the one that is measured: states exist


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tensors: Any) -> int:
    """Bytes of the storages of some tensors, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


class Peak(L.Callback):
    """Measures one step; must be the last callback.

    It records from the first step on: what was allocated before is not seen being freed.
    """

    def __init__(self) -> None:
        self.row: dict[str, float] = {}
        self.measure: Any = None
        self.times: list[int] = []  # of the measured step: start, end of the forward, end

    def measure_bytes(self, trainer: Any, module: Any) -> dict[str, int]:
        """Bytes of parameters, gradients and states that this rank has."""
        states = [
            local(v)
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            for v in state.values()
            if isinstance(v, torch.Tensor)
        ]
        grads = [local(p.grad) for p in module.parameters() if p.grad is not None]
        parameters = [local(p) for p in module.parameters()]
        return {"P": bytes_of(parameters), "S": bytes_of(states), "G": bytes_of(grads)}

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if index == 0:
            self.measure = tensor_bytes()
            self.found = self.measure.__enter__()
        if index == STEP:
            self.start = self.measure_bytes(trainer, module)
            self.times.append(time.time_ns())

    def on_before_backward(self, trainer, module, loss) -> None:
        if len(self.times) == 1:
            self.times.append(time.time_ns())

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if index != STEP:
            return
        self.times.append(time.time_ns())
        self.measure.__exit__(None, None, None)
        start, middle, end = self.times
        base = sum(self.start.values())
        found = self.found
        self.row = {
            "peak": base + found.peak_over(start, end),
            "forward_end": base + found.alive(middle) - found.alive(start),
            "forward_peak": base + found.peak_over(start, middle),
        } | self.measure_bytes(trainer, module)


def unit_bytes(module: Any, half: bool) -> list[int]:
    """Bytes of what each unit gathers, the largest first."""
    found = []
    for unit in parallel_module.fsdp_units(module):
        group = unit._get_fsdp_state()._fsdp_param_group
        if group is not None:
            numbers = sum(p._orig_size.numel() for p in group.fsdp_params)
            found.append(numbers * (2 if half else 4))
    return sorted(found, reverse=True)


def measure(layout: str, size: str, precision: str, rows: int | None) -> dict[str, Any]:
    """Train three steps and look at the last; in each rank."""
    warnings.simplefilter("ignore")
    parallel_module.DEFAULT_MIN_UNIT_BYTES = (
        2**20
    )  # as in training; the harness of the tests sets 0
    strategy, world = LAYOUTS[layout]
    shape, data = SIZES[size]
    if layout == "ep":
        shape = shape | {"num_experts": 4}
    if rows is not None:
        data = data | {"batch_size": rows}
    if isinstance(strategy, dict):
        strategy = MeshStrategy(**strategy)
    torch.manual_seed(0)
    module, peak = LanguageModel(**shape), Peak()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu", devices=world, strategy=strategy, max_steps=STEP + 1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
            precision=precision, callbacks=[peak], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=TextDataModule(source="embedded", **data))
    row = dict(peak.row)
    half = precision != "32-true"
    units = unit_bytes(module, half) if layout not in ("single", "ddp", "ddp 4") else []
    row["units"] = units[:2]
    row["W"] = sum(p.numel() * 4 for p in module.parameters())
    row["largest"] = max(local(p).numel() * 4 for p in module.parameters())
    row["logits"] = data["batch_size"] * data["context_length"] * 4 * int(module.net.vocab_size)
    row["logits"] //= 1 if layout in ("single", "tp", "sp", "pp", "cp", "tp x pp") else world
    return row


def bound(layout: str, row: dict[str, Any], alone: int) -> dict[str, int]:
    """A, and what the strategy has to hold at the worst moment of a step.

    `alone` is A of one process with all samples: a pipeline goes forward and backward in turns.
    """
    name = layout.split()[0]
    p, s, w = row["P"], row["S"], row["W"]
    g = p  # every parameter is trained, in fp32
    two, largest = sum(row["units"]), row["logits"]
    first = row["units"][0] if row["units"] else 0
    if name == "ddp":
        a = row["forward_end"] - p - s - g
        return {"A": a, "must_hold": p + g + s + a}
    if name == "zero2":
        a = row["forward_end"] - p - s - w
        return {"A": a, "must_hold": w + p + s + g + a + 2 * first}
    a = row["forward_end"] - p - s
    if "pp" in layout:
        a = alone // 2 // (2 if "tp" in layout else 1)  # of a stage
        a = a * 2 // 4  # 2 of 4 micro-batches
        return {"A": a, "must_hold": p + s + g + a + row["largest"]}
    if name == "zero1":
        return {"A": a, "must_hold": p + s + g + a}
    if row["units"] and name in ("zero3", "hsdp", "cp", "2d", "ep"):
        return {"A": a, "must_hold": p + s + g + a + two + 2 * first}
    return {"A": a, "must_hold": p + s + max(a, g + largest)}


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="25M", choices=list(SIZES))
    parser.add_argument("--only", default="")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rows", type=int, help="windows of a step")
    parser.add_argument("--dry", action="store_true", help="store no rows")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else list(LAYOUTS)
    alone = 0
    if any("pp" in layout for layout in chosen):
        (row,) = run_ranks(measure, 1, "single", given.size, given.precision, given.rows)
        alone = bound("single", row, 0)["A"]
    for layout in chosen:
        world = LAYOUTS[layout][1]
        job = (layout, given.size, given.precision, given.rows)
        rows = run_ranks(measure, world, *job, timeout=600)
        row = max(rows, key=lambda each: each["peak"])
        row |= bound(layout, row, alone)
        shown = {
            k: [round(x / MIB, 1) for x in v] if isinstance(v, list) else round(v / MIB, 1)
            for k, v in row.items()
        }
        shown["ratio"] = round(row["peak"] / row["must_hold"], 3)
        found = {"layout": layout, "size": given.size, "precision": given.precision} | shown
        if given.dry:
            print(found, flush=True)
        else:
            append("step_memory", found | machine())


if __name__ == "__main__":
    main()
