"""Cleaning: list the requested files in the folders of runs, then delete them.

    checkpoints    neither the newest nor a best one of any run
    evaluations    folders of test, validate and predict inside of runs
    events         TensorBoard files; `metrics.csv` has the same numbers
    failed         whole runs that ended without a checkpoint

Only entries that a walk without links finds inside of a run's folder are deleted, each through a
file descriptor of its parent folder, so that a link that appears meanwhile is not followed. A run
that is being written to is left alone. No path in a run's files names anything to delete.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ravine.errors import UsageError

from ..error_report import program_name, unknown_name_error
from ..run_folders import index
from .index import RunSummary
from .record import read_record

KINDS = ("checkpoints", "evaluations", "events", "failed")
ENDED_BADLY = ("failed", "interrupted", "killed")


class Deletion(NamedTuple):
    """An entry to delete: names of folders from the run's folder to it, and its size in bytes."""

    run: RunSummary
    segments: tuple[str, ...]  # () is the run's folder itself
    size: int

    def __str__(self) -> str:
        """Return its path."""
        return str(Path(self.run.folder, *self.segments))


def clean_runs(words: list[str], root: Path, flags: dict[str, str]) -> int:
    """Show what would be deleted, or with `--yes` delete it; return the exit status.

    Args:
        words: what to free (checkpoints, evaluations, events or failed), then names of runs.
        root: the folder of all runs.
        flags: by name without dashes: yes, and filters such as status.
    """
    from ..commands.runs import format_size, printable, select_runs

    is_confirmed = "yes" in flags
    kind, names = words[0] if words else "", words[1:]
    if kind not in KINDS:
        # suggests the nearest kind in the command `runs clean KIND`, or checkpoints
        raise unknown_name_error(
            f"runs clean: nothing to free is called {kind!r}"
            if kind
            else "runs clean: what to free was not given",
            kind,
            KINDS,
            "runs clean {}".format,
            "checkpoints",
        )
    # deletion later opens each folder from `root` down, and follows no link
    root = root.resolve() if root.is_symlink() else root
    all_runs = index.list_runs(root)
    # runs whose names begin with one of `names` (all without names) and that fit the filters
    chosen = select_runs(all_runs, names, root, flags)
    for run in chosen:
        if run.status == "running":
            print(f"{run.name} is running: left alone")
    ended = [run for run in chosen if run.status != "running"]
    # `all_runs` too: a run that was not chosen may still need a checkpoint of one that was
    # FINDERS: by kind, the function that returns what to delete, with sizes in bytes.
    deletions = FINDERS[kind](ended, all_runs)
    if not deletions:
        print(f"nothing to free: no {kind} of {len(chosen)} runs under {root} can be deleted")
        return 0
    total = sum(deletion.size for deletion in deletions)
    for deletion in deletions:
        verb = "deleting" if is_confirmed else "would delete"
        print(f"{verb}  {format_size(deletion.size):>8}  {printable(str(deletion))}", flush=True)
        if is_confirmed:
            delete(deletion, root)
    if is_confirmed:
        print(f"freed {format_size(total)}")
    else:
        again = " ".join(["runs clean", *words, *(f"--{k}={v}" for k, v in flags.items())])
        if str(root) != "runs":
            again += f" --root={root}"
        print(f"nothing was deleted yet: {len(deletions)} entries, {format_size(total)}")
        print(f"to delete them: {program_name()} {again} --yes")
    return 0


def find_old_checkpoints(ended: list[RunSummary], all_runs: list[RunSummary]) -> list[Deletion]:
    """Return checkpoints that are neither the newest nor a best one of any run.

    The newest checkpoint of each run states which files are its best; a best file may lie in the
    folder of the run that it was resumed from. A run whose newest checkpoint cannot be read keeps
    all files, and so do runs of the same name.

    Args:
        ended: the runs to free, none of which is running.
        all_runs: all runs, whose newest and best checkpoints stay.
    """
    if not any(len(list(walk_checkpoints(run))) > 1 for run in ended):
        return []
    # imported here, because it imports torch, which takes seconds
    from ravine.cli.run_folders.best_checkpoints import newest_and_best

    # device and inode numbers of the files to keep: the same under each name of a file
    protected: set[tuple[int, int]] = set()
    # names of runs without their version, such as spam/quick
    unreadable: set[str] = set()
    for run in all_runs:
        # `walk_checkpoints` yields the path below the run's folder as segments, and the size
        paths = [Path(run.folder, *segments) for segments, _ in walk_checkpoints(run)]
        kept, problem = newest_and_best(paths)
        protected |= {identity for path in kept if (identity := file_identity(path))}
        if problem:
            print(f"{run.name}: {problem}; all checkpoints of this name are kept")
            unreadable.add(run.name.rpartition("/")[0])
    deletions = []
    for run in ended:
        if run.name.rpartition("/")[0] in unreadable:
            continue
        for segments, size in walk_checkpoints(run):
            if file_identity(Path(run.folder, *segments)) not in protected:
                deletions.append(Deletion(run, segments, size))
    return deletions


