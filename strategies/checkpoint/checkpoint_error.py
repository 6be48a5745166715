"""CheckpointError: a checkpoint cannot be written or read."""

from ravine.errors import RunError


class CheckpointError(RunError):
    """A checkpoint cannot be written or read; the message gives the reason and a hint.

    `exit_status` is the exit status of a command: 1 if the run failed, 2 if the user can choose
    another file.
    """

    def __init__(self, text: str, exit_status: int = 2) -> None:
        """Store message and exit status; the default is for a file that cannot be read."""
        super().__init__(text)
        self.exit_status = exit_status
