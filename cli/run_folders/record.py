"""Run record: `run.json` in a run's folder says which command made the run, and how it ended.

    verb, command, configs, name, task      what was typed, and what it trains
    git, versions, machine                  where it ran; the diff is in `changes.diff`
    status, error, started, duration_s      how it ended; `running` until then
    steps, metrics                          how far it came
    best                                    best value: metric, mode, value, step, file
    parent                                  the run and the step that it was resumed from
    first_logged_step                       the number of the first optimizer step in the logs
    history                                 earlier records of a run that goes on in its folder

The file is written atomically, and read as data: nothing in it is executed or imported, and no
path in it is written to. This module needs the standard library only.
"""

import json
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

RECORD_FILE, DIFF_FILE, PACKAGES_FILE = "run.json", "changes.diff", "packages.txt"
COMMAND_FILE = "command.txt"  # the command that continues the run
METADATA_FILES = (RECORD_FILE, DIFF_FILE, PACKAGES_FILE, COMMAND_FILE)
RECORD_FORMAT = 1
FIRST_LOGGED_STEP = 1  # the number that the loggers write for the first optimizer step
STATUSES = ("running", "done", "failed", "interrupted", "killed", "unknown")
MAX_RECORD_BYTES, MAX_DIFF_BYTES = 2**20, 2**20
GIT_TIMEOUT_S = 5.0  # seconds; a slow repository leaves the commit out instead of delaying the run
MAIN_PACKAGES = ("ravine", "torch", "lightning", "torchmetrics", "numpy")
Record = dict[str, Any]

_typed_command: list[str] | None = None  # of the command line in this process


def set_typed_command(words: Iterable[str] | None) -> None:
    """Store the words that the user has typed, before presets and checkpoints add others."""
    global _typed_command
    _typed_command = None if words is None else list(words)


def typed_command() -> list[str]:
    """Return the words of the command line, or of the script that Python runs."""
    return list(_typed_command if _typed_command is not None else sys.orig_argv)


def new_record(verb: str, name: str, task: str) -> Record:
    """Return the record of a run that starts now in the current folder.

    Args:
        verb: fit, validate, test or predict.
        name: the name of the run, such as shakespeare/quick.
        task: the name of the model's class, such as LanguageModel.
    """
    # the words as typed, before presets and checkpoints add others
    command = typed_command()
    return {
        "format": RECORD_FORMAT,
        "first_logged_step": FIRST_LOGGED_STEP,
        "verb": verb,
        "command": command,
        # the values of -c and --config among these words
        "configs": _typed_configs(command),
        "name": name,
        "task": task,
        "folder": os.getcwd(),
        "status": "running",
        "started": time.time(),
        # process number, start time and machine: they show later whether the run is alive
        "process": current_process(),
        # [0]: commit, branch and names of changed files. [1] is the diff, which
        # `write_surroundings` writes to a file of its own.
        "git": git_state(os.getcwd())[0],
        "versions": main_versions(),
        "machine": describe_host(),
    }


