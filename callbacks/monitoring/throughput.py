"""Throughput: log units per second, model FLOPs utilization (MFU) and peak memory.

    MFU = FLOPs per unit (the module's own formula) * units per second / (peak * devices)

The peak is the manufacturer's figure for dense products of the precision in use. For a device that
is not in the table, the speed of a large product is measured instead. A printed line names the
source. The device is synchronized only at the ends of a window, never in a step.
"""

import re
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ravine.lightning_compat import logged_step
from ravine.strategies.data_parallel import DataParallelInfo

from ..base import OptimizerStepCallback
from .memory import peak_memory_bytes
from .progress import count_units, get_log_interval

# Dense bf16 or fp16 FLOP/s by a part of the device's name; longer names come first.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def precision_to_dtype(name: str) -> torch.dtype:
    """Return the dtype of matrix products under one of Lightning's precisions."""
    return torch.bfloat16 if "bf16" in name else torch.float16 if "16" in name else torch.float32


def find_peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of a device, and the source of the figure."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for model, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{model}\b", name):
                return flops, f"{name}, by its maker"
    size = 8192 if device.type == "cuda" else 1024
    return measure_peak_flops(
        device, dtype, size
    ), f"a product of {size} x {size}, measured, {dtype}"


def measure_peak_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of the fastest of five products of square matrices."""
    a = torch.randn(size, size, device=device).to(dtype)
    fastest = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def synchronize(device: torch.device) -> None:
    """Wait until the device has completed all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput(OptimizerStepCallback):
    """Logs units per second, MFU, peak memory and the fraction of time waiting for data.

    Example: `Trainer(callbacks=[Throughput()])`. The module names its unit in `unit` and counts the
    units of a batch by `count_units(batch)`. Its method `flops_per_unit()` returns the FLOPs of a
    training step per unit; without it no MFU is logged. Validation time is excluded.
    """

    def __init__(self) -> None:
        """Start without measurements."""
        self.peak_flops: tuple[float, str] | None = None
        self.windows: list[dict[str, float]] = []  # the logged rows
        self._start_window(0.0)

    def _start_window(self, now: float) -> None:
        self.window_start, self.paused_s = now, 0.0  # paused_s: seconds of validations
        self.num_units, self.data_wait_s = 0, 0.0
        self.step_end: float | None = None  # time of the end of the last step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up or measure the peak, and start the timer."""
        device = trainer.strategy.root_device
        if callable(getattr(pl_module, "flops_per_unit", None)):
            self.peak_flops = find_peak_flops(device, precision_to_dtype(str(trainer.precision)))
            flops, source = self.peak_flops
            pl_module.print(f"peak for MFU: {flops / 1e12:.3g} TFLOP/s ({source})")
        synchronize(device)
        super().on_train_start(trainer, pl_module)
        self._start_window(time.perf_counter())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the end of the last step to the wait for data."""
        if self.step_end is not None:
            self.data_wait_s += time.perf_counter() - self.step_end

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the units of the batch."""
        self.num_units += count_units(pl_module, batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.step_end = time.perf_counter()

    def on_optimizer_step_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any
    ) -> None:
        """Log at the end of a window."""
        if self.step % get_log_interval(trainer) == 0:
            self._log_window(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pause the timer."""
        synchronize(trainer.strategy.root_device)
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Resume the timer; the time until the next step is not a wait for data."""
        self.paused_s += time.perf_counter() - self._validation_start
        self.step_end = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the means over all windows but the first, which includes the warmup."""
        if self.num_units and not self.windows:
            self._log_window(trainer, pl_module)
        rows = self.windows[1:] or self.windows
        if not rows:
            return
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        unit = getattr(pl_module, "unit", "samples")
        fields = [f"{mean[f'{unit}_per_second']:,.0f} {unit}/s"]
        if self.peak_flops is not None:
            fields.append(f"MFU {mean['mfu']:.1%} of {self.peak_flops[0] / 1e12:.3g} TFLOP/s")
        fields.append(f"peak memory {rows[-1]['peak_memory_gb']:.2f} GB")
        fields.append(f"waiting for data {mean['frac_waiting_for_data']:.1%}")
        pl_module.print(", ".join(fields))

    def _log_window(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log units per second, MFU, peak memory and wait for data; start the next window.

        A window has all steps since the last call, without validations (`paused_s`).
        """
        device = trainer.strategy.root_device
        synchronize(device)  # the units of the window are computed now
        now = time.perf_counter()
        seconds = now - self.window_start - self.paused_s
        # number of ranks that train on different data
        dp_size = DataParallelInfo.from_trainer(trainer).dp_size
        units_per_s = self.num_units * dp_size / seconds  # of all ranks
        row = {f"{getattr(pl_module, 'unit', 'samples')}_per_second": units_per_s}
        if self.peak_flops is not None:
            peak_flops_per_device, _ = self.peak_flops  # operations per second, and their source
            flops: Any = getattr(pl_module, "flops_per_unit")  # noqa: B009 - not in LightningModule
            row["mfu"] = flops() * units_per_s / (peak_flops_per_device * trainer.world_size)
        row["peak_memory_gb"] = peak_memory_bytes(device) / 1e9
        row["frac_waiting_for_data"] = self.data_wait_s / seconds
        self.windows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{k}": v for k, v in row.items()}, logged_step(trainer))
        self._start_window(now)
