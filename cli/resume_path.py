"""Resolve `--ckpt_path=auto`, `last`, `best` and names of runs to a file before the run starts.

    auto, last             the newest checkpoint of the same config, or of the model's class
    best                   of the newest run of that config, the best by the monitored metric
    spam/quick/3           the newest of that run; with /best behind it, its best

This happens before the trainer is built, because the processes that it starts run the command
again. All of them must load the same file, even if one has saved another meanwhile. If a launcher
starts the ranks, rank 0 searches for all, because the search verifies the checksums of whole files.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError, sort_by_similarity
from ravine.strategies.checkpoint.atomic_io import CheckpointError, find_damage, list_checkpoints

from .checkpoint_metadata import load_metadata, saved_config_of
from .config import presets
from .config.stray_words import SWITCHES
from .config.values import ConfigValue, from_argv, from_env, gives_whole_run
from .error_report import program_name
from .rank_zero import call_on_rank_zero
from .run_dir import CHECKPOINT_FOLDERS_FILE, external_checkpoint_folders
from .run_folders import index
from .run_folders.best_checkpoints import best_checkpoint, monitored_metric
from .run_folders.record import read_record


def iter_values(argv: list[str]) -> Iterator[ConfigValue]:
    """Yield the user's values in order of precedence; the value of `trainer` is split into keys."""
    for value in [*from_env(argv[0]), *from_argv(argv[1:])]:
        yield from value.children() if value.key == "trainer" else [value]


