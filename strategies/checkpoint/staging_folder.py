"""Atomic write of a folder: it is written under a temporary name, locked, and then renamed.

A writer holds a lock on its temporary folder. So other writers can remove the folders of killed
writers, and only those.
"""

import errno
import fcntl
import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ravine.files import fsync

from .sharded_index import looks_like_checkpoint

STAGING_PATTERN = re.compile(r"\.tmp-[0-9a-f]{32}(-old)?")  # folders of killed writers


class StagingFolder:
    """A locked temporary folder, which other writers may remove after its writer was killed.

    Another writer may remove it between creation and locking. Then another folder is created.
    """

    def __init__(self, path: Path, rank: int) -> None:
        """Store the target and the rank; rank 0 creates the folder."""
        self.path, self.rank, self.lock_fd = path, rank, None
        self.folder = path

    def __enter__(self) -> tuple[Path, OSError | None]:
        """Return the temporary folder on every rank, and the error of rank 0 if there was one."""
        error = None
        if self.rank == 0:
            try:
                self._create()
            except OSError as problem:
                error = problem
        name: list[Any] = [self.folder.name]
        dist.broadcast_object_list(name)
        self.folder = self.path.with_name(name[0])
        return self.folder, error

    def _create(self) -> None:
        """Create and lock the temporary folder; called on rank 0.

        Raises:
            OSError: a folder that is not a checkpoint exists at the target, or cannot be created.
        """
        if (
            self.path.is_dir()
            and not self.path.is_symlink()
            and not looks_like_checkpoint(self.path)
        ):
            raise OSError(errno.EEXIST, "a folder that is not a checkpoint exists there")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # temporary folders of killed writers
        remove_stale_folders(self.path.parent)
        while self.lock_fd is None:
            candidate = self.path.with_name(f".tmp-{uuid.uuid4().hex}")
            candidate.mkdir()
            self.folder = candidate
            with suppress(BlockingIOError, FileNotFoundError):  # another writer is removing it
                # _lock_folder: file descriptor of the lock; raises BlockingIOError if it is locked
                candidate_lock = _lock_folder(candidate)
                # whether the locked folder is still there, under this name
                if candidate.is_dir() and os.path.samestat(
                    os.fstat(candidate_lock), candidate.stat()
                ):
                    self.lock_fd = candidate_lock
                else:
                    os.close(candidate_lock)

    def __exit__(self, *_: Any) -> None:
        """Remove the temporary folder unless it was renamed, and release the lock."""
        if self.rank == 0:
            if self.folder != self.path:
                shutil.rmtree(self.folder, ignore_errors=True)  # unless it was renamed
            if self.lock_fd is not None:
                os.close(self.lock_fd)


def remove_stale_folders(folder: Path) -> None:
    """Remove the folders of killed writers; a running writer holds a lock on its folder."""
    for leftover in folder.glob(".tmp-*/"):
        if STAGING_PATTERN.fullmatch(leftover.name) and not leftover.is_symlink():
            with suppress(OSError):
                lock = _lock_folder(leftover)
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _lock_folder(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def replace_folder(staging: Path, path: Path) -> None:
    """Rename a temporary folder to its target, and remove an earlier folder or file there."""
    old = path.with_name(f"{staging.name}-old")
    if os.path.lexists(path):
        os.replace(path, old)
    os.replace(staging, path)
    fsync(path.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)
