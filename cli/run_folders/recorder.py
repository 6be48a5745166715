"""RunRecorder: the callback that writes how far a run came, and how it ended, to its record."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from .record import Record, new_record, read_record, write_record, write_surroundings

MAX_METRICS = 200
MAX_HISTORY = 100  # earlier records that are kept: the first one and the newest
NOT_IN_HISTORY = ("metrics", "versions", "machine", "process")  # they would fill the file


class RunRecorder(L.Callback):
    """Writes `run.json` in the run's folder: at the start, after validations, and at the end.

    Rank 0 writes. A record that cannot be written does not end the run.

    Example: `Trainer(callbacks=[RunRecorder()])`.
    """

    def __init__(self) -> None:
        """Start without a run."""
        self.record: Record | None = None
        self.folder: Path | None = None
        self._started = 0.0
        self._best: dict[str, Any] | None = None
        self._earlier: Record | None = None  # of the run that goes on, until training starts

    def start(
        self,
        folder: Path,
        verb: str,
        name: str,
        module: L.LightningModule,
        origin: dict[str, Any] | None,
        is_continued: bool,
    ) -> None:
        """Write the first record of a run; the trainer calls this when the folder exists.

        Args:
            folder: the run's folder.
            verb: fit, validate, test or predict.
            name: the name of the run.
            module: what it trains or evaluates.
            origin: run, checkpoint and step that it starts from, or None.
            is_continued: whether the folder is that of an earlier run, which goes on.
        """
        # command, versions, machine and start time; status `running`
        record = new_record(verb, name, type(module).__name__)
        if is_continued:
            # restored by `on_exception` if the run fails before it trains a step
            self._earlier = read_record(folder)
            earlier = dict(self._earlier or {})
            # the earlier record becomes the last entry of the new one's history
            record["history"] = extend_history(earlier.pop("history", []), earlier, origin)
            record["parent"] = earlier.get("parent")
            best = earlier.get("best")
            # a best value of the earlier part counts for the whole run
            self._best = best if isinstance(best, dict) else None
            record["first_started"] = earlier.get("first_started", earlier.get("started"))
            if (past := earlier.get("duration_s")) and isinstance(past, int | float):
                record["earlier_duration_s"] = past
        else:
            record["parent" if verb == "fit" else "evaluated"] = origin
        self.record, self.folder, self._started = record, folder, time.monotonic()
        self._write()
        with suppress(OSError):
            # writes the uncommitted diff and the installed packages; a run goes on without them
            write_surroundings(folder)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add device and ranks to the record; a second fit of the same trainer reopens it."""
        if self.record is None:
            return
        self.record["machine"].update(describe_trainer(trainer))
        if stage == "fit" and self.record["status"] != "running":
            self.record["status"], self._started = "running", time.monotonic()
        self._write()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the record of the earlier run, which the history has."""
        self._earlier = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the metrics, so that a killed run shows how far it came."""
        if self.record is not None and not trainer.sanity_checking:
            self._update(trainer)
            self._write()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Record that the run is done."""
        self._end(trainer, "done")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Record that the run failed or was interrupted, and the first line of the error."""
        if self._earlier is not None:  # nothing was trained: the run is as it was
            self.record, self._earlier = self._earlier, None
            self._write()
            self.record = None
            return
        is_interrupt = isinstance(exception, KeyboardInterrupt | SystemExit)
        text = str(exception).partition("\n")[0][:500]
        error = f"{type(exception).__name__}: {text}" if text else type(exception).__name__
        self._end(trainer, "interrupted" if is_interrupt else "failed", error)

    def _end(self, trainer: L.Trainer, status: str, error: str | None = None) -> None:
        if self.record is None:
            return
        self._update(trainer)
        self.record["status"], self.record["ended"] = status, time.time()
        self.record["error"] = error
        self._write()

    def _update(self, trainer: Any) -> None:
        record = self.record
        if record is None:
            return
        earlier = record.get("earlier_duration_s", 0.0)
        record["duration_s"] = round(earlier + time.monotonic() - self._started, 3)
        metrics = list(trainer.callback_metrics.items())[:MAX_METRICS]
        record["metrics"] = record.get("metrics", {}) | {k: plain(v) for k, v in metrics}
        if record["verb"] == "fit" and trainer.state.fn == "fit":
            record["steps"] = trainer.global_step
            record["best"] = self._find_best(trainer, record["metrics"])
            if self.folder is not None and record["best"] is not None:
                record["best"]["file"] = best_file(trainer, record["best"], self.folder)

    def _find_best(self, trainer: Any, metrics: dict[str, Any]) -> dict[str, Any] | None:
        """Return the best value of the monitored metric so far, with its name, mode and step.

        Args:
            trainer: the trainer, with its ModelCheckpoint callbacks.
            metrics: the values that are logged now, by name.
        """
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        # the first callback that saves by a metric; without one, the validation loss is used
        monitored = next((c for c in callbacks if c.monitor), None)
        metric = str(monitored.monitor) if monitored else "val/loss"
        mode = monitored.mode if monitored else "min"
        value, best = metrics.get(metric), self._best
        # a resumed run may monitor another metric than before
        if best is not None and best.get("metric") != metric:
            best = None
        # value == value is False for NaN
        if isinstance(value, int | float) and value == value:
            is_first = best is None or not isinstance(best.get("value"), int | float)
            is_better = not is_first and (
                value > best["value"] if mode == "max" else value < best["value"]  # type: ignore
            )
            if is_first or is_better:
                step = trainer.global_step
                best = {"metric": metric, "mode": mode, "value": value, "step": step}
        self._best = best
        return best

    def _write(self) -> None:
        if self.record is not None and self.folder is not None:
            with suppress(OSError):  # a full disk or a removed folder ends the run elsewhere
                write_record(self.folder, self.record)


def extend_history(
    history: Any, earlier: Record, origin: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Return the records of a run that goes on in its folder, with that of the part before.

    A run may be resumed a thousand times: the first record is kept, and the newest ones.

    Args:
        history: the records before `earlier`; another type than a list is ignored.
        earlier: the record of the part before; {} without one.
        origin: run, checkpoint and step from which the run goes on.
    """
    kept = {key: value for key, value in earlier.items() if key not in NOT_IN_HISTORY}
    ended = kept | {"continued_from": origin} if earlier else {}
    records = [*(history if isinstance(history, list) else []), ended]
    return records if len(records) <= MAX_HISTORY else [records[0], *records[1 - MAX_HISTORY :]]


def best_file(trainer: Any, best: dict[str, Any], folder: Path) -> str | None:
    """Return the checkpoint of the best value, relative to the run's folder if it is below.

    None stands for a value whose checkpoint was not written, or not yet.

    Args:
        trainer: the trainer, with its ModelCheckpoint callbacks.
        best: metric and value, as in the record.
        folder: the run's folder.
    """
    for callback in trainer.checkpoint_callbacks:
        score = getattr(callback, "best_model_score", None)
        path = getattr(callback, "best_model_path", "")
        is_same_metric = getattr(callback, "monitor", None) == best["metric"]
        if path and is_same_metric and score is not None and float(score) == best["value"]:
            return os.path.relpath(path, folder) if Path(path).is_relative_to(folder) else str(path)
    return None


def plain(value: Any) -> Any:
    """Return a metric as a number."""
    number = float(value)
    return number if number == number and abs(number) < 1e300 else str(number)


def describe_trainer(trainer: Any) -> dict[str, Any]:
    """Return device, ranks and precision of a trainer."""
    return {
        "device": str(trainer.strategy.root_device),
        "ranks": trainer.world_size,
        "precision": str(trainer.precision),
    }
