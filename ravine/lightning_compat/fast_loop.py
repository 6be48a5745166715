"""FastEpochLoop: a training loop that calls only the implemented hooks in each step.

In each step Lightning calls some twenty hooks of every callback, the module, the strategy and a
profiler, and reads all logged values. For a tiny network that takes twice the time of the step:
360 us, and 370 us more for one `self.log`. Here the implemented hooks are listed once an epoch and
called in Lightning's order. A run with manual optimization, a profiler, a gradient scaler and the
like uses Lightning's own methods, which the classes below inherit.

Upstream: pytorch/loops/training_epoch_loop.py
Seen on: 2.5.6 to 2.6.6
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from ravine.errors import RunError

from .loops import load_batch
from .strategies import ModelParallelAccess

STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class FastOptimization(_AutomaticOptimization):
    """Forward, backward and step with the hooks that a FastEpochLoop has listed, in their order.

    Reason: Lightning's class calls each hook of each callback through the profiler.

    Upstream: pytorch/loops/optimization/automatic.py
    Seen on: 2.5.6 to 2.6.6
    """

    def __init__(self, trainer: L.Trainer, loop: "FastEpochLoop") -> None:
        """Store the loop's functions; the loop sets `is_fast` at the start of each epoch."""
        super().__init__(trainer)
        self.call, self.free_gradients = loop.call, loop.free_gradients
        self.is_fast = self.frees_gradients = False  # set by the loop for each epoch

    def _training_step(self, kwargs: OrderedDict) -> ClosureResult:
        """Compute the loss of a micro-batch: called by Lightning's closure, before backward.

        Args:
            kwargs: the arguments of the module's `training_step`, in order.
        """
        # is_fast: whether this epoch uses only features that the fast loop supports
        if not self.is_fast:
            return super()._training_step(kwargs)
        trainer = self.trainer
        # `self.log` reads the hook's name here. The `__setattr__` of nn.Module would take 3 us.
        module_attributes = trainer.lightning_module.__dict__
        module_attributes["_current_fx_name"] = "training_step"
        output = trainer.strategy.training_step(*kwargs.values())
        module_attributes["_current_fx_name"] = None
        if output is None and trainer.world_size > 1:
            raise RunError(
                "training_step returned None, but a rank cannot skip a step alone",
                "a loss on every rank",
                "return a loss multiplied by 0",
            )
        if isinstance(output, Tensor) and trainer.accumulate_grad_batches == 1:
            return ClosureResult(output)  # a division by one would add a node to the graph
        return ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)

    def _make_backward_fn(self, optimizer: Optimizer) -> Callable[[Tensor], None] | None:
        """Return the function that Lightning's closure calls with the loss: backward and hooks."""
        if not self.is_fast or self._skip_backward:
            return super()._make_backward_fn(optimizer)
        strategy, module = self.trainer.strategy, self.trainer.lightning_module
        # only a strategy that shards the model has a context for backward
        is_model_parallel = isinstance(strategy, ModelParallelAccess)
        backward_context = strategy.around_backward if is_model_parallel else nullcontext

        def backward(loss: Tensor) -> None:
            strategy.pre_backward(loss)
            # calls the implemented hooks of callbacks and module
            self.call("on_before_backward", loss)
            with backward_context():
                strategy.precision_plugin.backward(loss, module, optimizer)
            self.call("on_after_backward")
            strategy.post_backward(loss.detach())

        return backward

    def _on_before_zero_grad(self, optimizer: Optimizer) -> None:
        if not self.is_fast:
            return super()._on_before_zero_grad(optimizer)
        progress = self.optim_progress.optimizer.zero_grad
        progress.increment_ready()
        self.call("on_before_zero_grad", optimizer)
        progress.increment_started()

    def _optimizer_zero_grad(self, batch_idx: int, optimizer: Optimizer) -> None:
        if not self.is_fast:
            return super()._optimizer_zero_grad(batch_idx, optimizer)
        trainer = self.trainer
        if self.frees_gradients:  # neither module nor optimizer overrides zero_grad
            self.free_gradients(optimizer)
        else:
            module, epoch = trainer.lightning_module, trainer.current_epoch
            module.optimizer_zero_grad(epoch, batch_idx, optimizer)
        self.optim_progress.optimizer.zero_grad.increment_completed()

    def _optimizer_step(self, batch_idx: int, closure: Callable[[], Tensor | None]) -> None:
        if not self.is_fast:
            return super()._optimizer_step(batch_idx, closure)
        trainer, progress = self.trainer, self.optim_progress.optimizer.step
        progress.increment_ready()
        trainer.lightning_module.optimizer_step(
            trainer.current_epoch, batch_idx, trainer.strategy._lightning_optimizers[0], closure
        )
        progress.increment_completed()


class FastEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, whose steps call only the hooks that are implemented.

    Reason: see the docstring of this file. `is_fast` is true in an epoch that uses the fast loop.

    Upstream: pytorch/loops/training_epoch_loop.py
    Seen on: 2.5.6 to 2.6.6
    """

    def __init__(
        self,
        trainer: L.Trainer,
        min_steps: int | None,
        max_steps: int,
        frees_early: Callable[[Any], bool],
        free_gradients: Callable[[Any], None],
    ) -> None:
        """Prepare the loop; `install_fast_loop` describes the arguments."""
        super().__init__(trainer, min_steps, max_steps)
        self.frees_early, self.free_gradients = frees_early, free_gradients
        self.is_fast = False
        self.hooks: dict[str, list[Callable[..., Any]]] = {}
        self.logged_metrics: dict[str, tuple[Any, dict]] = {}  # metric and options by name
        self.automatic_optimization: FastOptimization = FastOptimization(trainer, self)

    @property
    def global_step(self) -> int:
        """Optimizer steps so far; read a dozen times in each step."""
        if self.is_fast:
            return self.automatic_optimization.optim_progress.optimizer.step.total.completed
        return super().global_step

    def run(self, data_fetcher: _DataFetcher) -> None:
        """Run an epoch, with a short `self.log` and a direct call of the clipping hook.

        Lightning's fit loop calls this once an epoch. What cannot change within an epoch is found
        here once.
        """
        trainer = self.trainer
        module, precision = trainer.lightning_module, trainer.precision_plugin
        self.is_fast = self.automatic_optimization.is_fast = self._can_be_fast(data_fetcher)
        if not self.is_fast:
            return super().run(data_fetcher)
        # whether old gradients may be freed before the forward pass
        self.automatic_optimization.frees_gradients = self.frees_early(trainer)
        # STEP: the names of the hooks of a step. Only implemented ones are called.
        self.hooks = {name: implemented_hooks(name, trainer) for name in STEP}
        # whether `training_step` has an argument batch_idx
        self.step_takes_index = "batch_idx" in self._build_kwargs(OrderedDict(), None, 0)
        self.moves_batches = self._moves_batches()
        self.has_validation = trainer.enable_validation
        overrides_clipping = is_overridden("configure_gradient_clipping", module)
        self.calls_clipping_hook = overrides_clipping or trainer.gradient_clip_val is not None
        self.logged_metrics.clear()
        # Entries of `__dict__` hide the methods of the class, only until the end of the epoch.
        replaces_log = type(module).log is L.LightningModule.log  # not overridden by the user
        if replaces_log:
            module.__dict__["log"] = MethodType(log_fast, module)
        # Lightning calls it before the optimizer's step, for hooks and gradient clipping
        precision.__dict__["_after_closure"] = self._after_closure
        try:
            super().run(data_fetcher)
        finally:
            precision.__dict__.pop("_after_closure")
            if replaces_log:
                module.__dict__.pop("log")

    def _can_be_fast(self, fetcher: _DataFetcher) -> bool:
        """Return whether this run needs only features that the fast loop supports.

        Methods are compared with Lightning's: a subclass that overrides one must be called.
        """
        trainer: Any = self.trainer
        module = trainer.lightning_module
        precision, strategy = type(trainer.precision_plugin), type(trainer.strategy)  # classes
        return (
            module.automatic_optimization
            and isinstance(trainer.profiler, PassThroughProfiler)
            and not isinstance(fetcher, _DataLoaderIterDataFetcher)
            and not is_overridden("on_train_batch_start", module)  # which may end the epoch
            # no loss scaling of float16
            and getattr(trainer.precision_plugin, "scaler", None) is None
            and precision.pre_backward in (Precision.pre_backward, MixedPrecision.pre_backward)
            and precision.post_backward is Precision.post_backward
            and precision._after_closure is Precision._after_closure
            and strategy.backward in (Strategy.backward, ModelParallelAccess.backward)
            and not trainer.strategy.handles_gradient_accumulation
        )

    def _moves_batches(self) -> bool:
        """Return whether a batch is moved or changed between the loader and the step."""
        trainer: Any = self.trainer
        return (
            trainer.strategy.root_device.type != "cpu"
            or type(trainer.precision_plugin).convert_input is not Precision.convert_input
            or any(is_overridden(hook, trainer.lightning_module) for hook in TRANSFER)
            or any(is_overridden(hook, trainer.datamodule) for hook in TRANSFER)
        )

    def call(self, name: str, *args: Any) -> None:
        """Call the hooks of this name, callbacks first; `self.log` reads the name."""
        if hooks := self.hooks[name]:
            module_attributes = self.trainer.lightning_module.__dict__
            outer_name = module_attributes["_current_fx_name"]
            module_attributes["_current_fx_name"] = name
            for hook in hooks:
                hook(*args)
            module_attributes["_current_fx_name"] = outer_name

    def _after_closure(self, module: L.LightningModule, optimizer: Optimizer) -> None:
        self.call("on_before_optimizer_step", optimizer)
        if self.calls_clipping_hook:
            module.configure_gradient_clipping(
                optimizer,
                gradient_clip_val=self.trainer.gradient_clip_val,
                gradient_clip_algorithm=self.trainer.gradient_clip_algorithm,
            )

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on one micro-batch: load it, call the hooks and the step, and log.

        Lightning's `run` calls this in a loop. The counters of `batch_progress` change in the order
        of Lightning's own `advance`, because a checkpoint may be saved in any hook.
        """
        # restarting: the first batch after a resume inside of an epoch
        if not self.is_fast or self.restarting:
            return super().advance(data_fetcher)
        trainer: Any = self.trainer
        progress = self.batch_progress
        if self.val_loop.restarting:  # set by a resume; this epoch's validation starts anew
            self.val_loop.restarting = False
        if trainer.world_size > 1:
            self._broadcast_sigterm_tensor()  # GracefulStop replaces it
        batch, _, _ = next(data_fetcher)
        index = progress.current.ready
        progress.is_last_batch = data_fetcher.done
        if self.moves_batches:
            batch = load_batch(trainer, trainer.lightning_module, batch)
        progress.increment_ready()
        connector, results = trainer._logger_connector, self._results
        # None before the epoch, True in its first micro-batch, False in later ones
        connector._first_loop_iter = connector._first_loop_iter is None
        # the open batch, from which `self.log` finds the batch size if it is not given
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        # calls the implemented hooks of callbacks and module
        self.call("on_train_batch_start", batch, index)
        trainer.strategy.on_train_batch_start(batch, index)
        progress.increment_started()
        inputs = (
            OrderedDict(batch=batch, batch_idx=index) if self.step_takes_index else {"batch": batch}
        )
        # automatic optimization has one optimizer
        output = self.automatic_optimization.run(trainer.optimizers[0], index, inputs)  # type: ignore
        progress.increment_processed()
        is_last = self._num_ready_batches_reached()
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if is_last:
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        self.call("on_train_batch_end", output, batch, index)
        interval = trainer.log_every_n_steps
        # _batches_that_stepped counts optimizer steps, from 0
        is_log_step = interval and (self._batches_that_stepped + 1) % interval == 0
        is_log_step = is_log_step or trainer.should_stop or trainer.fast_dev_run
        if is_log_step or is_last:
            connector.on_batch_end()  # computes the metrics of the step
        results.batch = results.batch_size = None
        progress.increment_completed()
        if is_log_step:
            connector.update_train_step_metrics()  # passes them to the loggers

    def _should_check_val_epoch(self) -> bool:
        if not self.is_fast:
            return super()._should_check_val_epoch()
        every = self.trainer.check_val_every_n_epoch
        return self.has_validation and (
            every is None or (self.trainer.current_epoch + 1) % every == 0
        )

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        due = super()._should_check_val_fx(data_fetcher)
        trainer = self.trainer
        if due and self.is_fast and trainer._logger_connector._first_loop_iter is not None:
            # collect now, so that the last training values can be read during the validation
            _ = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
        return due

    def _should_accumulate(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1 and super()._should_accumulate()


def implemented_hooks(name: str, trainer: Any) -> list[Callable[..., Any]]:
    """Return the implemented hooks ``name``: those of callbacks in order, then the module's.

    Reason: Lightning also calls hooks that are not overridden. Public API alone.

    Upstream: pytorch/trainer/call.py
    Seen on: 2.5.6 to 2.6.6
    """
    module = trainer.lightning_module
    hooks = [
        partial(getattr(callback, name), trainer, module)
        for callback in trainer.callbacks
        if is_overridden(name, callback, Callback)
    ]
    if is_overridden(name, module):
        hooks.append(getattr(module, name))
    return hooks


def log_fast(self: L.LightningModule, name: str, value: Any, *args: Any, **options: Any) -> None:
    """Log a value as `LightningModule.log`, in 4 us instead of 370 us.

    The first call with a name in an epoch runs Lightning's method and keeps the metric object.
    Later calls in `training_step` with the same options set the value of that object. Any other
    hook, type of value or option runs Lightning's method.

    Reason: Lightning's method checks the name, the options and the hook at each call.

    Upstream: pytorch/trainer/connectors/logger_connector/result.py
    Seen on: 2.5.6 to 2.6.6
    """
    loop: Any = self.trainer.fit_loop.epoch_loop
    can_keep = self._current_fx_name == "training_step" and not args and isinstance(value, Tensor)
    # logged_metrics: by name, the metric object and the options of the first call
    metric, kept_options = loop.logged_metrics.get(name, (None, None))
    if (
        can_keep
        and metric is not None
        and kept_options == options
        and value.ndim == 0
        # without a given batch size, Lightning's method finds it in the batch for the epoch's mean
        and not (metric.meta.on_epoch and options.get("batch_size") is None)
        and self.trainer._logger_connector._first_loop_iter is False  # not the first micro-batch
    ):
        value = value.detach()
        if metric.meta.on_epoch or metric.meta.sync.should or value.dtype is not torch.float32:
            metric.forward(value, options.get("batch_size", 1))
        else:  # as `forward` without a sum over steps: keep the value of this step
            # a clone, because the module may change the original in place
            metric._forward_cache = metric.value = value.clone()
            metric._computed = None  # torchmetrics' cached result of earlier steps
        metric.has_reset = False  # there is a value to log since the last reset
        return
    type(self).log(self, name, value, *args, **options)  # Lightning's method
    if can_keep:
        metric = loop._results.get(f"training_step.{name}")
        if metric is not None and metric.is_tensor:
            loop.logged_metrics[name] = (metric, options)
