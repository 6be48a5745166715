"""Memory limit of this process on the host: control group, machine, or a limit that is set.

    RAVINE_MEMORY_LIMIT=2.5     GiB; for a machine whose limit cannot be read, and for tests
    control group               memory.max (version 2) or memory.limit_in_bytes (version 1)
    machine                     MemTotal of /proc/meminfo

The kernel kills a process of a control group whose memory exceeds the limit, without an exception.
It counts these kills (`oom_kill`), which tells them from other kills.
"""

import os
import resource
import sys
from pathlib import Path
from typing import NamedTuple

from ravine.errors import UsageError

GIB = 2**30
LIMIT_VARIABLE = "RAVINE_MEMORY_LIMIT"
CGROUP_ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # version 1 states a limit near 2**63 where there is none


class MemoryLimit(NamedTuple):
    """The smallest limit of this process: bytes, and what sets it."""

    num_bytes: int
    source: str


def find_memory_limit() -> MemoryLimit | None:
    """Return the smallest limit of this process on the host; None if no limit can be read.

    Raises:
        UsageError: RAVINE_MEMORY_LIMIT is not a positive number.
    """
    if text := os.environ.get(LIMIT_VARIABLE):
        return MemoryLimit(parse_gibibytes(text), LIMIT_VARIABLE)
    limits = [
        MemoryLimit(value, f"control group, {folder / name}")
        for folder, name in _cgroup_files("memory.max", "memory.limit_in_bytes")
        if (value := _read_number(folder / name)) is not None and value < NO_LIMIT
    ]
    if (total := _read_meminfo("MemTotal")) is not None:
        limits.append(MemoryLimit(total, "memory of the machine"))
    return min(limits, default=None)


def parse_gibibytes(text: str) -> int:
    """Return a number of GiB in bytes.

    Raises:
        UsageError: the text is not a positive number.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise UsageError(
            f"{LIMIT_VARIABLE}={text} is not a positive number",
            ["GiB, such as 8 or 2.5"],
            hint=f"set {LIMIT_VARIABLE}=8, or remove it from the environment",
            flag=f"export {LIMIT_VARIABLE}=8",
        )
    return round(value * GIB)


def count_oom_kills() -> int:
    """Return how many processes the kernel has killed for memory in this control group."""
    total = 0
    for folder, name in _cgroup_files("memory.events", "memory.oom_control"):
        lines = _read_text(folder / name).splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return total


def peak_process_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cgroup_files(version_2: str, version_1: str) -> list[tuple[Path, str]]:
    """Return folder and file name of a value in the groups of this process and their parents."""
    files: list[tuple[Path, str]] = []
    for line in _read_text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = CGROUP_ROOT, version_2
        elif "memory" in controllers.split(","):
            root, name = CGROUP_ROOT / "memory", version_1
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            # inside of a container the path may be that of the host, which does not exist
            if (folder / name).is_file():
                files.append((folder, name))
            folder = folder.parent
    return files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None


def _read_meminfo(key: str) -> int | None:
    for line in _read_text(Path("/proc/meminfo")).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
