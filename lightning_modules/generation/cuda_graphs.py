"""CUDA graphs: record a step of many small kernels once and launch it as one graph.

A step of a small net is some eighty kernels of two microseconds. Launching them one by one takes
the host ten times as long; a CUDA graph launches all of them with one call. A graph repeats the
recorded addresses and shapes. So each length bucket has its own graph, and all changing values
(tokens, positions, cache) are written to preallocated buffers.
"""

from collections.abc import Callable

import torch

CaptureFn = Callable[[Callable[[], None]], Callable[[], None]]


def capture_cuda_graph(fn: Callable[[], None]) -> Callable[[], None]:
    """Record `fn` as a CUDA graph without running it; return the function that replays the graph.

    `fn` must not read values from the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


class GraphedCallable:
    """Call a function repeatedly, and replay its CUDA graph from the second call in a bucket on."""

    def __init__(self, fn: Callable[[], None], capture: CaptureFn | None) -> None:
        """Store the function and `capture`, which records it; None disables recording."""
        self.fn, self.capture = fn, capture
        self.graphs: dict[int, Callable[[], None] | None] = {}

    def __call__(self, bucket: int) -> None:
        """Run the function once; shapes must be equal for calls with an equal `bucket`."""
        if self.capture is None or bucket not in self.graphs:
            self.graphs[bucket] = None
            self.fn()  # eager: the libraries initialize themselves, and that cannot be recorded
            return
        replay = self.graphs[bucket]
        if replay is None:
            replay = self.graphs[bucket] = self.capture(self.fn)
        replay()
