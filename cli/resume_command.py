"""Resume command: the whole command that continues a run from its checkpoint.

    ravine fit --ckpt_path runs/spam/version_0/checkpoints/step=000300.ckpt --trust=mine

The checkpoint has the model, the data, the callbacks and the trainer's arguments. The command adds
what a checkpoint alone may not decide: arguments of the machine, paths and objects that differ from
the defaults, and the packages whose classes may be imported.
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L

from .config.callback_paths import without_output_paths
from .config.config_changes import Config, callback_specs
from .config.trainer_arguments import (
    MACHINE_ARGS,
    RESTORED_ARGS,
    is_restorable,
    trainer_defaults,
)
from .config.trust import TRUST_FLAG, packages_to_trust
from .error_report import program_name
from .rank_zero import is_launched


def make_command(config: Config, checkpoint: str | Path, length_flags: Iterable[str] = ()) -> str:
    """Return the command that continues a run, as it is typed in a shell.

    Args:
        config: the resolved configuration of the run, with the trainer's arguments under "trainer".
        checkpoint: the checkpoint, or the folder of the run.
        length_flags: flags that make a finished run longer.
    """
    words = [program_name(), "fit", "--ckpt_path", str(checkpoint), *length_flags]
    if packages := packages_to_trust(saved_form(config)):
        words.append(f"{TRUST_FLAG}={','.join(packages)}")
    return shlex.join([*words, *_unsaved_flags(config)])


def saved_form(config: Config) -> Config:
    """Return a resolved configuration with keys as in a checkpoint: trainer.callbacks."""
    return {
        "model": config["model"],
        "data": config["data"],
        "trainer.callbacks": callback_specs(config),
    }


def _unsaved_flags(config: Config) -> list[str]:
    """Return the flags of arguments that are not restored and differ from their defaults."""
    arguments, defaults = config["trainer"], trainer_defaults()
    flags = []
    for name, value in arguments.items():
        is_object = name in RESTORED_ARGS and not is_restorable(name, value)
        # an unknown default is None
        if (name in MACHINE_ARGS or is_object) and value != defaults.get(name):
            flags.append(
                f"--trainer.{name}={value if isinstance(value, str) else json.dumps(value)}"
            )
    for spec in callback_specs(config):
        # a callback with an output path, which a resume from the checkpoint alone would remove
        if _set_arguments(without_output_paths(spec)) != _set_arguments(spec):
            flags.append(f"--trainer.callbacks+={json.dumps(spec)}")
    return flags


def _set_arguments(spec: Config) -> dict[str, Any]:
    """Return the arguments of a callback that are not null."""
    sections = [spec.get("init_args") or {}, spec.get("dict_kwargs") or {}]
    return {k: v for section in sections for k, v in section.items() if v is not None}


def longer_run_flags(trainer: L.Trainer) -> list[str]:
    """Return a flag that doubles the length of a run that has reached it; none for other runs."""
    step, epochs = trainer.global_step, trainer.max_epochs
    if 0 < trainer.max_steps <= step:
        return [f"--trainer.max_steps={2 * step}"]
    if epochs is not None and 0 < epochs <= trainer.current_epoch:
        return [f"--trainer.max_epochs={2 * epochs}"]
    return []  # it was interrupted, or a callback has stopped it


def resume_line(command: str) -> str:
    """Return the line to print for a command that continues a run."""
    note = ", in the same job launcher" if is_launched() else ""
    return f"resume{note}: {command}"
