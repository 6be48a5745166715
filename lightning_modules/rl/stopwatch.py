"""Where a step's time goes, by the host's clock: nothing waits for the device to ask it.

A rollout ends in a look at its tokens, and a reward in numbers of Python, so theirs are seconds of
the device too; of an update on a GPU it is the time to start the work, and to wait for room.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds of named parts: `with clock("reward"): ...`, or `start` here and `stop` there."""

    def __init__(self) -> None:
        """Start with none."""
        self.durations_s: dict[str, float] = {}
        self._start_times: dict[str, float] = {}

    def start(self, name: str) -> None:
        """Begin a part."""
        self._start_times[name] = time.perf_counter()

    def stop(self, name: str) -> None:
        """End it."""
        self.durations_s[f"seconds_{name}"] = time.perf_counter() - self._start_times[name]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a part."""
        self.start(name)
        yield
        self.stop(name)
