"""RankWatchdog: end a distributed job with an error line if its ranks take different steps.

    at setup          one hash of the configuration is compared
    each epoch        the lengths of the loaders are compared, where loaders have a length
    during training   a thread in each rank reports the rank's position, once a second

Rank 0 reads the reports. It ends the job in two cases: the loader of one rank has ended an epoch in
which another rank has begun a later batch; or ranks wait in a collective for `limit_s` seconds
while another rank is not in one. A training step needs no additional collective or device
synchronization.
"""

import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NamedTuple

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

POLL_INTERVAL_S = 1.0  # seconds between two reports of a rank
MAX_BLOCKED_CPU_S = 0.002  # seconds of CPU time per poll; a waiting thread uses less
BUSY_FACTOR = 3  # a rank that computes may take this many times the limit
ALL_WAIT_S = 5.0  # seconds that all ranks wait before unequal loaders are reported as the reason
GRACE_S = 3.0  # seconds in which all ranks can read the verdict
LIBRARY_FOLDERS = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(L.__file__)))


StepPosition = tuple[int, int, int]  # epoch, number of batches begun, state of the last batch
# The states: in its step; between two steps; the loader has no more batches.
STEP_BEGUN, STEP_DONE, LOADER_ENDED = range(3)


class _Report(NamedTuple):
    """A rank's report to rank 0, stored as a JSON list."""

    number: int  # rises with each report
    epoch: int
    num_batches: int  # batches begun in the epoch
    state: int  # STEP_BEGUN, STEP_DONE or LOADER_ENDED
    waiting_s: float  # seconds that the rank has waited in one collective; 0 if in none
    is_busy: bool  # whether the rank computes, or is in a debugger
    call_text: str  # its innermost call


