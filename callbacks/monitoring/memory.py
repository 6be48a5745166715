"""MemoryMonitor: memory of weights, gradients and optimizer state, compared to full fine-tuning.

    full fine-tuning of N numbers in float32 with AdamW:   4N + 4N + 8N bytes
    adapters of n numbers over N in NF4:                   0.52N + 4n + 4n + 8n

Weights, gradients and optimizer state are counted on this rank, so a sharded run shows its shards.
Activations are not counted; the measured peak at the end includes them.
"""

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

from ravine.strategies.dtensor import to_local


class MemoryUsage(NamedTuple):
    """Number of elements, and their bytes."""

    num_elements: int
    num_bytes: int


def measure_memory(
    module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, MemoryUsage]:
    """Return elements and bytes of a module and its optimizers on this rank, by their use."""
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    states = [leaf for o in optimizers for s in o.state.values() for leaf in tree_leaves(dict(s))]
    return {
        "frozen weights": _sum_usage(p for p in parameters if not p.requires_grad),
        "trained weights": _sum_usage(trained),
        "gradients": _sum_usage(trained),  # of the same dtype
        "optimizer state": _sum_usage(leaf for leaf in states if isinstance(leaf, Tensor)),
    }


def full_finetuning_cost(module: nn.Module) -> dict[str, MemoryUsage]:
    """Return the memory of training all weights, without adapters, in float32 with AdamW."""
    count = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n)
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and "weight" not in layer._parameters:
            bits = (p for n, p in layer._parameters.items() if n.startswith("weight_"))
            count += layer.in_features * layer.out_features
            count -= sum(p.numel() for p in bits if p is not None)
    return {
        "frozen weights": MemoryUsage(0, 0),
        "trained weights": MemoryUsage(count, 4 * count),
        "gradients": MemoryUsage(count, 4 * count),
        "optimizer state": MemoryUsage(2 * count, 8 * count),
    }


def _sum_usage(tensors: Iterable[Tensor]) -> MemoryUsage:
    local_tensors = [to_local(tensor) for tensor in tensors]
    return MemoryUsage(
        sum(p.numel() for p in local_tensors), sum(p.numel() * p.itemsize for p in local_tensors)
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak bytes in use so far: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # does not exist on Windows

    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss if sys.platform == "darwin" else 1024 * max_rss


class MemoryMonitor(Callback):
    """Prints the memory table after the first optimizer step, and the measured peak at the end.

    Example: `lightning fit --config shakespeare/qlora --trainer.callbacks+=MemoryMonitor`.
    """

    def __init__(self) -> None:
        """Start without a measurement."""
        self.usage: dict[str, MemoryUsage] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Measure once, after the optimizer has created its state."""
        if self.usage or trainer.global_step == 0:
            return
        self.usage = measure_memory(pl_module, trainer.optimizers)
        if trainer.is_global_zero:
            Console().print(self.make_table(pl_module))

    def make_table(self, module: nn.Module) -> Table:
        """Return a table of the measured memory, compared to that of full fine-tuning.

        `self.usage` has the measurement of this rank by use: weights, gradients, optimizer state.
        """
        is_sharded = any(isinstance(p, DTensor) for p in module.parameters())
        source = "this rank's shards" if is_sharded else "this process"
        table = Table("", f"numbers, {source}", "bytes", "full fine-tuning, float32, AdamW: bytes")
        full_cost = full_finetuning_cost(module)  # computed from the number of parameters, by use
        for name, row in self.usage.items():
            table.add_row(
                name,
                f"{row.num_elements:,}",
                f"{row.num_bytes:,}",
                f"{full_cost[name].num_bytes:,}",
            )
        total = sum(row.num_bytes for row in self.usage.values())
        full_total = sum(row.num_bytes for row in full_cost.values())
        table.add_row("together", "", f"{total:,}", f"{full_total:,}")
        return table

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the measured peak memory."""
        device = pl_module.device
        description = (
            "allocated on the GPU" if device.type == "cuda" else "resident, with the libraries"
        )
        pl_module.print(f"peak memory: {peak_memory_bytes(device):,} bytes {description}")
