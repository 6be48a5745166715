"""Reports of ranks, and the sentences that name a rank for which others wait.

A rank reports its position once a second: phase, step, innermost call, and for each process group
the number of collectives that it has begun. torch counts them in the backend, so that a step costs
nothing. Two rules find ranks that wait:

    blocked     the main thread has been in a collective, without CPU time, for `waiting_s`
    ahead       it has begun more collectives of a group than another rank, and nothing has changed
                for `unchanged_s`; NCCL returns before a collective has ended, so this rule is
                needed on GPUs
"""

import os
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ..monitoring.heartbeat import (
    BETWEEN,
    PHASES,
    HeartbeatRecord,
    ProcessInfo,
    process_state,
)

STACK_SIGNAL = getattr(signal, "SIGUSR2", None)  # faulthandler writes the stack; Windows has none
STACK_WAIT_S = 0.5  # until the stack of another process is written
MAX_NAMED = 4  # ranks in one line
OLD_REPORT_POLLS = 5  # a report that is older than this many polls


class RankReport(NamedTuple):
    """A rank's report, stored as a JSON list.

    Attributes:
        number: rises with each report.
        epoch: current epoch.
        num_batches: batches begun in the epoch.
        state: STEP_BEGUN, STEP_DONE or LOADER_ENDED.
        waiting_s: seconds that the main thread has waited in one collective; 0 if in none.
        is_busy: whether it computes, or is in a debugger.
        call_text: its innermost call.
        phase: one of PHASES, or "loader" while it waits for a batch.
        step: optimizer steps that were completed.
        since_s: time (seconds since 1970) of the last change of phase.
        unchanged_s: seconds without a change of position and of collectives.
        collectives: by name of a process group, the number of collectives begun.
    """

    number: int
    epoch: int
    num_batches: int
    state: int
    waiting_s: float
    is_busy: bool
    call_text: str
    phase: str = ""
    step: int = 0
    since_s: float = 0.0
    unchanged_s: float = 0.0
    collectives: dict[str, int] = {}  # noqa: RUF012 - a tuple's default is never changed


