"""Heartbeat: the position of a rank in a small file, which remains if the process is killed.

    <run folder>/heartbeats/rank_3

    bytes 0 to 63        phase, epoch, batch, step, time and peak memory: the main thread
    bytes 64 to 1023     process, host and memory limit, as JSON: once, at the start
    bytes 1024 to 2047   bytes of the model, as JSON: once, by OutOfMemoryReport
    bytes 2048 to 4095   the newest report of RankWatchdog's thread, as JSON: once a second

The file is mapped into memory, so a change of the phase costs less than 1 us and no system call.
The file is removed at the end of the run, also after an error. A file whose process no longer
exists belongs to a rank that was killed.
"""

import json
import math
import mmap
import os
import socket
import stat
import struct
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from .memory_limit import MemoryLimit, count_oom_kills, find_memory_limit, peak_process_bytes

FOLDER = "heartbeats"
PHASES = (
    *("start", "forward pass", "backward pass", "optimizer step", "between two steps"),
    *("validation", "checkpoint", "test", "prediction"),
)
START, FORWARD, BACKWARD, STEP, BETWEEN, VALIDATION, CHECKPOINT, TEST, PREDICT = range(9)
POSITION = struct.Struct("<qqqqdq")  # phase, epoch, batch, step, time, peak memory
PROCESS_OFFSET, SUMMARY_OFFSET, REPORT_OFFSET, FILE_BYTES = 64, 1024, 2048, 4096
MEMORY_INTERVAL_S = 0.2  # between two readings of the memory, which take 2 us


@dataclass(frozen=True)
class ProcessInfo:
    """What does not change during a run.

    Attributes:
        rank: global rank.
        pid: number of the process.
        start_ticks: start of the process, which tells it from a later process of the same number.
        host: name of the machine.
        limit_bytes: memory limit of the process; 0 if unknown.
        limit_source: what sets the limit.
        oom_kills: kills for memory in its control group before the run.
    """

    rank: int
    pid: int
    start_ticks: int
    host: str
    limit_bytes: int
    limit_source: str
    oom_kills: int


@dataclass(frozen=True)
class HeartbeatRecord:
    """The content of a heartbeat file.

    Attributes:
        process: the process that wrote it.
        phase: one of PHASES.
        epoch: current epoch.
        batch: batches of the epoch that were begun.
        step: optimizer steps that were completed.
        time_s: seconds since 1970 of the last change of the phase.
        peak_bytes: largest resident memory of the process.
        report: newest report of RankWatchdog; empty without one.
        folder: folder of the file.
        summary: bytes of the model, by OutOfMemoryReport; empty without one.
    """

    process: ProcessInfo
    phase: str
    epoch: int
    batch: int
    step: int
    time_s: float
    peak_bytes: int
    report: str = ""
    folder: Path | None = None
    summary: str = ""


