"""Base of the datamodules: loaders for a trainer, provenance, checks, preparation per node.

    prepare_data   local rank 0 downloads and tokenizes, with all cores; the other ranks wait,
                   without a time limit
    setup          every rank gets the result: `exchange_prepared`

Lightning calls `prepare_data` on local rank 0 only and makes the other ranks wait at a barrier. An
error there, or Ctrl-C, is kept until `setup`, so that all ranks end with it.
"""

from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch.distributed as dist
from torch import Tensor

from ravine.errors import RunError, UsageError

from .loaders import DataParallelInfo, EvalLoader, ResumableLoader
from .samplers import EpochSampler


class BaseDataModule(L.LightningDataModule, metaclass=ABCMeta):
    """A datamodule whose loaders divide one global batch over the ranks of its trainer.

    `provenance` identifies the data used, for checkpoints: source, file, sha256.
    """

    batch_size: Any  # samples of one optimizer step, over all ranks and accumulated batches

    def __init__(self) -> None:
        """Start without data; a subclass reads them in `setup`."""
        super().__init__()
        self.provenance: dict[str, Any] = {}
        self.skips_validation = False  # whether a fit has no validation data
        # arguments with which a fit has validation data: {"val_fraction": 0.1}
        self.validation_arguments: dict[str, Any] = {}
        self._preparation: PreparationResult | None = None  # set between prepare_data and setup

    def make_train_loader(
        self,
        sampler: EpochSampler,
        make_batch: Callable[[Tensor], Any],
        num_samples: int,
        batch_size: int | None = None,
    ) -> ResumableLoader:
        """Return a training loader, which divides each batch over the ranks of the trainer.

        Args:
            sampler: draws the order of the samples in an epoch.
            make_batch: makes a batch from a tensor of sample indices.
            num_samples: samples of an epoch.
            batch_size: samples of one optimizer step over all ranks; by default `self.batch_size`.
        """
        trainer: Any = self.trainer
        # a loader whose position can be saved, and resumed on another number of ranks
        return ResumableLoader(
            sampler,
            make_batch,
            num_samples,
            self.batch_size if batch_size is None else batch_size,
            # rank, number of ranks, and micro-batches per optimizer step
            DataParallelInfo.from_trainer(trainer),
            # overfit_batches trains on the same few batches in every epoch
            repeat_first_epoch=bool(trainer and trainer.overfit_batches),
        )

    def make_eval_loader(
        self,
        make_batch: Callable[[Tensor], Any],
        num_samples: int,
        batch_size: int | None = None,
    ) -> EvalLoader:
        """Return an evaluation loader for the trainer's ranks; see `EvalLoader`."""
        return EvalLoader(
            make_batch,
            num_samples,
            self.batch_size if batch_size is None else batch_size,
            DataParallelInfo.from_trainer(self.trainer),
        )

    @abstractmethod
    def train_dataloader(self) -> ResumableLoader:
        """Return the training loader."""

    def test_dataloader(self) -> EvalLoader:
        """Return the validation loader, for data without a test split."""
        return self.val_dataloader()

    def prepare_for_all_ranks(self, prepare: Callable[[], Any]) -> None:
        """Call `prepare` in `prepare_data` of a distributed run, for all ranks of the node."""
        if is_distributed(self.trainer):
            self._preparation = PreparationResult.from_call(prepare)

    def get_prepared(self) -> Any:
        """Return in `setup` the value that local rank 0 prepared, or None.

        Collective in a distributed run: every rank calls it.
        """
        if not is_distributed(self.trainer):
            return None
        local_result, self._preparation = self._preparation, None
        return exchange_prepared(local_result, self.trainer)

    def skip_validation(self, **arguments: Any) -> None:
        """Run no validation, which avoids Lightning's warning about an empty loader.

        Args:
            arguments: arguments of the datamodule with which there is validation data.
        """
        self.validation_arguments = arguments
        trainer: Any = self.trainer
        if trainer is not None:
            self.skips_validation = True  # RunChecks prints it at the start of the run
            trainer.limit_val_batches = 0


