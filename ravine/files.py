"""Files: atomic write, SHA-256 of a file, and the cache folder.

    write -> .tmp-<uuid> beside the target -> fsync -> rename onto the target -> fsync the folder

The temporary file is in the folder of the target, because a rename is atomic only within one file
system. A rename from $TMPDIR on another file system is a copy, which can be interrupted.
"""

import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMP_FILE_PATTERN = re.compile(r"\.tmp-[0-9a-f]{32}")  # files of killed writers
READ_BYTES = 1 << 20  # bytes per read


def cache_folder() -> Path:
    """Return the cache folder: $XDG_CACHE_HOME/ravine, by default ~/.cache/ravine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ravine"


def compute_sha256(*paths: Path) -> str:
    """Return the SHA-256 of the concatenated contents of files, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Atomic write: yield a temporary file that replaces `path` if no error occurs.

    The data are flushed to disk (fsync) before the rename. After a crash `path` holds either the
    old or the new content, never a part of it. The temporary file is locked, so that the next
    writer in the folder removes it only if its own writer was killed.

        with atomic_write(path) as file:
            file.write(content)

    A function that needs a path may write to `file.name` instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # deletes temporary files that no process holds a lock on
    _remove_stale_temp_files(path.parent)
    temporary_path, file = _open_temp_file(path.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary_path, path)
    finally:
        # after os.replace the temporary name no longer exists
        temporary_path.unlink(missing_ok=True)
    fsync(path.parent)  # writes the new directory entry


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_temp_file(folder: Path) -> tuple[Path, IO[bytes]]:
    """Create and open a temporary file, which is locked until it is closed.

    A writer removes the temporary files that are not locked, because their writers were killed. It
    may remove the new file between its creation and its locking. Then another file is created.
    """
    for attempt in range(20):
        path = folder / f".tmp-{uuid.uuid4().hex}"
        file = path.open("wb")
        try:
            # raises BlockingIOError if another process holds the lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # not removed meanwhile
                return path, file
        except (BlockingIOError, FileNotFoundError):  # another writer is removing it
            pass
        except OSError:  # a file system without locks: stale files are not removed
            return path, file
        if attempt < 19:  # the last file is returned, although it may be removed
            file.close()
            path.unlink(missing_ok=True)
    return path, file  # the rename in `atomic_write` raises the error if it was removed


def _remove_stale_temp_files(folder: Path) -> None:
    """Remove the files of killed writers; a running writer holds a lock on its file."""
    for leftover in folder.glob(".tmp-*"):
        if TEMP_FILE_PATTERN.fullmatch(leftover.name) and not leftover.is_symlink():
            with suppress(OSError), leftover.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
