"""CheckpointError: a checkpoint cannot be written or read."""

from collections.abc import Iterable

from ravine.errors import RunError


class CheckpointError(RunError):
    """A checkpoint cannot be written or read.

    `exit_status` is the exit status of a command: 1 if the run failed, 2 if the user can choose
    another file.
    """

    def __init__(
        self,
        problem: str,
        allowed: Iterable[object] | str = (),
        hint: str = "",
        *,
        flag: str = "",
        exit_status: int = 2,
    ) -> None:
        """Store the parts of a UsageError, and the exit status."""
        super().__init__(problem, allowed, hint, flag=flag)
        self.exit_status = exit_status
