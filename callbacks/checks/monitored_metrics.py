"""Check before the first step that the metrics which callbacks and schedulers monitor are logged.

The names are found by a trial: one validation batch and one training batch go through the module's
steps, and the names that `log` is called with are recorded instead of being logged. Nothing is
refused where a name may have another source: a step that cannot be tried, or a hook or callback of
the user's that logs.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from ravine.errors import sort_by_similarity

LOGS = {"log", "log_dict", "callback_metrics"}  # what code that logs mentions
PACKAGES = ("ravine.", "lightning.", "torch.", "builtins.")
UNTRIED = (
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


class Monitored(NamedTuple):
    """One requirement: of these names at least one must be logged."""

    who: str
    names: tuple[str, ...]
    argument: str  # by which another one is chosen


def monitored(trainer: Any) -> list[Monitored]:
    """What the trainer's callbacks and schedulers require."""
    found = []
    for callback in trainer.callbacks:
        who = type(callback).__name__
        if isinstance(callback, ModelCheckpoint):
            optional = getattr(callback, "monitor_is_optional", callback.save_top_k == 0)
            if callback.monitor is not None and not optional:
                found.append(Monitored(who, (callback.monitor,), "monitor"))
        elif isinstance(callback, EarlyStopping) and callback.strict:
            found.append(Monitored(who, (callback.monitor,), "monitor"))
        elif (needed := _method(callback, "needed_metrics")) is not None:
            argument, groups = needed()
            found += [Monitored(who, tuple(sorted(names)), argument) for names in groups]
    for each in trainer.lr_scheduler_configs:
        if each.reduce_on_plateau and each.strict and each.monitor:
            found.append(Monitored(type(each.scheduler).__name__, (each.monitor,), "monitor"))
    return found


def missing(
    trainer: Any,
    module: L.LightningModule,
    validation_batches: Callable[[], list[Any] | None],
    training_batch: Callable[[], Any],
) -> str | None:
    """The error text for a metric that nothing logs; None if each is or may be logged.

    Args:
        trainer: whose callbacks are looked at
        module: whose steps are tried
        validation_batches: one of each loader, on the device; None if they cannot be read
        training_batch: one, on the device; None if it cannot be read

    Raises:
        Exception: what the validation step raises, where no sanity check has run it before.
    """
    open_ones = monitored(trainer)
    names = names_logged_by_callbacks(trainer)
    open_ones = unmet_requirements(open_ones, names)
    if not open_ones and not tries_validation(trainer):
        return None
    unknown = any(may_log(type(callback)) for callback in trainer.callbacks)
    if trainer.enable_validation:
        batches = validation_batches()
        tried = None if batches is None else try_validation(trainer, module, batches)
        unknown |= tried is None
        names |= tried or set()
        open_ones = unmet_requirements(open_ones, names)
    if not open_ones or unknown or any(untried_logging_hooks(module)):
        return None
    tried = try_training(trainer, module, training_batch())
    if tried is None:
        return None
    names |= tried
    open_ones = unmet_requirements(open_ones, names)
    return error_text(open_ones[0], names, trainer, module) if open_ones else None


def tries_validation(trainer: Any) -> bool:
    """Whether a validation is due that no sanity check tries."""
    return bool(trainer.enable_validation and not trainer.num_sanity_val_steps)


def _method(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)


def unmet_requirements(open_ones: list[Monitored], names: set[str]) -> list[Monitored]:
    """The requirements of which no name is logged."""
    return [each for each in open_ones if not names.intersection(each.names)]


def error_text(one: Monitored, names: set[str], trainer: Any, module: L.LightningModule) -> str:
    """The error text."""
    wanted = " and ".join(repr(name) for name in one.names)
    near = sort_by_similarity(one.names[0], names)[:6]
    where = "" if trainer.enable_validation else ", and this fit has no validation"
    return (
        f"{one.who} monitors {wanted}, and no metric of that name is logged by "
        f"{type(module).__name__}{where}; there are: {', '.join(near) or 'none'}; type "
        f"--trainer.callbacks.{one.argument}={near[0] if near else 'NAME'}, or log it"
    )


