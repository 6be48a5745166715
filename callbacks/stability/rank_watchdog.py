"""RankWatchdog: name the rank for which others wait, and end a job whose ranks would hang.

    at setup          one hash of the configuration is compared
    each epoch        the lengths of the loaders are compared, where loaders have a length
    during training   a thread in each rank reports the rank's position, once a second

Rank 0 reads the reports. After `report_after_s` seconds it prints one line that names the ranks
that have not arrived, since when, and where they are. It ends the job in two cases: the loader of
one rank has ended an epoch in which another rank has begun a later batch; or ranks wait in a
collective for `limit_s` seconds while another rank is not in one. A training step needs no
additional collective or device synchronization.

Each rank also writes its reports to its heartbeat file. If rank 0 itself is stopped, the lowest
rank of each machine that still runs reads these files and prints the line.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import IO, Any, NamedTuple

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ravine.errors import UsageError
from ravine.strategies.rank_agreement import (
    RankMismatchError,
    check_same_config,
    collect_script_config,
)

from ..base import find_callbacks
from ..monitoring.heartbeat import (
    FOLDER,
    PHASES,
    Heartbeat,
    HeartbeatRecord,
    process_state,
    read_heartbeats,
)
from .rank_reports import (
    OLD_REPORT_POLLS,
    STACK_SIGNAL,
    RankReport,
    count_collectives,
    describe_absent_ranks,
    describe_location,
    describe_mismatch,
    split_ranks,
)

POLL_INTERVAL_S = 1.0  # seconds between two reports of a rank
MAX_BLOCKED_CPU_S = 0.002  # seconds of CPU time per poll; a waiting thread uses less
BUSY_FACTOR = 3  # a rank that computes may take this many times the limit
ALL_WAIT_S = 5.0  # seconds that all ranks wait before unequal loaders are reported as the reason
GRACE_S = 3.0  # seconds in which all ranks can read the verdict
UNKNOWN_REPORT = RankReport(-1, 0, 0, 0, 0.0, False, "an unknown call")
LIBRARY_FOLDERS = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(L.__file__)))


StepPosition = tuple[int, int, int]  # epoch, number of batches begun, state of the last batch
# The states: in its step; between two steps; the loader has no more batches.
STEP_BEGUN, STEP_DONE, LOADER_ENDED = range(3)


class RankWatchdog(Callback):
    """End the job with status 1 and one line that names the rank, if ranks would hang.

    After `report_after_s` seconds, a line names the rank for which the others wait; after
    `limit_s` seconds the job ends.

    Ravine's Trainer adds it if there are several ranks. Example: `RankWatchdog(limit_s=1800)`.

    Args:
        limit_s: seconds that ranks may wait in a collective for a rank that is outside it and idle;
            a rank that computes may take three times as long.
        report_after_s: seconds that ranks wait before a line names the rank that is missing.

    Raises:
        RankMismatchError: at setup or at the start of an epoch, on all ranks.
    """

    def __init__(self, limit_s: float = 300, report_after_s: float = 30) -> None:
        """Set the limits.

        Args:
            limit_s: seconds that ranks may wait in a collective for a rank that is outside it.
            report_after_s: seconds before a line names the rank that is missing.
        """
        limits = {"limit_s": (limit_s, 300), "report_after_s": (report_after_s, 30)}
        for name, (value, default) in limits.items():
            if not value > 0:
                raise UsageError(
                    f"RankWatchdog: {name}={value} is not a positive time",
                    ["seconds above 0"],
                    hint=f"use {name}={default}",
                    flag=f"--trainer.callbacks.{type(self).__name__}.{name}={default}",
                )
        self.limit_s, self.report_after_s = limit_s, report_after_s
        self._group: Any = None  # process group on the CPU; None without several ranks
        self._store: Any = None  # key-value store on rank 0, with the reports of the ranks
        self._thread: threading.Thread | None = None
        self._store_thread: threading.Thread | None = None  # of the ranks other than 0
        self._stop_event = threading.Event()  # ends the thread
        # epoch, batches begun, and state of the last batch (STEP_BEGUN, STEP_DONE, LOADER_ENDED)
        self._position: StepPosition = (0, 0, STEP_BEGUN)
        self._rank = self._num_ranks = 0
        self._trainer: Any = None
        self._heartbeat = Heartbeat()  # of the trainer
        self._temporary_folder: str | None = None  # of heartbeat files without a run folder
        self._stack_file: IO[str] | None = None  # to which faulthandler writes this rank's stack
        self._report_text = ""  # newest report of this rank
        # monotonic time of the last reply of rank 0's store; on the other ranks only
        self._reply_time = 0.0
        self._reported_key: Any = None  # of the last line, so that it is printed once

    @property
    def state_key(self) -> str:
        """Return a constant key: a run has one RankWatchdog."""
        return "RankWatchdog"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare the configurations of the ranks."""
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        self._trainer, self._rank, self._num_ranks = trainer, dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        check_same_config(collect_script_config(trainer), self._group)
        heartbeats = find_callbacks(trainer, Heartbeat)
        if not heartbeats:
            heartbeats = [Heartbeat()]
            trainer.callbacks = [*trainer.callbacks, *heartbeats]  # type: ignore[attr-defined]
        self._heartbeat = heartbeats[0]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the thread that reports positions and, on rank 0, checks them."""
        if self._group is None:
            return
        self._position = (trainer.current_epoch, 0, STEP_BEGUN)
        address = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]
        message = [0]  # port of the store, which rank 0 sends to all
        if self._rank == 0:
            # port 0: the system chooses a free one
            self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            message = [self._store.port]
        dist.broadcast_object_list(message, group=self._group)
        if self._rank != 0:
            (port,) = message
            self._store = TCPStore(address, port)
        self._open_heartbeat(trainer)
        self._stop_event.clear()
        self._reported_key, self._reply_time = None, time.monotonic()
        if self._rank != 0:
            # a thread of its own: an operation of the store blocks while rank 0 is stopped
            self._store_thread = threading.Thread(
                target=self._run_store_loop, args=(self._store,), daemon=True
            )
            self._store_thread.start()
        thread_id = threading.get_ident()  # of this thread, which the new one watches
        self._thread = threading.Thread(target=self._run_watch_loop, args=(thread_id,), daemon=True)
        self._thread.start()
        self._compare_loader_lengths(trainer)

    def _open_heartbeat(self, trainer: L.Trainer) -> None:
        """Open the heartbeat file, and let faulthandler write the stack at a signal."""
        heartbeat = self._heartbeat
        if getattr(trainer, "run_dir", None) is None and heartbeat.folder is None:
            # a trainer without a run folder: one on the machine of rank 0
            message = [tempfile.mkdtemp(prefix="ravine-") if self._rank == 0 else ""]
            dist.broadcast_object_list(message, group=self._group)
            self._temporary_folder = message[0]
            heartbeat.folder = os.path.join(message[0], FOLDER)
        heartbeat.open(trainer)
        if heartbeat.path is None or STACK_SIGNAL is None:
            return
        if signal.getsignal(STACK_SIGNAL) is signal.SIG_DFL:  # else it has another use
            with suppress(OSError):
                path = heartbeat.path.with_name(f"stack_{self._rank}")
                self._stack_file = path.open("w")
                faulthandler.register(STACK_SIGNAL, self._stack_file, all_threads=False)

    def _close_heartbeat(self) -> None:
        """Remove the files of this rank."""
        if self._stack_file is not None and STACK_SIGNAL is not None:
            faulthandler.unregister(STACK_SIGNAL)
            with suppress(OSError):
                self._stack_file.close()
                os.unlink(self._stack_file.name)
            self._stack_file = None
        self._heartbeat.close()
        if self._temporary_folder is not None:
            with suppress(OSError):
                os.rmdir(self._temporary_folder)  # fails while other ranks have files
            self._heartbeat.folder = self._temporary_folder = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the lengths of the loaders, which may be new."""
        if self._group is not None:
            self._compare_loader_lengths(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the position for the reports."""
        self._position = (trainer.current_epoch, batch_idx + 1, STEP_BEGUN)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Record the end of the step, or of the loader."""
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._position = (*self._position[:2], LOADER_ENDED if last else STEP_DONE)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait for the other ranks while the thread still runs, then stop it."""
        if self._thread is not None:
            dist.barrier(group=self._group)
        self._stop_thread()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop the thread: the exception is the reason why this rank ends."""
        self._stop_thread()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Destroy the process group."""
        self._stop_thread()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _stop_thread(self) -> None:
        self._stop_event.set()
        for thread in (self._thread, self._store_thread):
            if thread is not None:
                thread.join(GRACE_S)
        if self._thread is not None:
            self._close_heartbeat()
        self._thread = self._store_thread = self._store = None

    def _compare_loader_lengths(self, trainer: L.Trainer) -> None:
        """Raise RankMismatchError if the training loaders of the ranks have unequal lengths.

        Loaders without a length are not compared. Unequal lengths are allowed if `max_steps` ends
        the run within the shortest loader. Called on all ranks.
        """
        lengths: list[Any] = [None] * self._num_ranks  # number of batches by rank
        dist.all_gather_object(lengths, trainer.num_training_batches, group=self._group)
        if float("inf") in lengths or min(lengths) == max(lengths):
            return
        shortest, longest = min(lengths), max(lengths)
        # batches of this epoch before a resume
        num_done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.max_steps != -1:
            steps_left = trainer.max_steps - trainer.global_step
            if num_done + steps_left * trainer.accumulate_grad_batches <= shortest:
                return
        raise RankMismatchError(
            f"the training loader has {shortest} batches on rank {lengths.index(shortest)} and "
            f"{longest} on rank {lengths.index(longest)}, and every rank must take the same number "
            "of steps",
            hint=f"pass limit_train_batches={shortest} to Trainer, or give each rank a shard of "
            "equal length",
            flag=f"--trainer.limit_train_batches={shortest}",
        )

    def _run_watch_loop(self, thread_id: int) -> None:
        """Report the position of the main thread every second, until training ends.

        This is the body of the watching thread. Rank 0 also reads all reports, and writes a verdict
        to the store if the job cannot continue. The other ranks act if rank 0 is stopped.

        Args:
            thread_id: identifier of the main thread.
        """
        wait_timer = _WaitTimer(thread_id)
        # for each rank: number of its last report, and time of its arrival
        last_arrivals: dict[int, tuple[int, float]] = {}
        number = 0
        while not self._stop_event.wait(POLL_INTERVAL_S):
            store = self._store
            number += 1
            report = self._make_report(number, wait_timer)
            self._report_text = json.dumps(report)
            self._heartbeat.write_report(self._report_text)
            if self._rank != 0:
                silence_s = time.monotonic() - self._reply_time
                if silence_s > OLD_REPORT_POLLS * POLL_INTERVAL_S:
                    self._act_for_rank_zero(last_arrivals, report)
                continue
            with suppress(RuntimeError):
                store.set("0", self._report_text)
                # a rank that was stopped early has not reported
                unknown = dict.fromkeys(range(self._num_ranks), UNKNOWN_REPORT)
                reports = unknown | _load_reports(store, range(self._num_ranks))
                _update_arrivals(last_arrivals, reports)
                if verdict := self._find_stop_reason(reports, last_arrivals):
                    self._end_job(store, verdict)
                self._report_absent_ranks(reports, last_arrivals)

    def _make_report(self, number: int, wait_timer: "_WaitTimer") -> RankReport:
        """Return the report of this rank."""
        position = self._position
        # a pipeline sends messages, which a backend counts as well, and not the same on all ranks
        has_pipeline = getattr(self._trainer.strategy, "pipeline", None) is not None
        collectives = {} if has_pipeline else count_collectives(self._group)
        # of the main thread: seconds in one collective (0 if in none), whether it computes, the
        # text of its innermost call, whether it loads data, and seconds without a change
        state = wait_timer.measure((position, collectives))
        heartbeat = self._heartbeat
        return RankReport(
            number,
            *position,
            state.waiting_s,
            state.is_busy,
            state.call_text,
            "loader" if state.is_in_loader else PHASES[heartbeat.phase],
            heartbeat.step,
            heartbeat.time_s,
            state.unchanged_s,
            collectives,
        )

    def _run_store_loop(self, store: Any) -> None:
        """Send the reports of this rank to rank 0, and end this rank at a verdict.

        This is the body of the second thread of the ranks other than 0.
        """
        lost_s = 0.0  # seconds since the store could not be reached
        while not self._stop_event.wait(POLL_INTERVAL_S):
            try:
                if self._report_text:
                    store.set(str(self._rank), self._report_text)
                if store.check(["verdict"]):
                    _silence_stderr()  # rank 0 prints the only message
                    self._close_heartbeat()
                    store.set(f"read {self._rank}", "")  # rank 0 waits for this mark
                    os._exit(1)  # the main thread waits in a collective, so no exception ends it
                lost_s, self._reply_time = 0.0, time.monotonic()
            except RuntimeError:  # rank 0 has ended; the collective may raise an error, or hang
                lost_s += POLL_INTERVAL_S
                text = self._report_text
                is_waiting = bool(text) and RankReport(*json.loads(text)).waiting_s > 0
                if is_waiting and lost_s > 10 * GRACE_S and not self._stop_event.is_set():
                    os._exit(1)

    def _act_for_rank_zero(
        self, last_arrivals: dict[int, tuple[int, float]], own_report: RankReport
    ) -> None:
        """Read the heartbeat files of this machine, and name the absent ranks.

        Called while the store of rank 0 does not reply.

        The lowest rank that runs prints the line. After `limit_s` each rank ends itself.
        """
        if self._heartbeat.path is None or not own_report.waiting_s:
            return
        records = read_heartbeats(self._heartbeat.path.parent)
        reports = {
            rank: RankReport(*json.loads(record.report))
            for rank, record in records.items()
            if record.report
        }
        _update_arrivals(last_arrivals, reports)
        if 0 not in reports:  # on another machine
            reports[0], last_arrivals[0] = UNKNOWN_REPORT, (UNKNOWN_REPORT.number, self._reply_time)
        ages = _ages(last_arrivals)
        is_lowest = all(
            ages[rank] > OLD_REPORT_POLLS * POLL_INTERVAL_S for rank in reports if rank < self._rank
        )
        if is_lowest:
            self._report_absent_ranks(reports, last_arrivals)
        # a process that has ended breaks the connections of the others, which raises an error
        is_stopped = 0 in records and process_state(records[0].process) == "T"
        if is_stopped and own_report.waiting_s > self.limit_s and not self._stop_event.is_set():
            if is_lowest:
                text = self._describe_absence(reports, last_arrivals)
                os.write(2, f"ravine: error: {text}\n".encode())
            os._exit(1)

    def _report_absent_ranks(
        self, reports: dict[int, RankReport], last_arrivals: dict[int, tuple[int, float]]
    ) -> None:
        """Print one line if ranks have waited for `report_after_s`; once for each wait."""
        ages = _ages(last_arrivals)
        waiting, outside, seconds = self._split_ranks(reports, ages)
        if not waiting or seconds < self.report_after_s:
            return
        positions = {rank: (reports[rank][1:4], reports[rank].collectives) for rank in waiting}
        key = (sorted(outside), positions)
        if key == self._reported_key or self._stop_event.is_set():
            return
        self._reported_key = key
        os.write(2, f"ravine: {self._describe_absence(reports, last_arrivals)}\n".encode())

    def _split_ranks(
        self, reports: dict[int, RankReport], ages: dict[int, float]
    ) -> tuple[list[int], list[int], float]:
        """Return the ranks that wait, those for which they wait, and the seconds."""
        # NCCL returns before a collective has ended, so the main thread may wait elsewhere
        is_asynchronous = self._trainer.strategy.root_device.type == "cuda"
        return split_ranks(reports, ages, OLD_REPORT_POLLS * POLL_INTERVAL_S, is_asynchronous)

    def _describe_absence(
        self, reports: dict[int, RankReport], last_arrivals: dict[int, tuple[int, float]]
    ) -> str:
        """Return which ranks wait, for how long, and where the others are."""
        max_age_s, ages = OLD_REPORT_POLLS * POLL_INTERVAL_S, _ages(last_arrivals)
        waiting, outside, seconds = self._split_ranks(reports, ages)
        first = min(waiting, default=self._rank)
        if not outside:
            return describe_unmatched(reports, seconds)
        records: dict[int, HeartbeatRecord] = {}
        if self._heartbeat.path is not None:
            records = read_heartbeats(self._heartbeat.path.parent)
        absent = describe_absent_ranks(outside, reports, ages, max_age_s, records)
        return (
            f"{absent}; rank {first} has waited for {seconds:.0f} s in "
            f"{reports[first].call_text}, {describe_location(reports[first])}"
        )

    def _find_stop_reason(
        self, reports: dict[int, RankReport], last_arrivals: dict[int, tuple[int, float]]
    ) -> str:
        """Return the reason why the job cannot continue, for the user; empty if it can.

        Either the loader of one rank has ended, or ranks wait too long in a collective while other
        ranks are outside of it. A rank whose report is old counts as outside.

        Args:
            reports: the newest report of each rank.
            last_arrivals: number and time of arrival of each rank's newest report.
        """
        report_age_s = _ages(last_arrivals)
        positions = {rank: (r.epoch, r.num_batches, r.state) for rank, r in reports.items()}
        if text := describe_ended_loader(positions):
            return text
        ranks_outside = [
            rank
            for rank, report in reports.items()
            if report.waiting_s == 0 or report_age_s[rank] > OLD_REPORT_POLLS * POLL_INTERVAL_S
        ]
        ranks_waiting = [rank for rank in reports if rank not in ranks_outside]
        if not ranks_waiting:
            return ""
        # how long all of the waiting ranks have waited
        seconds = min(reports[rank].waiting_s for rank in ranks_waiting)
        has_all_waiting = not ranks_outside and seconds > ALL_WAIT_S
        if has_all_waiting and (text := describe_ended_loader(positions, between_steps=True)):
            return text
        # a rank that computes, instead of being blocked, gets more time
        is_busy = any(reports[rank].is_busy for rank in ranks_outside)
        if seconds < self.limit_s * (BUSY_FACTOR if is_busy else 1):
            return ""
        text = self._describe_absence(reports, last_arrivals)
        if not ranks_outside:
            return f"{text}; call the same collectives in the same order on every rank"
        return f"{text}; if it needs longer, use RankWatchdog(limit_s={2 * self.limit_s:g})"

    def _end_job(self, store: Any, text: str) -> None:
        """End all ranks: their main threads wait in collectives and cannot be interrupted."""
        if self._stop_event.is_set():
            return
        sys.stdout.flush()
        os.write(2, f"ravine: error: {text}\n".encode())
        folder = None if self._heartbeat.path is None else self._heartbeat.path.parent
        _silence_stderr()  # the first rank that ends makes the collectives of the others fail
        store.set("verdict", text)
        read_marks = [f"read {rank}" for rank in range(1, self._num_ranks)]
        end = time.monotonic() + GRACE_S
        while not store.check(read_marks) and time.monotonic() < end:
            time.sleep(0.01)
        if (launcher := self._trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)  # a rank that has not ended by itself
        folder = self._temporary_folder or folder
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # no rank was killed by the system
        os._exit(1)


def _silence_stderr() -> None:
    """Discard all further output to stderr."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def describe_ended_loader(positions: dict[int, StepPosition], between_steps: bool = False) -> str:
    """Describe a loader that ended before the loader of another rank; empty if there is none.

    Args:
        positions: position of each rank: epoch, number of batches begun, and state of the last
            batch (STEP_BEGUN, STEP_DONE or LOADER_ENDED).
        between_steps: also count a rank that has batches left but has not begun the next. This
            alone is no proof, because `max_steps` may end the run of that rank here.
    """
    for rank, (epoch, batches, state) in sorted(positions.items()):
        for other_rank, (other_epoch, other_batches, other_state) in sorted(positions.items()):
            continues = other_batches > batches
            if between_steps and other_batches == batches and other_state == STEP_DONE:
                continues = True  # not LOADER_ENDED: it has batches left
            if state == LOADER_ENDED and other_epoch == epoch and continues:
                return (
                    f"the training loader of rank {rank} ended epoch {epoch} after {batches}"
                    f" batches, and that of rank {other_rank} continues; every rank must take the"
                    " same number of steps; give each rank a shard of equal length, or pass"
                    f" limit_train_batches={batches} to Trainer"
                )
    return ""


def describe_unmatched(reports: dict[int, RankReport], seconds: float) -> str:
    """Describe ranks that all wait in collectives, and which of them has begun fewer."""
    calls = "; ".join(
        f"rank {rank} in {reports[rank].call_text}, {describe_location(reports[rank])}"
        for rank in sorted(reports)[:4]
    )
    skipped = describe_mismatch(reports)
    return (
        f"all ranks have waited for {seconds:.0f} s in collectives that do not match: {calls}"
        + (f"; {skipped}" if skipped else "")
    )


class _ThreadState(NamedTuple):
    """What the main thread does: see RankReport."""

    waiting_s: float
    is_busy: bool
    call_text: str
    is_in_loader: bool
    unchanged_s: float


class _WaitTimer:
    """Measures how long one thread of this process has waited in one collective."""

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        has_clock = hasattr(time, "pthread_getcpuclockid")  # macOS has none
        self.clock = time.pthread_getcpuclockid(thread_id) if has_clock else None
        self.cpu_s, self.waiting_since = self._cpu_time(), 0.0
        self.position: Any = None
        self.unchanged_since = time.monotonic()

    def measure(self, position: Any) -> _ThreadState:
        """Return what the thread does; `position` changes whenever the rank makes progress."""
        cpu_s, now = self._cpu_time(), time.monotonic()
        is_blocked = cpu_s - self.cpu_s < MAX_BLOCKED_CPU_S
        frame = sys._current_frames().get(self.thread_id)
        if position != self.position:
            self.unchanged_since = now
        if not (is_blocked and in_collective(frame) and position == self.position):
            self.waiting_since = now
        self.cpu_s, self.position = cpu_s, position
        return _ThreadState(
            now - self.waiting_since,
            not is_blocked or in_debugger(frame),
            describe_frames(frame),
            in_loader(frame),
            now - self.unchanged_since,
        )

    def _cpu_time(self) -> float:
        return 0.0 if self.clock is None else time.clock_gettime(self.clock)


def in_collective(frame: FrameType | None) -> bool:
    """Whether the innermost call is one that waits for other ranks."""
    if frame is None:
        return False
    file = frame.f_code.co_filename
    distributed = "/torch/distributed/" in file and "/checkpoint/" not in file
    return distributed or file.endswith("/torch/autograd/graph.py")


def in_loader(frame: FrameType | None) -> bool:
    """Whether the thread waits for the next batch of a loader."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(("/loops/fetchers.py", "/utils/data/dataloader.py")):
            return True
        frame = frame.f_back
    return False


def in_debugger(frame: FrameType | None) -> bool:
    """Whether the thread is in a debugger."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(("/pdb.py", "/bdb.py")):
            return True
        frame = frame.f_back
    return False


def describe_frames(frame: FrameType | None) -> str:
    """Return the innermost call with file and line, and the innermost outside of libraries."""
    if frame is None:
        return "no Python code"
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename.startswith((*LIBRARY_FOLDERS, "<")):
        outer = outer.f_back
    frames = [frame] if outer is None or outer is frame else [frame, outer]
    return ", called from ".join(
        f"{shown_frame.f_code.co_name} "
        f"({os.path.basename(shown_frame.f_code.co_filename)}:{shown_frame.f_lineno})"
        for shown_frame in frames
    )


def _load_reports(store: Any, ranks: Any) -> dict[int, RankReport]:
    """Return the reports by rank, without ranks that have not reported."""
    return {r: RankReport(*json.loads(store.get(str(r)))) for r in ranks if store.check([str(r)])}


def _update_arrivals(
    last_arrivals: dict[int, tuple[int, float]], reports: dict[int, RankReport]
) -> None:
    """Note the time of each report that is new.

    Args:
        last_arrivals: number and time of arrival of each rank's newest report; updated here.
        reports: the newest report of each rank.
    """
    now = time.monotonic()
    for rank, report in reports.items():
        if rank not in last_arrivals or last_arrivals[rank][0] != report.number:
            last_arrivals[rank] = (report.number, now)


def _ages(last_arrivals: dict[int, tuple[int, float]]) -> dict[int, float]:
    """Return the seconds since the newest report of each rank."""
    now = time.monotonic()
    return {rank: now - time_s for rank, (_, time_s) in last_arrivals.items()}
