"""Count the bytes of live tensors: the peak of a piece of work over its start.

    with tensor_bytes() as bytes:
        loss(net(x)).backward()
    print(bytes.peak, bytes.rest)

On the CPU every allocation of torch's allocator is recorded by torch.profiler, in all threads,
autograd's included; what libraries below torch allocate (gloo's own buffers) is not seen, and of
what was allocated before the block, neither the bytes nor that it is freed. So start before
anything is allocated that the block frees, and look at a part of the curve (`peak_over`). A tensor
that a thread of gloo frees last stays counted. On CUDA the allocator counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.profiler import profile


@dataclass
class TensorBytes:
    """Bytes over those at the start: `peak`, and `rest` at the end; `curve` of (ns, bytes)."""

    peak: int = 0
    rest: int = 0
    curve: list[tuple[int, int]] = field(default_factory=list)

    def alive(self, moment: int) -> int:
        """Bytes over the start at a moment of `time.time_ns()`."""
        return next((alive for at, alive in reversed(self.curve) if at < moment), 0)

    def peak_over(self, start: int, end: int) -> int:
        """The peak between two moments of `time.time_ns()`, over what is alive at the first."""
        inside = [alive for at, alive in self.curve if start <= at <= end]
        return max([0, *(alive - self.alive(start) for alive in inside)])


@contextmanager
def tensor_bytes(device: str = "cpu") -> Iterator[TensorBytes]:
    """Measure the block; the result is filled in at its end."""
    found = TensorBytes()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.peak = torch.cuda.max_memory_allocated() - before
        found.rest = torch.cuda.memory_allocated() - before
        return
    with profile(profile_memory=True) as profiler:  # torch.profiler would build a tree: seconds
        yield found
    assert profiler is not None
    assert profiler.kineto_results is not None
    events: Any = profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), -event.nbytes()) for event in events if event.name() == "[memory]"
    )
    alive = 0
    for at, change in changes:
        alive -= change
        found.curve.append((at, alive))
    found.peak = max((alive for _, alive in found.curve), default=0)
    found.rest = alive
