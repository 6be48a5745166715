"""The loss by level of noise: means over ten buckets, each a tenth of the times trained at.

Axes: b batch, s levels of noise, m measures.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_BUCKETS = 10
BUCKET_CENTERS = (
    torch.arange(NUM_BUCKETS) + 0.5
) / NUM_BUCKETS  # as numbers u of `Denoiser.timestep_of`


class LossByNoiseLevel:
    """Sums that stay on the device: nothing waits for it until the means are logged.

    levels = Levels(1)
    levels.add(torch.tensor([0, 9]), torch.tensor([[0.1], [0.7]]))
    levels.means()
    """

    def __init__(self, num_metrics: int) -> None:
        """Start with nothing."""
        # float64: ranks and batches add in another order
        self.sums = torch.zeros(NUM_BUCKETS, 1 + num_metrics, dtype=torch.float64)

    def add(self, level: Tensor, values: Tensor) -> None:
        """Add the measures (b m) of samples at levels (b), whole numbers below ten."""
        rows = torch.cat((torch.ones_like(values[:, :1]), values), 1).double()
        onehot = level == torch.arange(NUM_BUCKETS, device=level.device)[:, None]  # (s b)
        # a product adds in one order; index_add_ on a GPU does not
        self.sums = self.sums.to(level.device) + onehot.double() @ rows

    def means(self, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means (s m), nan where there was no sample, and whether there was one (s)."""
        total = self.sums if sums is None else sums
        return total[:, 1:] / total[:, :1], total[:, 0] > 0


def name_bucket_metrics(
    name: str, timestep_of: Callable[[Tensor], Tensor], means: Tensor
) -> dict[str, Tensor]:
    """Means (s) under the name and the time in the middle of each bucket: train/loss_t051."""
    return {
        f"{name}_t{round(t):03}": mean
        for t, mean in zip(timestep_of(BUCKET_CENTERS).tolist(), means, strict=True)
    }
