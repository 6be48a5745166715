"""Recordings: on CUDA a sampling step is recorded once, and replayed until the evaluation is over.

A recording costs as much as some twenty steps, and images are asked for in many small calls.
Axes: b batch, c y x images.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..generation.cuda_graphs import CaptureFn, GraphedCallable, capture_cuda_graph

ConditionalDenoiseFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class CapturedDenoiser:
    """`denoise` through buffers that stay where they are: one recording serves every step."""

    def __init__(
        self,
        denoise: ConditionalDenoiseFn,
        x: Tensor,
        y: Tensor | None,
        capture: CaptureFn | None = None,
    ) -> None:
        """For images like x (b c y x), with labels y (b) if there are any."""
        self.denoise, self.x, self.x0 = denoise, x.clone(), torch.empty_like(x)
        self.t, self.y = x.new_zeros(len(x)), None if y is None else y.clone()
        self.graphed_call = GraphedCallable(self._run, capture)

    def _run(self) -> None:
        self.x0.copy_(self.denoise(self.x, self.t, self.y))

    def set_labels(self, y: Tensor | None) -> None:
        """The labels (b) from now on."""
        if self.y is not None and y is not None:
            self.y.copy_(y)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The images (b c y x) that x at time t come from."""
        self.x.copy_(x)
        self.t.fill_(t)
        self.graphed_call(0)
        return self.x0.clone()  # a sampler may keep it, and the next step overwrites


DenoiserFactory = Callable[
    [ConditionalDenoiseFn, Tensor, Tensor | None, Hashable], CapturedDenoiser
]


def no_capture(
    denoise: ConditionalDenoiseFn, x: Tensor, y: Tensor | None, name: Hashable
) -> CapturedDenoiser:
    """Nothing is recorded."""
    return CapturedDenoiser(denoise, x, y)


class GraphCache:
    """What has been recorded; one serves every call of its name on the same weights."""

    def __init__(self, capture: CaptureFn | None = None) -> None:
        """Record by `capture`; by default CUDA graphs where there is CUDA, else not at all."""
        self.capture = capture
        self.denoisers: dict[Hashable, CapturedDenoiser] = {}

    @contextmanager
    def bind(self, net: nn.Module) -> Iterator[DenoiserFactory]:
        """What makes an estimator with this net.

        A sharded net, whose weights come and go, is never recorded. A recording holds its casts of
        the weights: autocast would keep them aside until it is left, and a later replay would read
        what is no longer there.
        """
        weights = list(net.parameters())
        is_unsharded = all(type(p) is nn.Parameter for p in weights)
        device = weights[0].device
        capture = self.capture or (capture_cuda_graph if device.type == "cuda" else None)
        if capture is None or not is_unsharded:
            yield no_capture
            return
        weights_key = (net.training, *(p.data_ptr() for p in weights))

        def make_denoiser(
            denoise: ConditionalDenoiseFn, x: Tensor, y: Tensor | None, name: Hashable
        ) -> CapturedDenoiser:
            cache_key = (name, tuple(x.shape), y is None, weights_key)
            if cache_key not in self.denoisers:
                self.denoisers[cache_key] = CapturedDenoiser(denoise, x, y, capture)
            return self.denoisers[cache_key]

        autocast_context = nullcontext()
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            autocast_context = torch.autocast(device.type, dtype, cache_enabled=False)
        with autocast_context:
            yield make_denoiser
