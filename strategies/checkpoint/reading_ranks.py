"""Ranks that read one checkpoint divide its checksums and refuse it with the same error."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ..work_partition import assign_balanced
from .checkpoint_error import CheckpointError


class ReadingRanks:
    """The ranks that read one checkpoint at the same time; by default only this process.

    readers = Readers.of_job()
    mine = readers.share({"data/0": 4000, "data/1": 40}, copy=(inode, size, time), known=False)
    readers.agree(problem, lambda why: f"the checkpoint cannot be used: {why}")
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Set the place among the ranks."""
        self.rank, self.num_ranks = rank, num_ranks

    @classmethod
    def from_job(cls) -> "ReadingRanks":
        """All ranks of the job, if this process is one of several."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def gather_values(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def raise_first_problem(self, problem: str | None, format_error: Callable[[str], str]) -> None:
        """Return if no rank has a problem; else raise the first one on all ranks.

        Args:
            problem: what this rank has found, or None.
            format_error: makes the text of the error; called on rank 0 alone, as it may read other
            files.

        Raises:
            CheckpointError: with one text on all ranks.
        """
        first = next(
            (reported for reported in self.gather_values(problem) if reported is not None), None
        )
        if first is None:
            return
        raise CheckpointError(
            self.gather_values(format_error(first) if self.rank == 0 else None)[0]
        )

    def assign_parts(
        self, sizes: Mapping[str, int], file_identity: tuple[int, ...], is_verified: bool
    ) -> list[str]:
        """The parts of a checkpoint whose sums this rank compares.

        Every part is compared by one of the ranks that read the same copy of the checkpoint; nodes
        without a common file system have copies of their own.

        Args:
            sizes: bytes of each part, the same on all ranks.
            file_identity: identifies a copy: inode, size and time of change.
            is_verified: whether this process has compared the sums of this copy before.
        """
        reports = self.gather_values((file_identity, is_verified))
        same_file_ranks = [
            rank
            for rank, (other_identity, _) in enumerate(reports)
            if other_identity == file_identity
        ]
        if any(reports[rank][1] for rank in same_file_ranks):
            return []
        names = sorted(sizes)
        ranks = assign_balanced([sizes[name] for name in names], [0] * len(same_file_ranks))
        return [
            n for n, rank in zip(names, ranks, strict=True) if same_file_ranks[rank] == self.rank
        ]
