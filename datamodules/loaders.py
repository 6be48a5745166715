"""Resumable data loaders; the order depends only on (seed, epoch, sample index).

    epoch e:  sample  0 1 2 3 | 4 5 6 7 | ...      batch_size 4 = one optimizer step, all ranks
              micro   0 0 1 1 | 0 0 1 1 | ...      accumulate 2
              rank    0 1 0 1 | 0 1 0 1 | ...      size 2

Data-parallel ranks and micro-batches take slices of one stream. So the global batch of a step is
the same on any number of ranks. A position counted in samples can be resumed on another number of
ranks.
"""

import reprlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ravine.errors import UsageError
from ravine.strategies.data_parallel import DataParallelInfo

from .samplers import EpochSampler


class ResumableLoader:
    """Resumable training loader: yields the micro-batches of one epoch, from any saved position.

    The trainer calls `set_epoch` through `sampler`, as for torch's DistributedSampler.
    """

    is_rng_free = True  # does not use the default generators, so no reseeding per batch is needed

    def __init__(
        self,
        epoch_sampler: EpochSampler,
        make_batch: Callable[[Tensor], Any],
        num_samples: int,
        batch_size: int,
        data_parallel: DataParallelInfo = DataParallelInfo(),  # noqa: B008 - immutable
        repeat_first_epoch: bool = False,
    ) -> None:
        """Store the options and check that the batch divides over ranks and accumulated batches.

        Args:
            epoch_sampler: maps (epoch, first, last) to item indices.
            make_batch: makes a batch from item indices.
            num_samples: samples of an epoch; the incomplete last batch is dropped.
            batch_size: samples of one optimizer step, over all ranks and accumulated batches.
            data_parallel: data-parallel rank and size, and the number of accumulated batches.
            repeat_first_epoch: whether every epoch repeats the first one, for overfit_batches.
        """
        # raises an error if a step has more samples than the epoch, or unequal parts
        check_divisible(batch_size, num_samples, data_parallel)
        self.epoch_sampler, self.make_batch = epoch_sampler, make_batch
        self.batch_size, self.data_parallel = batch_size, data_parallel
        self.num_samples = num_samples // batch_size * batch_size
        # Lightning's BatchSizeFinder doubles the batch size while it is below this length. So
        # a size above half of the samples is not doubled: twice that would exceed them.
        self.dataset = range(num_samples // 2 + 1)
        self.epoch, self.num_consumed = 0, 0  # the position: samples of the epoch yielded so far
        self._trainer_epoch = 0  # the trainer's epoch number, given to `set_epoch`
        self._epoch_offset = 0  # the loader's epoch minus the trainer's
        self._resume_state: dict[str, int] | None = None  # loaded, until the next iteration
        self.repeat_first_epoch = repeat_first_epoch
        # Lightning calls `set_epoch` of `sampler` and of `batch_sampler`. With overfit_batches it
        # warns about a `sampler` whose shuffling it cannot disable, but not about the other.
        # Without overfit_batches the usual place is set, as in torch's DataLoader.
        setattr(self, "batch_sampler" if repeat_first_epoch else "sampler", _EpochSetter(self))

    def __len__(self) -> int:
        """Return the micro-batches per epoch. (With a length, Lightning prefetches no batch.)"""
        return self.num_samples // self.batch_size * self.data_parallel.accumulate

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's micro-batches of the epoch; a loaded position is used once.

        The position is read at the first batch: Lightning creates the iterator early, and may load
        a position after that.
        """
        # sets `epoch` and `num_consumed`, the samples of the epoch that all ranks have done
        self._restore_position()
        rank, size, accumulate = self.data_parallel
        micro_batch_size = self.batch_size // accumulate  # over all ranks
        # a checkpoint of another batch size may lie between two batches of this run
        if self.num_consumed % micro_batch_size:
            raise UsageError(
                f"the checkpoint was written after {self.num_consumed} samples of epoch "
                f"{self.epoch}, inside a batch of {micro_batch_size} samples of this run",
                [f"micro-batches whose size divides {self.num_consumed}"],
                "resume with the batch_size and accumulate_grad_batches of the checkpoint",
            )
        local_batch_size = micro_batch_size // size
        while self.num_consumed < self.num_samples:
            first = self.num_consumed + rank * local_batch_size
            # before the yield: a yielded batch counts as consumed
            self.num_consumed += micro_batch_size
            # `epoch_sampler` maps places first ... last - 1 of the epoch to indices of samples
            yield self.make_batch(self.epoch_sampler(self.epoch, first, first + local_batch_size))

    def _restore_position(self) -> None:
        """Resume from the loaded position, or start the next epoch if that one is over.

        The loader counts epochs itself. If a checkpoint was written at the end of an epoch,
        Lightning's number (fit_loop.epoch_progress) is one too high after a resume with max_steps.
        """
        state, self._resume_state, self.num_consumed = self._resume_state, None, 0
        if state is not None:
            is_same_epoch = state["trainer_epoch"] == self._trainer_epoch
            self.num_consumed = state["num_consumed"] if is_same_epoch else 0
            self._epoch_offset = state["epoch"] + (not is_same_epoch) - self._trainer_epoch
        self.epoch = 0 if self.repeat_first_epoch else self._trainer_epoch + self._epoch_offset

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps per epoch."""
        return self.num_samples // self.batch_size

    def set_accumulate(self, accumulate: int) -> None:
        """Set the micro-batches per optimizer step, from the next epoch on."""
        data_parallel = self.data_parallel._replace(accumulate=accumulate)
        check_divisible(self.batch_size, self.num_samples, data_parallel)
        self.data_parallel = data_parallel

    def peek(self) -> Any:
        """Return this rank's first micro-batch of the epoch without changing the position."""
        rank, size, accumulate = self.data_parallel
        local_batch_size = self.batch_size // accumulate // size
        return self.make_batch(
            self.epoch_sampler(self.epoch, rank * local_batch_size, (rank + 1) * local_batch_size)
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the trainer's epoch number for the next iteration."""
        self._trainer_epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the position in samples over all ranks, so that any layout can resume from it."""
        return {
            "epoch": self.epoch,
            "num_consumed": self.num_consumed,
            "trainer_epoch": self._trainer_epoch,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume the next iteration at the position that `state_dict` returned.

        Raises:
            UsageError: `state` has other keys or types.
        """
        # `type(...) is not int` also refuses bool. A checkpoint is not trusted.
        keys = ("epoch", "num_consumed", "trainer_epoch")
        if not isinstance(state, dict) or any(type(state.get(key)) is not int for key in keys):
            raise UsageError(
                f"the saved position in the data is {reprlib.repr(state)}",
                [f"integers for {', '.join(keys)}"],
                "pass another checkpoint to trainer.fit(ckpt_path=...)",
                flag="--ckpt_path=FILE",
            )
        self.epoch, self.num_consumed = state["epoch"], state["num_consumed"]
        # `epoch` counts this loader's epochs; after a resume the trainer's number may be one higher
        self._trainer_epoch = state["trainer_epoch"]
        # used once by the next iteration; the lines above are for `state_dict` before it
        self._resume_state = state


class _EpochSetter:
    """Provides `set_epoch` where Lightning expects it: in `sampler` or `batch_sampler.sampler`."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.sampler, self.set_epoch = self, loader.set_epoch


class EvalLoader:
    """Evaluation loader: every sample exactly once over the ranks, equal batch counts per rank.

    Sharded models communicate in every forward pass, so all ranks need the same number of batches.
    A remainder is spread over batches whose sizes differ by one. The loader has no state: every
    iteration is the same.
    """

    def __init__(
        self,
        make_batch: Callable[[Tensor], Any],
        num_samples: int,
        batch_size: int,
        data_parallel: DataParallelInfo = DataParallelInfo(),  # noqa: B008 - immutable
    ) -> None:
        """Split the samples into batches of about `batch_size` over all ranks.

        Args:
            make_batch: makes a batch from a tensor of sample indices.
            num_samples: samples of the split.
            batch_size: samples of one batch over all ranks.
            data_parallel: data-parallel rank and size.

        Raises:
            UsageError: there are more ranks than samples.
        """
        if num_samples == 0:
            raise UsageError(
                "there is no sample to evaluate",
                ["a validation or test split with at least one sample"],
                "use a larger val_fraction, or more data",
            )
        if num_samples < data_parallel.dp_size:
            raise UsageError(
                f"{num_samples} samples cannot be evaluated on {data_parallel.dp_size} ranks: "
                "each rank needs at least one",
                [f"at most {num_samples} ranks"],
                f"use Trainer(devices={num_samples})",
                flag=f"--trainer.devices={num_samples}",
            )
        check_positive("batch_size", batch_size)
        # -(-a // b) is a / b rounded up
        max_local_samples = -(-num_samples // data_parallel.dp_size)  # samples of the fullest rank
        local_batch_size = max(1, batch_size // data_parallel.dp_size)
        # one batch fewer if a rank would have an empty last batch
        num_batches = min(
            -(-max_local_samples // local_batch_size), num_samples // data_parallel.dp_size
        )
        # rank r of n gets the samples r, r + n, r + 2 n, ...
        local_indices = torch.arange(data_parallel.dp_rank, num_samples, data_parallel.dp_size)
        self.index_batches = local_indices.tensor_split(num_batches)
        self.make_batch = make_batch

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        return len(self.index_batches)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches in order."""
        return map(self.make_batch, self.index_batches)


def check_positive(name: str, value: int) -> None:
    """Raise an error if a value is not an integer of 1 or more."""
    if not isinstance(value, int) or value < 1:
        raise UsageError(
            f"{name}={value!r} is not a positive integer",
            ["1, 2, 3, ..."],
            f"use {name}=32",
            flag=f"--data.{name}=32",
        )


def check_divisible(batch_size: int, num_samples: int, data_parallel: DataParallelInfo) -> None:
    """Raise an error if the global batch exceeds the samples or does not divide over the ranks.

    Args:
        batch_size: samples of one optimizer step, over all ranks and accumulated batches.
        num_samples: samples of an epoch.
        data_parallel: data-parallel size, and the number of accumulated batches.
    """
    # raises an error if the value is no integer of 1 or more
    check_positive("batch_size", batch_size)
    if batch_size > num_samples:
        raise UsageError(
            f"batch_size={batch_size} is more than the {num_samples} training samples",
            [f"at most {num_samples}"],
            f"use batch_size={num_samples}",
            flag=f"--data.batch_size={num_samples}",
        )
    num_parts = data_parallel.dp_size * data_parallel.accumulate
    if batch_size % num_parts:
        lower_multiple = batch_size // num_parts * num_parts
        # 0 for a batch smaller than the number of parts
        nearest = lower_multiple or num_parts
        raise UsageError(
            f"batch_size={batch_size}, the samples of one optimizer step, does not divide into "
            f"{data_parallel.dp_size} ranks x {data_parallel.accumulate} accumulated batches = "
            f"{num_parts} equal parts",
            [size for size in (lower_multiple, lower_multiple + num_parts) if size],
            f"use batch_size={nearest}",
            flag=f"--data.batch_size={nearest}",
            label="nearest",
        )
