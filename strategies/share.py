"""Data-parallel rank and size, and gradient accumulation, as every data loader uses them."""

from typing import Any, NamedTuple

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ravine.errors import UsageError


class DataParallelInfo(NamedTuple):
    """Data-parallel rank and size, and micro-batches per optimizer step; default: one process.

    info = DataParallelInfo.of(trainer)
    local_batch = batch[info.dp_rank :: info.dp_size]
    """

    dp_rank: int = 0
    dp_size: int = 1
    accumulate: int = 1

    @classmethod
    def from_trainer(cls, trainer: Any) -> "DataParallelInfo":
        """Read the values from a trainer; ranks that split one model (tp, pp) count as one."""
        if trainer is None:
            return cls()
        check_constant_accumulation(trainer)
        kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        rank, size = kwargs.get("rank", 0), kwargs.get("num_replicas", 1)
        return cls(rank, size, trainer.accumulate_grad_batches)


def check_constant_accumulation(trainer: Any) -> None:
    """Raise UsageError if GradientAccumulationScheduler would change the batch of a step.

    A callback with `supports_accumulation_schedule = True` adapts the batch, so it is then allowed.
    """
    callbacks = getattr(trainer, "callbacks", None) or ()
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    if changes and not any(
        getattr(callback, "supports_accumulation_schedule", False) for callback in callbacks
    ):
        raise UsageError(
            "GradientAccumulationScheduler would make an optimizer step larger than "
            "batch_size, which counts all samples of one; allowed: ravine's Trainer, or "
            "ravine.callbacks.RunChecks in trainer.callbacks; add RunChecks()"
        )
