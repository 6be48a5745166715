"""Config changes: the values of a command that differ from those of its checkpoint's run."""

import json
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from ravine.errors import UsageError

from .callback_arguments import class_name
from .callback_paths import without_output_paths
from .trainer_arguments import LENGTH_ARGS, OUTPUT_ARGS, TRAINING_ARGS

Config = dict[str, Any]
MISSING = object()  # stands for a value that only the other configuration has
MAX_SHOWN_CHARS = 200  # of a value in a line
# The key of a difference, such as model.d_model, the value of the checkpoint, and the new value.
Difference = tuple[str, Any, Any]


def report_changes(config: Config, parsed: Config, path: str, command: str = "test") -> list[str]:
    """Print the values that differ from the checkpoint's, and return their keys.

    A fit also names the callbacks that it leaves out or adds.

    Args:
        config: the configuration of the checkpoint.
        parsed: the configuration of the command.
        path: the checkpoint, for errors.
        command: the command; only a fit compares arguments of the trainer.

    Raises:
        UsageError: the model is of another class, so the weights cannot fit.
    """
    _check_model_class(config, parsed, path)
    print_once, changed = rank_zero_only(print), []
    trainer_keys = (*LENGTH_ARGS, *TRAINING_ARGS, *OUTPUT_ARGS) if command == "fit" else ()
    pairs, omitted, added = pair_callbacks(callback_specs(config), callback_specs(parsed))
    for key, old, new in [
        *_value_differences(config, parsed, trainer_keys),
        *_argument_differences(pairs),
    ]:
        new_text, old_text = _describe_value(new), _describe_value(old)
        print_once(f"{key} is {new_text} here and {old_text} in the checkpoint: {new_text} is used")
        changed.append(key)
    for spec in omitted if command == "fit" else ():
        changed.append(f"trainer.callbacks.{class_name(spec)}")
        print_once(f"{changed[-1]} of the checkpoint's run is left out in this run")
    for spec in added if command == "fit" else ():
        changed.append(f"trainer.callbacks.{class_name(spec)}")
        print_once(f"{changed[-1]} is not in the checkpoint: it starts in this run")
    return changed


def changed_arguments(config: Config, parsed: Config) -> list[str]:
    """Return the arguments of a fit for which it is another run than that of the checkpoint.

    Arguments of LENGTH_ARGS, OUTPUT_ARGS and of the machine do not count, and neither do output
    paths and arguments that the checkpoint of an older version lacks.

    Args:
        config: the configuration of the checkpoint, with keys such as trainer.callbacks.
        parsed: the configuration of the command, with the trainer's arguments under "trainer".
    """
    saved_specs, specs = (
        [without_output_paths(spec) for spec in callback_specs(c)] for c in (config, parsed)
    )
    pairs, _, _ = pair_callbacks(saved_specs, specs)
    differences = [
        *_value_differences(config, parsed, TRAINING_ARGS),
        *_argument_differences(pairs),
    ]
    changed = {key for key, _, _ in differences}
    # the order of the callbacks counts too
    if [s["class_path"] for s in saved_specs] != [s["class_path"] for s in specs]:
        changed.add("trainer.callbacks")
    return sorted(changed)


def callback_specs(config: Config) -> list[Config]:
    """Return the callbacks of a checkpoint or of a command as a list, also a single one."""
    specs = config["trainer"]["callbacks"] if "trainer" in config else config["trainer.callbacks"]
    return specs if isinstance(specs, list) else [specs] if specs else []


def import_spec_class(spec: Config) -> Any:
    """Import the class that a specification names.

    Raises:
        ImportError, AttributeError: there is no such class.
    """
    module, _, name = spec["class_path"].rpartition(".")
    if not module:
        raise ImportError(f"{name!r} is not the dotted path of a class")
    return getattr(import_module(module), name)


def pair_callbacks(
    saved_specs: list[Config], specs: list[Config]
) -> tuple[list[tuple[Config, Config]], list[Config], list[Config]]:
    """Pair the callbacks of two runs by their class, in order.

    Returns:
        The pairs, the callbacks that only the first run has, and those of the second run only.
    """
    pairs, omitted, remaining = [], [], list(specs)
    for saved in saved_specs:
        same = next((s for s in remaining if s["class_path"] == saved["class_path"]), None)
        if same is None:
            omitted.append(saved)
        else:
            pairs.append((saved, same))
            remaining.remove(same)
    return pairs, omitted, remaining


def _check_model_class(config: Config, parsed: Config, path: str) -> None:
    """Raise UsageError if the models of checkpoint and command are unrelated classes."""
    try:
        # imports the class at the class_path of a mapping
        saved_class = import_spec_class(config["model"])
    except (ImportError, AttributeError) as error:
        class_path = config["model"]["class_path"]
        raise UsageError(
            f"{path} names the model {class_path!r}, which cannot be imported: {error}",
            flag="cd FOLDER, to the folder with its file, or --ckpt_path=ANOTHER",
        ) from error
    parsed_class = import_spec_class(parsed["model"])
    if not issubclass(saved_class, parsed_class) and not issubclass(parsed_class, saved_class):
        raise UsageError(
            f"{path} contains the weights of a {saved_class.__name__}, which do not fit the model "
            f"{parsed_class.__name__} of the command",
            [saved_class.__name__],
            flag=f"--model={saved_class.__name__}, or the same command without --model and "
            "--config",
        )


def _value_differences(
    config: Config, parsed: Config, trainer_keys: tuple[str, ...]
) -> Iterator[Difference]:
    """Yield the differences in model, data, seed and the named arguments of the trainer."""
    for key in ("data", "model", "seed_everything"):
        yield from iter_differences(config[key], parsed[key], key)
    for key in sorted(trainer_keys):
        name = f"trainer.{key}"
        # a checkpoint of an older version has fewer arguments
        if name in config and key in parsed["trainer"]:
            yield from iter_differences(config[name], parsed["trainer"][key], name)


def _argument_differences(pairs: list[tuple[Config, Config]]) -> Iterator[Difference]:
    """Yield the differences in the arguments of callbacks of the same class."""
    for saved, spec in pairs:
        yield from iter_differences(saved, spec, f"trainer.callbacks.{class_name(spec)}")


def iter_differences(saved: Any, now: Any, key: str) -> Iterator[Difference]:
    """Yield where two values differ, with dotted keys as typed: without init_args.

    A list of another length, or another class, is one difference. An argument of a class that only
    `now` has is none: a newer version of the class has added it.
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        if saved.get("class_path") != now.get("class_path"):
            yield key, saved.get("class_path", saved), now.get("class_path", now)
            return
        is_spec = "class_path" in saved
        for name in sorted(saved.keys() | (set() if is_spec else now.keys())):
            if is_spec and name in ("init_args", "dict_kwargs"):
                yield from _argument_mapping_differences(saved[name], now.get(name), key)
            else:
                child_key = f"{key}.{name}"
                yield from iter_differences(
                    saved.get(name, MISSING), now.get(name, MISSING), child_key
                )
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for index, (old, new) in enumerate(zip(saved, now, strict=True)):
            yield from iter_differences(old, new, f"{key}.{index}")
    elif saved is not now and saved != now:
        yield key, saved, now


def _argument_mapping_differences(saved: Any, now: Any, key: str) -> Iterator[Difference]:
    arguments = now or {}
    for name, old in sorted((saved or {}).items()):
        yield from iter_differences(old, arguments.get(name, MISSING), f"{key}.{name}")


def _describe_value(value: Any) -> str:
    if value is MISSING:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."
