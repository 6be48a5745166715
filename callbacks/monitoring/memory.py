"""MemoryTable: what a training holds, tensor by tensor, beside what full fine-tuning would.

    full fine-tuning of N numbers in float32 with AdamW:   4N + 4N + 8N bytes
    adapters of n numbers over N in NF4:                   0.52N + 4n + 4n + 8n

Weights, gradients and optimizer state are counted on this rank, so a sharded run shows its share.
Activations are not: the measured peak at the end has them.
"""

import resource
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ravine.strategies.shards import local


class Held(NamedTuple):
    """How many numbers, and in how many bytes."""

    numbers: int
    bytes: int


def held(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Held]:
    """Numbers and bytes of a module and its optimizers on this rank, by what they are for."""
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    states = [leaf for o in optimizers for s in o.state.values() for leaf in tree_leaves(dict(s))]
    return {
        "frozen weights": _sum(p for p in parameters if not p.requires_grad),
        "trained weights": _sum(trained),
        "gradients": _sum(trained),  # of their dtype
        "optimizer state": _sum(leaf for leaf in states if isinstance(leaf, Tensor)),
    }


def full(module: nn.Module) -> dict[str, Held]:
    """The same for all of its weights in float32 under AdamW, quantized ones as they were."""
    count = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n)
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and "weight" not in layer._parameters:
            bits = (p for n, p in layer._parameters.items() if n.startswith("weight_"))
            count += layer.in_features * layer.out_features
            count -= sum(p.numel() for p in bits if p is not None)
    return {
        "frozen weights": Held(0, 0),
        "trained weights": Held(count, 4 * count),
        "gradients": Held(count, 4 * count),
        "optimizer state": Held(2 * count, 8 * count),
    }


def _sum(tensors: Iterable[Tensor]) -> Held:
    parts = [local(tensor) for tensor in tensors]
    return Held(sum(p.numel() for p in parts), sum(p.numel() * p.itemsize for p in parts))


def peak(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


class MemoryTable(Callback):
    """Prints the table after the first optimizer step, and the measured peak at the end.

    lightning fit --config shakespeare/qlora --trainer.callbacks+=MemoryTable
    """

    def __init__(self) -> None:
        """Nothing counted yet."""
        self.rows: dict[str, Held] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Count when the optimizer has made its state."""
        if self.rows or trainer.global_step == 0:
            return
        self.rows = held(pl_module, trainer.optimizers)
        if trainer.is_global_zero:
            Console().print(self.table(pl_module))

    def table(self, module: nn.Module) -> Table:
        """The rows, beside full fine-tuning."""
        sharded = any(isinstance(p, DTensor) for p in module.parameters())
        whose = "this rank's shards" if sharded else "this process"
        made = Table("", f"numbers, {whose}", "bytes", "full fine-tuning, float32, AdamW: bytes")
        whole = full(module)
        for name, row in self.rows.items():
            made.add_row(name, f"{row.numbers:,}", f"{row.bytes:,}", f"{whole[name].bytes:,}")
        total, before = (sum(row.bytes for row in rows.values()) for rows in (self.rows, whole))
        made.add_row("together", "", f"{total:,}", f"{before:,}")
        return made

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was measured."""
        device = pl_module.device
        what = "allocated on the GPU" if device.type == "cuda" else "resident, with the libraries"
        pl_module.print(f"peak memory: {peak(device):,} bytes {what}")
