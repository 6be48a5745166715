"""Stopwatch: wall-clock seconds of each phase of a training step, without device synchronization.

A rollout ends with a read of its tokens, and a reward with Python numbers. So their times include
the device's time. The time of an update on a GPU is only the time to launch its kernels, and to
wait for space in the queue.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds of named phases: `with stopwatch("reward"): ...`, or `start` and `stop`."""

    def __init__(self) -> None:
        """Start without any phase."""
        self.durations_s: dict[str, float] = {}
        self._start_times: dict[str, float] = {}

    def start(self, name: str) -> None:
        """Start a phase."""
        self._start_times[name] = time.perf_counter()

    def stop(self, name: str) -> None:
        """Stop a phase and store its duration in seconds."""
        self.durations_s[f"{name}_s"] = time.perf_counter() - self._start_times[name]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the duration of a `with` block."""
        self.start(name)
        yield
        self.stop(name)
