"""Data parallel: rank and size for data loaders, and DDP with less memory and fewer messages.

`DataParallelInfo` holds the data-parallel rank and size, and the gradient accumulation, as every
data loader uses them. `DataParallelStrategy` is Lightning's DDPStrategy with two changes:

    gradients   views of the buckets in which they are averaged      W bytes less on each rank
    buffers     BatchNorm statistics and other changing buffers      never sent: constant tables

The strategy is registered under Lightning's names (`ddp`, `ddp_find_unused_parameters_true`, ...),
in place of DDPStrategy. A DDPStrategy that a script creates itself is not changed.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.lightning_compat import ddp_options

from .buffer_sync import (
    NORM_STATISTICS,
    buffer_fingerprint,
    find_changed_buffers,
    is_power_of_two,
)

# from an error message of torch's DDP
UNFINISHED_REDUCTION_TEXT = "Expected to have finished reduction in the prior iteration"


class DataParallelInfo(NamedTuple):
    """Data-parallel rank and size, and micro-batches per optimizer step; default: one process.

    Example:

        info = DataParallelInfo.from_trainer(trainer)
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
    has_scheduler = any(
        isinstance(callback, GradientAccumulationScheduler) for callback in callbacks
    )
    # the callback RunChecks has this attribute
    is_supported = any(
        getattr(callback, "supports_accumulation_schedule", False) for callback in callbacks
    )
    if has_scheduler and not is_supported:
        raise UsageError(
            "GradientAccumulationScheduler would make an optimizer step larger than batch_size, "
            "which is the number of samples per optimizer step",
            ["ravine.Trainer, or the callback ravine.callbacks.RunChecks"],
            "add RunChecks() to Trainer(callbacks=...)",
        )


