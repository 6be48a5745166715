"""Where a step's time goes, by the host's clock: nothing waits for the device to ask it.

A rollout ends in a look at its tokens, and a reward in numbers of Python, so theirs are seconds of
the device too; of an update on a GPU it is the time to start the work, and to wait for room.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of named parts: `with clock("reward"): ...`, or `start` here and `stop` there."""

    def __init__(self) -> None:
        """Start with none."""
        self.seconds: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    def start(self, part: str) -> None:
        """Begin a part."""
        self._begun[part] = time.perf_counter()

    def stop(self, part: str) -> None:
        """End it."""
        self.seconds[f"seconds_{part}"] = time.perf_counter() - self._begun[part]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a part."""
        self.start(part)
        yield
        self.stop(part)