class RankWatchdog(Callback):
    """End the job with status 1 and one line that names the rank, if ranks would hang.

    Ravine's Trainer adds it if there are several ranks. Example: `RankWatchdog(limit_s=1800)`.

    Args:
        limit_s: seconds that ranks may wait in a collective for a rank that is outside it and idle;
            a rank that computes may take three times as long.

    Raises:
        RankMismatchError: at setup or at the start of an epoch, on all ranks.
    """

    def __init__(self, limit_s: float = 300) -> None:
        """Set the limit.

        Args:
            limit_s: seconds that ranks may wait in a collective for a rank that is outside it.
        """
        if limit_s <= 0:
            raise UsageError(
                f"RankWatchdog: limit_s={limit_s} is not a positive time",
                ["seconds above 0"],
                hint="use limit_s=300",
                flag=f"--trainer.callbacks.{type(self).__name__}.limit_s=300",
            )
        self.limit_s = limit_s
        self._group: Any = None  # process group on the CPU; None without several ranks
        self._store: Any = None  # key-value store on rank 0, with the reports of the ranks
        self._thread: threading.Thread | None = None
        self._stop_event = threading.Event()  # ends the thread
        # epoch, batches begun, and state of the last batch (STEP_BEGUN, STEP_DONE, LOADER_ENDED)
        self._position: StepPosition = (0, 0, STEP_BEGUN)
        self._rank = self._num_ranks = 0
        self._trainer: Any = None

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
        self._stop_event.clear()
        thread_id = threading.get_ident()  # of this thread, which the new one watches
        self._thread = threading.Thread(target=self._run_watch_loop, args=(thread_id,), daemon=True)
        self._thread.start()
        self._compare_loader_lengths(trainer)

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
        if self._thread is not None:
            self._thread.join(GRACE_S)
        self._thread = self._store = None

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
        to the store if the job cannot continue. The other ranks end at a verdict.

        Args:
            thread_id: identifier of the main thread.
        """
        wait_timer = _WaitTimer(thread_id)
        lost_s = 0.0  # seconds since the store could not be reached
        # on rank 0, for each rank: number of its last report, and time of its arrival
        last_arrivals: dict[int, tuple[int, float]] = {}
        number = 0
        while not self._stop_event.wait(POLL_INTERVAL_S):
            store = self._store
            number += 1
            epoch, num_batches, state = self._position
            # of the main thread: seconds in one collective (0 if in none), whether it computes,
            # and the text of its innermost call
            waiting_s, is_busy, call_text = wait_timer.measure(self._position)
            report = _Report(number, epoch, num_batches, state, waiting_s, is_busy, call_text)
            try:
                store.set(str(self._rank), json.dumps(report))
                if self._rank == 0:
                    reports = _load_reports(store, range(self._num_ranks))
                    if verdict := self._find_stop_reason(reports, last_arrivals):
                        self._end_job(store, verdict)
                elif store.check(["verdict"]):
                    _silence_stderr()  # rank 0 prints the only message
                    store.set(f"read {self._rank}", "")  # rank 0 waits for this mark
                    os._exit(1)  # the main thread waits in a collective, so no exception ends it
                lost_s = 0.0
            except RuntimeError:  # rank 0 has ended; the collective may raise an error, or hang
                lost_s += POLL_INTERVAL_S
                if waiting_s and lost_s > 10 * GRACE_S and not self._stop_event.is_set():
                    os._exit(1)

    def _find_stop_reason(
        self, reports: dict[int, _Report], last_arrivals: dict[int, tuple[int, float]]
    ) -> str:
        """Return the reason why the job cannot continue, for the user; empty if it can.

        Either the loader of one rank has ended, or ranks wait too long in a collective while other
        ranks are outside of it. A rank whose report is old counts as outside.

        Args:
            reports: the newest report of each rank.
            last_arrivals: number and time of arrival of each rank's newest report; updated here.
        """
        now = time.monotonic()
        for rank, report in reports.items():
            if rank not in last_arrivals or last_arrivals[rank][0] != report.number:
                last_arrivals[rank] = (report.number, now)
        report_age_s = {rank: now - time_s for rank, (_, time_s) in last_arrivals.items()}
        positions = {rank: (r.epoch, r.num_batches, r.state) for rank, r in reports.items()}
        if text := describe_ended_loader(positions):
            return text
        ranks_outside = [
            rank
            for rank, report in reports.items()
            if report.waiting_s == 0 or report_age_s[rank] > 5 * POLL_INTERVAL_S
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
        if not ranks_outside:
            calls = "; ".join(
                f"rank {rank} in {reports[rank].call_text}" for rank in sorted(ranks_waiting)[:4]
            )
            return (
                f"all ranks have waited for {seconds:.0f} s in collectives that do not match: "
                f"{calls}; call the same collectives in the same order on every rank"
            )
        outside_text = "; ".join(
            f"rank {rank} is in {reports[rank].call_text}" for rank in sorted(ranks_outside)[:4]
        )
        first = min(ranks_waiting)
        return (
            f"{outside_text} and does not reach the collective in which rank {first} has waited for"
            f" {seconds:.0f} s, at batch {reports[first].num_batches} of epoch"
            f" {reports[first].epoch}; if it needs longer, use"
            f" RankWatchdog(limit_s={2 * self.limit_s:g})"
        )

    def _end_job(self, store: Any, text: str) -> None:
        """End all ranks: their main threads wait in collectives and cannot be interrupted."""
        if self._stop_event.is_set():
            return
        sys.stdout.flush()
        os.write(2, f"ravine: error: {text}\n".encode())
        _silence_stderr()  # the first rank that ends makes the collectives of the others fail
        store.set("verdict", text)
        read_marks = [f"read {rank}" for rank in range(1, self._num_ranks)]
        end = time.monotonic() + GRACE_S
        while not store.check(read_marks) and time.monotonic() < end:
            time.sleep(0.01)
        if (launcher := self._trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)  # a rank that has not ended by itself
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


class _WaitTimer:
    """Measures how long one thread of this process has waited in one collective."""

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        has_clock = hasattr(time, "pthread_getcpuclockid")  # macOS has none
        self.clock = time.pthread_getcpuclockid(thread_id) if has_clock else None
        self.cpu_s, self.last_time, self.waiting_since = self._cpu_time(), time.monotonic(), 0.0
        self.position: Any = None

    def measure(self, position: Any) -> tuple[float, bool, str]:
        """Return seconds in one collective (0: none), whether it computes, its innermost call."""
        cpu_s, now = self._cpu_time(), time.monotonic()
        is_blocked = cpu_s - self.cpu_s < MAX_BLOCKED_CPU_S
        frame = sys._current_frames().get(self.thread_id)
        if not (is_blocked and in_collective(frame) and position == self.position):
            self.waiting_since = now
        self.cpu_s, self.position = cpu_s, position
        return (
            now - self.waiting_since,
            not is_blocked or in_debugger(frame),
            describe_frames(frame),
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


def _load_reports(store: Any, ranks: Any) -> dict[int, _Report]:
    """Return the reports by rank, without ranks that have not reported."""
    return {r: _Report(*json.loads(store.get(str(r)))) for r in ranks if store.check([str(r)])}
