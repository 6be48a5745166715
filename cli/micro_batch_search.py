"""Find the largest micro-batch that fits: `--trainer.accumulate_grad_batches=auto`.

    estimate    the bytes of a micro-batch, by `lightning estimate` in a process of its own
    trial       the same command with a number in place of auto, for a few micro-batches, in a
                process of its own, which may be killed or run out of memory
    limit       on the CPU the memory limit of the process; on a GPU its memory, by the trial

The number takes the place of the word, so the run, its config and its checkpoints are those of the
number typed by hand. All ranks get it, because the first process starts them with its arguments.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ravine.callbacks.estimates.estimate import RESERVED, format_bytes
from ravine.callbacks.monitoring.memory_limit import MemoryLimit, find_memory_limit
from ravine.errors import RunError, UsageError

from .resume_path import iter_values

KEY = "trainer.accumulate_grad_batches"
MAX_TRIALS = 3
SURE_MARGIN = 1.15  # a prediction above the limit by this factor needs no trial
GPU_RESERVED_BYTES = sum(RESERVED.values())  # context of CUDA, and cuBLAS
SCALED_CLASSES = ("activations", "temporary", "batch", "communication")
# the ranks of these are started by another program, each with the same command
LAUNCHER_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


class Trial(NamedTuple):
    """What a trial has shown: whether it fits, and its peak in bytes; 0 if it was killed."""

    fits: bool
    peak_bytes: int = 0


class Prediction(NamedTuple):
    """Bytes of a rank: those that do not depend on the micro-batch, and those of one sample."""

    fixed_bytes: float
    sample_bytes: float

    def peak(self, samples: float) -> float:
        """Return the bytes with a micro-batch of a number of samples."""
        return self.fixed_bytes + self.sample_bytes * samples


def list_divisors(number: int) -> list[int]:
    """Return the divisors of a number, the smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def choose_accumulation(
    batch_size: int,
    prediction: Prediction,
    limit_bytes: float | None,
    run_trial: Callable[[int], Trial],
) -> int | None:
    """Return the smallest number of micro-batches of a step that fits; None if no trial fits.

    The first trial is the one that the prediction prefers. Each trial corrects the prediction. The
    next trial is the neighbor that could still be the answer, and at most three trials run.

    Args:
        batch_size: samples of a step on a rank.
        prediction: of the memory.
        limit_bytes: memory of a rank; None if only a trial can show it.
        run_trial: runs a step with a number of micro-batches.
    """
    divisors = list_divisors(batch_size)
    limit = math.inf if limit_bytes is None else limit_bytes
    fitting: int | None = None  # index of the smallest divisor that fits, so far
    failing = -1  # index of the largest divisor that does not fit
    for _ in range(MAX_TRIALS):
        last = len(divisors) if fitting is None else fitting
        candidates = range(failing + 1, last)
        predicted = {i: prediction.peak(batch_size / divisors[i]) for i in candidates}
        if fitting is None:
            likely = [i for i in candidates if predicted[i] <= limit]
            index = likely[0] if likely else len(divisors) - 1
        else:
            # the neighbor, unless its memory is certainly too much
            possible = [i for i in candidates if predicted[i] <= SURE_MARGIN * limit]
            if not possible:
                break
            index = possible[0] if predicted[possible[0]] <= limit else possible[-1]
        if index not in candidates:
            break
        trial = run_trial(divisors[index])
        if trial.peak_bytes:
            error = trial.peak_bytes - predicted[index]
            prediction = prediction._replace(fixed_bytes=prediction.fixed_bytes + error)
        elif not trial.fits and predicted[index] <= limit < math.inf:
            # it was killed, so it needs more than predicted: at least the limit
            error = limit - predicted[index]
            prediction = prediction._replace(fixed_bytes=prediction.fixed_bytes + error + 1)
        if trial.fits:
            fitting = index
        else:
            failing = index
        if limit == math.inf and fitting is None:  # halve the micro-batch after an error
            half = 2 * divisors[failing]
            failing = next((i for i, d in enumerate(divisors) if d >= half), len(divisors)) - 1
    return None if fitting is None else divisors[fitting]


def resolve_accumulation(argv: list[str]) -> list[str]:
    """Replace `--trainer.accumulate_grad_batches=auto` by the number that is found.

    Args:
        argv: the command and its arguments.

    Raises:
        UsageError: the word stands where it cannot be replaced, or no micro-batch fits.
    """
    values = [value for value in iter_values(argv) if value.key == KEY]
    if not values or values[-1].value != "auto":
        return argv
    others = list(_without(argv, KEY))
    is_flag = len(others) < len(argv)
    if argv[0] != "fit" or not is_flag or "ckpt_path" in " ".join(argv):
        raise UsageError(
            f"{KEY}=auto is possible only as a flag of fit without --ckpt_path; a resumed run has "
            "the number of its checkpoint",
            flag=f"--{KEY}=auto" if argv[0] == "fit" and not is_flag else f"--{KEY}=4",
        )
    if any(word.startswith(("--print_config", "--help")) for word in argv):
        return others  # nothing is run, so no number is found
    launcher = next((v for v in LAUNCHER_VARIABLES if os.environ.get(v, "1") != "1"), None)
    if launcher is not None:
        raise UsageError(
            f"{KEY}=auto needs one command that starts all ranks, and {launcher} says that another "
            "program has started them",
            ["a number, or the same command without the launcher"],
            flag=f"--{KEY}=4",
        )
    return [*others, f"--{KEY}={find_accumulation(others)}"]