class Heartbeat(Callback):
    """Writes phase, step and time to `<run folder>/heartbeats/rank_<k>` when the phase changes.

    Ravine's Trainer adds it to runs with a folder, and RankWatchdog to runs with several ranks.
    """

    takes_partial_gradients = True  # it reads no gradients

    def __init__(self, folder: str | None = None) -> None:
        """Create the callback.

        Args:
            folder: folder of the files; by default `heartbeats` in the run folder of Ravine's
                Trainer. A trainer without one writes no file.
        """
        self.folder = folder
        self.phase, self.epoch, self.batch, self.step = START, 0, 0, 0
        self.time_s = 0.0  # of the last change of the phase
        self.path: Path | None = None
        self._map: mmap.mmap | None = None
        self._peak_bytes, self._next_reading_s = 0, 0.0

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one Heartbeat."""
        return "Heartbeat"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the file, whose phase is `start` until the first batch."""
        self.open(trainer)
        self.mark(START)

    def open(self, trainer: Any) -> None:
        """Create and map the file, unless it is open. A file that cannot be created is left out."""
        run_dir = getattr(trainer, "run_dir", None)
        folder = self.folder or (run_dir and os.path.join(run_dir, FOLDER))
        if self._map is not None or not folder:
            return
        rank = trainer.global_rank
        # a full disk or a missing permission is reported by the other files of the run
        with suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            path = Path(folder, f"rank_{rank}")
            limit = find_memory_limit() or MemoryLimit(0, "")
            pid = os.getpid()
            process = ProcessInfo(
                rank, pid, start_ticks(pid), socket.gethostname(), *limit, count_oom_kills()
            )
            path.unlink(missing_ok=True)  # a link would be followed
            with path.open("x+b") as file:
                # written, not truncated to size: a hole may have no space on the disk later
                file.write(bytes(FILE_BYTES))
                file.flush()
                self._map = mmap.mmap(file.fileno(), FILE_BYTES)
            _put_text(self._map, PROCESS_OFFSET, SUMMARY_OFFSET, json.dumps(asdict(process)))
            self.path = path

    def mark(self, phase: int) -> None:
        """Note that a phase begins."""
        now = time.time()
        self.phase, self.time_s = phase, now
        if self._map is None:
            return
        if now > self._next_reading_s:
            self._peak_bytes, self._next_reading_s = peak_process_bytes(), now + MEMORY_INTERVAL_S
        POSITION.pack_into(
            self._map, 0, phase, self.epoch, self.batch, self.step, now, self._peak_bytes
        )

    def write_summary(self, text: str) -> None:
        """Write the summary of OutOfMemoryReport."""
        if self._map is not None:
            _put_text(self._map, SUMMARY_OFFSET, REPORT_OFFSET, text)

    def write_report(self, text: str) -> None:
        """Write the report of RankWatchdog's thread."""
        target = self._map
        if target is not None:
            with suppress(ValueError):  # the main thread closes it at the same time
                _put_text(target, REPORT_OFFSET, FILE_BYTES, text)

    def close(self) -> None:
        """Remove the file, and its folder if it is empty."""
        if self._map is None or self.path is None:
            return
        self._map.close()
        self._map = None
        with suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()  # fails while other ranks have files

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the loop begins."""
        self.open(trainer)  # the run folder may be created after `on_fit_start`
        self.epoch, self.step, self.batch = trainer.current_epoch, trainer.global_step, 0
        self.mark(BETWEEN)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that a forward pass begins."""
        self.epoch, self.batch, self.step = (
            trainer.current_epoch,
            batch_idx + 1,
            trainer.global_step,
        )
        self.mark(FORWARD)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any
    ) -> None:
        """Note that a backward pass begins."""
        self.mark(BACKWARD)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note that an optimizer step begins."""
        self.mark(STEP)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Note that the step has ended; callbacks and the loader follow."""
        self.step = trainer.global_step
        self.mark(BETWEEN)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that a validation begins."""
        self.mark(VALIDATION)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that a validation is over."""
        self.mark(BETWEEN)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that a checkpoint is written."""
        self.mark(CHECKPOINT)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that a test begins."""
        self.mark(TEST)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that predictions begin."""
        self.mark(PREDICT)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the file."""
        self.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the file: an exception is reported by itself."""
        self.close()


def read_heartbeat(path: Path) -> HeartbeatRecord | None:
    """Return the content of a heartbeat file; None if it is incomplete, damaged or a link.

    The rank in the file must be that of its name, because the name is later removed.
    """
    try:
        data = _read_file(path)
        process = ProcessInfo(**json.loads(_get_text(data, PROCESS_OFFSET, SUMMARY_OFFSET)))
        if not _is_valid(process):
            return None
        phase, epoch, batch, step, time_s, peak_bytes = POSITION.unpack_from(data, 0)
        if min(phase, epoch, batch, step, peak_bytes) < 0 or not math.isfinite(time_s):
            return None
        if path.name != f"rank_{process.rank}":
            return None
        report = _get_text(data, REPORT_OFFSET, FILE_BYTES)
        summary = _get_text(data, SUMMARY_OFFSET, REPORT_OFFSET)
        return HeartbeatRecord(
            process,
            PHASES[phase],
            epoch,
            batch,
            step,
            time_s,
            peak_bytes,
            report,
            path.parent,
            summary,
        )
    except (OSError, ValueError, TypeError, IndexError, RecursionError, struct.error):
        return None


def _read_file(path: Path) -> bytes:
    """Return the first bytes of a regular file; a link, pipe or device raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return os.read(descriptor, FILE_BYTES)
    finally:
        os.close(descriptor)


def _is_valid(process: ProcessInfo) -> bool:
    """Whether each value is of the kind that a heartbeat file has: an integer or printable text."""
    return all(
        isinstance(value, str) and value.isprintable()
        if name in ("host", "limit_source")
        else type(value) is int and abs(value) < 2**63
        for name, value in asdict(process).items()
    )


def read_heartbeats(folder: Path) -> dict[int, HeartbeatRecord]:
    """Return the records of a folder by rank."""
    records = [read_heartbeat(path) for path in folder.glob("rank_*")]
    return {record.process.rank: record for record in records if record is not None}


def process_state(process: ProcessInfo) -> str:
    """Return the state of a process: one letter of Linux, "X" if it has ended, "" if unknown.

    T: stopped by a signal. R: running. S: waiting. D: waiting for a disk. Z or X: ended.
    """
    if process.host != socket.gethostname():
        return ""
    fields = _process_fields(process.pid)
    if fields is None:
        return "X" if os.path.isdir("/proc/self") else ""
    state, ticks = fields
    # another process may have got the number
    return state if ticks == process.start_ticks else "X"


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since the machine started; 0 if unknown."""
    fields = _process_fields(pid)
    return 0 if fields is None else fields[1]


def _process_fields(pid: int) -> tuple[str, int] | None:
    """Return state and start of a process; None if it does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may contain spaces
    return fields[0], int(fields[19])


def _put_text(target: mmap.mmap, start: int, stop: int, text: str) -> None:
    """Write a text and its length; a longer text is cut."""
    data = text.encode()[: stop - start - 4]
    target[start + 4 : start + 4 + len(data)] = data
    struct.pack_into("<I", target, start, len(data))


def _get_text(data: bytes, start: int, stop: int) -> str:
    (length,) = struct.unpack_from("<I", data, start)
    return data[start + 4 : min(stop, start + 4 + length)].decode(errors="replace")