def resolve_argv(argv: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments with the run name and checkpoint path filled in, and that path.

    Args:
        argv: the command and its arguments.

    Returns:
        The arguments, in which `--ckpt_path` names a file, and its path. The path is None without a
        checkpoint, also if `auto` finds none.
    """
    # iter_values yields the user's values with their keys, from flags and configs; later ones win
    user_values = list(iter_values(argv))
    values: dict[str, Any] = {value.key: value.value for value in user_values}
    configs = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    # beside an overlay config, the run and its name are those of the checkpoint
    is_overlay = bool(values.get("ckpt_path")) and not gives_whole_run(user_values)
    if "trainer.name" not in values and configs and not is_overlay:
        # a run without a name is called by its first config
        values["trainer.name"] = presets.run_name(configs[0])
        # not at the end, where a flag without a value may stand
        argv = [argv[0], f"--trainer.name={values['trainer.name']}", *argv[1:]]
    # a flag without a value at the end, which the parser reports
    is_incomplete = re.fullmatch(r"--[^=]+", argv[-1]) and argv[-1] not in SWITCHES
    request = None if is_incomplete else values.get("ckpt_path")
    root = str(values.get("trainer.default_root_dir", "runs"))
    # `split_run_request` is None unless the request is the name of a run
    names_run = isinstance(request, str) and bool(index.split_run_request(request, Path(root)))
    if request not in ("auto", "last", "best") and not names_run:
        call_on_rank_zero(None)  # tells ranks that wait for a path that their commands differ
        return argv, Path(request) if request else None

    def find_path() -> str | None:
        if names_run:
            return str(find_in_run(str(request), root))
        # a function: whether a class path is one of the command's model; all are without a model
        accepts = _accepts_class_of(values.get("model"))
        latest = find_latest(argv[0], str(request), values.get("trainer.name"), root, accepts)
        return None if latest is None else str(latest)

    # rank 0 looks for it, and all ranks get the same path: a file may appear meanwhile
    path_text = call_on_rank_zero(find_path)
    path = None if path_text is None else Path(path_text)
    return [*argv, f"--ckpt_path={path or 'null'}"], path


def _accepts_class_of(model: Any) -> Callable[[str], bool]:
    """Return whether a class path is of the class of `--model`; any class without that flag."""
    spec = model.get("class_path") if isinstance(model, dict) else model
    wanted = spec.rpartition(".")[2] if isinstance(spec, str) else ""
    return lambda class_path: not wanted or class_path.rpartition(".")[2] == wanted


def find_in_run(request: str, root: str) -> Path:
    """Return the newest or the best checkpoint of a run that is given by its name.

    Args:
        request: the name of the run, with "/best" at the end for its best checkpoint.
        root: the folder of all runs.

    Raises:
        UsageError: no run has that name, or it has no such checkpoint.
    """
    # the run's folder, and whether its best checkpoint is meant
    folder, wants_best = index.split_run_request(request, Path(root)) or (Path(request), False)
    # newest first
    for _time, path in sorted(list_checkpoints(folder / "checkpoints"), reverse=True):
        # None: the file is complete
        if find_damage(path) is None:
            chosen = find_best(path) if wants_best else path
            rank_zero_only(print)(f"--ckpt_path {request}: {chosen}")
            return chosen
    raise UsageError(
        f"the run {folder} has no checkpoint that is whole", flag="--ckpt_path=last, or FILE"
    )


def find_best(newest: Path) -> Path:
    """Return the best checkpoint of the run whose newest checkpoint is given.

    Raises:
        UsageError: no metric was monitored, or the best file was removed.
    """
    # the best file and its metric, by the state of the callback in the newest checkpoint
    path, metric = best_checkpoint(newest)
    if not metric:
        monitored = monitored_metric(newest) or "that Checkpoint monitors"
        # the metrics in the run's record; {} without one
        record = read_record(newest.parent.parent) or {}
        metrics = record.get("metrics")
        logged = sort_by_similarity(monitored, metrics)[:3] if isinstance(metrics, dict) else []
        again = f", or fit again with --trainer.callbacks.Checkpoint.monitor={logged[0]}"
        raise UsageError(
            f"the run of {newest} has no best checkpoint: the metric {monitored} was never logged",
            logged,
            flag=f"--ckpt_path=last{again if logged else ''}",
            label="logged",
        )
    if path is None:
        raise UsageError(
            f"the best checkpoint by {metric} of the run of {newest} is not in its folder",
            flag="--ckpt_path=last",
        )
    return path


def find_latest(
    command: str,
    request: str,
    name: str | None,
    root: str,
    accepts: Callable[[str], bool] = lambda class_path: True,
) -> Path | None:
    """Return the newest checkpoint of a run name, or of all names if none is given.

    auto: the newest complete checkpoint; if there is none, `fit` starts from scratch. last: the
    newest checkpoint, which must exist and be complete. best: the best one of its run.

    Args:
        command: the subcommand.
        request: auto, last or best.
        name: the name of the run, or None.
        root: the folder of all runs.
        accepts: returns whether a class path is one of the model's; used if `name` is None.
    """
    folder = Path(root, name or "")
    print_once = rank_zero_only(print)
    # newest first; required_name: a name that the checkpoint must have, because runs share its
    # folder
    for path, required_name in iter_checkpoints(folder, name):
        # `reason`: why the checkpoint cannot be used, or None.
        # The other two are the run name and the model's class path, as saved in it
        reason, checkpoint_run_name, class_path = _inspect_checkpoint(path)
        if reason is None:
            if name is None and class_path and not accepts(class_path):
                continue  # a checkpoint of another model
            if required_name is not None and checkpoint_run_name not in (None, required_name):
                continue  # runs of several names share the folder
            chosen = find_best(path) if request == "best" else path
            print_once(f"--ckpt_path {request}: {chosen}")
            return chosen
        if request in ("last", "best"):
            raise UsageError(
                f"the last checkpoint, {path}, cannot be used: {reason}",
                "auto, which is the newest complete checkpoint",
                flag="--ckpt_path=auto",
            )
        print_once(f"--ckpt_path auto: {path} is skipped: {reason}")
    if request == "auto" and command == "fit":
        print_once(f"--ckpt_path auto: no checkpoint in {folder} yet, starting from scratch")
        return None
    # the names of the runs below `root` that have checkpoints
    names = sorted({str(run.parent.relative_to(root)) for run in _iter_runs(Path(root), None)})
    config = name if name in presets.list_presets() else "shakespeare/quick"
    raise UsageError(
        f"--ckpt_path {request}: there is no checkpoint in {folder}",
        names,
        flag=f"--trainer.name={names[0]}" if names else f"{program_name()} fit --config {config}",
        label="names with checkpoints",
    )


def iter_checkpoints(folder: Path, name: str | None) -> Iterator[tuple[Path, str | None]]:
    """Yield the checkpoints of runs, newest first, with the run name to verify, or None.

    A run with a separate checkpoint folder lists it in CHECKPOINT_FOLDERS_FILE. That folder may
    contain files of other runs, so their run name must be verified.

    Args:
        folder: the folder of one run name, or of all runs.
        name: the run name; None for all names.
    """
    info_by_path: dict[Path, tuple[int, str | None]] = {}  # time, and the name to verify
    for run in _iter_runs(folder, name):
        # the folders that the run's file lists
        for checkpoint_folder in external_checkpoint_folders(run):
            for time, path in list_checkpoints(checkpoint_folder):
                info_by_path.setdefault(path, (time, name))
        for time, path in list_checkpoints(run / "checkpoints"):
            # a file below the run is its own: no name to verify
            info_by_path[path] = time, None
    newest_first = sorted(
        info_by_path.items(), key=lambda item: (item[1][0], str(item[0])), reverse=True
    )
    for path, (_time, required_name) in newest_first:
        yield path, required_name


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


def _inspect_checkpoint(path: Path) -> tuple[str | None, str | None, str]:
    """Return why a checkpoint cannot be resumed, or None; its run's name; its model's class."""
    if reason := find_damage(path):
        return reason, None, ""
    try:
        checkpoint = load_metadata(path)
        config = saved_config_of(checkpoint, path)
        task = (config.get("model") or {}).get("class_path") or checkpoint.get("task")
        return None, config.get("trainer.name"), task if isinstance(task, str) else ""
    except (CheckpointError, UsageError) as error:  # a checkpoint of another program in the folder
        text = error.problem if isinstance(error, UsageError) else str(error)
        return text.partition("\n")[0], None, ""
