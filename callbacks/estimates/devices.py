"""Devices and links of an estimate: memory, FLOP/s and bandwidth of GPUs, as their makers state.

The FLOP/s are those of `PEAK_FLOPS` in callbacks/monitoring/throughput.py: dense products in 16
bits. The memory is that which nvidia-smi reports.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from ravine.errors import UsageError, sort_by_similarity

from ..monitoring.throughput import PEAK_FLOPS

GIB = 2**30
Link = Literal["nvlink", "ib400"]


@dataclass(frozen=True)
class Device:
    """A device: its memory in bytes, 16-bit FLOP/s, and bytes/s of its memory."""

    name: str
    memory_bytes: float
    flops_per_s: float
    memory_bytes_per_s: float


def _device(name: str, memory_gib: float, terabytes_per_s: float, peak: str = "") -> Device:
    return Device(name, memory_gib * GIB, PEAK_FLOPS[peak or name], terabytes_per_s * 1e12)


# by the value of --gpu
DEVICES: dict[str, Device] = {
    "b200": _device("B200", 179.1, 8.0),
    "h200": _device("H200", 140.4, 4.8),
    "gh200": _device("GH200", 95.6, 4.0),
    "h100": _device("H100", 79.6, 3.35),
    "h100-pcie": _device("H100 PCIe", 79.6, 2.0),
    "a100-80": _device("A100 80GB", 80.0, 2.04, "A100"),
    "a100-40": _device("A100 40GB", 40.0, 1.56, "A100"),
    "l40s": _device("L40S", 45.0, 0.86),
    "a10": _device("A10", 22.5, 0.6),
    "l4": _device("L4", 22.5, 0.3),
    "rtx4090": _device("RTX 4090", 24.0, 1.01),
    "rtx3090": _device("RTX 3090", 24.0, 0.94),
    "v100": _device("V100", 32.0, 0.9),
    "t4": _device("T4", 15.0, 0.32),
}
# bytes per second that a device sends: NVLink 4 one way, and InfiniBand at 400 Gbit/s
LINKS: dict[str, float] = {"nvlink": 450e9, "ib400": 50e9}
assert set(LINKS) == set(get_args(Link))
DEFAULT_BANDWIDTH = 1e12  # of the memory of a device that is not in the table


def find_device(
    gpu: str | None, memory_gib: float | None = None, tflops: float | None = None
) -> Device | None:
    """Return the device of `--gpu`, or one with the stated memory and speed; None without any.

    Args:
        gpu: a key of DEVICES, in any case.
        memory_gib: memory in GiB; it replaces that of `gpu`.
        tflops: dense 16-bit TFLOP/s; they replace those of `gpu`.

    Raises:
        UsageError: the device is unknown, or a number is not positive.
    """
    for name, value in (("gpu_memory", memory_gib), ("gpu_tflops", tflops)):
        if value is not None and value <= 0:
            raise UsageError(
                f"estimate: {name}={value:g} is not positive",
                ["a number above 0"],
                f"use {name}=80",
                flag=f"--{name}=80",
            )
    if gpu is None:
        if memory_gib is None and tflops is None:
            return None
        known = Device("device", float("inf"), float("nan"), DEFAULT_BANDWIDTH)
    elif gpu.lower() in DEVICES:
        known = DEVICES[gpu.lower()]
    else:
        names = sort_by_similarity(gpu.lower(), DEVICES)
        raise UsageError(
            f"estimate: gpu={gpu!r} is not in the table of devices",
            names,
            f"use gpu={names[0]!r}, or gpu_memory=80 and gpu_tflops=312 for another device",
            flag=f"--gpu={names[0]}, or --gpu_memory=80 --gpu_tflops=312 for another device",
        )
    return Device(
        known.name,
        known.memory_bytes if memory_gib is None else memory_gib * GIB,
        known.flops_per_s if tflops is None else tflops * 1e12,
        known.memory_bytes_per_s,
    )


def link_bandwidth(link: str | None, num_nodes: int) -> tuple[float, str]:
    """Return the bytes/s that a device sends, and the name of the link.

    Args:
        link: a key of LINKS; None: ib400 between nodes, nvlink within one.
        num_nodes: number of nodes.

    Raises:
        UsageError: the link is unknown.
    """
    name = link or ("ib400" if num_nodes > 1 else "nvlink")
    if name not in LINKS:
        names = sort_by_similarity(name, LINKS)
        raise UsageError(
            f"estimate: link={name!r} does not exist",
            names,
            f"use link={names[0]!r}",
            flag=f"--link={names[0]}",
        )
    return LINKS[name], name
