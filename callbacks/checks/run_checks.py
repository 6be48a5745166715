"""RunChecks: try validation, checkpointing and logged metrics before the first training step.

    setup                         checks that need arguments only
    check(trainer, module, batch) checks that need the network or data: after the strategy has
                                  placed the weights and a checkpoint is restored, before the
                                  sanity check

Any callback, module or datamodule may have a method `check`. It is called once a fit, on all ranks,
with the first validation batch on its device, or None if there is no batch. It may raise an error,
and must not change the state of training. Its changes of the module, the module's buffers and the
default random generators are undone afterwards.

A callback may also have a method `check_files(trainer, module)`. It is called before the data are
prepared, if the run is not resumed, and raises an error for a missing file.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, SpikeDetection
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from ravine.errors import RunError, UsageError
from ravine.lightning_compat import (
    attached_trainer,
    checkpoint_connector,
    combined_loader,
    load_batch,
    validation_loaders,
)
from ravine.strategies.checkpoint.atomic_io import (
    AtomicCheckpointIO,
    CheckpointError,
    check_serializable,
)
from ravine.strategies.checkpoint.plain_values import to_plain
from ravine.strategies.stock_callbacks import check_stock_callbacks

from ..base import find_callbacks
from ..checkpointing.batch_seeds import find_generators
from ..hook_overrides import restore_hook
from ..stock_callbacks.finetuning import (
    TRAINABLE_KEY,
    find_finetuning_callbacks,
    postpone_freezing,
    restore_freezing,
    save_trainable,
    unfreeze_params,
)
from ..stock_callbacks.gradient_accumulation import (
    apply_accumulation_factor,
    check_accumulation_factors,
    find_accumulation_scheduler,
)
from ..stock_callbacks.tuners import (
    disable_searches,
    enable_searches,
    restore_batch_size,
    save_batch_size,
)
from . import monitored_metrics
from .missing_validation import find_missing_validation
from .preserve_state import preserve_state, snapshot_value

SERIALIZABLE_VALUES = ("tensors", "numbers", "text", "lists", "dicts")


class RunChecks(Callback):
    """Call every `check(trainer, module, batch)` once, before the first training step.

    Callbacks of Ravine add it to a stock Trainer; it has no arguments. Example of a check:

        class Scores(L.Callback):
            def check(self, trainer, module, batch):
                if not hasattr(module, "score"):
                    raise UsageError("Scores: the module has no method score")
    """

    supports_accumulation_schedule = True

    def __init__(self) -> None:
        """Create the callback."""
        self._checks_pending = self._metrics_pending = False
        self._trainable_names: list[str] = []  # read from a checkpoint
        self._log: Any = None
        # how a notice becomes text; the command line adds what to type
        self.format_notice: Callable[[UsageError], str] = str
        self.has_printed_notice = False  # in this fit

    @property
    def log(self) -> Any:
        """The module's `log`, which Lightning sets on every callback."""
        return self._log

    @log.setter
    def log(self, log: Any) -> None:
        """Store `log`, and refuse a module without optimizer, and a run without its files.

        Lightning sets `log` before it prepares the data, which may take minutes. It requires
        `configure_optimizers` right after it sets `log`, and its error does not name OptimizerPlan.
        """
        self._log = log
        if isinstance(module := getattr(log, "__self__", None), L.LightningModule):
            trainer = attached_trainer(module)
            _check_has_optimizer(trainer, module)
            _check_files(trainer, module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check other callbacks, hyperparameters and `predict_step`, which needs no data."""
        self._checks_pending = self._metrics_pending = stage == "fit"
        self._trainable_names = []
        self.has_printed_notice = False
        check_stock_callbacks(trainer)
        if stage == "fit":
            postpone_freezing(trainer, pl_module)
            enable_searches(trainer)
            for callback in find_callbacks(trainer, SpikeDetection):
                # its load_state_dict uses this name
                callback.running = callback.running_mean  # pyright: ignore[reportAttributeAccessIssue]
            _check_hyperparameters(trainer, pl_module)
        elif stage == "predict":
            _check_predict_step(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move after a GradientAccumulationScheduler, which must get the trainer unchanged."""
        schedulers = [
            c
            for c in find_callbacks(trainer, Callback)
            if c is find_accumulation_scheduler(trainer)
        ]
        remaining = [
            c for c in find_callbacks(trainer, Callback) if c is not self and c not in schedulers
        ]
        trainer.callbacks = [*schedulers, self, *remaining]  # pyright: ignore[reportAttributeAccessIssue]
        unfreeze_params(pl_module, self._trainable_names)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the trainable parameters, if they change in a run, and a found batch size."""
        save_trainable(trainer, pl_module, checkpoint)
        save_batch_size(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore them; parameters are unfrozen again before the optimizers are created."""
        self._trainable_names = (
            checkpoint.get(TRAINABLE_KEY, []) if find_finetuning_callbacks(trainer) else []
        )
        if trainer.state.fn == "fit" and checkpoint.get("global_step"):  # else a file of a search
            disable_searches(trainer)
            restore_batch_size(trainer, pl_module, checkpoint)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply a GradientAccumulationScheduler's factor to Ravine's data loaders."""
        apply_accumulation_factor(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the trainer's accumulation and the patched methods."""
        restore_freezing(trainer)
        for callback in find_finetuning_callbacks(trainer):
            restore_hook(pl_module, "configure_model", callback)
        if find_accumulation_scheduler(trainer) is not None:
            trainer.accumulate_grad_batches = 1

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the checks before the sanity check, if there is one."""
        self._check_once(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the checks if there was no sanity check; then try validation, metrics and saving."""
        self._check_once(trainer, pl_module)
        check_accumulation_factors(trainer)
        apply_accumulation_factor(trainer)  # a resumed epoch has no on_train_epoch_start
        if self._metrics_pending and (
            monitored_metrics.find_monitored_metrics(trainer)
            or monitored_metrics.needs_validation_trial(trainer)
        ):
            raise_on_all_ranks(trainer, _find_validation_error(trainer, pl_module))
        if self._metrics_pending:
            raise_on_all_ranks(trainer, _find_save_error(trainer, pl_module))
            if (notice := find_missing_validation(trainer, pl_module)) is not None:
                pl_module.print(self.format_notice(notice))
                self.has_printed_notice = True
        self._metrics_pending = False

    def _check_once(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Call every `check(trainer, module, batch)` at the first call of a fit, on all ranks.

        An error on one rank is raised on all of them.
        """
        if not self._checks_pending:
            return
        self._checks_pending = False
        owners = [*find_callbacks(trainer, Callback), module, getattr(trainer, "datamodule", None)]
        # methods `check(trainer, module, batch)` of callbacks, module and datamodule
        checks = [check for owner in owners if (check := _find_check(owner)) is not None]
        if not checks:
            return
        check_error: Exception | None = None
        with preserve_state(trainer, module):
            try:
                # of the first validation loader; None if it cannot be read
                first_batch, *_ = get_first_validation_batches(trainer, module) or [None]
                for check in checks:
                    check(trainer, module, first_batch)
            except Exception as error:
                check_error = error
        raise_on_all_ranks(trainer, check_error)


def _check_has_optimizer(trainer: L.Trainer | None, module: L.LightningModule) -> None:
    """Raise UsageError for a fit without `configure_optimizers` and without OptimizerPlan."""
    from ..optimizers.plan import OptimizerPlan  # plan.py imports this file

    if trainer is None or trainer.state.fn != "fit" or find_callbacks(trainer, OptimizerPlan):
        return
    if is_overridden("training_step", module) and not is_overridden("configure_optimizers", module):
        name = type(module).__name__
        if not module.automatic_optimization:
            raise UsageError(
                f"{name} steps its own optimizers (manual optimization), and has no "
                "configure_optimizers",
                hint=f"return the optimizers from {name}.configure_optimizers",
            )
        raise UsageError(
            f"{name} has no configure_optimizers, and the trainer has no OptimizerPlan",
            hint="pass callbacks=[OptimizerPlan(torch.optim.AdamW)] to Trainer",
            flag="--optimizer=AdamW",
        )


def _check_files(trainer: L.Trainer | None, module: L.LightningModule) -> None:
    """Call `check_files(trainer, module)` of the callbacks that have it, for a fit that is new.

    A resumed fit needs no file but its checkpoint. A stock Trainer does not tell which it is, and
    is not checked here.
    """
    if trainer is None or trainer.state.fn != "fit":
        return
    if getattr(checkpoint_connector(trainer), "selected_path", "") is not None:
        return
    for callback in find_callbacks(trainer, Callback):
        if callable(check := getattr(callback, "check_files", None)):
            check(trainer, module)


def _find_validation_error(trainer: L.Trainer, module: L.LightningModule) -> Exception | None:
    """Return the error of the validation step on one batch, or of a metric that nothing logs."""
    with preserve_state(trainer, module):
        try:
            return monitored_metrics.find_missing_metric(
                trainer,
                module,
                lambda: get_first_validation_batches(trainer, module),
                lambda: get_first_training_batch(trainer, module),
            )
        except Exception as error:
            return error


def _find_save_error(trainer: L.Trainer, module: L.LightningModule) -> Exception | None:
    """Return an error for state of user-defined objects that no checkpoint file can hold.

    The objects are callbacks, module, datamodule and schedulers. Each is asked for its state as at
    a save, and is unchanged afterwards. An error of its own hook is ignored here: the hook may need
    values that only training sets.
    """
    if not _saves_checkpoints(trainer):
        return None
    data = getattr(trainer, "datamodule", None)
    owners = [
        owner
        for owner in (*find_callbacks(trainer, Callback), module, data)
        if _is_user_object(owner)  # its class is of no known package, such as Lightning
    ]
    # `preserve_state` restores the module only
    restores = [snapshot_value(vars(owner), {}) for owner in owners if isinstance(owner, Callback)]
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    try:
        with preserve_state(trainer, module):
            for owner in [*owners, *schedulers]:
                try:
                    state = _collect_saved_state(trainer, module, owner)
                except Exception:  # of the owner's own code
                    continue
                for key, value in state.items():
                    # raises CheckpointError, which names the value
                    check_serializable(value, f"{key} of {type(owner).__name__}")
    except CheckpointError as error:
        return UsageError(
            f"a checkpoint cannot be written: {error.problem}",
            SERIALIZABLE_VALUES,
            hint="convert it in state_dict or on_save_checkpoint",
        )
    finally:
        for restore in restores:
            restore()
    return None


def _collect_saved_state(
    trainer: L.Trainer, module: L.LightningModule, owner: Any
) -> dict[str, Any]:
    """Return the entries that an owner adds to a checkpoint, by `state_dict` and by its hook.

    The owner is a callback, module, datamodule or scheduler. Its `on_save_checkpoint` gets a
    checkpoint with the usual entries, and may add to them or replace them.
    """
    state = {} if owner is module else dict(owner.state_dict())  # a module's has only tensors
    if (hook := getattr(owner, "on_save_checkpoint", None)) is None:
        return state
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": L.__version__,
        "state_dict": dict(module.state_dict()),
        "hyper_parameters": dict(module.hparams),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    usual_entries = dict(checkpoint)  # to find the entries that the hook adds or replaces
    if isinstance(owner, Callback):
        hook(trainer, module, checkpoint)
    else:
        hook(checkpoint)
    return state | {
        key: value
        for key, value in checkpoint.items()
        if key not in usual_entries or value is not usual_entries[key]
    }


def _is_user_object(owner: Any) -> bool:
    """Whether the class of an object is of no known package."""
    return owner is not None and not f"{type(owner).__module__}.".startswith(
        monitored_metrics.KNOWN_PACKAGES
    )


def _saves_checkpoints(trainer: L.Trainer) -> bool:
    has_checkpointing = trainer.checkpoint_callbacks and not getattr(trainer, "fast_dev_run", False)
    return bool(has_checkpointing) and isinstance(
        trainer.strategy.checkpoint_io, AtomicCheckpointIO
    )


def add_run_checks(trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
    """Add a RunChecks to the trainer unless it has one; called in the `setup` of callbacks."""
    if not find_callbacks(trainer, RunChecks):
        checks = RunChecks()
        # Lightning iterates over the old list in this hook, so `setup` is called here
        trainer.callbacks = [checks, *find_callbacks(trainer, Callback)]  # pyright: ignore[reportAttributeAccessIssue]
        checks.setup(trainer, module, stage)


def raise_on_all_ranks(trainer: L.Trainer, error: Exception | None) -> None:
    """Raise on every rank if one rank has an error: the other ranks would wait for it."""
    if trainer.world_size > 1 and dist.is_initialized():
        all_arguments: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(all_arguments, None if error is None else _error_arguments(error))
        failures = [(rank, args) for rank, args in enumerate(all_arguments) if args is not None]
        if error is None and failures:
            rank, arguments = failures[0]
            problem = f"on rank {rank}: {arguments.pop('problem')}"
            raise UsageError(problem, **arguments)
    if error is not None:
        raise error


def _error_arguments(error: Exception) -> dict[str, Any]:
    """Return the arguments of a UsageError with the content of an error."""
    has_parts = isinstance(error, UsageError | RunError)
    return error.to_arguments() if has_parts else {"problem": str(error)}


def get_first_validation_batches(trainer: L.Trainer, module: L.LightningModule) -> list[Any] | None:
    """Return the first batch of each validation loader, on the device.

    Returns None without validation, and if the data can be read only once.
    """
    if not trainer.enable_validation:
        return None
    with validation_loaders(trainer, forget=True) as loaders:  # recreated later, with equal draws
        batches = [get_first_batch(loader) for loader in loaders]
    if not batches or any(batch is None for batch in batches):
        return None
    return [load_batch(trainer, module, batch) for batch in batches]


def get_first_training_batch(trainer: L.Trainer, module: L.LightningModule) -> Any:
    """Return the first training batch, on the device; None if the data can be read only once."""
    loader = combined_loader(trainer)
    if loader is None:
        return None
    batch = tree_map(get_first_batch, loader.iterables)
    if any(leaf is None for leaf in tree_leaves(batch)):
        return None
    return load_batch(trainer, module, batch)


def get_first_batch(loader: Any) -> Any:
    """Return the first batch of a loader without changing the loader's position.

    The generators of data set and sampler are restored too. Returns None for a loader that cannot
    be read without a change: an iterator, or a loader with its own state and no `peek`.
    """
    if callable(peek := getattr(loader, "peek", None)):  # a method of Ravine's own loaders
        return peek()
    if isinstance(loader, Iterator):
        return None  # it can be read only once
    if isinstance(loader, Stateful):
        return None
    if not isinstance(loader, DataLoader):  # any iterable, such as a list of batches
        return next(iter(copy.copy(loader)), None)
    if isinstance(loader.dataset, Iterator):
        return None
    # a copy with its own iterator, because the iterator owns persistent workers
    loader_copy: Any = copy.copy(loader)
    for name in ("_get_iterator", "_batch_seeds"):  # set by BatchSeeder for the original loader
        loader_copy.__dict__.pop(name, None)
    loader_copy.__dict__["_iterator"] = None
    # functions that restore the states of generators of data set, sampler and transforms
    restores = [
        snapshot_value(generator, {})
        for generator in find_generators(loader_copy, loader_copy.collate_fn)
    ]
    try:
        return next(iter(loader_copy), None)
    finally:
        if (iterator := loader_copy.__dict__["_iterator"]) is not None:
            iterator._shutdown_workers()
        for restore in restores:
            restore()


def _find_check(owner: Any) -> Any:
    """Return the owner's `check`; None for a method of this name with other parameters."""
    check = getattr(owner, "check", None)
    if not callable(check):
        return None
    try:
        inspect.signature(check).bind(None, None, None)
    except (TypeError, ValueError):
        return None
    return check


def _check_hyperparameters(trainer: L.Trainer, module: L.LightningModule) -> None:
    if not _saves_checkpoints(trainer):
        return
    for owner in (module, getattr(trainer, "datamodule", None)):
        check_serializable_hyperparameters(
            type(owner).__name__, dict(getattr(owner, "hparams", {}) or {})
        )


def check_serializable_hyperparameters(owner: str, hyperparameters: dict[str, Any]) -> None:
    """Raise UsageError for the first hyperparameter that no checkpoint can hold, with its key."""
    for key, value in hyperparameters.items():
        try:
            check_serializable(to_plain(value), str(key))
        except CheckpointError as error:
            raise UsageError(
                f"{owner}: a checkpoint cannot hold the hyperparameter: {error.problem}",
                ["paths", *SERIALIZABLE_VALUES],
                hint=f"use self.save_hyperparameters(ignore=[{str(key)!r}]), or pass it as text",
            ) from error


def _check_predict_step(module: L.LightningModule) -> None:
    """Raise UsageError if there is no `predict_step` and `forward` needs more than the batch.

    Without `predict_step`, Lightning calls `forward` with the batch alone.
    """
    if is_overridden("predict_step", module):
        return
    name = type(module).__name__
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError as error:
        can_generate = callable(getattr(module, "generate", None))
        raise UsageError(
            f"{name} has no predict_step, and its forward needs more than a batch ({error})",
            ["a module with predict_step(batch, batch_idx)"],
            hint=f"call {name}.generate()"
            if can_generate
            else f"define predict_step(batch, batch_idx) in {name}",
            flag="lightning generate --ckpt_path=last" if can_generate else "",
        ) from error
