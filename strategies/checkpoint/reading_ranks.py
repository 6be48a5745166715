"""Ranks that read one checkpoint divide its checksums and refuse it with the same error."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ..work_partition import spread_evenly
from .checkpoint_error import CheckpointError


class Readers:
    """The ranks that read one checkpoint at the same time; by default only this process.

    readers = Readers.of_job()
    mine = readers.share({"data/0": 4000, "data/1": 40}, copy=(inode, size, time), known=False)
    readers.agree(problem, lambda why: f"the checkpoint cannot be used: {why}")
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Set the place among the ranks."""
        self.rank, self.size = rank, size

    @classmethod
    def of_job(cls) -> "Readers":
        """All ranks of the job, if this process is one of several."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, problem: str | None, words: Callable[[str], str]) -> None:
        """Return if no rank has a problem; else raise the first one on all ranks.

        Args:
            problem: what this rank has found, or None.
            words: makes the text of the error; called on rank 0 alone, as it may read other files.

        Raises:
            CheckpointError: with one text on all ranks.
        """
        first = next((each for each in self.gather(problem) if each is not None), None)
        if first is None:
            return
        raise CheckpointError(self.gather(words(first) if self.rank == 0 else None)[0])

    def share(self, sizes: Mapping[str, int], copy: tuple[int, ...], known: bool) -> list[str]:
        """The parts of a checkpoint whose sums this rank compares.

        Every part is compared by one of the ranks that read the same copy of the checkpoint; nodes
        without a common file system have copies of their own.

        Args:
            sizes: bytes of each part, the same on all ranks.
            copy: identifies a copy: inode, size and time of change.
            known: whether this process has compared the sums of this copy before.
        """
        found = self.gather((copy, known))
        same = [rank for rank, (each, _) in enumerate(found) if each == copy]
        if any(found[rank][1] for rank in same):
            return []
        names = sorted(sizes)
        ranks = spread_evenly([sizes[name] for name in names], [0] * len(same))
        return [n for n, rank in zip(names, ranks, strict=True) if same[rank] == self.rank]