def count_collectives(ignored_group: Any) -> dict[str, int]:
    """Return by name of each process group how many collectives this rank has begun in it.

    Args:
        ignored_group: the group of the watchdog itself.
    """
    counts: dict[str, int] = {}
    for group, name in list(dist.distributed_c10d._world.pg_names.items()):
        # a rank that is not in the group, or a backend that does not count
        with suppress(RuntimeError, AttributeError):
            if group is not ignored_group:
                counts[name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return counts


def split_ranks(
    reports: Mapping[int, RankReport],
    report_age_s: Mapping[int, float],
    max_age_s: float,
    is_asynchronous: bool = False,
) -> tuple[list[int], list[int], float]:
    """Return the ranks that wait, those for which they wait, and how long all of these have waited.

    Both lists may be complete or empty: all ranks wait if they are in different collectives.

    Args:
        reports: newest report of each rank.
        report_age_s: seconds since each report.
        max_age_s: a rank whose report is older is stopped or has ended.
        is_asynchronous: whether collectives return before they have ended, as those of NCCL.
    """
    is_overdue = {rank: report_age_s[rank] > max_age_s for rank in reports}
    waiting = [rank for rank, r in reports.items() if r.waiting_s and not is_overdue[rank]]
    outside = [rank for rank in reports if rank not in waiting]
    if waiting and outside:
        return waiting, outside, min(reports[rank].waiting_s for rank in waiting)
    behind = find_ranks_behind(reports) if is_asynchronous else []
    ahead = [rank for rank in reports if rank not in behind and not is_overdue[rank]]
    if behind and ahead and not waiting:
        seconds = min(reports[rank].unchanged_s for rank in reports if not is_overdue[rank])
        return ahead, behind, seconds
    seconds = min((reports[rank].waiting_s for rank in waiting), default=0.0)
    return waiting, outside, seconds


def find_ranks_behind(reports: Mapping[int, RankReport]) -> list[int]:
    """Return the ranks that have begun fewer collectives of a group than another rank of it."""
    names = {name for report in reports.values() for name in report.collectives}
    behind: set[int] = set()
    for name in names:
        counts = {r: p.collectives[name] for r, p in reports.items() if name in p.collectives}
        maximum = max(counts.values())
        behind |= {rank for rank, count in counts.items() if count < maximum}
    return sorted(behind)


def describe_absent_ranks(
    ranks: Iterable[int],
    reports: Mapping[int, RankReport],
    report_age_s: Mapping[int, float],
    max_age_s: float,
    records: Mapping[int, HeartbeatRecord],
) -> str:
    """Name ranks that have not arrived: since when, and where in the code or in the step.

    Args:
        ranks: the ranks.
        reports: newest report of each rank.
        report_age_s: seconds since each report.
        max_age_s: a rank whose report is older is stopped or has ended.
        records: heartbeat files, by rank, of the ranks whose files can be read here.
    """
    absent = sorted(ranks)
    texts = [
        _describe_rank(
            rank, reports[rank], report_age_s[rank], report_age_s[rank] > max_age_s, records
        )
        for rank in absent[:MAX_NAMED]
    ]
    num_others = len(absent) - MAX_NAMED
    return "; ".join([*texts, *([f"and {num_others} more ranks"] if num_others > 0 else [])])


def _describe_rank(
    rank: int,
    report: RankReport,
    age_s: float,
    is_overdue: bool,
    records: Mapping[int, HeartbeatRecord],
) -> str:
    record = records.get(rank)
    # one letter: T for stopped, X and Z for ended
    state = "" if record is None else process_state(record.process)
    if not is_overdue and state not in ("T", "X", "Z"):
        return (
            f"rank {rank} has been in {report.call_text} since {clock_time(report.since_s)}, "
            f"{describe_location(report)}"
        )
    last_seen = time.time() - age_s
    location = describe_location(report)
    if record is not None and record.time_s > report.since_s:  # newer than the report
        location = describe_phase(record.phase, record.step) + _count_text(report)
    if state == "T":
        return f"rank {rank} has been stopped by a signal since {clock_time(last_seen)}, {location}"
    if state in ("X", "Z"):
        return f"the process of rank {rank} ended at {clock_time(last_seen)}, {location}"
    text = f"rank {rank} has not reported since {clock_time(last_seen)}, {location}"
    stack = "" if record is None else read_stack(record.process, stack_path(records, rank))
    return f"{text}, in {stack}" if stack else text


def describe_location(report: RankReport) -> str:
    """Return phase, step and number of collectives of a rank, for a sentence."""
    if not report.phase:  # a rank of another machine, which has not reported
        return "at an unknown step"
    return describe_phase(report.phase, report.step) + _count_text(report)


def describe_phase(phase: str, step: int) -> str:
    """Return a phase with the step to which it belongs, or which it follows.

    Args:
        phase: one of PHASES, or "loader".
        step: optimizer steps that were completed.
    """
    if phase == "loader" or phase in PHASES[:BETWEEN]:
        return f"in the {phase} of step {step + 1}"
    return f"after step {step}" if phase == PHASES[BETWEEN] else f"in the {phase} after step {step}"


def _count_text(report: RankReport) -> str:
    total = sum(report.collectives.values())
    return f", after {total} collectives" if report.collectives else ""


def describe_mismatch(reports: Mapping[int, RankReport]) -> str:
    """Name the ranks that have skipped a collective, if the numbers show it.

    Such a rank has begun fewer collectives of a group than another rank that is not ahead of it in
    the step, or as many as one that is behind it.
    """
    texts = []
    for rank, report in sorted(reports.items()):
        for name, count in report.collectives.items():
            numbers_skipped = {
                other_rank: other.collectives[name] - count + (_progress(report) > _progress(other))
                for other_rank, other in reports.items()
                if name in other.collectives and _progress(report) >= _progress(other)
            }
            other_rank = max(numbers_skipped, key=lambda key: numbers_skipped[key])
            if numbers_skipped[other_rank] > 0:
                others_count = reports[other_rank].collectives[name]
                texts.append(
                    f"rank {rank} has skipped at least {numbers_skipped[other_rank]}: it has begun "
                    f"{count} collectives of group {name}, and rank {other_rank}, which is not "
                    f"ahead of it in the step, {others_count}"
                )
                break
    return "; ".join(texts[:MAX_NAMED])


def _progress(report: RankReport) -> tuple[int, int, int]:
    """Return the position in the run, to compare ranks: epoch, batches begun, phase."""
    phase = PHASES.index(report.phase) if report.phase in PHASES else BETWEEN
    return report.epoch, report.num_batches, phase


def clock_time(seconds: float) -> str:
    """Return a time of day: 14:02:10."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def stack_path(records: Mapping[int, HeartbeatRecord], rank: int) -> Path | None:
    """Return the file to which faulthandler writes the stack of a rank."""
    record = records.get(rank)
    return None if record is None or record.folder is None else record.folder / f"stack_{rank}"


def read_stack(process: ProcessInfo, path: Path | None) -> str:
    """Make another process of this machine write its stack, and return its innermost calls.

    faulthandler writes it in the signal handler, also if the process does not release Python's
    lock. "" if the process has no such handler.
    """
    if path is None or not path.exists() or STACK_SIGNAL is None:
        return ""
    try:
        start = path.stat().st_size
        os.kill(process.pid, STACK_SIGNAL)
        time.sleep(STACK_WAIT_S)
        text = path.read_text(errors="replace")[start:]
    except OSError:
        return ""
    # lines such as:   File "/path/module.py", line 12 in step
    calls = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    return ", called from ".join(_short_call(call) for call in calls[:2])


def _short_call(line: str) -> str:
    """Return `step (module.py:12)` for a line of faulthandler."""
    path, _, remainder = line.removeprefix('File "').partition('", line ')
    number, _, function = remainder.partition(" in ")
    return f"{function} ({os.path.basename(path)}:{number})"
