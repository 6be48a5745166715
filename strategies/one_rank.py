"""OneRankStrategy: one process that reads the data of rank 0 of several data-parallel ranks.

An estimate of a distributed run simulates one of its ranks, without the others.
"""

from lightning.pytorch.strategies import SingleDeviceStrategy


class OneRankStrategy(SingleDeviceStrategy):
    """One process on the CPU, with the batches of rank 0 of `dp_size` data-parallel ranks.

    Attributes:
        divides_batch: whether a data loader has divided its batch by the number of ranks.
    """

    def __init__(self, dp_size: int = 1) -> None:
        """Store the number of ranks."""
        super().__init__(device="cpu")
        self.dp_size, self.divides_batch = dp_size, False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Return the data-parallel size and rank, which `DataParallelInfo` reads."""
        self.divides_batch = True
        return {"num_replicas": self.dp_size, "rank": 0}
