"""Check before the first step that the metrics which callbacks and schedulers monitor are logged.

The names are found by a trial: one validation batch and one training batch go through the module's
steps. The names passed to `log` are recorded, and nothing is logged. No metric is refused if it may
have another source: a step that cannot be tried, or a user-defined hook or callback that logs.
"""

import inspect
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from ravine.errors import UsageError, sort_by_similarity

LOGGING_NAMES = {"log", "log_dict", "callback_metrics"}  # names in the code of a function that logs
KNOWN_PACKAGES = ("ravine.", "lightning.", "torch.", "builtins.")
UNTRIED_HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_validation_end",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "configure_gradient_clipping",
)


class MonitoredMetric(NamedTuple):
    """A requirement of a callback or scheduler: at least one of these names must be logged."""

    owner_name: str
    names: tuple[str, ...]
    argument: str  # argument of the owner that selects another metric
    is_scheduler: bool = False  # whether the owner is a learning-rate scheduler of the module


def find_monitored_metrics(trainer: Any) -> list[MonitoredMetric]:
    """Return the metrics that the trainer's callbacks and schedulers require.

    Callbacks of Ravine state theirs by `needed_metrics()`: the name of their argument, and sets
    of metrics, in each of which one must be logged.
    """
    requirements = []
    for callback in trainer.callbacks:
        owner_name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint):
            # as Ravine's Checkpoint says by an attribute, or if no files are ranked by the metric
            is_optional = getattr(callback, "monitor_is_optional", callback.save_top_k == 0)
            if callback.monitor is not None and not is_optional:
                requirements.append(MonitoredMetric(owner_name, (callback.monitor,), "monitor"))
        elif isinstance(callback, EarlyStopping) and callback.strict:
            requirements.append(MonitoredMetric(owner_name, (callback.monitor,), "monitor"))
        elif (needed := _get_method(callback, "needed_metrics")) is not None:
            argument, name_sets = needed()  # one metric of each set must be logged
            requirements += [
                MonitoredMetric(owner_name, tuple(sorted(names)), argument) for names in name_sets
            ]
    for scheduler_config in trainer.lr_scheduler_configs:
        if (
            scheduler_config.reduce_on_plateau
            and scheduler_config.strict
            and scheduler_config.monitor
        ):
            requirements.append(
                MonitoredMetric(
                    type(scheduler_config.scheduler).__name__,
                    (scheduler_config.monitor,),
                    "monitor",
                    is_scheduler=True,
                )
            )
    return requirements


def find_missing_metric(
    trainer: Any,
    module: L.LightningModule,
    validation_batches: Callable[[], list[Any] | None],
    training_batch: Callable[[], Any],
) -> UsageError | None:
    """Return the error for a metric that nothing logs; None if each is or may be logged.

    The validation step is tried first, and the training step only if a metric is still missing.

    Args:
        trainer: the trainer of the callbacks and schedulers.
        module: the module whose steps are tried.
        validation_batches: returns a batch of each loader, on the device; None if unreadable.
        training_batch: returns a batch, on the device; None if it cannot be read.

    Raises:
        Exception: the error of the validation step, if no sanity check has run the step before.
    """
    logged_names = collect_callback_metric_names(trainer)
    # required metrics that are not known to be logged
    unmet = select_unmet(find_monitored_metrics(trainer), logged_names)
    if not unmet and not needs_validation_trial(trainer):
        return None
    # whether there may be more metrics than the recorded ones
    may_log_more = any(may_log(type(callback)) for callback in trainer.callbacks)
    if trainer.enable_validation:
        batches = validation_batches()
        names = None if batches is None else try_validation(trainer, module, batches)
        may_log_more |= names is None  # the trial was not possible
        logged_names |= names or set()
        unmet = select_unmet(unmet, logged_names)
    # hooks that may log and that no trial calls: no error, because the metric may come from there
    if not unmet or may_log_more or any(find_untried_logging_hooks(module)):
        return None
    names = try_training(trainer, module, training_batch())
    if names is None:
        return None
    logged_names |= names
    unmet = select_unmet(unmet, logged_names)
    return missing_metric_error(unmet[0], logged_names, trainer, module) if unmet else None


