"""Data loaders, fetchers and counters of Lightning's training loop."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_info

from .versions import (
    fast_loop_refusal,
    private,
    private_import,
    replace_method,
    restore_method,
    set_private,
)

# Attributes of a LightningModule that refer to the trainer; a copy of the module omits them.
# Reason: they are entries of the module's `__dict__`, among its own attributes.
# Upstream: pytorch/core/module.py
# Seen on: 2.5.6 to 2.6.6
MODULE_REFERENCES = ("_trainer", "_fabric")


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer of a module, or None for a module without one.

    Reason: `module.trainer` raises an error if there is no trainer, and returns a placeholder under
    Fabric. Public API alone.

    Upstream: pytorch/core/module.py
    Seen on: 2.5.6 to 2.6.6
    """
    if module.fabric is not None:
        return None
    try:
        return module.trainer
    except RuntimeError:
        return None


def combined_loader(trainer: L.Trainer) -> Any:
    """Return the CombinedLoader of the training data, or None before the data are set up.

    Reason: `trainer.train_dataloader` returns the loaders as the user has nested them, without
    their limits and the flat list.

    Upstream: pytorch/loops/fit_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(trainer.fit_loop, "_combined_loader")


def combined_mode(loader: Any) -> str:
    """Return how a CombinedLoader joins its loaders: min_size, max_size, ...

    Reason: the argument `mode` is kept under a private name only.

    Upstream: pytorch/utilities/combined_loader.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(loader, "_mode")


def combined_iterator(loader: Any) -> Any:
    """Return the current iterator over all loaders, or None.

    Reason: after a resume, the iterator of a single loader is replaced by one at its position.

    Upstream: pytorch/utilities/combined_loader.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(loader, "_iterator")


def data_fetcher(trainer: L.Trainer) -> Any:
    """Return the data fetcher, which takes batches from the training loaders, or None.

    Reason: it counts the batches and holds prefetched ones; it has no public name.

    Upstream: pytorch/loops/fetchers.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(trainer.fit_loop, "_data_fetcher")


def is_prefetching(fetcher: Any) -> bool:
    """Return whether a fetcher is Lightning's default one, which prefetches a batch.

    Reason: only this fetcher can start at a later batch. Others pass the iterator to the user.

    Upstream: pytorch/loops/fetchers.py
    Seen on: 2.5.6 to 2.6.6
    """
    kind = private_import("lightning.pytorch.loops.fetchers", "_PrefetchDataFetcher")
    return isinstance(fetcher, kind)


def should_accumulate(trainer: L.Trainer) -> bool:
    """Return whether the current micro-batch ends without an optimizer step.

    Reason: it depends on the accumulation, on the end of the epoch and on the strategy.
    `trainer.global_step` changes only after the step.

    Upstream: pytorch/loops/fit_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    return private(trainer.fit_loop, "_should_accumulate")()


def validation_follows(trainer: L.Trainer) -> bool:
    """Return whether a validation follows the micro-batch that ends now.

    Reason: a checkpoint is written after the validation of its step. The rule depends on seven
    arguments of the trainer, and only the loop implements all of it.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    fetcher = data_fetcher(trainer)
    assert fetcher is not None
    return private(trainer.fit_loop.epoch_loop, "_should_check_val_fx")(fetcher)


