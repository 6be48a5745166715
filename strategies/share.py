"""Which part of the data a process computes: the one question that all who read data ask."""

from typing import Any, NamedTuple


class Share(NamedTuple):
    """Part `rank` of `size`, in `accumulate` micro-batches; alone: all of it.

    share = Share.of(trainer)
    mine = batch[share.rank :: share.size]
    """

    rank: int = 0
    size: int = 1
    accumulate: int = 1

    @classmethod
    def of(cls, trainer: Any) -> "Share":
        """Ask the trainer; ranks that split one model (tensor parallel) count as one."""
        if trainer is None:
            return cls()
        kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        rank, size = kwargs.get("rank", 0), kwargs.get("num_replicas", 1)
        return cls(rank, size, trainer.accumulate_grad_batches)
