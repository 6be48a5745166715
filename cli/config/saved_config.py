"""Saved config: the part of a command's configuration in its checkpoints, and its use on resume.

    checkpoint["ravine"]["config"]: model, data, seed_everything, trainer.name, trainer.callbacks,
                                    and the trainer's arguments of RESTORED_ARGS

They become flags before the user's own, so that `fit --ckpt_path X` and `test --ckpt_path X` are
complete commands:

    test, validate, predict    the first four, and the callbacks that change the net
    fit                        all of them

The user's values take precedence, and each difference is printed (config_changes.py). A change of a
weight's shape is an error: see checkpoint_connector.py.
"""

import json
from collections.abc import Collection, Iterable
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
from ..run_folders import record
from ..run_folders.placement import recorded_folder, run_of_checkpoint
from .callback_arguments import class_name
from .callback_paths import without_output_paths
from .config_changes import MISSING, Config, callback_specs, import_spec_class
from .errors import parse_argv
from .trainer_arguments import LENGTH_ARGS, RESTORED_ARGS, is_restorable, trainer_defaults
from .trust import TrustPolicy
from .values import ConfigValue, gives_whole_run

SAVED_FLAG_KEYS = ("model", "data", "seed_everything", "trainer.name")  # saved as flags


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
        self._has_command_file = False

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
        keys = ("name", "callbacks", *RESTORED_ARGS)
        saved_values |= {
            f"trainer.{key}": trainer_arguments[key] for key in keys if key in trainer_arguments
        }
        section = record_format(checkpoint)  # checkpoint["ravine"]
        section.update({"config": saved_values, "world_size": trainer.world_size})
        # set by the command line: makes the command that continues from a checkpoint or a run
        make_command = getattr(trainer, "resume_command", None)
        folder = trainer.log_dir if make_command and not self._has_command_file else None
        if make_command and folder and trainer.is_global_zero and trainer.global_step:
            # A killed run has this command; the end of a run writes that of its last checkpoint.
            record.write_command(folder, make_command(folder))
            self._has_command_file = True


def load_saved_config(path: Path) -> Config:
    """Return the configuration in a checkpoint; empty if no command has written it."""
    return saved_config_of(load_metadata(path), path)


def to_argv(
    config: Config, values: Collection[ConfigValue], command: str = "test", source: str = ""
) -> list[str]:
    """Convert a saved configuration to flags that precede the user's.

    The saved lengths are left out if the user gives a length or the config of a whole run. A
    trainer argument may be null on purpose although its default is a number.

    Args:
        config: the configuration of the checkpoint.
        values: the user's values, from flags, configs and variables.
        command: the command; only a fit gets arguments of the trainer.
        source: the path of the checkpoint, for a printed line.
    """
    typed_keys = {value.key for value in values}
    names = list(RESTORED_ARGS) if command == "fit" else []
    if gives_whole_run(values) or any(f"trainer.{name}" in typed_keys for name in LENGTH_ARGS):
        names = [name for name in names if name not in LENGTH_ARGS]
    # A variable of the environment would not take precedence over a flag. Model and data are merged
    # with the user's values.
    replaced_keys = typed_keys & {"seed_everything", "trainer.name"}
    saved = {
        key: config[key]
        for key in SAVED_FLAG_KEYS
        if config.get(key) is not None and key not in replaced_keys
    }
    defaults = trainer_defaults()
    for name in names:
        key = f"trainer.{name}"
        if key not in config or key in typed_keys or config[key] == defaults.get(name, MISSING):
            continue
        # an object, such as a logger with its own folder
        if not is_restorable(name, config[key]):
            rank_zero_only(print)(f"{key} of {source} is an object: the default is used instead")
        else:
            saved[key] = config[key]
    return [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in saved.items()]


def callbacks_argv(
    config: Config, values: Collection[ConfigValue], trust: TrustPolicy, source: str
) -> list[str]:
    """Return flags that add the callbacks of a checkpoint to a fit, before the user's own flags.

    There are none if the user replaces the list (`--trainer.callbacks=`) or gives the config of a
    whole run. A callback that the user adds (`--trainer.callbacks+=EMA`) replaces that of the same
    class.

    Args:
        config: the configuration of the checkpoint.
        values: the user's values, from flags, configs and variables.
        trust: decides which classes of the checkpoint may be imported.
        source: the path of the checkpoint, for errors.

    Raises:
        UsageError: a callback may not be imported, or cannot be imported.
    """
    is_replaced, typed_names = _typed_callbacks(values)
    if is_replaced or gives_whole_run(values):
        return []
    # A command must not write to the output paths of the run in the checkpoint.
    specs = [
        without_output_paths(spec)
        for spec in callback_specs(config)
        if class_name(spec) not in typed_names
    ]
    for spec in specs:
        # both raise an error: for a class that is not admitted, or that cannot be imported
        trust.require_admitted(spec["class_path"], f"trainer.callbacks in {source}")
        _check_importable(spec, source)
        # raises an error if an argument names a class that is not admitted
        trust.check_callback(spec, source)
    if specs:
        names = ", ".join(class_name(spec) for spec in specs)
        rank_zero_only(print)(f"callbacks of the checkpoint: {names}")
    return [f"--trainer.callbacks+={json.dumps(spec)}" for spec in specs]


