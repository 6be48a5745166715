"""Saved config: the part of a command's configuration in its checkpoints, and its use on resume.

    checkpoint["ravine"]["config"]: model, data, seed_everything, trainer.name, trainer.callbacks,
                                    and of the trainer's arguments those of TRAINING_ARGS

The first four become flags before the user's own, so that `test --ckpt_path X` is a complete
command. Callbacks that change the net are added too. `fit` also gets the arguments of
TRAINING_ARGS, and all callbacks if the user names none. The user's values take precedence, and each
difference is printed. A change of a weight's shape is an error: see checkpoint_connector.py.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from ravine.callbacks.transforms.base import Transform
from ravine.checkpoint_format import record_format
from ravine.errors import UsageError
from ravine.lightning_compat import checkpoint_connector

from ..checkpoint_connector import RavineCheckpointConnector
from ..checkpoint_metadata import load_metadata, saved_config_of
from ..model_optimizer import model_optimizer_message
from .trust import TrustPolicy

Config = dict[str, Any]
SAVED_FLAG_KEYS = ("model", "data", "seed_everything", "trainer.name")  # saved as flags
LENGTH_ARGS = ("max_epochs", "max_steps")
TRAINING_ARGS = (  # trainer arguments that a resumed fit keeps instead of the defaults
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    *LENGTH_ARGS,
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
)
OUTPUT_PATH_ARGS = (
    "dirpath",
    "exclude_batches_path",
    "cache_dir",
)  # callback arguments with output paths
FORMAT_FIELD = re.compile(
    r"\{[\w./ -]+(:0?\d{0,2}(\.\d{1,2})?[defg%]?)?\}"
)  # a field of a file name template: {val/loss:.2f}


def resolve_config(parser: LightningArgumentParser, config: Namespace) -> Config:
    """Return a configuration as plain values, including defaults."""
    return json.loads(parser.dump(config, format="json", skip_unset=False))


class ConfigSaver(L.Callback):
    """Saves config.yaml in the run directory, and the configuration in each checkpoint."""

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, changed_keys: list[str]
    ) -> None:
        """Store the configuration of a command, and the keys that differ from its checkpoint."""
        self.config, self.changed_keys = resolve_config(parser, config), changed_keys
        self.start_step: int | None = None  # step at which training started, or None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write config.yaml, after the datamodule has resolved its source."""
        data_source = getattr(trainer.datamodule, "provenance", None) or {}  # type: ignore
        arguments = (self.config["data"] or {}).get("init_args", {})
        if arguments.get("source") == "auto":  # another machine must use the same source
            arguments["source"] = data_source.get("source", "auto")
        connector = checkpoint_connector(trainer)
        if isinstance(connector, RavineCheckpointConnector):
            connector.changed_keys = self.changed_keys
        folder = trainer.log_dir
        if trainer.is_global_zero and folder:
            lines = [f"# data {key}: {value}\n" for key, value in data_source.items()]
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            Path(folder, "config.yaml").write_text("".join(lines) + text, encoding="utf-8")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, and print which optimizer the model builds if no plan does."""
        self.start_step = trainer.global_step
        # None if an OptimizerPlan builds the optimizer, and prints a table of it
        if trainer.is_global_zero and (message := model_optimizer_message(trainer, pl_module)):
            print(message)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration that rebuilds the model and the data to the checkpoint.

        Lightning calls this on every rank when a checkpoint is saved.
        """
        saved_values = {key: self.config[key] for key in ("model", "data", "seed_everything")}
        trainer_arguments = self.config["trainer"]
        keys = ("name", "callbacks", *TRAINING_ARGS)
        saved_values |= {
            f"trainer.{key}": trainer_arguments[key] for key in keys if key in trainer_arguments
        }
        section = record_format(checkpoint)  # checkpoint["ravine"]
        section.update({"config": saved_values, "world_size": trainer.world_size})


def load_saved_config(path: Path) -> Config:
    """Return the configuration in a checkpoint; empty if no command has written it."""
    return saved_config_of(load_metadata(path), path)


def to_argv(config: Config, command: str = "test", typed_keys: Collection[str] = ()) -> list[str]:
    """Convert a saved configuration to flags that precede the user's, whose keys are `typed_keys`.

    If the user gives a length or a config, the saved lengths are left out. A trainer argument may
    be null on purpose although its default is a number.
    """
    keys = [*SAVED_FLAG_KEYS, *(f"trainer.{key}" for key in TRAINING_ARGS if command == "fit")]
    if "config" in typed_keys or any(f"trainer.{key}" in typed_keys for key in LENGTH_ARGS):
        keys = [key for key in keys if key.removeprefix("trainer.") not in LENGTH_ARGS]
    values = {
        key: config[key]
        for key in keys
        if key in config and (key.startswith("trainer.") or config[key] is not None)
    }
    return [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]


