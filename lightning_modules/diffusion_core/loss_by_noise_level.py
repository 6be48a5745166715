"""Loss by noise level: means over ten buckets of equal probability under the training times.

Axes: b batch, s noise levels, m metrics.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NUM_BUCKETS = 10
BUCKET_CENTERS = (
    torch.arange(NUM_BUCKETS) + 0.5
) / NUM_BUCKETS  # as numbers u of `Denoiser.sample_t`


class LossByNoiseLevel:
    """Accumulate metrics by noise level on the device; the host does not wait before the means.

    For example:

        losses = LossByNoiseLevel(1)
        losses.add(torch.tensor([0, 9]), torch.tensor([[0.1], [0.7]]))
        losses.means()
    """

    def __init__(self, num_metrics: int) -> None:
        """Start with zero sums."""
        # float64: the order of addition depends on ranks and batches
        self.sums = torch.zeros(NUM_BUCKETS, 1 + num_metrics, dtype=torch.float64)

    def add(self, level: Tensor, values: Tensor) -> None:
        """Add the metrics (b m) of samples at levels (b), integers below ten."""
        rows = torch.cat((torch.ones_like(values[:, :1]), values), 1).double()
        onehot = level == torch.arange(NUM_BUCKETS, device=level.device)[:, None]  # (s b)
        # a matrix product adds in a fixed order; index_add_ on a GPU does not
        self.sums = self.sums.to(level.device) + onehot.double() @ rows

    def means(self, sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return means (s m), NaN for a level without samples, and whether it has samples (s)."""
        total = self.sums if sums is None else sums
        return total[:, 1:] / total[:, :1], total[:, 0] > 0


def name_bucket_metrics(
    name: str, timestep_of: Callable[[Tensor], Tensor], means: Tensor
) -> dict[str, Tensor]:
    """Name the means (s) by the time at the center of each bucket: train/loss_t051."""
    return {
        f"{name}_t{round(t):03}": mean
        for t, mean in zip(timestep_of(BUCKET_CENTERS).tolist(), means, strict=True)
    }
