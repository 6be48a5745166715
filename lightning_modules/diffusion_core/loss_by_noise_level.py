"""The loss by level of noise: means over ten buckets, each a tenth of the times trained at.

Axes: b batch, s levels of noise, m measures.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LEVELS = 10
MIDDLES = (torch.arange(LEVELS) + 0.5) / LEVELS  # as numbers u of `Denoising.times`


class Levels:
    """Sums that stay on the device: nothing waits for it until the means are logged.

    levels = Levels(1)
    levels.add(torch.tensor([0, 9]), torch.tensor([[0.1], [0.7]]))
    levels.means()
    """

    def __init__(self, measures: int) -> None:
        """Start with nothing."""
        # float64: ranks and batches add in another order
        self.sums = torch.zeros(LEVELS, 1 + measures, dtype=torch.float64)

    def add(self, level: Tensor, values: Tensor) -> None:
        """Add the measures (b m) of samples at levels (b), whole numbers below ten."""
        rows = torch.cat((torch.ones_like(values[:, :1]), values), 1).double()
        at = level == torch.arange(LEVELS, device=level.device)[:, None]  # (s b)
        # a product adds in one order; index_add_ on a GPU does not
        self.sums = self.sums.to(level.device) + at.double() @ rows

    def means(self, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means (s m), nan where there was no sample, and whether there was one (s)."""
        total = self.sums if sums is None else sums
        return total[:, 1:] / total[:, :1], total[:, 0] > 0


def named(name: str, times: Callable[[Tensor], Tensor], means: Tensor) -> dict[str, Tensor]:
    """Means (s) under the name and the time in the middle of each bucket: train/loss_t051."""
    return {
        f"{name}_t{round(t):03}": mean
        for t, mean in zip(times(MIDDLES).tolist(), means, strict=True)
    }
