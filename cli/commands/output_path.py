"""Output path checks: an unwritable path is rejected before any computation."""

import os
from pathlib import Path

from ravine.errors import UsageError


def check_writable(name: str, flag: str, is_file: bool) -> None:
    """Raise an error if a file or folder cannot be created or written; nothing is created here."""
    path = Path(name).absolute()
    existing = path.parent if is_file else path
    while not existing.exists():
        existing = existing.parent
    reason = "" if os.access(existing, os.W_OK) else "is not writable"
    if not existing.is_dir():
        reason = "is not a folder"
    elif is_file and path.is_dir():
        existing, reason = path, "is a folder"
    if reason:
        problem = f"{name} cannot be written: {existing} {reason}"
        raise UsageError(problem, "a writable path", flag=f"--{flag}=ANOTHER/{path.name}")
