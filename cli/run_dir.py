"""Run directory: the folder of one run, its name, its errors, and its removal if it is empty."""

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from ravine.errors import RunError, UsageError

from .error_report import DISK_FULL_ERRNOS
from .run_folders.csv_rows import open_experiment
from .run_folders.record import METADATA_FILES

if TYPE_CHECKING:
    from .trainer import Trainer

CHECKPOINT_FOLDERS_FILE = (
    "checkpoint_folders.txt"  # file in the run directory: other folders with its checkpoints
)


def check_run_name(name: str) -> None:
    """Raise an error if a run name, perhaps of a checkpoint, leads out of default_root_dir."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UsageError(
            f"the run name {name!r} leads to a folder outside of default_root_dir",
            "a name without '..', which may contain /",
            hint="use name='NAME' and default_root_dir='FOLDER'",
            flag="--trainer.name=NAME --trainer.default_root_dir=FOLDER",
        )


def check_run_links(name: str | None, root: str | Path) -> None:
    """Raise an error if a link puts the directory of a checkpoint's run name outside of `root`."""
    if name:
        check_run_name(name)
    if name and not Path(root, name).resolve().is_relative_to(Path(root).resolve()):
        raise UsageError(
            f"the run name {name!r} of the checkpoint leads outside of {root} by a symbolic link",
            f"a folder in {root}",
            flag=f"--trainer.name={name}, if the link is intended, or --trainer.name=ANOTHER",
        )


def run_dir_error(folder: Path, error: OSError) -> Exception:
    """Return the error for a run directory that cannot be created.

    A full disk and a name that is too long keep their error, which has its own message.
    """
    if error.errno in {*DISK_FULL_ERRNOS, errno.ENAMETOOLONG}:
        return error
    return UsageError(
        f"the run directory {folder} cannot be created: {error.strerror}",
        "a folder with write permission",
        hint="use default_root_dir='FOLDER' or name='NAME'",
        flag="--trainer.default_root_dir=FOLDER, or --trainer.name=NAME",
    )


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which creates its folder again if it was removed during the run.

    Args:
        kept_steps: number of optimizer steps whose rows a run that goes on keeps, or None.
        options: arguments of CSVLogger.
    """

    def __init__(self, *options: Any, kept_steps: int | None = None, **named: Any) -> None:
        """Store the number of steps."""
        super().__init__(*options, **named)
        self.kept_steps, self._is_open = kept_steps, False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the writer; the first access opens it with the rows to keep."""
        if self._is_open:
            return super().experiment
        self._is_open = True
        return open_experiment(
            Path(self.log_dir), self.kept_steps, lambda: super(RunCSVLogger, self).experiment
        )

    def save(self) -> None:
        """Write the metrics; create the folder if it is missing."""
        os.makedirs(self.log_dir, exist_ok=True)
        super().save()


def external_checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders outside of the run directory to which the run has written checkpoints."""
    try:
        lines = (run / CHECKPOINT_FOLDERS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [Path(line) for line in lines if line]


def raise_if_run_dir_removed(trainer: "Trainer", error: BaseException) -> None:
    """Raise RunDirRemovedError instead of an error that a removed run directory has caused."""
    folder, step = trainer.run_dir, trainer.global_step
    if folder and step and isinstance(error, Exception) and not Path(folder).is_dir():
        raise RunDirRemovedError(
            f"the run directory {folder} was removed at step {step}, while the run was writing to"
            f" it ({type(error).__name__}), and its checkpoints with it",
            hint="run the same command again and keep the folder until the run ends",
        ) from error


class RunDirRemovedError(RunError):
    """The directory of a run was removed before its end."""


def remove_empty_run_dir(trainer: "Trainer") -> None:
    """Remove the directory of a run that failed before its first step, if it has no other files."""
    folder = trainer.run_dir
    if not folder or trainer.global_step or not trainer.is_global_zero:
        return
    file_names = [path.name for path in Path(folder).rglob("*") if path.is_file()]
    metadata_files = ("config.yaml", "hparams.yaml", CHECKPOINT_FOLDERS_FILE, *METADATA_FILES)
    if all(name in metadata_files or name.startswith("events.out.") for name in file_names):
        shutil.rmtree(folder, ignore_errors=True)