def check_fraction(name: str, value: float, can_be_zero: bool = False) -> None:
    """Raise an error if a fraction is not between 0 and 1; 1 is excluded, 0 by default too."""
    if not 0 < value < 1 and not (can_be_zero and value == 0):
        raise UsageError(
            f"{name}={value} is not a fraction of the data",
            ["0, or a number between 0 and 1" if can_be_zero else "a number between 0 and 1"],
            f"use {name}=0.1",
            flag=f"--data.{name}=0.1",
        )


class PreparationResult(NamedTuple):
    """The result of a preparation as plain values, or the error that ended it."""

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def from_call(cls, fn: Callable[[], Any]) -> "PreparationResult":
        """Call `fn` and keep the value that it returns or the exception that it raises."""
        try:
            return cls(fn())
        except BaseException as error:  # Ctrl-C too: the other ranks wait for a result
            return cls(error=error)


def is_distributed(trainer: Any) -> bool:
    """Return whether the trainer has several ranks and their process group is initialized."""
    has_several_ranks = getattr(trainer, "world_size", 1) > 1
    return has_several_ranks and dist.is_available() and dist.is_initialized()


def exchange_prepared(local_result: PreparationResult | None, trainer: Any) -> Any:
    """Return the value prepared by local rank 0 of this node, or None if no rank prepared one.

    Collective: every rank calls it. Without a local rank 0 that prepared a value, a node gets the
    value of another node.

    Args:
        local_result: the value or the error of the preparation in this process; None on the ranks
            that prepare nothing.
        trainer: the trainer of this rank.

    Raises:
        PreparationError, InvalidDataError: on the other ranks, if the preparation failed. The rank
            that failed raises its own error.
    """
    local_error = None if local_result is None else local_result.error
    # a group of its own on the CPU: the objects need no GPU, and other collectives are not
    # disturbed
    group: Any = dist.new_group(backend="gloo")
    try:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        message = None
        if local_result is not None:
            # the error as texts, from which another rank raises it again
            message = local_result.value, _describe_error(local_error)
        dist.all_gather_object(gathered, (trainer.node_rank, message), group=group)
    except RuntimeError:  # another rank has ended, for example after Ctrl-C
        if local_error is not None:
            raise local_error from None
        raise
    finally:
        dist.destroy_process_group(group)
    if local_error is not None:
        raise local_error
    # (node, value, error as texts) of each rank that prepared something
    results = [(node, *message) for node, message in gathered if message is not None]
    for _, _, described_error in results:
        if described_error is not None:
            _raise_remote_error(*described_error)
    all_values = [value for _, value, _ in results]
    node_values = [value for node, value, _ in results if node == trainer.node_rank]
    return next(iter(node_values or all_values), None)


class PreparationError(RunError):
    """Local rank 0 failed to prepare the data."""


class InvalidDataError(UsageError):
    """Local rank 0 rejected the data; the problem and the hints are those of its error."""


def _describe_error(error: BaseException | None) -> tuple[str, dict[str, Any]] | None:
    """Return the category of an error and its parts, as plain values."""
    if error is None:
        return None
    if isinstance(error, KeyboardInterrupt):
        return "interrupt", {}
    if isinstance(error, UsageError | RunError):
        return "usage" if isinstance(error, UsageError) else "failed", error.to_arguments()
    text = str(error.args[0] if isinstance(error, LookupError) and error.args else error)
    problem = text or type(error).__name__
    return "failed", {"problem": problem, "hint": "see the output of local rank 0"}


def _raise_remote_error(category: str, fields: dict[str, Any]) -> None:
    if category == "interrupt":
        raise KeyboardInterrupt
    if category == "usage":
        raise InvalidDataError(**fields)
    problem = f"local rank 0 could not prepare the data: {fields['problem']}"
    raise PreparationError(**fields | {"problem": problem})