def extra_argv(
    config: Config,
    parsed: Config,
    trust: TrustPolicy,
    source: str,
    command: str = "test",
    typed_keys: Collection[str] = (),
) -> list[str]:
    """Return flags to append to the user's: the checkpoint's transforms and its data source.

    The source replaces `auto`, which may find other data now. A fit without a config and without
    user callbacks gets all callbacks of the checkpoint. With a config, the callbacks of the config
    are used.

    Args:
        config: the configuration of the checkpoint.
        parsed: the configuration of the command.
        trust: decides which classes of the checkpoint may be imported.
        source: the path of the checkpoint, for errors.
        command: the command.
        typed_keys: the keys that the user gave.
    """
    # callback specs are mappings with a class_path, and init_args
    present_classes = {spec["class_path"] for spec in _callback_specs(parsed)}
    takes_all = command == "fit" and not present_classes and "config" not in typed_keys
    flags = []
    # A command must not write to the output paths of the run in the checkpoint.
    for spec in map(_without_output_paths, _callback_specs(config)):
        path = spec["class_path"]
        is_left_out = not takes_all and path not in present_classes
        if is_left_out and not trust.is_admitted(path):
            rank_zero_only(print)(f"callback of the checkpoint not used: {path} is not trusted")
        elif takes_all or (is_left_out and _is_transform(spec)):  # a transform changes the net
            # raises an error if an argument of it names a class that is not admitted
            trust.check_callback(spec, source)
            flags.append(f"--trainer.callbacks+={json.dumps(spec)}")
    if takes_all and flags:
        callback_names = [spec["class_path"].rpartition(".")[2] for spec in _callback_specs(config)]
        rank_zero_only(print)(f"callbacks of the checkpoint: {', '.join(callback_names)}")
    # `source` is the argument of a datamodule that names its files
    parsed_data = (parsed.get("data") or {}).get("init_args", {})
    saved_data = (config.get("data") or {}).get("init_args", {})
    if parsed_data.get("source") == "auto" and saved_data.get("source"):
        flags.append(f"--data.source={saved_data['source']}")
    return flags


def _without_output_paths(spec: Config) -> Config:
    """Return a callback of a checkpoint without output paths: a run writes below its own folder."""
    cleaned = dict(spec)
    for section in spec.keys() & {"init_args", "dict_kwargs"}:
        arguments = spec[section] or {}
        cleaned[section] = {
            k: v
            for k, v in arguments.items()
            if k not in OUTPUT_PATH_ARGS and not _may_leave_folder(k, v)
        }
    return cleaned


def _may_leave_folder(key: str, value: Any) -> bool:
    """Return whether a file name or template may become a path outside of its folder."""
    if key != "filename" or value is None:
        return False
    literal = FORMAT_FIELD.sub("0", str(value))
    field_names = [field[0].strip("{}") for field in FORMAT_FIELD.finditer(str(value))]
    is_malformed = "{" in literal or "}" in literal  # such as {step:c}, which can be any character
    return is_malformed or any(
        os.path.isabs(n) or ".." in Path(n).parts for n in (literal, *field_names)
    )


def report_changes(config: Config, parsed: Config, path: str, command: str = "test") -> list[str]:
    """Print the values that differ from the checkpoint's, and return their keys.

    Args:
        config: the configuration of the checkpoint.
        parsed: the configuration of the command.
        path: the checkpoint, for errors.
        command: the command; only a fit compares arguments of the trainer.

    Raises:
        UsageError: the model is of another class, so the weights cannot fit.
    """
    try:
        # imports the class at the class_path of a mapping
        saved_class = _import_spec_class(config["model"])
    except (ImportError, AttributeError) as error:
        class_path = config["model"]["class_path"]
        raise UsageError(
            f"{path} names the model {class_path!r}, which cannot be imported: {error}",
            flag="cd FOLDER, to the folder with its file, or --ckpt_path=ANOTHER",
        ) from error
    parsed_class = _import_spec_class(parsed["model"])
    if not issubclass(saved_class, parsed_class) and not issubclass(parsed_class, saved_class):
        raise UsageError(
            f"{path} contains the weights of a {saved_class.__name__}, which do not fit the model "
            f"{parsed_class.__name__} of the command",
            [saved_class.__name__],
            flag=f"--model={saved_class.__name__}, or the same command without --model and "
            "--config",
        )
    is_fit = command == "fit"
    # values by dotted key, such as model.d_model
    parsed_leaves = dict(_compared_leaves(parsed, is_fit))
    saved_leaves = dict(_compared_leaves(config, is_fit))
    # a key that only one of both configurations has is not compared
    changed = [
        key
        for key in sorted(parsed_leaves.keys() & saved_leaves.keys())
        if parsed_leaves[key] != saved_leaves[key]
    ]
    for key in changed:
        new_text, old_text = json.dumps(parsed_leaves[key]), json.dumps(saved_leaves[key])
        rank_zero_only(print)(
            f"{key} is {new_text} here and {old_text} in the checkpoint: {new_text} is used"
        )
    return changed


