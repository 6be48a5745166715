"""Check that all ranks have the same configuration, by comparing one hash per rank."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.distributed import ProcessGroup

from ravine.errors import UsageError

from .collectives import all_gather_values

ABSENT_VALUE = "absent"
MAX_SHOWN_CHARS = 60  # characters of a value in a message
COMPARED_TRAINER_ARGS = (
    "max_epochs",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "check_val_every_n_epoch",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "num_sanity_val_steps",
)
RANK_SPECIFIC_HPARAMS = (
    "rank",
    "local_rank",
    "global_rank",
    "node_rank",
    "device",
    "gpu",
    "gpu_id",
)  # hparams


class RankMismatchError(UsageError):
    """The ranks of a job have different configurations, or loaders of unequal length."""


def flatten_config(config: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists, by dotted key."""
    if isinstance(config, Mapping) and config:
        items: Any = config.items()
    elif isinstance(config, list | tuple) and config:
        items = enumerate(config)
    else:
        return {key: config}
    return {
        k: v
        for name, child in items
        for k, v in flatten_config(child, f"{key}.{name}".lstrip(".")).items()
    }


def check_same_config(config: dict[str, Any], group: ProcessGroup | None = None) -> None:
    """Raise RankMismatchError on every rank if the flat configurations of the ranks are not equal.

    Every rank of `group` calls it. It gathers one hash per rank. Only if the hashes differ, it
    gathers the values, to name the first key that differs.

    Args:
        config: values by dotted key, as of `flatten_config`.
        group: the ranks; None: all.
    """
    config_text = {
        key: json.dumps(config[key], default=repr, sort_keys=True) for key in sorted(config)
    }
    digest = hashlib.sha256(json.dumps(config_text).encode()).hexdigest()
    if len(set(all_gather_values(digest, group))) == 1:
        return
    configs: list[dict[str, str]] = all_gather_values(config_text, group)
    all_keys = sorted(set().union(*configs))
    key = next(key for key in all_keys if len({config.get(key) for config in configs}) > 1)
    # ABSENT_VALUE: text for a key that a rank does not have
    values = [config.get(key, ABSENT_VALUE) for config in configs]
    differing_rank = next(rank for rank, value in enumerate(values) if value != values[0])
    # of long values the message has the part in which they differ
    first_value, other_value = _shorten_pair(values[0], values[differing_rank])
    raise RankMismatchError(
        f"the ranks of this job have different configurations: {key} is {first_value} on rank 0 "
        f"and {other_value} on rank {differing_rank}",
        hint="start every rank with the same arguments, config files and environment variables",
    )


def collect_script_config(trainer: L.Trainer) -> dict[str, Any]:
    """Return the configuration of a script, as far as trainer, module and data hold it.

    Returns:
        the seed, the classes, arguments of the trainer, and plain hyperparameters of module and
        datamodule, by dotted key.
    """
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    config: dict[str, Any] = {
        # Lightning's seed_everything sets this variable
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "module": _class_path(module),
        "data": _class_path(data) if data is not None else None,
        "trainer": {name: getattr(trainer, name, None) for name in COMPARED_TRAINER_ARGS},
    }
    for name, owner in (("module", module), ("data", data)):
        for key, value in dict(getattr(owner, "hparams", None) or {}).items():
            # RANK_SPECIFIC_HPARAMS: e.g. "local_rank", which may differ
            if key not in RANK_SPECIFIC_HPARAMS and isinstance(
                value, bool | int | float | str | None
            ):
                config[f"{name}.{key}"] = value
    return flatten_config(config)


def _shorten_pair(first: str, second: str) -> tuple[str, str]:
    """Shorten two different texts to MAX_SHOWN_CHARS characters that contain their difference."""
    pairs = zip(first, second, strict=False)
    # the shorter text may be the beginning of the other one
    num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    # the first difference is in the middle, or in its place if that is earlier
    start = max(0, num_equal - MAX_SHOWN_CHARS // 2)
    if max(len(first), len(second)) <= MAX_SHOWN_CHARS:
        start = 0
    end = start + MAX_SHOWN_CHARS
    first, second = (
        f"{'...' if start else ''}{text[start:end]}{'...' if len(text) > end else ''}"
        for text in (first, second)
    )
    return first, second


def _class_path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
