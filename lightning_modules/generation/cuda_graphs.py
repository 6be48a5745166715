"""Replay: a step of many small kernels is recorded once and started as one.

A small net's step is some eighty kernels of two microseconds; starting them one by one takes the
host ten times as long. A CUDA graph starts them together. It repeats addresses and shapes, so there
is one for each length bucket, and all that changes (text, times, cache) lies in buffers that stay.
"""

from collections.abc import Callable

import torch

CaptureFn = Callable[[Callable[[], None]], Callable[[], None]]


def capture_cuda_graph(fn: Callable[[], None]) -> Callable[[], None]:
    """Record `fn`, which must not read from the device, without doing it; what repeats it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


class GraphedCallable:
    """Does the same work again and again, from its second time in a bucket by a recording."""

    def __init__(self, fn: Callable[[], None], capture: CaptureFn | None) -> None:
        """Record with `capture`, or never."""
        self.fn, self.capture = fn, capture
        self.graphs: dict[int, Callable[[], None] | None] = {}

    def __call__(self, bucket: int) -> None:
        """Do it once, for shapes that are equal in equal buckets."""
        if self.capture is None or bucket not in self.graphs:
            self.graphs[bucket] = None
            self.fn()  # for real: libraries prepare themselves, which cannot be recorded
            return
        replay = self.graphs[bucket]
        if replay is None:
            replay = self.graphs[bucket] = self.capture(self.fn)
        replay()
