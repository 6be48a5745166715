"""CheckpointError: why a checkpoint cannot be written or read, and what to do, in one line."""

from ravine.errors import RunError


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read; the text says why and what to do, in one line.

    `exit_status` is what a command ends with: 1 where the run failed, 2 where the user can choose
    another file.
    """

    def __init__(self, text: str, exit_status: int = 2) -> None:
        """Store the text; the default exit status is that of a file that cannot be read."""
        super().__init__(text)
        self.exit_status = exit_status
