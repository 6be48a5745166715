"""Differences between a resumed run and the run of its checkpoint: refused, or printed.

A checkpoint keeps under `exact_resume`:

    callbacks    class names of those that act on training
    optimizers   class names, in their order
    data         fingerprint: what the datamodule says in `resolved`, and numbers of samples
    world        ranks, and micro-batches of an optimizer step

A difference that would train wrongly is refused; `ExactResume(accept=["EMA"])` permits one.
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

WATCHES = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar, Timer)
PLACES = ("file", "source", "path", "root")  # the location of the data, not their content
Facts = dict[str, Any]


@rank_zero_only
def say(text: str) -> None:
    """Print a line on rank 0."""
    print(text)


def refuse(problem: str, word: str, instead: str = "") -> None:
    """Raise ValueError, with the word of `accept` that permits the difference."""
    first = f"{instead}; or " if instead else ""
    raise UsageError(
        f"{problem}; {first}if it is meant, type --trainer.callbacks+=ExactResume "
        f"--trainer.callbacks.accept=[{word}] (in Python: ExactResume(accept=[{word!r}]))"
    )


def run_properties(trainer: L.Trainer) -> Facts:
    """Properties of the run that a checkpoint stores for the comparison."""
    return {
        "callbacks": training_callbacks(trainer),
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "data": fingerprint(trainer),
        "world": {"ranks": trainer.world_size, "accumulate": trainer.accumulate_grad_batches},
    }


def training_callbacks(trainer: Any) -> list[str]:
    """Names of the callbacks that act on training; callbacks of other packages count as such."""
    found = []
    for callback in trainer.callbacks:
        ours = type(callback).__module__.startswith("ravine.")
        acts = getattr(callback, "acts_on_training", not ours)
        if acts and not isinstance(callback, WATCHES):
            found.append(type(callback).__name__)
    return sorted(found)


def fingerprint(trainer: Any) -> dict[str, Any]:
    """The datamodule's `resolved` values and the number of samples of each loader."""
    taken = getattr(trainer.datamodule, "resolved", None) or {}
    found = {f"data {key}": plain(v) for key, v in taken.items() if key not in PLACES}
    loader = combined_loader(trainer)
    if loader is not None:
        sizes = [sized_len(getattr(part, "dataset", None)) for part in loader.flattened]
        found["samples of the loaders"] = sizes
    return found


def plain(value: Any) -> Any:
    """Lists and mappings of plain values as a checkpoint may hold them."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def compare_callbacks(trainer: L.Trainer, checkpoint: Facts, accept: Collection[str] = ()) -> None:
    """Refuse a run without an average, or without the optimizers, of the checkpoint's run."""
    here = training_callbacks(trainer)
    if "ema" in checkpoint and "EMA" not in accept and not has(trainer, "EMA"):
        refuse(
            "the run of the checkpoint had EMA, which is missing here: the file's weights are the "
            "average, and the optimizer's state belongs to the raw weights",
            "EMA",
            "give EMA again: --trainer.callbacks+=EMA",
        )
    if checkpoint.get("optimizer_plan") and not has(trainer, "OptimizerPlan"):
        members = " + ".join(checkpoint["optimizer_plan"])
        raise UsageError(
            f"the optimizers of the checkpoint's run ({members}) were a callback's, which is "
            "missing here; give the callbacks of that run again: --config RUN/config.yaml before "
            "--ckpt_path, or --trainer.callbacks+=OptimizerPlan ..."
        )
    there = checkpoint.get("exact_resume", {}).get("callbacks")
    if there is None:
        return
    for name in sorted({*there} - {*here} - {"EMA"}):
        say(f"{name} was in the run of the checkpoint and is missing here: it acts no more")
    for name in sorted({*here} - {*there}):
        say(f"{name} was not in the run of the checkpoint: it begins here")


def has(trainer: Any, name: str) -> bool:
    """Whether a callback of that class, or of one derived from it, is there."""
    return any(name in (c.__name__ for c in type(each).__mro__) for each in trainer.callbacks)


def compare_data(trainer: L.Trainer, there: Facts, accept: Collection[str]) -> None:
    """Refuse data that have changed; called after the loaders are made."""
    here = fingerprint(trainer)
    changed = [key for key in there if key in here and there[key] != here[key]]
    for key in changed:
        text = f"{key}: {short(there[key])} in the checkpoint, {short(here[key])} here"
        if "data" not in accept:
            refuse(f"the training data have changed ({text})", "data", "give the same data")
        say(f"the training data have changed, which is accepted ({text})")


def compare_ranks_and_accumulation(trainer: L.Trainer, there: Facts, own_order: bool) -> None:
    """Print that the number of ranks or micro-batches differs: the resume is not bitwise."""
    ranks, parts = there["ranks"], there["accumulate"]
    if (ranks, parts) == (trainer.world_size, trainer.accumulate_grad_batches):
        return
    order = (
        "the order of the data continues, and what is drawn on each rank is another"
        if own_order
        else "in this epoch some samples may come twice, or not at all"
    )
    say(
        f"the checkpoint was written by {ranks} ranks x {parts} micro-batches of a step, and this "
        f"run has {trainer.world_size} x {trainer.accumulate_grad_batches}: {order}"
    )


def compare_optimizers(here: list[str], there: list[str], accept: Collection[str]) -> bool:
    """Whether the saved states are these optimizers'; refuse those of others, unless accepted."""
    if here == there:
        return True
    text = f"the checkpoint has the state of {' + '.join(there)}, and this run {' + '.join(here)}"
    if "optimizer" not in accept:
        refuse(text, "optimizer", "give the same optimizer")
    say(f"{text}: its state begins anew, which is accepted")
    return False


def short(value: Any) -> str:
    """A value in a line."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
