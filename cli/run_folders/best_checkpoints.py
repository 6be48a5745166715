"""Best checkpoints: which files the newest checkpoint of a run names as its best."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from ravine.strategies.checkpoint.atomic_io import find_damage

from .placement import checkpoint_step_in_name


def newest_and_best(paths: Collection[Path]) -> tuple[list[Path], str]:
    """Return the newest and the best files among the checkpoints of a run.

    The newest complete one by time, the one with the highest step in its name, and every file that
    a callback of the newest names as a best or last one are returned. The second value says why
    the newest cannot be read, or is empty.
    """
    if not paths:
        return [], ""
    by_time = sorted(paths, key=lambda path: path.lstat().st_mtime_ns, reverse=True)
    # -1 for a name without a step
    kept = {max(paths, key=lambda path: checkpoint_step_in_name(path) or -1)}
    for path in by_time:
        kept.add(path)
        # None: the file is complete. Checksums would mean to read all of a large file.
        if find_damage(path, verify_checksums=False) is None:
            # the states of the callbacks in the checkpoint, by name; None if they cannot be read
            states = callback_states(path)
            if states is None:
                return list(kept), f"the callbacks in {path.name} cannot be read"
            # `named_files`: the existing files that these states call best or last
            return [*kept, *named_files(states, path)], ""
    return list(kept), "no checkpoint can be read"


def callback_states(path: Path) -> dict[str, Any] | None:
    """Return the states of the callbacks in a checkpoint, without its weights; None if damaged."""
    file = path / "meta.pt" if path.is_dir() else path
    try:
        content = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        states = content.get("callbacks", {})
    except Exception:  # pickle and zipfile raise many kinds for a damaged file
        return None
    return states if isinstance(states, dict) else None


def named_files(states: dict[str, Any], checkpoint: Path) -> list[Path]:
    """Return the existing files that checkpoint callbacks name as a best or last one.

    A run's folder may have moved: a name is looked for beside `checkpoint` too.

    Args:
        states: by name, the state of each callback in the checkpoint.
        checkpoint: its path.
    """
    names: list[str] = []
    for state in states.values():
        if isinstance(state, dict):
            # best_k_models, best_model_path and last_model_path are written by Lightning's
            # ModelCheckpoint
            best = state.get("best_k_models")
            names += [*best] if isinstance(best, dict) else []
            names += [state.get("best_model_path", ""), state.get("last_model_path", "")]
    candidates = [Path(name) for name in names if isinstance(name, str) and name.strip("\0")]
    candidates += [checkpoint.parent / path.name for path in candidates]
    existing = []
    for path in candidates:
        try:
            if path.exists():
                existing.append(path)
        # a path that is too long or has a NUL character
        except (OSError, ValueError):
            continue
    return existing


def monitored_metric(newest: Path) -> str:
    """Return the metric that the checkpoint callback of a run monitors; "" if it has none."""
    states = [s for s in (callback_states(newest) or {}).values() if isinstance(s, dict)]
    return next((str(state["monitor"]) for state in states if state.get("monitor")), "")


def best_checkpoint(newest: Path) -> tuple[Path | None, str]:
    """Return the best file by the monitored metric of the run of a checkpoint, and the metric.

    Only a file in the folder of `newest` is returned, whatever path it names. None stands for a
    file that was removed, "" for a metric that was never logged.
    """
    for state in (callback_states(newest) or {}).values():
        if not isinstance(state, dict) or state.get("best_model_score") is None:
            continue
        metric = str(state.get("monitor") or "")
        path = newest.parent / Path(str(state.get("best_model_path"))).name
        if metric:
            return (path if path.exists() else None), metric
    return None, ""
