"""Placement: decide which folder a run writes to.

    fit                                   the next free version_<k>
    fit from the newest checkpoint        the folder of the checkpoint's run, which goes on
    fit from an older one, or changed     the next free version_<k>; its record names the parent
    test, validate, predict               <verb>_<k> inside of the folder of the evaluated run
    the same, of a file that is not a     <verb>_<k> beside the runs of that name
    run's own, or may not be written to

Nothing that a file says takes part in the choice except whether its run is still alive. A link is
never followed: a checkpoint that is reached through a link of its run's folder is not the run's
own.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ravine.strategies.checkpoint.atomic_io import find_damage, list_checkpoints

from . import index, record

CHECKPOINTS_FOLDER = "checkpoints"


class Placement(NamedTuple):
    """Where a run writes.

    Attributes:
        parent: the folder below which a numbered folder is created.
        prefix: the beginning of its name.
        continued: the existing folder of a run that goes on; None creates a folder.
        origin: what the record says of the checkpoint: run, checkpoint, step; None without one.
        reason: why a resumed run gets a folder of its own, or "".
    """

    parent: Path
    prefix: str
    continued: Path | None = None
    origin: dict[str, Any] | None = None
    reason: str = ""


def place_run(
    verb: str,
    checkpoint: str | None,
    root: Path,
    name: str,
    changed_arguments: list[str] | None,
) -> Placement:
    """Decide where a run writes.

    The result names the parent folder and a prefix, to which a number is added later. If a run goes
    on, it also names the existing folder, `continued`.

    Args:
        verb: fit, validate, test or predict.
        checkpoint: the checkpoint that it loads, or None.
        root: the folder of all runs.
        name: the name of the run.
        changed_arguments: arguments that differ from the checkpoint's run; None if they are not
            known, as in a script.
    """
    parent = Path(root, name)
    # VERSION_PREFIX is version_. A URL is no file of a run.
    if checkpoint is None or "://" in str(checkpoint):
        return Placement(parent, index.VERSION_PREFIX)
    path = Path(checkpoint)
    # run: the folder whose `checkpoints` holds the file, or None. step: its optimizer steps.
    run, step = run_of_checkpoint(path), checkpoint_step(path)
    origin = {"run": None, "checkpoint": str(path), "step": step}
    if run is not None:
        # relative to `root`, so that the folder of all runs can be moved
        origin["run"] = relative_to_root(run, root)
    if verb != "fit":
        # an evaluation lies inside of the run that it evaluates
        if run is not None and is_writable(run):
            return Placement(run, f"{verb}_", origin=origin)
        return Placement(parent, f"{verb}_", origin=origin)
    # why the fit may not go on in the folder of that run; "" if it may
    reason = reason_for_new_version(path, run, parent, changed_arguments)
    if reason or run is None:
        return Placement(parent, index.VERSION_PREFIX, origin=origin, reason=reason)
    return Placement(parent, index.VERSION_PREFIX, continued=run, origin=origin)


def run_of_checkpoint(path: Path) -> Path | None:
    """Return the folder of the run whose `checkpoints` folder holds a file, without any link."""
    folder = next((p for p in path.parents if p.name == CHECKPOINTS_FOLDER), None)
    if folder is None:
        return None
    run = folder.parent
    is_linked = path.parent.resolve() != run.resolve() / path.parent.relative_to(run)
    if is_linked or run.is_symlink() or not index.is_run_folder(run):
        return None
    return run


def recorded_folder(run: Path) -> str | None:
    """Return the folder in which the command of a run was typed, if it exists and is another one.

    None if the run has no record, or if it is the current folder.
    """
    folder = (record.read_record(run) or {}).get("folder")
    is_other = isinstance(folder, str) and os.path.isdir(folder) and folder != os.getcwd()
    return folder if is_other else None


def is_writable(run: Path) -> bool:
    """Return whether a run's folder belongs to this user and may be written to.

    A folder without any write permission counts as read-only for the superuser too.
    """
    try:
        status = run.stat()
    except OSError:
        return False
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return is_own and bool(stat.S_IMODE(status.st_mode) & 0o222) and os.access(run, os.W_OK)


def reason_for_new_version(
    path: Path, run: Path | None, parent: Path, changed_arguments: list[str] | None
) -> str:
    """Return why a fit from a checkpoint may not go on in its run's folder; "" if it may.

    Args:
        path: the checkpoint.
        run: the folder of the run that it belongs to, or None.
        parent: the folder of the runs with the name of this command, in which a new version would
            lie.
        changed_arguments: arguments that differ from the checkpoint's run; None in a script.
    """
    # a script has no configuration that could be compared
    if changed_arguments is None:
        return "a script resumes into a new version"
    if run is None:
        return "the checkpoint does not lie in the folder of a run"
    if run.resolve().parent != parent.resolve():
        return f"the run has another name than {parent.name}"
    if not is_writable(run):
        return f"{run} may not be written to"
    if special := find_special_file(run):
        return f"{special} is a link or a device, and writing to it could leave the run's folder"
    # the content of run.json, or None. A run whose process no longer exists does not count as
    # running.
    known = record.read_record(run)
    if record.status_of(known, index.inspect_folder(run).last_written) == "running":
        return f"{run} is still being written to"
    # rows of one file must not be counted from 0 and from 1
    if record.first_logged_step(known) != record.FIRST_LOGGED_STEP:
        return f"the logs of {run} count steps from 0, as an older version did"
    if changed_arguments:
        shown = ", ".join(changed_arguments[:3]) + (", ..." if len(changed_arguments) > 3 else "")
        return f"{shown} changed"
    # going on from an older checkpoint would replace what the run trained after it
    if newer := newer_checkpoint(path, run):
        return f"{newer.name} is newer than {path.name}"
    return ""


def find_special_file(folder: Path) -> Path | None:
    """Return an entry below a folder that is neither a regular file nor a folder, or None."""
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(top, name)
            try:
                mode = path.lstat().st_mode
            except OSError:
                continue
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                return path
    return None


def newer_checkpoint(path: Path, run: Path) -> Path | None:
    """Return a complete checkpoint of the run that is newer than a given one, or None."""
    times = {p.resolve(): time for time, p in list_checkpoints(run / CHECKPOINTS_FOLDER)}
    resolved_path = path.resolve()
    limit = (times.get(resolved_path, 0), checkpoint_step_in_name(path) or 0)
    for other, time in sorted(times.items(), key=lambda item: -item[1]):
        is_newer = (time, checkpoint_step_in_name(other) or 0) > limit
        if other != resolved_path and is_newer and find_damage(other) is None:
            return other
    return None


def checkpoint_step_in_name(path: Path) -> int | None:
    """Return the step that a checkpoint's name states, `step=000080.ckpt`."""
    return index.step_in_name(path.name)