def needs_validation_trial(trainer: Any) -> bool:
    """Whether the fit has a validation and no sanity check that tries it."""
    return bool(trainer.enable_validation and not trainer.num_sanity_val_steps)


def _get_method(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def select_unmet(requirements: list[MonitoredMetric], names: set[str]) -> list[MonitoredMetric]:
    """Return the requirements of which no name is logged."""
    return [
        requirement for requirement in requirements if not names.intersection(requirement.names)
    ]


def missing_metric_error(
    requirement: MonitoredMetric, names: set[str], trainer: Any, module: L.LightningModule
) -> UsageError:
    """Return the error for a required metric that is not logged.

    Args:
        requirement: the metric and its owner: a callback, or a scheduler of the module.
        names: the logged metrics, the nearest of which are listed.
        trainer: whether it validates is a part of the message.
        module: the module that does not log the metric.
    """
    owner, module_name = requirement.owner_name, type(module).__name__
    wanted = " and ".join(repr(name) for name in requirement.names)
    # `name_step` and `name_epoch` may be possible forms of `name` only
    plain_names = {n for n in names if n.removesuffix("_step").removesuffix("_epoch") == n} or names
    logged = sort_by_similarity(requirement.names[0], plain_names)[:6]  # the most similar first
    where = "" if trainer.enable_validation else "; this fit has no validation"
    hint, flag = f"log {wanted} in {module_name}", ""
    if logged and requirement.is_scheduler:
        hint = f"use 'monitor': {logged[0]!r} in {module_name}.configure_optimizers"
    elif logged:
        # a value of the callback's argument that selects the nearest metric
        value = example_value(requirement.argument, logged[0])
        hint = f"use {owner}({requirement.argument}={value!r})"
        text = shlex.quote(str(value).replace("'", ""))
        flag = f"--trainer.callbacks.{owner}.{requirement.argument}={text}"
    return UsageError(
        f"{owner} monitors {wanted}, which {module_name} does not log{where}",
        logged or ["none"],
        hint,
        flag=flag,
        label="logged",
    )


def example_value(argument: str, metric: str) -> Any:
    """Return a value of a callback's argument that selects the metric."""
    bounds = {metric: 0.5}
    values = {"monitor": metric, "min_value": bounds, "min_fraction_of_first": bounds}
    return values.get(argument, [metric])


def try_validation(trainer: Any, module: L.LightningModule, batches: list[Any]) -> set[str] | None:
    """Return the names that a validation of one batch per loader logs; None if it fails.

    A step that reads the loader itself (`dataloader_iter`) is not tried.

    Args:
        trainer: its strategy calls the step.
        module: its validation hooks and step are called.
        batches: one batch of each loader.

    Raises:
        Exception: the error of the step, if no sanity check has run the step before.
    """
    step = module.validation_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        return None
    # as Lightning decides which arguments a step gets
    takes_batch_idx = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    takes_loader_idx = len(batches) > 1 and is_param_in_hook_signature(
        step, "dataloader_idx", min_args=3
    )
    in_step = False  # whether an error is one of the step, not of a hook
    with record_logged_names(module, len(batches)) as names:
        try:
            module.on_validation_start()
            module.on_validation_epoch_start()
            batch_idx = 0
            for loader_idx, batch in enumerate(batches):
                step_args = [batch]
                if takes_batch_idx:
                    step_args.append(batch_idx)
                if takes_loader_idx:
                    step_args.append(loader_idx)
                module.on_validation_batch_start(batch, batch_idx, loader_idx)
                in_step = True
                output = trainer.strategy.validation_step(*step_args)
                in_step = False
                module.on_validation_batch_end(output, batch, batch_idx, loader_idx)
            module.on_validation_epoch_end()
        except Exception:
            # a hook of a user's callback, not called here, may prepare the step
            if (
                in_step
                and needs_validation_trial(trainer)  # no sanity check would show this error
                and not any(map(overrides_validation_hook, trainer.callbacks))
            ):
                raise
            return None  # one batch may be too few for the metric of an epoch
    return names


def try_training(trainer: Any, module: L.LightningModule, batch: Any) -> set[str] | None:
    """Return the names that a training step on the batch logs; None if a trial is not possible.

    No gradient is computed. The module is in training mode for the step, and in evaluation mode
    afterwards, as `preserve_state` requires.
    """
    step, strategy = module.training_step, trainer.strategy
    # one rank cannot compute a step of a model that is split over pipeline or sequence ranks
    is_split = getattr(strategy, "pipeline", None) or getattr(strategy, "context_parallel", None)
    if batch is None or is_split or not module.automatic_optimization:
        return None
    if "dataloader_iter" in inspect.signature(step).parameters:
        return None
    step_args = [batch, 0] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else [batch]
    module.train()
    # 1: number of loaders
    with record_logged_names(module, 1) as names, trainer.precision_plugin.train_step_context():
        try:
            module.on_train_batch_start(batch, 0)
            step(*step_args)
        except Exception:
            return None
        finally:
            module.eval()
    return names


@contextmanager
def record_logged_names(module: L.LightningModule, num_loaders: int) -> Iterator[set[str]]:
    """Record the names that are passed to Lightning's `log` of the module within the context.

    A module's own `log`, which may change the names, is called as in a training step. Nothing is
    logged. Lightning may log a name as it is, or with `_step` and `_epoch`, depending on options
    and on defaults that differ between hooks; with several loaders it adds a suffix at the end. All
    of these forms are recorded; a name that is never logged has none of them.
    """
    names: set[str] = set()
    original = L.LightningModule.log

    def record_name(self: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
        if self is not module:
            original(self, name, *args, **kwargs)
            return
        forms = (name, f"{name}_step", f"{name}_epoch")
        names.update(forms)
        if num_loaders > 1:
            names.update(f"{n}/dataloader_idx_{i}" for n in forms for i in range(num_loaders))

    # the class is patched, because a module's own `log` calls it by `super().log`
    L.LightningModule.log = record_name
    try:
        yield names
    finally:
        L.LightningModule.log = original


def collect_callback_metric_names(trainer: Any) -> set[str]:
    """Return the names that callbacks of Ravine and of Lightning log, as far as known."""
    names: set[str] = set()
    for callback in trainer.callbacks:
        if (logged := _get_method(callback, "logged_metrics")) is not None:
            names |= set(logged(trainer))
        if isinstance(callback, LearningRateMonitor):
            groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
            class_names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            more = [f"/pg{i}" for i in range(1, len(groups) + 1)]
            names |= {
                f"lr-{class_name}{suffix}" for class_name in class_names for suffix in ("", *more)
            }
    return names


def overrides_validation_hook(callback: Any) -> bool:
    """Whether a user-defined callback has a hook before the validation step, which may need it."""
    hooks = ("on_sanity_check_start", "on_validation_start", "on_validation_epoch_start")
    hooks = (*hooks, "on_validation_batch_start")
    return not f"{type(callback).__module__}.".startswith(KNOWN_PACKAGES) and any(
        getattr(type(callback), hook) is not getattr(L.Callback, hook) for hook in hooks
    )


def may_log(callback_class: type) -> bool:
    """Whether a user-defined callback class refers to a method that logs."""
    user_classes = [
        base
        for base in callback_class.__mro__
        if not f"{base.__module__}.".startswith(KNOWN_PACKAGES)
    ]
    return any(
        LOGGING_NAMES & set(code.co_names)
        for base in user_classes
        for code in iter_function_codes(vars(base))
    )


def iter_function_codes(members: Any) -> Iterator[CodeType]:
    """Yield the code objects of all functions of a class, including nested functions."""
    for value in members.values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, FunctionType):
            yield from iter_nested_codes(function.__code__)


def iter_nested_codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and those of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from iter_nested_codes(constant)


def find_untried_logging_hooks(module: L.LightningModule) -> Iterable[str]:
    """Yield the untried hooks of the module that log, directly or by a method they call."""
    for name in UNTRIED_HOOKS:
        if is_overridden(name, module) and _calls_log(type(module), name, set()):
            yield name


def _calls_log(cls: type, name: str, seen: set[str]) -> bool:
    function = getattr(cls, name, None)
    if name in seen or not isinstance(function, FunctionType):
        return False
    if function.__module__.startswith("lightning."):
        return False
    seen.add(name)
    called_names = {
        called_name
        for code in iter_nested_codes(function.__code__)
        for called_name in code.co_names
    }
    return bool(LOGGING_NAMES & called_names) or any(
        _calls_log(cls, called_name, seen) for called_name in called_names
    )
