"""Time of an optimizer step on a device, from the operations of a simulated one.

    operation   max(FLOPs / (e_f * peak), bytes / (e_b * bandwidth), launch)
    step        micro-batches * (forward + backward) + optimizer + communication that is not hidden
    MFU         FLOPs of the module's formula (or counted) / (seconds * peak)

All constants are assumptions, and are printed with the result. `e_f` and `e_b` are the fractions of
peak and bandwidth that large kernels reach.
"""

import math
from dataclasses import dataclass

from ravine.errors import UsageError

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
    energy_kwh: float | None = None  # of the run, with the stated watts
    price: float | None = None  # of the run, with the stated price


@dataclass(frozen=True)
class Cost:
    """What a device costs: its price per hour, and its power in watts; None if not stated."""

    price_per_hour: float | None = None
    watts: float | None = None

    def check(self) -> None:
        """Raise UsageError for a number that is not positive."""
        for name, value, example in (
            ("price_per_hour", self.price_per_hour, "2.5"),
            ("watts", self.watts, "700"),
        ):
            if value is not None and not value > 0:
                raise UsageError(
                    f"estimate: {name}={value:g} is not positive",
                    ["a number above 0"],
                    f"use {name}={example}",
                    flag=f"--{name}={example}",
                )

    def assumptions(self, ranks: int) -> list[str]:
        """Return the assumptions of price and energy, one a line."""
        lines = []
        if self.price_per_hour is not None:
            lines.append(f"a device costs {self.price_per_hour:g} an hour; {ranks} devices")
        if self.watts is not None:
            lines.append(
                f"a device takes {self.watts:g} W all the time, without host, network and cooling"
            )
        return lines


NO_COST = Cost()  # neither price nor energy is computed


def compute_seconds(simulation: Simulation, device: Device, is_half: bool) -> tuple[float, float]:
    """Return the seconds of a micro-batch (forward and backward), and of the optimizer step."""
    peak = device.flops_per_s * FLOP_EFFICIENCY * (1.0 if is_half else FP32_FRACTION)
    bandwidth = device.memory_bytes_per_s * BANDWIDTH_EFFICIENCY
    micro_batch = step = 0.0
    for operation in simulation.operations:
        seconds = max(operation.flops / peak, operation.num_bytes / bandwidth, LAUNCH_S)
        seconds *= operation.count
        if operation.phase in ("forward", "backward"):
            micro_batch += seconds
        elif operation.phase == "step":
            step += seconds
    return micro_batch / simulation.num_micro_batches, step


def step_time(
    simulation: Simulation,
    layout: Layout,
    ranks: Ranks,
    device: Device,
    is_half: bool,
    cost: Cost = NO_COST,
) -> StepTime | None:
    """Return the time of an optimizer step under a layout; None without FLOP/s of the device."""
    if math.isnan(device.flops_per_s) or not simulation.operations:
        return None
    micro_batch, optimizer = compute_seconds(simulation, device, is_half)
    compute = simulation.accumulate * micro_batch * layout.compute_fraction + optimizer
    # gradients and parameters are sent while the passes run, two thirds of which are backward
    exposed = layout.exposed_s + max(0.0, layout.overlapped_s - 2 / 3 * compute)
    seconds = compute + exposed
    # micro-batches of the simulation in a step of all ranks
    count = layout.rows * layout.dp_size * simulation.accumulate
    units = simulation.units * count
    flops = simulation.flops * count
    if simulation.flops_per_unit is not None:
        flops = simulation.flops_per_unit * units
    total_s = None if simulation.total_steps is None else simulation.total_steps * seconds
    mfu = flops / (seconds * device.flops_per_s * ranks.size)
    energy = price = None
    if total_s is not None:
        hours = total_s / 3600 * ranks.size
        energy = None if cost.watts is None else hours * cost.watts / 1000
        price = None if cost.price_per_hour is None else hours * cost.price_per_hour
    return StepTime(seconds, compute, exposed, units / seconds, mfu, total_s, energy, price)


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
            "messages behind up to two thirds of the computation, tp, ep and pp hide none"
        )
    return lines
