"""What a rank allocates from before the network is built until the first step: 124 M parameters.

python benchmarks/start_memory.py     appends a row a layout to rows/start_memory.jsonl

    start     the callbacks that change the network before it is sharded, if there are any
    share     bytes of the parameters that a rank keeps
    tensors   the peak of tensor bytes from `setup` to `on_fit_start`, without `mapped`
    mapped    bytes of a safetensors file, whose pages the counter takes for tensors
    anonymous the growth of the process's own memory (RssAnon) in that time
    bound     1.3 x share + 32 MiB
"""

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from record import append, machine
from step_memory import SIZES, local

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import run_ranks
from tensor_bytes import tensor_bytes

from ravine.callbacks import LoRA, Pretrained, Quantization
from ravine.cli.trainer import Trainer
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.strategies import parallel_module

LAYOUTS = {"zero3": 4, "zero3 2": 2, "zero2": 4, "hsdp": 4, "tp": 2, "pp": 2}
STARTS: dict[str, Any] = {  # callbacks by the folder of the weights; on zero3 with 4 ranks
    "LoRA": lambda folder: [LoRA()],
    "QLoRA": lambda folder: [Quantization(), LoRA()],
    "Pretrained": lambda folder: [Pretrained(f"{folder}/base.ckpt")],
    "Pretrained safetensors": lambda folder: [Pretrained(f"{folder}/gpt2")],
    "Pretrained + QLoRA": lambda folder: [
        Pretrained(f"{folder}/base.ckpt"), Quantization(), LoRA()
    ],
}  # fmt: skip


def anonymous() -> int:
    """Bytes of memory that this process alone has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class Start(L.Callback):
    """From `setup`, before the network is built, to `on_fit_start`."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.before = anonymous()
        self.measure = tensor_bytes()
        self.found = self.measure.__enter__()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.measure.__exit__(None, None, None)
        self.row = {
            "share": sum(local(p).nbytes for p in module.parameters()),
            "tensors": self.found.peak,
            "anonymous": anonymous() - self.before,
        }


def write(size: str, folder: str) -> None:
    """Write a checkpoint and the safetensors of GPT-2; in one process."""
    shape, data = SIZES[size]
    module = LanguageModel(**shape)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=TextDataModule(source="embedded", **data))
    trainer.save_checkpoint(f"{folder}/base.ckpt", weights_only=True)
    if size == "124M":  # the other is no GPT-2
        module.export(f"{folder}/gpt2")


def measure(layout: str, size: str, start: str, files: str) -> dict[str, int]:
    """Begin a run; in each rank."""
    warnings.simplefilter("ignore")
    parallel_module.DEFAULT_MIN_UNIT_BYTES = (
        2**20
    )  # as in training; the harness of the tests sets 0
    shape, data = SIZES[size]
    look = Start()
    changes = STARTS[start](files) if start in STARTS else []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="cpu", devices=LAYOUTS[layout], strategy=layout.split()[0], max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            limit_val_batches=0, callbacks=[look, *changes], default_root_dir=folder,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(LanguageModel(**shape), datamodule=TextDataModule(source="embedded", **data))
    file = Path(files, "gpt2/model.safetensors")
    look.row["mapped"] = file.stat().st_size if "safetensors" in start else 0
    look.row["tensors"] -= look.row["mapped"]
    return look.row


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="124M", choices=list(SIZES))
    parser.add_argument("--only", default="")
    parser.add_argument("--dry", action="store_true", help="store no rows")
    given = parser.parse_args()
    cases = [(layout, "plain") for layout in LAYOUTS] + [("zero3", start) for start in STARTS]
    if given.size != "124M":
        cases = [case for case in cases if "safetensors" not in case[1]]
    if given.only:
        cases = [case for case in cases if {*case} & {*given.only.split(",")}]
    with tempfile.TemporaryDirectory() as files:
        if any("Pretrained" in start for _, start in cases):
            run_ranks(write, 1, given.size, files, timeout=600)
        for layout, start in cases:
            how = layout, given.size, start, files
            rows = run_ranks(measure, LAYOUTS[layout], *how, timeout=600)
            row = max(rows, key=lambda each: each["tensors"])
            row["bound"] = int(1.3 * row["share"]) + 2**25
            shown: dict[str, Any] = {k: round(v / 2**20, 1) for k, v in row.items()}
            shown["ratio"] = round(row["tensors"] / row["bound"], 3)
            what: dict[str, Any] = {"layout": layout, "ranks": LAYOUTS[layout], "size": given.size}
            shown = what | ({"start": start} if start in STARTS else {}) | shown
            print(shown, flush=True) if given.dry else append("start_memory", shown | machine())


if __name__ == "__main__":
    main()
