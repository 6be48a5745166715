"""CUDA graphs for diffusion sampling: capture one denoising step and replay it.

A capture costs as much as about twenty steps, and images are sampled in many small calls. So the
graphs are kept until the evaluation ends.
Axes: b batch, c y x images.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..generation.cuda_graphs import CaptureFn, GraphedCallable, capture_cuda_graph

ConditionalDenoiseFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class CapturedDenoiser:
    """Call `denoise` through static buffers, so that one CUDA graph serves every step."""

    def __init__(
        self,
        denoise: ConditionalDenoiseFn,
        x: Tensor,
        y: Tensor | None,
        capture: CaptureFn | None = None,
    ) -> None:
        """Allocate buffers for images like x (b c y x), and for labels y (b) if there are any."""
        self.denoise, self.x, self.x0 = denoise, x.clone(), torch.empty_like(x)
        self.t, self.y = x.new_zeros(len(x)), None if y is None else y.clone()
        self.graphed_call = GraphedCallable(self._run, capture)

    def _run(self) -> None:
        self.x0.copy_(self.denoise(self.x, self.t, self.y))

    def set_labels(self, y: Tensor | None) -> None:
        """Set the labels (b) of the following calls."""
        if self.y is not None and y is not None:
            self.y.copy_(y)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Estimate x0 (b c y x) from x at time t."""
        self.x.copy_(x)
        self.t.fill_(t)
        self.graphed_call(0)
        return self.x0.clone()  # the next step overwrites x0, and a sampler may keep it


DenoiserFactory = Callable[
    [ConditionalDenoiseFn, Tensor, Tensor | None, Hashable], CapturedDenoiser
]


def no_capture(
    denoise: ConditionalDenoiseFn, x: Tensor, y: Tensor | None, name: Hashable
) -> CapturedDenoiser:
    """Create a `CapturedDenoiser` that records no graph."""
    return CapturedDenoiser(denoise, x, y)


class GraphCache:
    """Cache of captured denoisers, by name, image shape and weights."""

    def __init__(self, capture: CaptureFn | None = None) -> None:
        """Set the capture function; by default CUDA graphs on CUDA devices, else none."""
        self.capture = capture
        self.denoisers: dict[Hashable, CapturedDenoiser] = {}

    @contextmanager
    def bind(self, net: nn.Module) -> Iterator[DenoiserFactory]:
        """Yield a factory of denoisers for this net; a denoiser of an earlier call is used again.

        A sharded net is never captured, because its weights are gathered and freed. The autocast
        cache is disabled: a graph contains its casts of the weights. Autocast would free cached
        casts on exit, and a later replay would read freed memory.

        `no_capture` is a factory whose denoisers record nothing. A factory takes the function that
        estimates x0, images x (b c y x), labels y (b) or None, and a name of the settings.
        """
        weights = list(net.parameters())
        is_unsharded = all(type(p) is nn.Parameter for p in weights)
        device = weights[0].device
        # `self.capture`: another capture function, which was passed to the constructor
        capture = self.capture or (capture_cuda_graph if device.type == "cuda" else None)
        if capture is None or not is_unsharded:
            yield no_capture
            return
        # a graph reads the weights at the addresses at which it was captured
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