def checkpoint_step(path: Path) -> int | None:
    """Return the number of optimizer steps of a checkpoint, from its content; None if unknown."""
    file = path / "meta.pt" if path.is_dir() else path
    if find_damage(path, verify_checksums=False) is not None:
        return checkpoint_step_in_name(path)
    try:
        content = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        step = content["global_step"]
    except Exception:  # the strategy that loads it reports what is wrong
        return checkpoint_step_in_name(path)
    return step if isinstance(step, int) else checkpoint_step_in_name(path)


def relative_to_root(run: Path, root: Path) -> str:
    """Return the folder of a run relative to that of all runs, or absolute if it is not below."""
    try:
        return run.resolve().relative_to(Path(root).resolve()).as_posix()
    except ValueError:
        return str(run.resolve())


def create_numbered_folder(
    parent: Path, prefix: str, fail: Callable[[Path, OSError], Exception]
) -> Path:
    """Create the next free numbered folder; runs that start together get different ones.

    Args:
        parent: the folder in which it is created.
        prefix: the beginning of its name, such as `version_`.
        fail: makes the error to raise, from the folder and the system's error.
    """
    names = [path.name for path in parent.glob(f"{prefix}*")]
    numbers = [int(n[len(prefix) :]) for n in names if n[len(prefix) :].isdecimal()]
    number = max(numbers, default=-1) + 1
    while True:
        folder = parent / f"{prefix}{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not os.path.lexists(folder):  # a parent is a file or a broken link
                raise fail(folder, error) from error
            # another run has just created this folder: try the next number
            number += 1