class DataParallelStrategy(DDPStrategy):
    """DDPStrategy with `gradient_as_bucket_view`, which broadcasts only changing buffers.

    At the start all buffers equal those of rank 0. After the batches 1, 2, 4, 8, ... and at the
    start of each epoch the ranks check which buffers have changed. From then on these are broadcast
    before each forward pass, as DDP does with all buffers. BatchNorm statistics are broadcast from
    the start.

    Args:
        gradient_as_bucket_view: as in torch's DistributedDataParallel; set it to false if other
            code keeps a reference to a gradient from one step to the next.
        kwargs: arguments of DDPStrategy; with `broadcast_buffers=False` no buffer is sent.
    """

    def __init__(self, gradient_as_bucket_view: bool = True, **kwargs: Any) -> None:
        """Pass the arguments to DDPStrategy."""
        super().__init__(**{"gradient_as_bucket_view": gradient_as_bucket_view}, **kwargs)
        self._num_batches = 0  # in this run
        # fingerprints of buffers that have not changed so far
        self._unchanged_fingerprints: dict[str, tuple[Any, ...]] = {}
        self._num_optimizer_steps = 0  # in this run

    def configure_ddp(self) -> None:
        """Wrap the module in DDP, and exclude unchanged buffers from the broadcast."""
        super().configure_ddp()
        self._num_batches, self._num_optimizer_steps, self._unchanged_fingerprints = 0, 0, {}
        if not self._ddp_module.will_sync_module_buffers():
            return
        for name, buffer in self._ddp_module.module.named_buffers():
            if name.rpartition(".")[2] not in NORM_STATISTICS:
                self._unchanged_fingerprints[name] = buffer_fingerprint(buffer)
        self._ignore_buffers(set(self._unchanged_fingerprints))

    @property
    def _ddp_module(self) -> DistributedDataParallel:
        assert isinstance(self.model, DistributedDataParallel)
        return self.model

    def _ignore_buffers(self, names: set[str]) -> None:
        """Set the names of buffers that DDP ignores; DDP reads them before each broadcast."""
        ddp: Any = self._ddp_module
        ddp.parameters_to_ignore = (
            set(ddp.parameters_to_ignore) - set(self._unchanged_fingerprints) | names
        )
        ddp._assign_modules_buffers()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check for changed buffers before the batches 1, 2, 4, 8, ... and at each epoch start."""
        super().on_train_batch_start(batch, batch_idx)
        number, self._num_batches = self._num_batches, self._num_batches + 1
        if (
            self._unchanged_fingerprints
            and number > 0
            and (is_power_of_two(number) or batch_idx == 0)
        ):
            self._update_changed_buffers()

    def _update_changed_buffers(self) -> None:
        buffers = dict(self._ddp_module.module.named_buffers())
        changed = find_changed_buffers(self._unchanged_fingerprints, buffers, self.root_device)
        if changed:
            self._ignore_buffers(set(self._unchanged_fingerprints) - set(changed))
            for name in changed:
                del self._unchanged_fingerprints[name]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, and turn DDP's error for unreached parameters into a UsageError.

        Raises:
            UsageError: the previous backward pass did not reach all trainable parameters.
        """
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError as error:
            # a part of DDP's message about gradients that did not arrive
            if UNFINISHED_REDUCTION_TEXT not in str(error):
                raise
            raise UsageError(
                f"{type(self.lightning_module).__name__}: the loss does not depend on "
                # torch's text has indices of the parameters; the message has their names
                f"{self._unreached_param_names(str(error))}, and ddp waits for all gradients",
                ["losses that depend on all trainable parameters"],
                'use Trainer(strategy="ddp_find_unused_parameters_true")',
                flag="--trainer.strategy=ddp_find_unused_parameters_true",
            ) from error

    def _unreached_param_names(self, text: str) -> str:
        """Return the names of the parameters whose indices are in an error message of DDP."""
        match = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
        trainable_names = [
            name for name, p in self._ddp_module.module.named_parameters() if p.requires_grad
        ]
        indices = [int(index) for index in match[1].split()] if match else []
        names = [trainable_names[index] for index in indices if index < len(trainable_names)]
        rest_text = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{rest_text}" if names else "some trainable parameters"

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step; after the steps 1, 2, 4, 8, ... check that bucket views are not misused."""
        output = super().optimizer_step(optimizer, *args, **kwargs)
        self._num_optimizer_steps += 1
        if (
            self._num_optimizer_steps & (self._num_optimizer_steps - 1) == 0
            and ddp_options(self)["gradient_as_bucket_view"]
        ):
            check_gradients_in_buckets(optimizer)
            if self._num_optimizer_steps == 1:
                check_no_gradient_in_state(optimizer)
        return output


def check_gradients_in_buckets(optimizer: Any) -> None:
    """Raise UsageError if `p.grad.data = new` has replaced the memory of a bucket view.

    With `gradient_as_bucket_view=True` a gradient is a view of a bucket, the flat tensor that DDP
    all-reduces. DDP would reduce the bucket, and the gradient would not get the result. It is
    called after the steps 1, 2, 4, 8, and so on.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        gradient = parameter.grad
        # `_base` is None for a gradient that is no view, e.g. after `p.grad = new`
        if gradient is None or gradient.layout != torch.strided or gradient._base is None:
            continue
        # `_base` is the bucket: a view has the storage of its base
        if gradient.untyped_storage().data_ptr() != gradient._base.untyped_storage().data_ptr():
            raise UsageError(
                f"`p.grad.data = new` for a parameter of shape {tuple(parameter.shape)} replaces "
                "the memory of a gradient, which ddp keeps in a bucket",
                ["p.grad.copy_(new)", "p.grad = new"],
                "use p.grad.copy_(new), or DataParallelStrategy(gradient_as_bucket_view=False)",
                flag=(
                    "--trainer.strategy=DataParallelStrategy "
                    "--trainer.strategy.gradient_as_bucket_view=false"
                ),
            )


def check_no_gradient_in_state(optimizer: Any) -> None:
    """Raise UsageError if an optimizer state is a gradient itself instead of a copy.

    The next backward pass overwrites a gradient that is a view of a bucket.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: Any = getattr(optimizer, "state", None)
    if not isinstance(states, Mapping):  # an optimizer that is not torch's class
        return
    for parameter in parameters:
        if parameter.grad is None or parameter.grad.layout != torch.strided:
            continue
        # with a bucket view this is the address of the bucket
        gradient_address = parameter.grad.untyped_storage().data_ptr()
        state = states.get(parameter)
        if not isinstance(state, Mapping):
            continue
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                continue
            if value.numel() and value.untyped_storage().data_ptr() == gradient_address:
                raise UsageError(
                    f"{type(optimizer).__name__} keeps a gradient as its state {name!r}, and ddp "
                    "overwrites gradients in place",
                    ["states with memory of their own"],
                    "use DataParallelStrategy(gradient_as_bucket_view=False)",
                    flag=(
                        "--trainer.strategy=DataParallelStrategy "
                        "--trainer.strategy.gradient_as_bucket_view=false"
                    ),
                )


def register_ddp_names() -> None:
    """Register DataParallelStrategy under each name of Lightning's DDPStrategy."""
    for name, entry in list(StrategyRegistry.items()):
        if entry["strategy"] is DDPStrategy:
            StrategyRegistry.register(
                name,
                DataParallelStrategy,
                entry["description"],
                override=True,
                **entry["init_params"],
            )


register_ddp_names()