def _typed_configs(command: list[str]) -> list[str]:
    configs = []
    for word, next_word in zip(command, [*command[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag in ("-c", "--config"):
            configs.append(value if equals else next_word)
    return configs


def write_record(folder: str | Path, record: Record) -> None:
    """Replace the record of a run by a complete new one; a link of that name is replaced too."""
    write_atomically(Path(folder, RECORD_FILE), json.dumps(record, indent=1, default=str) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old or the new content, whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@cache
def current_umask() -> int:
    """Return the mask of file permissions of this process."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_surroundings(folder: str | Path) -> None:
    """Write the uncommitted changes of the current folder, and the installed packages."""
    if difference := git_state(os.getcwd())[1]:
        write_atomically(Path(folder, DIFF_FILE), difference)
    write_atomically(Path(folder, PACKAGES_FILE), "\n".join(installed_packages()) + "\n")


def write_command(folder: str | Path, command: str) -> None:
    """Write the command that continues a run to its folder, if that still exists."""
    text = f"# continues this run from its newest checkpoint; type it in {os.getcwd()}\n{command}\n"
    if os.path.isdir(folder):
        with suppress(OSError):  # a full disk ends the run elsewhere
            write_atomically(Path(folder, COMMAND_FILE), text)


def read_record(folder: str | Path) -> Record | None:
    """Return the record of a run; None if there is none, or if the file is not a record."""
    text = read_regular_file(Path(folder, RECORD_FILE), MAX_RECORD_BYTES)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("verb"), str) else None


def first_logged_step(record: Record | None) -> int:
    """Return the number of the first optimizer step in the logs of a run.

    It is 0 for a run without a record, and for one of an older version of Ravine: Lightning's
    loggers count steps from 0.
    """
    return 1 if record is not None and record.get("first_logged_step") == 1 else 0


def read_regular_file(path: Path, max_bytes: int) -> str | None:
    """Return a text file; None if it is missing, a link, a device, too large or not readable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
    except (OSError, ValueError):
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(descriptor)  # os.fdopen refuses a folder with an exception
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(max_bytes).decode("utf-8", "replace")
        except OSError:
            return None


def current_process() -> dict[str, Any]:
    """Return what identifies this process on this machine until the next start of the machine."""
    return {
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "host": socket.gethostname(),
        "boot": boot_id(),
    }


def process_start(pid: int) -> str | None:
    """Return when a process started, in clock ticks since the machine did; None without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]  # the name of the program may hold blanks
    except (OSError, IndexError):
        return None


@cache
def boot_id() -> str | None:
    """Return an identifier of this start of the machine; None without /proc."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return None


def is_alive(record: Record, last_written: float) -> bool:
    """Return whether the process that writes a run still exists.

    Args:
        record: the record of the run.
        last_written: time of the newest file of the run, in seconds since 1970. It decides for a
            run of another machine: within the last hour it counts as alive.
    """
    process = record.get("process")
    if not isinstance(process, dict) or not isinstance(pid := process.get("pid"), int):
        return False
    # a process of another machine cannot be looked up here
    if process.get("host") != socket.gethostname():
        return time.time() - last_written < 3600
    # after a restart of the machine the number belongs to another process, or to none
    if process.get("boot") != boot_id() or pid <= 0:
        return False
    # Numbers are used again: the same start time means the same process. It is None on a system
    # without /proc.
    if process.get("started") is not None:
        return process_start(pid) == process["started"]
    try:
        # signal 0 is not delivered; it only asks whether the process exists
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # it exists, but belongs to another user
    except OSError:
        return True
    return True


def status_of(record: Record | None, last_written: float) -> str:
    """Return how a run ended: one of STATUSES; `killed` if its process left no end."""
    status = "unknown" if record is None else record.get("status")
    if status == "running" and record is not None and not is_alive(record, last_written):
        return "killed"
    return status if status in STATUSES else "unknown"


@cache
def git_state(folder: str) -> tuple[dict[str, Any] | None, str]:
    """Return commit, branch and changed files of the repository of a folder, and their diff.

    It is read once a process. External diff programs, hooks and file monitors are not run. None
    and "" stand for a folder without a repository, or a machine without git.

    The result is a pair: a mapping with commit, branch and changed files, and the text of the diff.
    """
    git = shutil.which("git")
    if git is None or (head := _run_git(git, folder, "rev-parse", "HEAD")) is None:
        return None, ""
    # `_run_git` returns the output of a git command; None if it fails or takes too long
    branch = (_run_git(git, folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    changed = _run_git(git, folder, "status", "--porcelain", "--ignore-submodules=all")
    difference = _run_git(
        git, folder, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all"
    )
    files = [line[:200] for line in (changed or "").splitlines()]
    state = {
        "commit": head.strip(),
        "branch": branch,
        # None: git status has failed, so it is not known
        "is_dirty": None if changed is None else bool(files),
        "changed_files": files[:100],
        "num_changed_files": len(files),
    }
    text = difference or ""
    if len(text) > MAX_DIFF_BYTES:
        text = text[:MAX_DIFF_BYTES] + f"\n# cut off: the diff has {len(text):,} characters\n"
    return state, text


def _run_git(git: str, folder: str, *words: str) -> str | None:
    """Return the output of a git command that reads; None if it fails or takes too long.

    Args:
        git: the path of the git program.
        folder: the folder in which it runs.
        words: the command and its arguments.
    """
    # a repository's own settings could otherwise name programs that git runs
    options = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    # no lock is taken, so a git command of the user at the same time is not disturbed
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_PAGER": "cat"}
    try:
        finished = subprocess.run(
            [git, *options, *words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.decode("utf-8", "replace") if finished.returncode == 0 else None


@cache
def installed_packages() -> tuple[str, ...]:
    """Return `name==version` of the packages that can be imported, from the names of folders."""
    packages: dict[str, str] = {}
    for folder in sys.path:
        with suppress(OSError):
            for entry in os.listdir(folder or "."):
                if entry.endswith(".dist-info") and "-" in entry:
                    name, _, version = entry.removesuffix(".dist-info").rpartition("-")
                    packages.setdefault(name.lower(), f"{name}=={version}")
    return tuple(packages[name] for name in sorted(packages))


def main_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers of a run."""
    versions = dict(line.split("==", 1) for line in installed_packages())
    named = {name: versions[name] for name in MAIN_PACKAGES if name in versions}
    return {"python": platform.python_version(), **named}


def describe_host() -> dict[str, Any]:
    """Return the name, the system and the number of processors of this machine."""
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
    }