def find_evaluations(ended: list[RunSummary], all_runs: list[RunSummary]) -> list[Deletion]:
    """Return the folders of evaluations inside of runs."""
    deletions = []
    for run in ended:
        for name, path in subfolders(run.folder):
            known = read_record(path)
            is_evaluation = known is not None and known["verb"] in ("test", "validate", "predict")
            has_checkpoint = bool(index.inspect_folder(path).checkpoints)
            if is_evaluation and not has_checkpoint:
                deletions.append(Deletion(run, (name,), folder_size(path)))
    return deletions


def find_events(ended: list[RunSummary], all_runs: list[RunSummary]) -> list[Deletion]:
    """Return the TensorBoard files of runs."""
    deletions = []
    for run in ended:
        for segments, size in walk_files(run.folder):
            if segments[-1].startswith("events.out.tfevents."):
                deletions.append(Deletion(run, segments, size))
    return deletions


def find_failed(ended: list[RunSummary], all_runs: list[RunSummary]) -> list[Deletion]:
    """Return whole runs that did not end well and have no checkpoint anywhere inside."""
    return [
        Deletion(run, (), run.size)
        for run in ended
        if run.status in ENDED_BADLY and not index.inspect_folder(run.folder).checkpoints
        # its checkpoints lie elsewhere, and only this file knows where
        if not os.path.lexists(run.folder / "checkpoint_folders.txt")
    ]


FINDERS: dict[str, Callable[[list[RunSummary], list[RunSummary]], list[Deletion]]] = {
    "checkpoints": find_old_checkpoints,
    "evaluations": find_evaluations,
    "events": find_events,
    "failed": find_failed,
}


def subfolders(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the folders in a folder, without links, sorted by name."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield entry.name, Path(entry.path)


def walk_files(
    folder: Path, segments: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the path below `folder`, and the size, of each regular file; links are left out."""
    with suppress(OSError), os.scandir(Path(folder, *segments)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from walk_files(folder, (*segments, entry.name))
            elif entry.is_file(follow_symlinks=False):
                yield (*segments, entry.name), entry.stat(follow_symlinks=False).st_size


def walk_checkpoints(run: RunSummary) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield each checkpoint, a file or a folder, below the `checkpoints` folder of a run.

    A checkpoint is given by the names from the run's folder to it, and its size in bytes. Links are
    left out.
    """
    pending: list[tuple[str, ...]] = [("checkpoints",)]
    while pending:
        segments = pending.pop()
        top = Path(run.folder, *segments)
        if top.is_symlink():
            continue
        # a folder that was deleted meanwhile is left out
        with suppress(OSError), os.scandir(top) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                inner = (*segments, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    # a sharded checkpoint is a folder
                    if entry.name.endswith(".ckpt"):
                        yield inner, folder_size(Path(entry.path))
                    # .tmp: a checkpoint that is being written
                    elif not entry.name.startswith(".tmp"):
                        pending.append(inner)
                elif entry.is_file(follow_symlinks=False) and entry.name.endswith(".ckpt"):
                    yield inner, entry.stat(follow_symlinks=False).st_size


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; links are not followed."""
    return sum(size for _, size in walk_files(folder))


def file_identity(path: Path) -> tuple[int, int] | None:
    """Return what identifies a file under all its names; None if it is missing."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


@contextmanager
def opened_folder(root: Path, segments: tuple[str, ...]) -> Iterator[int]:
    """Open a folder below `root` step by step; a link on the way is an error."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    descriptor = os.open(root, flags)
    try:
        for segment in segments:
            if segment in ("", ".", "..") or "/" in segment:
                raise OSError(f"{segment!r} is no name of a folder")
            inner = os.open(segment, flags | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def delete(deletion: Deletion, root: Path) -> None:
    """Delete one entry below `root` without following a link.

    Args:
        deletion: the run, and the names of folders from its folder to the entry.
        root: the folder of all runs.

    Raises:
        UsageError: the entry is no longer what was shown.
    """
    # names of folders from `root` to the entry; the entry itself is the last
    segments = (*deletion.run.folder.relative_to(root).parts, *deletion.segments)
    try:
        # opens each folder inside the one before and refuses a link; `parent` is a descriptor
        with opened_folder(root, segments[:-1]) as parent:
            name = segments[-1]
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                shutil.rmtree(name, dir_fd=parent)
            elif stat.S_ISREG(mode):
                os.unlink(name, dir_fd=parent)
            else:
                raise OSError(f"{name} is no file and no folder")
    except OSError as error:
        raise UsageError(
            f"{deletion} cannot be deleted: {error.strerror or error}",
            flag="the command again, which shows what is there now",
        ) from error
