"""Places to write: one that cannot be written is refused before anything is computed for it."""

import os
from pathlib import Path

from ravine.errors import UsageError


def check(name: str, flag: str, file: bool) -> None:
    """Refuse a file, or a folder, that cannot be made or written; nothing is made yet."""
    path = Path(name).absolute()
    there = path.parent if file else path
    while not there.exists():
        there = there.parent
    why = "" if os.access(there, os.W_OK) else "may not be written"
    if not there.is_dir():
        why = "is no folder"
    elif file and path.is_dir():
        there, why = path, "is a folder"
    if why:
        wrong = f"{name} cannot be written: {there} {why}"
        raise UsageError(wrong, ["a place of your own"], flag=f"--{flag}=ANOTHER/{path.name}")
