"""Which part of the data a process computes: the one question that all who read data ask."""

from typing import Any, NamedTuple

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ravine.errors import UsageError


class DataParallelInfo(NamedTuple):
    """Part `dp_rank` of `dp_size`, in `accumulate` micro-batches; alone: all of it.

    share = Share.of(trainer)
    mine = batch[share.rank :: share.size]
    """

    dp_rank: int = 0
    dp_size: int = 1
    accumulate: int = 1

    @classmethod
    def of(cls, trainer: Any) -> "DataParallelInfo":
        """Ask the trainer; ranks that split one model (tensor parallel) count as one."""
        if trainer is None:
            return cls()
        check_constant_accumulation(trainer)
        kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        rank, size = kwargs.get("rank", 0), kwargs.get("num_replicas", 1)
        return cls(rank, size, trainer.accumulate_grad_batches)


def check_constant_accumulation(trainer: Any) -> None:
    """ValueError if a batch of one optimizer step would grow with the epoch, and nothing helps."""
    callbacks = getattr(trainer, "callbacks", None) or ()
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if changes and not any(
        getattr(callback, "follows_accumulation", False) for callback in callbacks
    ):
        raise UsageError(
            "GradientAccumulationScheduler would make an optimizer step larger than "
            "batch_size, which counts all samples of one; allowed: ravine's Trainer, or "
            "ravine.callbacks.RunChecks in trainer.callbacks; add RunChecks()"
        )