def _without(argv: list[str], key: str) -> Iterator[str]:
    """Yield the words without a flag and its value."""
    words = iter(argv)
    for word in words:
        if word == f"--{key}":
            next(words, None)
        elif not word.startswith(f"--{key}="):
            yield word


def find_accumulation(argv: list[str]) -> int:
    """Return the smallest number of micro-batches that fits, and print why.

    Args:
        argv: the command and its arguments, without `accumulate_grad_batches`.
    """
    estimate = run_estimate(argv)
    run, row = estimate["run"], _configured_row(estimate)
    if not run["divides_batch"] or not run["batch_size"]:
        raise UsageError(
            f"{KEY}=auto needs a datamodule that divides its batch by the number of micro-batches",
            ["the datamodules of Ravine"],
            flag=f"--{KEY}=1",
        )
    ranks, samples = estimate["batch"]["ranks"], estimate["batch"]["samples"]
    batch_size = max(1, run["batch_size"] // run["dp_size"])
    scaled = sum(row["bytes"].get(name, 0) for name in SCALED_CLASSES)
    fixed, gpu_bytes = row["peak"] - scaled, run["gpu_bytes"]
    limit = find_memory_limit() if gpu_bytes is None else MemoryLimit(gpu_bytes, "GPU")
    if limit is not None and gpu_bytes is None:
        # a process of the host has its libraries, and the ranks share the memory
        limit = MemoryLimit(limit.num_bytes // ranks, limit.source)
        fixed += run["process_bytes"]
    elif gpu_bytes is not None:
        fixed += GPU_RESERVED_BYTES
    prediction = Prediction(fixed, scaled / max(1, samples))
    trials: list[str] = []

    def run_trial(count: int) -> Trial:
        trial = run_steps(argv, count, limit if gpu_bytes is None else None)
        outcome = "fits" if trial.fits else "does not fit"
        peak = f", {format_bytes(trial.peak_bytes)}" if trial.peak_bytes and limit else ""
        trials.append(f"{batch_size // count} samples: {outcome}{peak}")
        return trial

    number = choose_accumulation(
        batch_size, prediction, None if limit is None else limit.num_bytes, run_trial
    )
    limit_text = "" if limit is None else f" in {format_bytes(limit.num_bytes)} ({limit.source})"
    if number is None:
        raise RunError(
            f"no micro-batch fits{limit_text} ({'; '.join(trials)})",
            hint="use a smaller model or activation checkpointing",
            flag="--trainer.callbacks+=ActivationCheckpointing",
        )
    print(
        f"accumulate_grad_batches=auto: {number}, micro-batches of {batch_size // number} samples"
        f"{limit_text} ({'; '.join(trials)})"
    )
    return number


def _configured_row(estimate: dict[str, Any]) -> dict[str, Any]:
    names = {row["name"]: row for row in estimate["layouts"]}
    return names.get(estimate["run"]["strategy"], estimate["layouts"][0])


def run_estimate(argv: list[str]) -> dict[str, Any]:
    """Return the estimate of a run with one micro-batch in a step."""
    words = ["estimate", *argv[1:], f"--{KEY}=1", "--json"]
    result = subprocess.run(_command(words), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        message = result.stderr.strip().splitlines() or ["no message"]
        raise UsageError(
            f"{KEY}=auto needs an estimate, which failed: {message[0]}",
            flag=f"--{KEY}=4",
        )
    return json.loads(result.stdout[result.stdout.index("{") :])


def run_steps(argv: list[str], count: int, limit: MemoryLimit | None) -> Trial:
    """Run a few micro-batches in a process of their own.

    The first optimizer step creates its state, so the memory of the next micro-batch counts.

    Args:
        argv: the command and its arguments.
        count: micro-batches of a step.
        limit: memory of a rank on the host; None on a GPU.
    """
    num_batches = count + min(count, 2)
    words = [*argv, f"--{KEY}={count}", f"--trainer.fast_dev_run={num_batches}"]
    process = subprocess.Popen(
        _command(words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    # the largest resident memory of the process and of the ranks that it has started
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    is_complete = process.returncode == 0
    is_memory = process.returncode in (-9, 137) or "out of memory" in errors
    if not is_complete and not is_memory:
        lines = [line for line in errors.strip().splitlines() if "error" in line]
        raise RunError(
            f"{KEY}=auto: a trial of {count} micro-batches failed, and not for its memory: "
            f"{(lines or ['no message'])[-1]}",
            hint="run the command with a number to see the whole message",
            flag=f"--{KEY}={count}",
        )
    if limit is None:
        return Trial(is_complete)
    return Trial(is_complete and peak <= limit.num_bytes, peak if is_complete else 0)


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "ravine.cli.main", *words]