def _typed_callbacks(values: Iterable[ConfigValue]) -> tuple[bool, set[str]]:
    """Return whether the user replaces the list of callbacks, and the classes that are added."""
    is_replaced, names = False, set[str]()
    for value in values:
        if value.key.rstrip("+") != "trainer.callbacks":
            continue
        is_replaced |= not value.is_appended
        elements = value.children() if isinstance(value.node, yaml.SequenceNode) else [value]
        names |= {class_name(spec) for element in elements if (spec := element.class_spec)}
    return is_replaced, names


def _check_importable(spec: Config, source: str) -> None:
    """Raise an error that names the callback of a checkpoint, if its class cannot be imported."""
    try:
        import_spec_class(spec)
    except Exception as error:  # the file is missing, or its code fails
        path, run = spec["class_path"], run_of_checkpoint(Path(source))
        package = path.partition(".")[0]
        # where the command of that run was typed; None if it is not known
        folder = recorded_folder(run) if run is not None else None
        fix = f"cd {folder or 'FOLDER'}, the folder with {package}"
        if run is not None:
            fix += f"; or --config={run}/config.yaml, after you have removed the callback from it"
        raise UsageError(
            f"the run of {source} has the callback {path!r}, which cannot be imported "
            f"({type(error).__name__}: {error})",
            hint=f"make {package!r} importable",
            flag=fix,
        ) from error


def check_parsed_alone(parser: LightningArgumentParser, argv: list[str], source: str) -> None:
    """Raise an error that names the checkpoint if the flags made from it are wrong.

    Otherwise the error would name a word that the user has not typed.

    Args:
        parser: the parser of all commands.
        argv: the command and the flags made from the checkpoint; without flags nothing is checked.
        source: the path of the checkpoint.
    """
    if not argv[1:]:
        return
    try:
        parse_argv(parser, argv)
    except UsageError as error:
        problem = error.problem.replace("on the command line, ", "")
        raise UsageError(
            f"the configuration in {source} does not fit the classes of this version: {problem}",
            error.allowed,
            hint="use the version that wrote the checkpoint, or another checkpoint",
            flag="--config=FILE.yaml with the whole configuration, or --ckpt_path=ANOTHER",
            label=error.label,
        ) from error


def extra_argv(config: Config, parsed: Config, trust: TrustPolicy, source: str) -> list[str]:
    """Return flags to append to the user's: the checkpoint's transforms and its data source.

    The source replaces `auto`, which may find other data now.

    Args:
        config: the configuration of the checkpoint.
        parsed: the configuration of the command.
        trust: decides which classes of the checkpoint may be imported.
        source: the path of the checkpoint, for errors.
    """
    # callback specs are mappings with a class_path, and init_args
    present_classes = {spec["class_path"] for spec in callback_specs(parsed)}
    flags = []
    for spec in map(without_output_paths, callback_specs(config)):
        path = spec["class_path"]
        # a transform changes the net, so the weights need it
        if path not in present_classes and trust.is_admitted(path) and _is_transform(spec):
            # raises an error if an argument of it names a class that is not admitted
            trust.check_callback(spec, source)
            flags.append(f"--trainer.callbacks+={json.dumps(spec)}")
    parsed_data, saved_data = parsed.get("data") or {}, config.get("data") or {}
    # `source` is the argument of a datamodule that names its files
    saved_source = saved_data.get("init_args", {}).get("source")
    is_same_class = parsed_data.get("class_path") == saved_data.get("class_path")
    if is_same_class and saved_source and parsed_data["init_args"].get("source") == "auto":
        flags.append(f"--data.source={saved_source}")
    return flags


def remove_transforms(config: Config) -> Config:
    """Return the configuration of a checkpoint without the callbacks that transform the net."""
    remaining = [spec for spec in callback_specs(config) if not _is_transform(spec)]
    return config | {"trainer.callbacks": remaining}


def _is_transform(spec: Config) -> bool:
    try:
        callback_class = import_spec_class(spec)
    except (ImportError, AttributeError):  # the file was removed: not known to be a transform
        return False
    return isinstance(callback_class, type) and issubclass(callback_class, Transform)
