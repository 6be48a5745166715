"""A real optimizer step on the CPU: its peak by torch's allocator, its states and FLOPs.

step = real_step(LanguageModel(...), TextDataModule(...), callbacks=[Muon()])
step.peak, step.state_bytes, step.flops
"""

import contextlib
import gc
import io
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from tensor_bytes import tensor_bytes
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from ravine import Trainer
from ravine.callbacks.monitoring.memory import measure_memory

aten = torch.ops.aten
# Size of a tensor that is allocated and freed to mark a moment in the list of allocations. The
# profiler's clock may differ from Python's by more than a step of these tests takes.
MARK_BYTES = 7_654_321


def unwrapped(formula: Any) -> Any:
    """A formula of torch's registry, which FlopCounterMode must not wrap again."""

    def count(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: unwrapped(sdpa_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: unwrapped(sdpa_backward_flop),
}


@dataclass
class RealStep:
    """Bytes at the peak of the second optimizer step, bytes of states, FLOPs of a micro-batch."""

    peak: int = 0
    state_bytes: int = 0
    parameters: int = 0
    flops: int = 0


class StepWatch(L.Callback):
    """Marks the second optimizer step, and counts FLOPs in its last micro-batch."""

    def __init__(self, counts_flops: bool) -> None:
        self.counts_flops = counts_flops
        self.num_marks = 0
        self.flops = self.state_bytes = 0
        self.counter: Any = None

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        if trainer.global_step == 1 and self.num_marks == 0:
            self.mark()
        if trainer.global_step == 2 and self.counts_flops:
            self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            self.counter.__enter__()

    def on_after_backward(self, trainer, module) -> None:
        if module.automatic_optimization:  # without the FLOPs of the optimizer
            self.stop_counting()

    def mark(self) -> None:
        torch.empty(MARK_BYTES, dtype=torch.uint8)  # freed at once
        self.num_marks += 1

    def stop_counting(self) -> None:
        if self.counter is not None:
            self.flops = self.counter.get_total_flops()
            self.counter.__exit__(None, None, None)
            self.counter = None

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.stop_counting()
        if trainer.global_step == 2 and self.num_marks == 1:
            self.mark()
            self.state_bytes = measure_memory(module, trainer.optimizers)[
                "optimizer state"
            ].num_bytes
        if trainer.global_step == 2 + self.counts_flops:
            trainer.should_stop = True  # not max_steps, which schedules read

    def peak(self, found: Any) -> int:
        """The peak of the step in the curve of `tensor_bytes`."""
        levels = [alive for _, alive in found.curve]
        marks = [
            index
            for index, (before, after) in enumerate(zip([0, *levels], levels, strict=False))
            if after - before == MARK_BYTES
        ]
        start, end = marks  # indices of the levels that the marks raise
        return max(levels[start + 1 : end])


def real_step(build: Any, make_data: Any, counts_flops: bool = True, **arguments: Any) -> RealStep:
    """Train three steps; module and data are made here, so that their tensors are counted too."""
    watch = StepWatch(counts_flops)
    arguments["callbacks"] = [*arguments.get("callbacks", []), watch]
    arguments |= {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    arguments |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **arguments)
        gc.collect()  # what earlier tests left must not be freed within the step
        with tensor_bytes() as found:
            module, data = build(), make_data()
            key = "datamodule" if isinstance(data, L.LightningDataModule) else "train_dataloaders"
            trainer.fit(module, **{key: data})
    parameters = sum(p.numel() for p in module.parameters())
    return RealStep(watch.peak(found), watch.state_bytes, parameters, watch.flops)