@contextmanager
def validation_loaders(trainer: L.Trainer, forget: bool = False) -> Iterator[list[Any]]:
    """Set up the validation loaders of a fit, and yield a flat list of them.

    Reason: the loaders are created at the first validation. A check before the first step needs
    them earlier, and must not change the run.

    Args:
        trainer: the trainer.
        forget: discard loaders that this call created, so that the loop creates them again. True
            for a check that reads batches, because an iterator may not start anew.

    Upstream: pytorch/loops/evaluation_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    # `private` reads a private attribute of Lightning, and raises an error if it does not exist
    was_missing = private(loop, "_combined_loader") is None
    last_reload_epoch = private(loop, "_last_val_dl_reload_epoch")
    loop.setup_data()  # creates the loaders only if they are missing or due to be reloaded
    combined = private(loop, "_combined_loader")
    try:
        yield [] if combined is None else combined.flattened
    finally:
        if forget and was_missing:
            set_private(loop, "_combined_loader", None)
            set_private(loop, "_last_val_dl_reload_epoch", last_reload_epoch)


def load_batch(trainer: Any, module: L.LightningModule, batch: Any) -> Any:
    """Convert a batch and move it to the device, as the training loop does before a step.

    Reason: the transfer hooks are called by a private method of the module, which includes those of
    the datamodule.

    Upstream: pytorch/core/module.py
    Seen on: 2.5.6 to 2.6.6
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = private(module, "_on_before_batch_transfer")(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def set_sampler_epoch(loader: Any, epoch: int) -> None:
    """Call `set_epoch` of a loader's samplers, if they have it.

    Reason: the loop calls it once an epoch, with the epoch of an interrupted run after a resume.

    Upstream: fabric/utilities/data.py
    Seen on: 2.5.6 to 2.6.6
    """
    private_import("lightning.fabric.utilities.data", "_set_sampler_epoch")(loader, epoch)


def restore_loader_states(trainer: L.Trainer) -> None:
    """Load the states of the training loaders that the loop has read from a checkpoint.

    Reason: the loop discards them after the end of an epoch, and if `configure_optimizers` reads
    the number of steps: https://github.com/Lightning-AI/pytorch-lightning/issues/20550

    Upstream: pytorch/loops/fit_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    loader, fit = combined_loader(trainer), trainer.fit_loop
    states = private(fit, "_combined_loader_states_to_load")
    if states and loader is not None:
        private(loader, "_load_state_dicts")(states)
        set_private(fit, "_combined_loader_states_to_load", [])
        iter(data_fetcher(trainer))


def after_resuming_at_epoch_end(trainer: L.Trainer) -> None:
    """Make the loop start a new epoch, because the restored one is complete.

    Reason: with these flags set, the loop skips hooks and counters of the new epoch. The property
    `restarting` of the fit loop cannot be set to False in a run with `max_steps` alone.

    Upstream: pytorch/loops/fit_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    set_private(trainer.fit_loop, "_restarting", False)
    set_private(trainer.fit_loop, "_resuming_from_checkpoint", False)
    trainer.fit_loop.epoch_loop.restarting = False


def after_resuming_within_epoch(trainer: L.Trainer) -> None:
    """Make the loop continue after a restored micro-batch.

    Reason: as for `after_resuming_at_epoch_end`. The epoch has begun already, so the flag
    `_resuming_from_checkpoint` is kept.

    Upstream: pytorch/loops/fit_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    set_private(trainer.fit_loop, "_restarting", False)
    trainer.fit_loop.epoch_loop.restarting = False  # also of the inner loops


def skip_next_validation(trainer: L.Trainer, skips: bool) -> None:
    """Set whether the next validation that is due is skipped.

    Reason: a resume from a checkpoint written after a validation must not run it again.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    set_private(trainer.fit_loop.epoch_loop, "_skip_next_val", skips)


def set_before_fetch(trainer: L.Trainer, function: Callable[[], None]) -> None:
    """Call a function before each training batch is taken from the loaders.

    Reason: other loaders than torch's draw random numbers while a batch is taken. No public hook is
    called at that moment.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    loop = trainer.fit_loop.epoch_loop
    # `private` reads a private attribute of Lightning, and raises an error if it does not exist
    original_method = private(type(loop), "_on_before_fetch")

    def before_fetch() -> None:
        function()
        original_method(loop)

    # sets the attribute of this object; the class stays as it is
    replace_method(loop, "_on_before_fetch", before_fetch)


def restore_before_fetch(trainer: L.Trainer) -> None:
    """Undo `set_before_fetch`.

    Reason: the loop exists longer than the fit.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    restore_method(trainer.fit_loop.epoch_loop, "_on_before_fetch")


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Skip the broadcast of a SIGTERM in the loop, in versions that have it.

    Reason: it is a collective in each micro-batch, and GracefulStop combines the signals of all
    ranks twice a second.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        replace_method(loop, "_broadcast_sigterm_tensor", lambda: None)


def restore_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Undo `skip_sigterm_broadcast`.

    Reason: the loop exists longer than the fit.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    restore_method(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")


def install_fast_loop(
    trainer: Any, frees_early: Callable[[Any], bool], free_gradients: Callable[[Any], None]
) -> bool:
    """Replace the trainer's epoch loop by the fast one, on the tested versions.

    Reason: in each step Lightning calls some twenty hooks of every callback, the module, the
    strategy and a profiler; see fast_loop.py. `RAVINE_FAST_LOOP=0` keeps Lightning's loop.

    Args:
        trainer: a trainer that has not run yet.
        frees_early: whether old gradients may be freed before the forward pass.
        free_gradients: sets the gradients of an optimizer's parameters to None.

    Returns:
        Whether the loop was replaced. If not, the reason is logged in one line.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    # a text if Lightning's version is not tested or the variable is 0, else None
    if (refusal := fast_loop_refusal()) is not None:
        rank_zero_info(f"training uses Lightning's own loop, not the fast one: {refusal}")
        return False
    from .fast_loop import FastEpochLoop

    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = FastEpochLoop(
        trainer, loop.min_steps, loop.max_steps, frees_early, free_gradients
    )
    return True


class _WithoutProfiling(PassThroughProfiler):
    """A profiler that does nothing, without a generator for each hook."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore
        """Do nothing around the hook."""
        return nullcontext()


def without_profiling(trainer: Any) -> None:
    """Replace a profiler that measures nothing by one without overhead.

    Reason: Lightning's profiler creates a generator for each hook. Public API alone.

    Upstream: pytorch/profilers/base.py
    Seen on: 2.5.6 to 2.6.6
    """
    if type(trainer.profiler) is PassThroughProfiler:
        trainer.profiler = _WithoutProfiling()


def count_optimizer_step(trainer: L.Trainer) -> None:
    """Count an optimizer step beside the one that the loop counts in each batch.

    Reason: a module may take several optimizer steps in one batch. `trainer.global_step`, max_steps
    and the steps of log lines count the steps, and the loop adds one for each batch.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.automatic_optimization.optim_progress.optimizer.step
    progress.increment_ready()
    progress.increment_completed()
    # the step of log lines
    set_private(loop, "_batches_that_stepped", private(loop, "_batches_that_stepped") + 1)
