"""Ranks that load one checkpoint divide its checksums, and raise the same error."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ..work_partition import assign_balanced
from .checkpoint_error import CheckpointError


class ReadingRanks:
    """The ranks that load one checkpoint at the same time; by default only this process.

    For example:

        readers = ReadingRanks.from_job()
        names = readers.assign_parts({"data/0": 4000, "data/1": 40}, (inode, size, time), False)
        readers.raise_first_problem(problem, lambda reason: CheckpointError(reason))
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Store the index of this rank and the number of ranks."""
        self.rank, self.num_ranks = rank, num_ranks

    @classmethod
    def from_job(cls) -> "ReadingRanks":
        """Return all ranks of the job, or this process only if there is no process group."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def gather_values(self, value: Any) -> list[Any]:
        """All-gather a value; return the values of all ranks in rank order."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def raise_first_problem(
        self,
        problem: str | CheckpointError | None,
        make_error: Callable[[str], CheckpointError],
    ) -> None:
        """Raise the first problem of any rank on all ranks; return if there is none.

        Every rank calls it.

        Args:
            problem: the problem that this rank found, or the error itself, or None.
            make_error: makes the error for a problem; called on rank 0 only, because it may read
                other files.

        Raises:
            CheckpointError: the same on all ranks.
        """
        # gather_values: the values of all ranks, in rank order
        first = next(
            (reported for reported in self.gather_values(problem) if reported is not None), None
        )
        if first is None:
            return
        if isinstance(first, str):
            # a text becomes an error on rank 0, which all ranks get
            rank_zero_error = make_error(first) if self.rank == 0 else None
            first = self.gather_values(rank_zero_error)[0]
        raise first

    def assign_parts(
        self, sizes: Mapping[str, int], file_identity: tuple[int, ...], is_verified: bool
    ) -> list[str]:
        """Return the parts of a checkpoint whose checksums this rank verifies.

        Each part is verified by one of the ranks that read the same copy of the checkpoint. Nodes
        without a shared file system have separate copies.

        Args:
            sizes: bytes of each part, the same on all ranks.
            file_identity: identity of a copy: inode, size and time of change.
            is_verified: whether this process has already verified this copy.
        """
        reports = self.gather_values((file_identity, is_verified))
        same_file_ranks = [
            rank for rank, (identity, _) in enumerate(reports) if identity == file_identity
        ]
        # one verification of a copy is enough for all of its ranks
        if any(verified for identity, verified in reports if identity == file_identity):
            return []
        names = sorted(sizes)
        # by index in same_file_ranks, balanced by bytes
        # assign_balanced: index for each size, so that sums are about equal; all sums begin at 0
        indices = assign_balanced([sizes[name] for name in names], [0] * len(same_file_ranks))
        return [
            name
            for name, index in zip(names, indices, strict=True)
            if same_file_ranks[index] == self.rank
        ]