def try_validation(trainer: Any, module: L.LightningModule, batches: list[Any]) -> set[str] | None:
    """Names that a validation of one batch logs; None if it cannot be tried.

    Raises:
        Exception: what the step raises, where no sanity check has run it before.
    """
    step = module.validation_step
    if "dataloader_iter" in inspect.signature(step).parameters:
        return None
    in_step = False
    with record_logged_names(module, len(batches)) as names:
        try:
            module.on_validation_start()
            module.on_validation_epoch_start()
            for number, batch in enumerate(batches):
                given = [batch]
                if is_param_in_hook_signature(step, "batch_idx", min_args=2):
                    given.append(0)
                if len(batches) > 1 and is_param_in_hook_signature(
                    step, "dataloader_idx", min_args=3
                ):
                    given.append(number)
                module.on_validation_batch_start(batch, 0, number)
                in_step = True
                output = trainer.strategy.validation_step(*given)
                in_step = False
                module.on_validation_batch_end(output, batch, 0, number)
            module.on_validation_epoch_end()
        except Exception:
            if in_step and tries_validation(trainer) and not any(map(prepares, trainer.callbacks)):
                raise
            return None  # one batch may be too few for the metric of an epoch
    return names


def try_training(trainer: Any, module: L.LightningModule, batch: Any) -> set[str] | None:
    """Names that a training step logs; None if it cannot be tried without training."""
    step, strategy = module.training_step, trainer.strategy
    cut = getattr(strategy, "pipeline", None) or getattr(strategy, "context", None)
    if batch is None or cut or not module.automatic_optimization:
        return None
    if "dataloader_iter" in inspect.signature(step).parameters:
        return None
    given = [batch, 0] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else [batch]
    module.train()
    with record_logged_names(module, 1) as names, trainer.precision_plugin.train_step_context():
        try:
            module.on_train_batch_start(batch, 0)
            step(*given)
        except Exception:
            return None
        finally:
            module.eval()
    return names


@contextmanager
def record_logged_names(module: L.LightningModule, loaders: int) -> Iterator[set[str]]:
    """Collect the names that arrive at Lightning's `log` of the module in the body.

    A module's own `log`, which may give other names, is called as in a step.
    """
    names: set[str] = set()
    original = L.LightningModule.log

    def log(self: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
        if self is not module:
            original(self, name, *args, **kwargs)
            return
        forks = {name, *(f"{name}/dataloader_idx_{i}" for i in range(loaders) if loaders > 1)}
        for each in forks:
            names.update(
                (each, f"{each}_step", f"{each}_epoch") if logs_step_and_epoch(kwargs) else (each,)
            )

    L.LightningModule.log = log
    try:
        yield names
    finally:
        L.LightningModule.log = original


def logs_step_and_epoch(options: dict[str, Any]) -> bool:
    """Whether a value is logged at the step and at the epoch, under two more names."""
    return bool(options.get("on_step") and options.get("on_epoch"))


def names_logged_by_callbacks(trainer: Any) -> set[str]:
    """Names that callbacks of this package and of Lightning log, as far as they are known."""
    names: set[str] = set()
    for callback in trainer.callbacks:
        if (logged := _method(callback, "logged_metrics")) is not None:
            names |= set(logged(trainer))
        if isinstance(callback, LearningRateMonitor):
            groups = [g for each in trainer.optimizers for g in each.param_groups]
            kinds = [type(each).__name__ for each in trainer.optimizers]
            more = [f"/pg{i}" for i in range(1, len(groups) + 1)]
            names |= {f"lr-{kind}{end}" for kind in kinds for end in ("", *more)}
    return names


def prepares(callback: Any) -> bool:
    """Whether a callback of the user's acts before a validation step, which may rely on it."""
    hooks = ("on_sanity_check_start", "on_validation_start", "on_validation_epoch_start")
    hooks = (*hooks, "on_validation_batch_start")
    return not f"{type(callback).__module__}.".startswith(PACKAGES) and any(
        getattr(type(callback), hook) is not getattr(L.Callback, hook) for hook in hooks
    )


def may_log(kind: type) -> bool:
    """Whether a callback's class that is of no known package mentions a method that logs."""
    own = [base for base in kind.__mro__ if not f"{base.__module__}.".startswith(PACKAGES)]
    return any(LOGS & set(code.co_names) for base in own for code in function_codes(vars(base)))


def function_codes(members: Any) -> Iterator[CodeType]:
    """The code of all functions of a class, inner ones included."""
    for value in members.values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, FunctionType):
            yield from nested_codes(function.__code__)


def nested_codes(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_codes(constant)


def untried_logging_hooks(module: L.LightningModule) -> Iterable[str]:
    """Hooks of the module that log, themselves or by a method they call, and were not tried."""
    for name in UNTRIED:
        if is_overridden(name, module) and _logs(type(module), name, set()):
            yield name


def _logs(kind: type, name: str, seen: set[str]) -> bool:
    function = getattr(kind, name, None)
    if name in seen or not isinstance(function, FunctionType):
        return False
    if function.__module__.startswith("lightning."):
        return False
    seen.add(name)
    words = {word for code in nested_codes(function.__code__) for word in code.co_names}
    return bool(LOGS & words) or any(_logs(kind, word, seen) for word in words)
