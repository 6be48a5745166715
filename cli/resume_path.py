"""Resolve `--ckpt_path=auto` and `last`: find the newest checkpoint of a run before it starts.

This happens before the trainer is built, because the processes that it starts run the command
again. All of them must load the same file, even if one has saved another meanwhile. If a launcher
starts the ranks, rank 0 searches for all, because the search verifies the checksums of whole files.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError
from ravine.strategies.checkpoint.atomic_io import CheckpointError, find_damage, list_checkpoints

from .checkpoint_metadata import load_metadata, saved_config_of
from .config import presets
from .config.values import ConfigValue, from_argv, from_env
from .rank_zero import call_on_rank_zero
from .run_dir import CHECKPOINT_FOLDERS_FILE, external_checkpoint_folders


def iter_values(argv: list[str]) -> Iterator[ConfigValue]:
    """Yield the user's values in order of precedence; the value of `trainer` is split into keys."""
    for value in [*from_env(argv[0]), *from_argv(argv[1:])]:
        yield from value.children() if value.key == "trainer" else [value]


def resolve_argv(argv: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments with the run name and checkpoint path filled in, and that path."""
    values: dict[str, Any] = {value.key: value.value for value in iter_values(argv)}
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    if "trainer.name" not in values and configs:
        values["trainer.name"] = presets.run_name(configs[0])
        argv = [*argv, f"--trainer.name={values['trainer.name']}"]
    request = values.get("ckpt_path")
    if request not in ("auto", "last"):
        call_on_rank_zero(None)
        return argv, Path(request) if request else None
    root = str(values.get("trainer.default_root_dir", "runs"))

    def find_path() -> str | None:
        latest = find_latest(argv[0], request, values.get("trainer.name"), root)
        return None if latest is None else str(latest)

    path_text = call_on_rank_zero(find_path)
    path = None if path_text is None else Path(path_text)
    return [*argv, f"--ckpt_path={path or 'null'}"], path


def find_latest(command: str, request: str, name: str | None, root: str) -> Path | None:
    """Return the newest checkpoint of a run name, or of all names if none is given.

    auto: the newest complete checkpoint; if there is none, `fit` starts from scratch. last: the
    newest checkpoint, which must exist and be complete.
    """
    folder = Path(root, name or "")
    print_once = rank_zero_only(print)
    for path, run in iter_checkpoints(folder, name):
        reason, checkpoint_run_name = _inspect_checkpoint(path)
        if run is not None and reason is None and checkpoint_run_name not in (None, run):
            continue  # runs of several names share the folder
        if reason is None:
            print_once(f"--ckpt_path {request}: {path}")
            return path
        if request == "last":
            raise UsageError(
                f"the last checkpoint, {path}, cannot be used: {reason}",
                "auto, which is the newest complete checkpoint",
                flag="--ckpt_path=auto",
            )
        print_once(f"--ckpt_path auto: {path} is skipped: {reason}")
    if request == "auto" and command == "fit":
        print_once(f"--ckpt_path auto: no checkpoint in {folder} yet, starting from scratch")
        return None
    raise UsageError(
        f"--ckpt_path {request}: there is no checkpoint in {folder}",
        sorted({str(run.parent.relative_to(root)) for run in _iter_runs(Path(root), None)}),
        flag="--trainer.name=NAME, or --ckpt_path=FILE",
        label="names with checkpoints",
    )


def iter_checkpoints(folder: Path, name: str | None) -> Iterator[tuple[Path, str | None]]:
    """Yield the checkpoints of runs, newest first, with the run name to verify, or None.

    A run with a separate checkpoint folder lists it in CHECKPOINT_FOLDERS_FILE. That folder may
    contain files of other runs, so their run name must be verified.
    """
    info_by_path: dict[Path, tuple[int, str | None]] = {}
    for run in _iter_runs(folder, name):
        for checkpoint_folder in external_checkpoint_folders(run):
            for time, path in list_checkpoints(checkpoint_folder):
                info_by_path.setdefault(path, (time, name))
        for time, path in list_checkpoints(run / "checkpoints"):
            info_by_path[path] = time, None
    for path in sorted(
        info_by_path,
        key=lambda path: (info_by_path[path][0], str(path)),
        reverse=True,
    ):
        yield path, info_by_path[path][1]


def _iter_runs(folder: Path, name: str | None) -> Iterator[Path]:
    if name:
        yield from folder.glob("version_*")
        return
    run_folders = {
        marker.parent
        for marker_name in ("checkpoints", CHECKPOINT_FOLDERS_FILE)
        for marker in folder.rglob(marker_name)
    }
    yield from sorted(run_folders)


def _inspect_checkpoint(path: Path) -> tuple[str | None, str | None]:
    """Return why a checkpoint cannot be resumed, or None, and the name of its run."""
    if reason := find_damage(path):
        return reason, None
    try:
        return None, saved_config_of(load_metadata(path), path).get("trainer.name")
    except (CheckpointError, UsageError) as error:  # a checkpoint of another program in the folder
        text = error.problem if isinstance(error, UsageError) else str(error)
        return text.partition("\n")[0], None
