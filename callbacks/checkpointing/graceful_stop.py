"""GracefulStop: save a checkpoint at SIGINT, SIGTERM or SIGUSR1 and stop after an optimizer step.

    first signal   the handler sets a flag -> all ranks agree -> checkpoint -> SignalInterrupt
    second signal  SignalInterrupt at once; checkpoints that are already written stay complete

Lightning broadcasts a flag at every micro-batch, from rank 0 only, and ends with status 0 and no
checkpoint. Here all ranks combine their flags about twice a second, in a process group on the CPU.
A signal to any rank stops all ranks.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from ravine.lightning_compat import (
    after_registering_signals,
    last_saved,
    log_train_step,
    original_handlers,
    restore_signal_registration,
    restore_sigterm_broadcast,
    should_accumulate,
    skip_sigterm_broadcast,
)
from ravine.strategies.checkpoint.saving import (
    defer_saving_hooks,
    restore_saving_hooks,
    save_on_all_ranks,
    weights_are_finite,
)

SYNC_INTERVAL_S = 0.5  # seconds; the ranks agree on the number of steps in that time


class SignalInterrupt(SystemExit):
    """Raised when a signal ends a run; `code` is 130 (SIGINT), 143 (SIGTERM) or 138 (SIGUSR1).

    It is a SystemExit: a plain script ends with `code` as its exit status and without a traceback.
    The command line returns `code`. `checkpoint` is the path of the file written, or None.
    """

    def __init__(self, signum: int, checkpoint: str | None = None) -> None:
        """Set the exit status to 128 + signum, as shells report a process ended by a signal."""
        super().__init__(128 + signum)
        self.signum = signum
        self.checkpoint = checkpoint


class GracefulStop(Callback):
    """Stop at a signal with a checkpoint from which ExactResume continues bit for bit.

    During a validation a single process stops after the current batch, and a resume runs the
    validation again; several ranks complete it first. Outside of training the run stops at once.
    """

    def __init__(self) -> None:
        """Create the callback."""
        self._signum = 0  # number of the received signal; 0 if none
        self._training = False
        self._no_checkpoint_note = ""  # of the message at a signal outside of training
        self._previous_handlers: dict[int, Any] = {}
        # process group in which several ranks combine their signals; None in a single process
        self._group: Any = None
        self._next_sync_step, self._last_sync_step, self._last_sync_time = 0, 0, 0.0
        # of the first weight after the last step; another value shows replaced weights
        self._weight_version: tuple[int, int] | None = None
        self._pid = 0  # of the main process; data-loader workers inherit the handlers
        self._is_rank_zero = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install the signal handlers, and move this callback to the end of the trainer's list.

        There it acts after the other callbacks, so that its checkpoint has their changes.
        """
        trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]  # type: ignore
        # number of the signal received, 0 for none; process group; process that handles signals,
        # because workers of a data loader inherit the handlers
        self._signum, self._group, self._pid = 0, None, os.getpid()
        # With several ranks, the step at which they next tell each other of a signal. A signal may
        # reach one rank only.
        self._next_sync_step, self._last_sync_time = 0, 0.0
        # text of the message at a stop
        self._no_checkpoint_note = (
            " before the first step: nothing was saved" if stage == "fit" else ""
        )
        self._is_rank_zero = trainer.is_global_zero
        # this callback then runs after the module's own hooks, which may change weights
        defer_saving_hooks(trainer, pl_module, self)
        if stage == "fit" and trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # on the CPU: no wait for a GPU
        if threading.current_thread() is not threading.main_thread():
            return  # Python runs signal handlers only in the main thread

        # at the start of a run Lightning sets its own handlers, and then calls this function
        def reinstall_handlers() -> None:
            self._install_handlers(trainer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # cli/main.py blocks it

        after_registering_signals(trainer, reinstall_handlers)
        self._install_handlers(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the start of training: from now on a signal saves a checkpoint."""
        self._training, self._weight_version = True, _first_weight_version(pl_module)
        skip_sigterm_broadcast(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Stop at the end of an optimizer step if a signal was received."""
        self._weight_version = _first_weight_version(pl_module)
        if should_accumulate(trainer):
            return
        if self._group is not None:
            self._sync_signals(trainer.global_step)
        if self._signum and (self._group is None or self._next_sync_step < 0):
            self._save_and_stop(trainer, is_step_logged=False)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Stop during a validation, unless a callback has replaced the weights for it."""
        if not (self._signum and self._training) or self._group is not None:
            return
        if not should_accumulate(trainer) and self._weight_version == _first_weight_version(
            pl_module
        ):
            self._save_and_stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the end of training: a signal now saves nothing."""
        self._training, self._no_checkpoint_note = False, " after the last step"

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the previous handlers, also among those that Lightning sets afterwards."""
        self._restore_handlers(trainer)
        original_handlers(trainer).update(self._previous_handlers)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous handlers; raise SignalInterrupt for a signal after the last step."""
        self._restore_handlers(trainer)
        restore_saving_hooks(pl_module, self)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._signum:
            raise SignalInterrupt(self._signum)

    def _handle_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # in a worker of a data loader: the main process decides
        if self._signum or not self._training:
            signal.signal(signum, signal.SIG_DFL)  # a third signal needs no Python handler
            if self._is_rank_zero:
                note = " at once" if self._signum else self._no_checkpoint_note
                os.write(2, f"\nstopped by {signal.Signals(signum).name}{note}\n".encode())
            raise SignalInterrupt(signum)
        self._signum = signum
        self._announce_stop()

    def _announce_stop(self) -> None:
        """Print on rank 0 that the run will stop; Ctrl-C in a terminal reaches all ranks."""
        if self._is_rank_zero:
            text = "\nstopping after this step with a checkpoint; a second signal stops at once\n"
            os.write(2, text.encode())  # print is not reentrant

    def _install_handlers(self, trainer: L.Trainer) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            previous = signal.signal(signum, self._handle_signal)
            self._previous_handlers.setdefault(signum, previous)

    def _restore_handlers(self, trainer: L.Trainer) -> None:
        self._training = False
        restore_signal_registration(trainer)
        restore_sigterm_broadcast(trainer)
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._previous_handlers.items():
                signal.signal(signum, handler)

    def _sync_signals(self, step: int) -> None:
        """Combine the signals of all ranks, and agree on the step of the next all-reduce."""
        if step < self._next_sync_step:
            return
        current_time = time.monotonic()
        rate = (step - self._last_sync_step) / (
            current_time - self._last_sync_time
        )  # steps per second
        wait = min(max(1, int(rate * SYNC_INTERVAL_S)), 1000) if self._last_sync_time else 1
        message = torch.tensor([self._signum, -wait])
        dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        if message[0] and not self._signum:  # another rank has received it
            self._announce_stop()
        self._signum, wait = int(message[0]), -int(message[1])
        self._last_sync_step, self._last_sync_time = step, current_time
        self._next_sync_step = -1 if self._signum else step + wait

    def _save_and_stop(self, trainer: L.Trainer, is_step_logged: bool = True) -> None:
        """Save a checkpoint unless the step has one, then raise SignalInterrupt; on all ranks.

        Args:
            trainer: the trainer to stop.
            is_step_logged: whether the loggers have the metrics of the step; else they get them.
        """
        step, saved_path = trainer.global_step, None
        for callback in trainer.checkpoint_callbacks:
            saved_step, path = last_saved(callback)  # of its last file; the step may be None
            if saved_step == step:  # it has saved this step already
                saved_path = path
        is_dry_run = getattr(trainer, "fast_dev_run", False)
        if saved_path is None and not is_dry_run and weights_are_finite(trainer):
            # the folder of the first checkpoint callback that has one
            folders = [getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks]
            root = os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
            folder = next(filter(None, folders), root)
            saved_path = os.path.join(trainer.strategy.broadcast(folder), f"step={step:06d}.ckpt")
            save_on_all_ranks(trainer, saved_path)  # an error of the writer is raised on all
        if not is_step_logged:
            log_train_step(trainer)
        interrupt = SignalInterrupt(self._signum, saved_path)
        name = signal.Signals(self._signum).name
        hint = _resume_hint(trainer, saved_path) if saved_path else "nothing was saved"
        rank_zero_info(f"stopped by {name} at step {step}; {hint}")
        self._signum = 0  # the signal is handled: `teardown` raises nothing
        environment = getattr(trainer.strategy, "cluster_environment", None)
        # LightningEnvironment: rank 0 has started the other processes of its machine itself
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            interrupt.code = 0  # the launcher of rank 0 kills all processes if one fails
        raise interrupt


def _resume_hint(trainer: L.Trainer, checkpoint: str) -> str:
    """Return how to resume: the command of a command line, else the argument of `Trainer.fit`."""
    make_command = getattr(trainer, "resume_command", None)
    if make_command is not None:
        return f"resume: {make_command(checkpoint)}"
    return f"resume with ckpt_path={checkpoint!r}"


def _first_weight_version(module: L.LightningModule) -> tuple[int, int] | None:
    """Return data pointer and version of the first trainable weight; any change alters them."""
    weight = next((p for p in module.parameters() if p.requires_grad), None)
    if weight is None or isinstance(weight, DTensor):
        return None
    return weight.data_ptr(), weight._version
