"""Trainer arguments by their source on a resume: the checkpoint, or the machine and the command.

    LENGTH_ARGS     restored, unless the command gives any length
    TRAINING_ARGS   restored: they change the result of training
    OUTPUT_ARGS     restored: they change what a run checks, logs and prints
    MACHINE_ARGS    not restored: they belong to the machine or the account of the user
    DRY_RUN_ARGS    not restored: such a run writes no checkpoint

An argument of the command or of its config has precedence over the checkpoint's. Each argument of
the trainer is in one of these groups; `name` and `callbacks` have rules of their own.
"""

from inspect import signature
from typing import Any

import lightning as L

from ..trainer import Trainer

LENGTH_ARGS = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")
TRAINING_ARGS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
    "sync_batchnorm",
    "deterministic",
    "benchmark",
)
OUTPUT_ARGS = (
    "logger",
    "log_every_n_steps",
    "num_sanity_val_steps",
    "limit_test_batches",
    "limit_predict_batches",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "enable_autolog_hparams",
    "inference_mode",
    "detect_anomaly",
    "profiler",
)
MACHINE_ARGS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "plugins",
    "default_root_dir",
    "model_registry",  # a place to upload to
)
DRY_RUN_ARGS = ("fast_dev_run", "barebones")
RESTORED_ARGS = (*LENGTH_ARGS, *TRAINING_ARGS, *OUTPUT_ARGS)
# Arguments that may also be objects. Of a checkpoint only these names are used: the parser would
# import any other text, and an object may write to any path or send data to any address.
ALLOWED_NAMES = {
    "logger": ("csv", "tensorboard", "wandb", "mlflow"),
    "profiler": ("simple", "advanced", "pytorch", "xla"),
}
DURATION_ARGS = ("max_time", "val_check_interval")  # may be a mapping: {minutes: 5}


def is_restorable(key: str, value: Any) -> bool:
    """Return whether a saved value of a trainer argument is plain: the parser imports nothing."""
    if key in ALLOWED_NAMES:
        items = value if isinstance(value, list) else [value]
        names = ALLOWED_NAMES[key]
        return all(item is None or isinstance(item, bool) or item in names for item in items)
    if isinstance(value, dict):
        is_duration = all(isinstance(number, int | float) for number in value.values())
        return key in DURATION_ARGS and is_duration
    return value is None or isinstance(value, bool | int | float | str)


def trainer_defaults() -> dict[str, Any]:
    """Return the default values of the trainer's arguments."""
    parameters = {**signature(L.Trainer).parameters, **signature(Trainer).parameters}
    return {name: parameter.default for name, parameter in parameters.items()}
