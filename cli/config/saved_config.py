"""What a checkpoint carries of the command that made it, and how it comes back.

    checkpoint["ravine"]["config"]: model, data, seed_everything, trainer.name, trainer.callbacks,
                                    and of the trainer's arguments those of TRAINING

The first four, put in front of the user's words, make `test --ckpt_path X` a whole command; of the
callbacks those that change the net are added. `fit` has the arguments of TRAINING in front too, and
all callbacks where the user names none. What the user gives stands behind and wins, and each
difference is printed. One that changes the shape of a weight is refused: see restore.py.
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
from ravine.errors import UsageError
from ravine.lightning_compat import checkpoint_connector

from ..checkpoint_connector import Restore, config_of, read
from .trust import Trust

Config = dict[str, Any]
WORDS = ("model", "data", "seed_everything", "trainer.name")  # that come back as flags
LENGTHS = ("max_epochs", "max_steps")
TRAINING = (  # arguments of the trainer that a resumed fit would otherwise have by default
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    *LENGTHS,
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
)
PLACES = ("dirpath", "exclude_batches_path", "cache")  # arguments of callbacks: where to write
FIELD = re.compile(
    r"\{[\w./ -]+(:0?\d{0,2}(\.\d{1,2})?[defg%]?)?\}"
)  # of a file's name: {val/loss:.2f}
FORM = 1  # of what stands under checkpoint["ravine"]["config"]


def resolved(parser: LightningArgumentParser, config: Namespace) -> Config:
    """A configuration as plain values, defaults included."""
    return json.loads(parser.dump(config, format="json", skip_unset=False))


class SavedConfig(L.Callback):
    """Writes config.yaml into the run's folder, and what a checkpoint needs of it into each."""

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, changed: list[str]
    ) -> None:
        """Take the configuration of a command, and the keys that differ from its checkpoint."""
        self.config, self.changed = resolved(parser, config), changed
        self.begun: int | None = None  # step at which training began, if it did

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write config.yaml, when the data have said which source they took."""
        taken = getattr(trainer.datamodule, "resolved", None) or {}  # type: ignore
        arguments = (self.config["data"] or {}).get("init_args", {})
        if arguments.get("source") == "auto":  # another machine must not take another
            arguments["source"] = taken.get("source", "auto")
        connector = checkpoint_connector(trainer)
        if isinstance(connector, Restore):
            connector.changed = self.changed
        folder = trainer.log_dir
        if trainer.is_global_zero and folder:
            lines = [f"# data {key}: {value}\n" for key, value in taken.items()]
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            Path(folder, "config.yaml").write_text("".join(lines) + text, encoding="utf-8")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step."""
        self.begun = trainer.global_step

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add to the checkpoint what rebuilds its model and its data."""
        kept = {key: self.config[key] for key in ("model", "data", "seed_everything")}
        trainer_arguments = self.config["trainer"]
        keys = ("name", "callbacks", *TRAINING)
        kept |= {
            f"trainer.{key}": trainer_arguments[key] for key in keys if key in trainer_arguments
        }
        own = checkpoint.setdefault("ravine", {})
        own |= {"version": FORM, "config": kept, "world_size": trainer.world_size}


def saved(path: Path) -> Config:
    """The configuration inside a checkpoint; empty if it was not written by a command."""
    return config_of(read(path), path)


def as_words(config: Config, command: str = "test", typed: Collection[str] = ()) -> list[str]:
    """A saved configuration as flags, to stand before the user's own, whose keys are `typed`.

    Who types a length or a config decides how long the run is. An argument of the trainer may be
    null on purpose, where its default is a number.
    """
    keys = [*WORDS, *(f"trainer.{key}" for key in TRAINING if command == "fit")]
    if "config" in typed or any(f"trainer.{key}" in typed for key in LENGTHS):
        keys = [key for key in keys if key.removeprefix("trainer.") not in LENGTHS]
    values = {
        key: config[key]
        for key in keys
        if key in config and (key.startswith("trainer.") or config[key] is not None)
    }
    return [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in values.items()]


def words_behind(
    config: Config,
    parsed: Config,
    trust: Trust,
    source: str,
    command: str = "test",
    typed: Collection[str] = (),
) -> list[str]:
    """Flags to stand behind the user's: the checkpoint's transforms that his callbacks leave out,
    and the source it was trained on in the place of `auto`, which might now find another.

    A fit without a configuration and without any callback of the user's gets all of the
    checkpoint's. Where a configuration is typed, its callbacks are the recipe.
    """
    present = {spec["class_path"] for spec in _callbacks(parsed)}
    everything = command == "fit" and not present and "config" not in typed
    words = []
    for spec in map(_writing_below, _callbacks(config)):
        path = spec["class_path"]
        left_out = not everything and path not in present
        if left_out and not trust.admits(path):
            rank_zero_only(print)(f"{path} of the checkpoint is left out: it is not imported")
        elif everything or (left_out and _changes_the_net(spec)):
            trust.check_callback(spec, source)
            words.append(f"--trainer.callbacks+={json.dumps(spec)}")
    if everything and words:
        names = [spec["class_path"].rpartition(".")[2] for spec in _callbacks(config)]
        rank_zero_only(print)(f"callbacks of the checkpoint: {', '.join(names)}")
    here, there = ((c.get("data") or {}).get("init_args", {}) for c in (parsed, config))
    if here.get("source") == "auto" and there.get("source"):
        words.append(f"--data.source={there['source']}")
    return words


def _writing_below(spec: Config) -> Config:
    """A callback of a checkpoint without the folder it wrote to: a run writes below its own."""
    kept = dict(spec)
    for part in spec.keys() & {"init_args", "dict_kwargs"}:
        arguments = spec[part] or {}
        kept[part] = {
            k: v for k, v in arguments.items() if k not in PLACES and not _leaves_folder(k, v)
        }
    return kept


def _leaves_folder(key: str, value: Any) -> bool:
    """Whether the name of a file, a template perhaps, may become a path out of its folder."""
    if key != "filename" or value is None:
        return False
    literal = FIELD.sub("0", str(value))
    names = [field[0].strip("{}") for field in FIELD.finditer(str(value))]
    odd = "{" in literal or "}" in literal  # such as {step:c}, which is any letter
    return odd or any(os.path.isabs(n) or ".." in Path(n).parts for n in (literal, *names))


def compare(config: Config, parsed: Config, path: str, command: str = "test") -> list[str]:
    """Print the values that differ from the checkpoint's and return their keys.

    Refuse a model of another kind: its weights would not fit, and the user should hear why.
    """
    try:
        theirs = _imported(config["model"])
    except (ImportError, AttributeError) as error:
        named = config["model"]["class_path"]
        raise UsageError(
            f"{path} names the model {named!r}, which cannot be imported: {error}",
            flag="the command from the folder that has its file, or another checkpoint",
        ) from error
    ours = _imported(parsed["model"])
    if not issubclass(theirs, ours) and not issubclass(ours, theirs):
        raise UsageError(
            f"{path} holds the weights of a {theirs.__name__}, and the model given is a "
            f"{ours.__name__}: they are of different tasks",
            flag=f"--model={theirs.__name__}, or the command without --model and --config",
        )
    fits = command == "fit"
    here, there = dict(_leaves(parsed, fits)), dict(_leaves(config, fits))
    changed = [key for key in sorted(here.keys() & there.keys()) if here[key] != there[key]]
    for key in changed:
        word, other = json.dumps(here[key]), json.dumps(there[key])
        rank_zero_only(print)(f"{key} is {word} here and {other} in the checkpoint: {word} is used")
    return changed


def _leaves(config: Config, fits: bool) -> Iterator[tuple[str, Any]]:
    """The values of model, data, callbacks and seed, and for a fit the trainer's, by key."""
    callbacks = {spec["class_path"]: spec.get("init_args", {}) for spec in _callbacks(config)}
    yield from _flat({k: config[k] for k in ("model", "data", "seed_everything")})
    arguments = config.get("trainer") or {
        k[8:]: v for k, v in config.items() if k[:8] == "trainer."
    }
    for key in sorted({*TRAINING} - {*LENGTHS}) if fits else ():
        if key in arguments:
            yield f"trainer.{key}", arguments[key]
    for path, arguments in callbacks.items():
        yield from _flat(arguments, f"trainer.callbacks.{path.rpartition('.')[2]}")


def without_transforms(config: Config) -> Config:
    """The configuration of a checkpoint whose net is as it was built."""
    kept = [spec for spec in _callbacks(config) if not _changes_the_net(spec)]
    return config | {"trainer.callbacks": kept}


def _callbacks(config: Config) -> list[Config]:
    """The callbacks of a checkpoint or of a command, where one may stand without its list."""
    specs = config["trainer"]["callbacks"] if "trainer" in config else config["trainer.callbacks"]
    return specs if isinstance(specs, list) else [specs] if specs else []


def _changes_the_net(spec: Config) -> bool:
    try:
        kind = _imported(spec)
    except (ImportError, AttributeError):  # a file that has gone; a transform would be missed
        return False
    return isinstance(kind, type) and issubclass(kind, Transform)


def _imported(spec: Config) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    if not module:
        raise ImportError(f"{name!r} is no dotted path of a class")
    return getattr(import_module(module), name)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists by dotted key, as they are typed: without init_args."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in pairs:
            below = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from _flat(inner, below)
    else:
        yield key, value
