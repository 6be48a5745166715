"""Time of an optimizer step on a device, from the operations of a simulated one.

    operation   max(FLOPs / (e_f * peak), bytes / (e_b * bandwidth), launch)
    step        micro-batches * (forward + backward) + optimizer + communication that is not hidden
    MFU         FLOPs of the module's formula (or counted) / (seconds * peak)

All constants are assumptions, and are printed with the result. `e_f` and `e_b` are the fractions of
peak and bandwidth that large kernels reach.
"""

import math
from dataclasses import dataclass

from .devices import Device
from .layouts import Layout, Ranks
from .simulation import Simulation

FLOP_EFFICIENCY = 0.7  # of a large matrix product
BANDWIDTH_EFFICIENCY = 0.8  # of an elementwise kernel
LAUNCH_S = 4e-6  # of a kernel in eager mode
FP32_FRACTION = 0.5  # TF32 products, of the 16-bit peak


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, and what follows from them."""

    seconds: float
    compute_s: float
    communication_s: float  # that is not hidden behind the computation
    units_per_s: float
    mfu: float
    total_s: float | None  # of the run


def compute_seconds(simulation: Simulation, device: Device, is_half: bool) -> tuple[float, float]:
    """Return the seconds of a micro-batch (forward and backward), and of the optimizer step."""
    peak = device.flops_per_s * FLOP_EFFICIENCY * (1.0 if is_half else FP32_FRACTION)
    bandwidth = device.memory_bytes_per_s * BANDWIDTH_EFFICIENCY
    micro_batch = step = 0.0
    for operation in simulation.operations:
        seconds = max(operation.flops / peak, operation.num_bytes / bandwidth, LAUNCH_S)
        if operation.phase in ("forward", "backward"):
            micro_batch += seconds
        elif operation.phase == "step":
            step += seconds
    return micro_batch / simulation.num_micro_batches, step


def step_time(
    simulation: Simulation, layout: Layout, ranks: Ranks, device: Device, is_half: bool
) -> StepTime | None:
    """Return the time of an optimizer step under a layout; None without FLOP/s of the device."""
    if math.isnan(device.flops_per_s) or not simulation.operations:
        return None
    micro_batch, optimizer = compute_seconds(simulation, device, is_half)
    compute = simulation.accumulate * micro_batch * layout.compute_fraction + optimizer
    communication = layout.sent_bytes / ranks.bandwidth
    # gradients and parameters are sent while the passes run, two thirds of which are backward
    hidden = 2 / 3 * compute if layout.overlaps else 0.0
    exposed = max(0.0, communication - hidden)
    seconds = compute + exposed
    # all samples of a step, whichever ranks have them
    units = simulation.units * simulation.accumulate * ranks.size
    flops = simulation.flops * simulation.accumulate * ranks.size
    if simulation.flops_per_unit is not None:
        flops = simulation.flops_per_unit * units
    total_s = None if simulation.total_steps is None else simulation.total_steps * seconds
    mfu = flops / (seconds * device.flops_per_s * ranks.size)
    return StepTime(seconds, compute, exposed, units / seconds, mfu, total_s)


def list_assumptions(device: Device, ranks: Ranks, is_half: bool) -> list[str]:
    """Return the assumptions of the times, one a line."""
    lines = [
        f"{device.name}: {device.flops_per_s / 1e12:.4g} TFLOP/s in 16 bits, "
        f"{device.memory_bytes_per_s / 1e12:.3g} TB/s",
        f"matrix products reach {FLOP_EFFICIENCY:.0%} of the peak, other kernels "
        f"{BANDWIDTH_EFFICIENCY:.0%} of the bandwidth; a kernel takes {LAUNCH_S * 1e6:.0f} us or "
        "more; eager mode",
    ]
    if not is_half:
        lines.append(f"fp32 products as TF32, at {FP32_FRACTION:.0%} of the 16-bit peak")
    if ranks.size > 1:
        lines.append(
            f"{ranks.link}: a rank sends {ranks.bandwidth / 1e9:.0f} GB/s; ddp and zero hide "
            "messages behind up to two thirds of the computation, tp and pp hide none"
        )
    return lines
