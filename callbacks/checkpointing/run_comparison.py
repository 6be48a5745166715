"""Compare a resumed run with the run of its checkpoint; refuse or print the differences.

A checkpoint stores under `exact_resume`:

    callbacks    class names of the callbacks that act on training
    optimizers   class names, in their order
    data         fingerprint: `provenance` of the datamodule, and numbers of samples
    location     file or name of the data, for messages
    world        number of ranks, and of micro-batches in an optimizer step

A difference that makes the training wrong is refused; `ExactResume(accept=["EMA"])` permits one.
"""

from collections.abc import Collection
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError
from ravine.lightning_compat import combined_loader

MONITORING_CALLBACKS = (
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
LOCATION_KEYS = ("file", "source", "path", "root")  # locations of the data, not their content
# With other values of these the weights do not fit, so that no argument can accept them.
SHAPE_KEYS = ("data vocab_size", "data class_names")
RunProperties = dict[str, Any]


@rank_zero_only
def print_rank_zero(text: str) -> None:
    """Print a line on rank 0."""
    print(text)


def raise_mismatch(problem: str, accept_key: str, remedy: str, remedy_flag: str = "") -> None:
    """Raise UsageError, and name the value of `accept` that permits the difference."""
    accept_flag = f"--trainer.callbacks+=ExactResume --trainer.callbacks.accept=[{accept_key}]"
    raise UsageError(
        problem,
        hint=f"{remedy}, or accept the difference with ExactResume(accept=[{accept_key!r}])",
        flag=f"{remedy_flag}, or {accept_flag}" if remedy_flag else accept_flag,
    )


def collect_run_properties(trainer: L.Trainer) -> RunProperties:
    """Return the properties of the run that a checkpoint stores for the comparison."""
    return {
        "callbacks": list_training_callbacks(trainer),
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "data": fingerprint_data(trainer),
        "location": locate_data(trainer),
        "world": {"ranks": trainer.world_size, "accumulate": trainer.accumulate_grad_batches},
    }


def list_training_callbacks(trainer: Any) -> list[str]:
    """Return the names of callbacks that act on training, by default all of other packages.

    MONITORING_CALLBACKS are left out.
    """
    names = []
    for callback in trainer.callbacks:
        is_builtin = type(callback).__module__.startswith("ravine.")
        acts = getattr(callback, "acts_on_training", not is_builtin)
        if acts and not isinstance(callback, MONITORING_CALLBACKS):
            names.append(type(callback).__name__)
    return sorted(names)


def fingerprint_data(trainer: Any) -> dict[str, Any]:
    """Return the datamodule's `provenance` values and the number of samples of each loader."""
    entries = fingerprint_files(trainer)
    loader = combined_loader(trainer)
    if loader is not None:
        sizes = [
            sized_len(getattr(train_loader, "dataset", None)) for train_loader in loader.flattened
        ]
        entries["samples of the loaders"] = sizes
    return entries


def fingerprint_files(trainer: Any) -> dict[str, Any]:
    """Return the datamodule's `provenance` values without locations; available after `setup`."""
    resolved = getattr(trainer.datamodule, "provenance", None) or {}
    return {f"data {key}": to_plain(v) for key, v in resolved.items() if key not in LOCATION_KEYS}


def locate_data(trainer: Any) -> str:
    """Return the file of the data, or the name of their source; "" if neither is known."""
    resolved = getattr(trainer.datamodule, "provenance", None) or {}
    return str(resolved.get("file") or resolved.get("source") or "")


def to_plain(value: Any) -> Any:
    """Convert a value to the lists, dicts and plain values that a checkpoint may hold."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def compare_callbacks(
    trainer: L.Trainer, checkpoint: RunProperties, accept: Collection[str] = ()
) -> None:
    """Refuse a run that lacks the checkpoint's EMA or OptimizerPlan; print other differences.

    Args:
        trainer: of the run that resumes.
        checkpoint: contents of the whole file.
        accept: permitted differences; with "EMA" the callback EMA may be missing.

    Raises:
        UsageError: EMA or the OptimizerPlan is missing.
    """
    current = list_training_callbacks(trainer)
    if "ema" in checkpoint and "EMA" not in accept and not has_callback(trainer, "EMA"):
        # raises a UsageError that also names the value of `accept`
        raise_mismatch(
            "EMA was in the run of the checkpoint and is missing in this run; the weights in the "
            "file are the average, and the state of the optimizer belongs to the raw weights",
            accept_key="EMA",
            remedy="add EMA() to Trainer(callbacks=...)",
            remedy_flag="--trainer.callbacks+=EMA",
        )
    if checkpoint.get("optimizer_plan") and not has_callback(trainer, "OptimizerPlan"):
        members = " + ".join(checkpoint["optimizer_plan"])  # names of its optimizers
        raise UsageError(
            f"the optimizers of the checkpoint ({members}) belong to an OptimizerPlan, which is "
            "missing in this run",
            hint="add the OptimizerPlan(...) of that run to Trainer(callbacks=...)",
            flag="the same command without --trainer.callbacks= and --config",
        )
    saved = checkpoint.get("exact_resume", {}).get("callbacks")  # names
    # The run of the checkpoint had no ExactResume, or the command line has named the differences.
    if saved is None or getattr(trainer, "changed_arguments", None) is not None:
        return
    for name in sorted({*saved} - {*current} - {"EMA"}):
        print_rank_zero(f"{name} was in the run of the checkpoint and is missing in this run")
    for name in sorted({*current} - {*saved}):
        print_rank_zero(f"{name} was not in the run of the checkpoint: it starts in this run")


def has_callback(trainer: Any, name: str) -> bool:
    """Whether the trainer has a callback of that class or of a subclass."""
    return any(
        name in (c.__name__ for c in type(callback).__mro__) for callback in trainer.callbacks
    )


def compare_data(trainer: Any, saved: RunProperties, accept: Collection[str]) -> None:
    """Refuse training data or a tokenizer that differ from the checkpoint's, unless accepted.

    Before the loaders exist, only the datamodule's `provenance` is compared.

    Args:
        trainer: of the run that resumes; its datamodule is set up.
        saved: the record of ExactResume in the checkpoint.
        accept: permitted differences; with "data" a line is printed instead.

    Raises:
        UsageError: the data are others, and `accept` does not permit it.
    """
    current, before = fingerprint_data(trainer), saved.get("data", {})
    changed = [key for key in before if key in current and before[key] != current[key]]
    if not changed:
        return
    if "data" in accept:
        for key in changed:
            text = describe_change(trainer, saved, key)
            print_rank_zero(f"the training data have changed, which is accepted: {text}")
        return
    # a changed vocabulary, for which the weights do not fit, is named first
    key = next((key for key in SHAPE_KEYS if key in changed), changed[0])
    text = describe_change(trainer, saved, key)
    if key in SHAPE_KEYS:
        raise UsageError(
            f"the training data have changed: {text}, for which the weights do not fit",
            hint="use the data of the checkpoint, or train a new model without ckpt_path",
            flag="the same command without --ckpt_path, for a new model",
        )
    raise UsageError(
        f"the training data have changed: {text}",
        hint="use the data of the checkpoint, or accept the others with "
        "ExactResume(accept=['data'])",
        flag="--allow_changed_data, to go on with the changed data",
    )


def describe_change(trainer: Any, saved: RunProperties, key: str) -> str:
    """Return which file or set has changed since the checkpoint, and in which value.

    Args:
        trainer: of the run that resumes.
        saved: the record of ExactResume in the checkpoint.
        key: a key of `fingerprint_data` whose values differ.
    """
    location, saved_location = locate_data(trainer), saved.get("location") or ""
    values = (
        f"{key}: {shorten(saved['data'][key])} in the checkpoint, "
        f"{shorten(fingerprint_data(trainer)[key])} in this run"
    )
    if not location:
        return values
    if saved_location and location != saved_location:
        return f"they are {location} and were {saved_location} ({values})"
    return f"{location} is not as it was when the checkpoint was written ({values})"


def compare_ranks_and_accumulation(
    trainer: L.Trainer, saved: RunProperties, has_resumable_order: bool
) -> None:
    """Print a line if the number of ranks or micro-batches differs: the resume is not bitwise.

    Args:
        trainer: of the run that resumes.
        saved: `ranks` and `accumulate` (micro-batches in an optimizer step) of the checkpoint.
        has_resumable_order: whether the training loaders restore their own position.
    """
    ranks, accumulate = saved["ranks"], saved["accumulate"]
    if (ranks, accumulate) == (trainer.world_size, trainer.accumulate_grad_batches):
        return
    # a loader that knows its position continues with the next sample for any number of ranks
    order = (
        "the order of the data continues, and each rank draws other random numbers"
        if has_resumable_order
        else "in this epoch some samples may be read twice, or not at all"
    )
    print_rank_zero(
        f"the run of the checkpoint has {ranks} ranks x {accumulate} micro-batches of a step, and "
        f"this run has {trainer.world_size} x {trainer.accumulate_grad_batches}: {order}"
    )


def compare_optimizers(current: list[str], saved: list[str], accept: Collection[str]) -> bool:
    """Whether the saved states can be loaded; refuse those of other optimizers unless accepted."""
    if current == saved:
        return True
    text = (
        f"the checkpoint has the state of {' + '.join(saved)}, and this run uses "
        f"{' + '.join(current)}"
    )
    if "optimizer" not in accept:
        raise_mismatch(text, "optimizer", "use the same optimizer")
    print_rank_zero(f"{text}: its state starts anew, which is accepted")
    return False


def shorten(value: Any) -> str:
    """Return a value as text of at most 40 characters."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
