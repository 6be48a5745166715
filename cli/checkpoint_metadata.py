"""Checkpoint metadata: all of a checkpoint but its tensors, and the configuration saved in it."""

import json
from pathlib import Path
from typing import Any

import torch

from ravine.checkpoint_format import check_format
from ravine.errors import UsageError
from ravine.strategies.checkpoint.atomic_io import CheckpointError, damage_error
from ravine.strategies.checkpoint.safe_pickle import UnsafePickle, check_tree_size
from ravine.strategies.checkpoint.validation import find_malformed_section

from .rank_zero import is_launched

MAX_SAVED_CONFIG_VALUES, MAX_SAVED_CONFIG_LEVELS = 20_000, 50  # limits of a saved configuration


def load_metadata(path: Path) -> dict[str, Any]:
    """Load a checkpoint without its tensor values: tensors on the meta device have only a shape.

    A single process verifies all checksums. A rank started by a launcher verifies none here: the
    ranks divide the checksums when they load the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
        UsageError: the file is not a checkpoint of a trainer.
    """
    # an error if files are missing or cut off, or if checksums differ; else None
    if error := damage_error(path, verify_checksums=not is_launched()):
        raise error
    file = path / "meta.pt" if path.is_dir() else path  # a sharded checkpoint is a folder
    checkpoint = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    # a text if a section has a type that no trainer writes, else None
    if problem := find_malformed_section(checkpoint):
        raise CheckpointError(
            f"the checkpoint {path} cannot be used: {problem}",
            hint="use another checkpoint",
            flag="--ckpt_path=ANOTHER",
        )
    # the weights of a sharded checkpoint lie in other files
    if isinstance(checkpoint, dict) and (path.is_dir() or "state_dict" in checkpoint):
        # raises an error if it has another format than this version reads
        check_format(checkpoint, f"the checkpoint {path}")
        return checkpoint
    raise UsageError(
        f"{path} is a file of torch.save, but not a checkpoint of a trainer: it has no "
        "'state_dict'",
        "checkpoints of a run, such as runs/NAME/version_0/checkpoints/step=000100.ckpt",
        hint="use a checkpoint of a run",
        flag="--ckpt_path=auto",
    )


def saved_config_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the configuration that a command has saved in a checkpoint; empty if there is none.

    Args:
        checkpoint: the content of the checkpoint.
        path: its path, for errors.

    Raises:
        UsageError: the configuration is malformed or too large to come from a command.
    """
    config = checkpoint.get("ravine", {})
    if isinstance(config, dict):  # another type is reported below
        config = config.get("config", {})
    if config == {}:
        return {}
    reason = ""
    try:
        # raises UnsafePickle for too many values or levels
        check_tree_size(config, MAX_SAVED_CONFIG_VALUES, MAX_SAVED_CONFIG_LEVELS)
        # `_is_config`: whether model, data and callbacks are mappings that name a class
        is_valid = isinstance(config, dict) and _is_config(config)
        json.dumps(config)  # raises an error for values that are not plain
    except (TypeError, ValueError, UnsafePickle) as error:
        is_valid, reason = False, f": {error}"
    if is_valid:
        return config
    raise UsageError(
        f"{path}: its configuration, ravine.config, was not written by a command{reason}",
        ["model, data, seed_everything, trainer.name, trainer.callbacks"],
        hint="use another checkpoint, or build the model and pass ckpt_path to trainer.fit",
        flag="--ckpt_path=ANOTHER",
    )


def _is_config(config: dict[str, Any]) -> bool:
    callbacks = config.get("trainer.callbacks") or []
    specs = [*(callbacks if isinstance(callbacks, list) else [callbacks])]
    specs += [config[key] for key in ("model", "data") if config.get(key) is not None]
    for spec in specs:
        if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
            return False
        if not isinstance(spec.get("init_args", {}), dict):
            return False
    return (
        config.keys() >= {"model", "data", "seed_everything", "trainer.name", "trainer.callbacks"}
        and isinstance(config["model"], dict)
        and isinstance(config["trainer.name"], str | None)
        and isinstance(config["seed_everything"], int | None)
    )
