"""Recordings: on CUDA a sampling step is recorded once, and replayed until the evaluation is over.

A recording costs as much as some twenty steps, and images are asked for in many small calls.
Axes: b batch, c y x images.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..generation.cuda_graphs import Capture, Replay, cuda_graph

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Estimator:
    """`denoise` through buffers that stay where they are: one recording serves every step."""

    def __init__(
        self, denoise: Denoise, x: Tensor, y: Tensor | None, capture: Capture | None = None
    ) -> None:
        """For images like x (b c y x), with labels y (b) if there are any."""
        self.denoise, self.x, self.x0 = denoise, x.clone(), torch.empty_like(x)
        self.t, self.y = x.new_zeros(len(x)), None if y is None else y.clone()
        self.work = Replay(self._run, capture)

    def _run(self) -> None:
        self.x0.copy_(self.denoise(self.x, self.t, self.y))

    def label(self, y: Tensor | None) -> None:
        """The labels (b) from now on."""
        if self.y is not None and y is not None:
            self.y.copy_(y)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The images (b c y x) that x at time t come from."""
        self.x.copy_(x)
        self.t.fill_(t)
        self.work(0)
        return self.x0.clone()  # a sampler may keep it, and the next step overwrites


Record = Callable[[Denoise, Tensor, Tensor | None, Hashable], Estimator]


def plainly(denoise: Denoise, x: Tensor, y: Tensor | None, name: Hashable) -> Estimator:
    """Nothing is recorded."""
    return Estimator(denoise, x, y)


class Recordings:
    """What has been recorded; one serves every call of its name on the same weights."""

    def __init__(self, capture: Capture | None = None) -> None:
        """Record by `capture`; by default CUDA graphs where there is CUDA, else not at all."""
        self.capture = capture
        self.made: dict[Hashable, Estimator] = {}

    @contextmanager
    def used_by(self, net: nn.Module) -> Iterator[Record]:
        """What makes an estimator with this net.

        A sharded net, whose weights come and go, is never recorded. A recording holds its casts of
        the weights: autocast would keep them aside until it is left, and a later replay would read
        what is no longer there.
        """
        weights = list(net.parameters())
        plain = all(type(p) is nn.Parameter for p in weights)
        device = weights[0].device
        capture = self.capture or (cuda_graph if device.type == "cuda" else None)
        if capture is None or not plain:
            yield plainly
            return
        where = (net.training, *(p.data_ptr() for p in weights))

        def record(denoise: Denoise, x: Tensor, y: Tensor | None, name: Hashable) -> Estimator:
            names = (name, tuple(x.shape), y is None, where)
            if names not in self.made:
                self.made[names] = Estimator(denoise, x, y, capture)
            return self.made[names]

        casts = nullcontext()
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            casts = torch.autocast(device.type, dtype, cache_enabled=False)
        with casts:
            yield record
