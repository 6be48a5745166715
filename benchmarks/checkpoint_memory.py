"""The memory of a rank while a checkpoint is saved and loaded, and the size of the files.

python benchmarks/checkpoint_memory.py                   the net of gpt2/124m, zero3 on 4 ranks
python benchmarks/checkpoint_memory.py --size small      the same with 6 M parameters
python benchmarks/checkpoint_memory.py --only "tp"       another layout

A row for each of: save a folder, save a file, load a folder, load a file, into
rows/checkpoint_memory.jsonl. MiB of one rank, the largest of the ranks but for the single file,
which rank 0 alone collects.

    share        parameters and optimizer state that the rank holds, by their storages
    peak         tensor bytes: share and what is alive beside it (torch's allocator); gradients, of
                 which a save has some, are not counted
    limit        1.3 x share + 32
    anonymous    growth of RssAnon at its peak, over the moment before
"""

import argparse
import contextlib
import io
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from record import append, machine
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import run_ranks
from tensor_bytes import tensor_bytes

from ravine.datamodules import TextDataModule
from ravine.lightning_compat import replace_method, set_saves_sharded
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.pretrained.gpt2 import GPT2_KWARGS
from ravine.strategies import STRATEGY_PRESETS, AtomicCheckpointIO, MeshStrategy

MIB = 2**20
SIZES: dict[str, dict[str, Any]] = {
    "124M": {"num_layers": 12, "d_model": 768, "num_heads": 12} | GPT2_KWARGS,
    "small": {"num_layers": 4, "d_model": 96, "num_heads": 4} | GPT2_KWARGS,
}


class Net(LanguageModel):
    """With an optimizer of its own, so that no plan is needed."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, foreach=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_of(trainer: Any, module: Any) -> int:
    """Bytes of parameters and optimizer states of this rank, each storage once."""
    tensors = [local(p) for p in module.parameters()]
    tensors += [
        local(v) for o in trainer.optimizers for s in o.state.values() for v in s.values()
        if isinstance(v, torch.Tensor)
    ]  # fmt: skip
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


@contextmanager
def sampled(found: dict[str, int]) -> Iterator[None]:
    """The peak of `anonymous` over its start, looked at every 5 ms."""
    before, done = anonymous(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            found["anonymous"] = max(found.get("anonymous", 0), anonymous() - before)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Begun(Exception):
    """The checkpoint is loaded."""


class Stop(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise Begun


def prepared(layout: str, ranks: int, size: str, folder: bool, **options: Any) -> Any:
    strategy = MeshStrategy(**STRATEGY_PRESETS[layout][1], save_distributed_checkpoint=folder)  # type: ignore
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, logger=False,
        plugins=[AtomicCheckpointIO()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, **options,
    )  # fmt: skip
    data = TextDataModule(source="embedded", tokenizer="gpt2", context_length=64, batch_size=ranks)
    return trainer, Net(**SIZES[size]), data


def save(layout: str, ranks: int, size: str, place: str) -> dict[str, dict[str, int]]:
    """One step, then both kinds of checkpoint."""
    rows = {}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer, module, data = prepared(layout, ranks, size, True, max_steps=1)
        trainer.fit(module, data)
        for kind in ("folder", "file"):
            set_saves_sharded(trainer.strategy, kind == "folder")
            found: dict[str, int] = {"share": share_of(trainer, module)}
            with tensor_bytes() as tensors, sampled(found):
                trainer.save_checkpoint(f"{place}/{kind}.ckpt")
            rows[kind] = found | {"peak": found["share"] + tensors.peak}
    return rows


def load(layout: str, ranks: int, size: str, path: str) -> dict[str, int]:
    """Resume, until the first step."""
    found: dict[str, int] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer, module, data = prepared(layout, ranks, size, True, max_steps=2, callbacks=[Stop()])
        plain = trainer.strategy.load_checkpoint

        def measured(*args: Any, **options: Any) -> Any:
            share = share_of(trainer, module)
            with tensor_bytes() as tensors, sampled(found):
                checkpoint = plain(*args, **options)
            found["peak"] = share + tensors.peak
            return checkpoint

        replace_method(trainer.strategy, "load_checkpoint", measured)
        with contextlib.suppress(Begun):
            trainer.fit(module, data, ckpt_path=path)
    return found | {"share": share_of(trainer, module)}


def bytes_at(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--only", default="zero3", help="names of strategies, by commas")
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for layout in options.only.split(","):
        with tempfile.TemporaryDirectory() as place:
            about = (layout, options.ranks, options.size)
            saved = run_ranks(save, options.ranks, *about, place, timeout=1200)
            for kind in ("folder", "file"):
                path = Path(place, f"{kind}.ckpt")
                loaded = run_ranks(load, options.ranks, *about, str(path), timeout=1200)
                ranks = [rank[kind] for rank in saved]
                first, others = ranks[:1], ranks[1:] if kind == "file" else ranks
                tables = {f"save {kind}": others, f"load {kind}": loaded}
                if kind == "file":
                    tables["save file, rank 0"] = first
                for what, found in tables.items():
                    worst = max(found, key=lambda each: each["peak"] / (1.3 * each["share"]))
                    limit = 1.3 * worst["share"] + 32 * MIB
                    row = {
                        "size": options.size, "layout": layout, "ranks": options.ranks,
                        "what": what, "mib": bytes_at(path) / MIB,
                        "share": worst["share"] / MIB, "peak": worst["peak"] / MIB,
                        "limit": limit / MIB, "ratio": worst["peak"] / worst["share"],
                        "anonymous": max(each["anonymous"] for each in found) / MIB,
                    }  # fmt: skip
                    row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
                    print(row, flush=True)
                    append("checkpoint_memory", row | machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