def changed_arguments(config: Config, parsed: Config) -> list[str]:
    """Return the arguments of a fit that are not those of the checkpoint's run.

    Lengths, output paths, and arguments of the machine do not count: with other ones the run of
    the checkpoint can go on.

    Args:
        config: the configuration of the checkpoint, with keys such as trainer.callbacks.
        parsed: the configuration of the command, with the trainer's arguments under "trainer".
    """
    trainer_arguments = {f"trainer.{key}": value for key, value in parsed["trainer"].items()}
    parsed = {key: value for key, value in parsed.items() if key != "trainer"} | trainer_arguments
    # each configuration with its callbacks as mappings, without arguments that are output paths
    before, now = (
        c | {"trainer.callbacks": [_without_output_paths(spec) for spec in _callback_specs(c)]}
        for c in (config, parsed)
    )
    # values by dotted key, such as model.d_model
    saved_leaves = dict(_compared_leaves(before, is_fit=True))
    parsed_leaves = dict(_compared_leaves(now, is_fit=True))
    changed = {
        key
        for key in saved_leaves.keys() | parsed_leaves.keys()
        if key not in saved_leaves
        or key not in parsed_leaves
        or saved_leaves[key] != parsed_leaves[key]
    }
    # the order of the callbacks counts too
    saved_classes = [spec["class_path"] for spec in _callback_specs(before)]
    parsed_classes = [spec["class_path"] for spec in _callback_specs(now)]
    if saved_classes != parsed_classes:
        changed.add("trainer.callbacks")
    return sorted(changed)


def _compared_leaves(config: Config, is_fit: bool) -> Iterator[tuple[str, Any]]:
    """Yield the values of model, data, callbacks and seed by key, and for a fit the trainer's."""
    callbacks = {spec["class_path"]: spec.get("init_args", {}) for spec in _callback_specs(config)}
    yield from _flatten_config({k: config[k] for k in ("model", "data", "seed_everything")})
    arguments = config.get("trainer") or {
        k[8:]: v for k, v in config.items() if k[:8] == "trainer."
    }
    for key in sorted({*TRAINING_ARGS} - {*LENGTH_ARGS}) if is_fit else ():
        if key in arguments:
            yield f"trainer.{key}", arguments[key]
    for path, arguments in callbacks.items():
        yield from _flatten_config(arguments, f"trainer.callbacks.{path.rpartition('.')[2]}")


def remove_transforms(config: Config) -> Config:
    """Return the configuration of a checkpoint without the callbacks that transform the net."""
    remaining = [spec for spec in _callback_specs(config) if not _is_transform(spec)]
    return config | {"trainer.callbacks": remaining}


def _callback_specs(config: Config) -> list[Config]:
    """Return the callbacks of a checkpoint or of a command as a list, also a single one."""
    specs = config["trainer"]["callbacks"] if "trainer" in config else config["trainer.callbacks"]
    return specs if isinstance(specs, list) else [specs] if specs else []


def _is_transform(spec: Config) -> bool:
    try:
        callback_class = _import_spec_class(spec)
    except (ImportError, AttributeError):  # the file was removed: not known to be a transform
        return False
    return isinstance(callback_class, type) and issubclass(callback_class, Transform)


def _import_spec_class(spec: Config) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    if not module:
        raise ImportError(f"{name!r} is not the dotted path of a class")
    return getattr(import_module(module), name)


def _flatten_config(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists by dotted key as typed: without init_args."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, child in pairs:
            child_key = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from _flatten_config(child, child_key)
    else:
        yield key, value
