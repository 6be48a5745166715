"""Changes that a user wants, on every preset: one flag changes one value and no other.

    python benchmarks/config_changes.py [--only shakespeare/quick] [--left]

A preset either has the argument or not.

    changed     the resolved configuration differs in that one value, which is the typed one
    several     the short form matches several arguments; the error lists flags that do it
    added       the callback is not in the preset; the error names flags that add it
    refused     the model, the data or the optimizer has no such argument; the error names it

A row a preset goes to rows/config_changes.jsonl, with the number of each outcome and the processor
time. Anything else is an error of this program. tests/configs/test_config_changes.py checks a part
of the table.
"""

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for `parsed_config`

import yaml
from parsed_config import ParsedCLI, changes, leaves, parse

from ravine.cli.config import callback_flags, presets
from ravine.cli.trainer import DEFAULT_CALLBACKS
from ravine.errors import UsageError

PLANS = ("Muon", "Newton", "OptimizerPlan", "OptimizerSweep")
NUM_RULES = 4  # rules of a plan that a short form may mean


@dataclass(frozen=True)
class Change:
    """A flag, the value that it sets, and the paths that it may mean by class of the callback."""

    flag: str
    value: Any
    paths: dict[str, list[str]]

    @property
    def words(self) -> str:
        """The flag as typed."""
        return f"{self.flag}={self.value}".replace(" ", "").replace("'", "").replace("True", "true")


def of_optimizer(key: str, value: Any) -> Change:
    """Return the change of an argument of the optimizer."""
    paths = {
        "Muon": [key, f"aux_optimizer.{key}"],
        "Newton": [key],
        "OptimizerPlan": [
            f"optimizer.{key}",
            *(f"rules.{number}.optimizer.{key}" for number in range(NUM_RULES)),
        ],
        "OptimizerSweep": [f"optimizer.{key}"],
    }
    return Change(f"--optimizer.{key}", value, paths)


def of_plan(key: str, value: Any) -> Change:
    """Return the change of an argument that every plan has."""
    return Change(f"--optimizer.{key}", value, {name: [key] for name in PLANS})


def of_callback(name: str, path: str, value: Any) -> Change:
    """Return the change of an argument of a callback by its class."""
    return Change(f"--trainer.callbacks.{name}.{path}", value, {name: [path]})


def of_schedule(key: str, value: Any) -> Change:
    """Return the change of an argument of the schedule."""
    return Change(f"--schedule.{key}", value, {name: [f"schedule.{key}"] for name in PLANS})


CHANGES = [
    of_optimizer("lr", 0.0123),
    of_optimizer("weight_decay", 0.3),
    of_optimizer("betas", [0.8, 0.95]),
    of_optimizer("eps", 1e-6),
    of_optimizer("momentum", 0.75),
    of_plan("decay", "all"),
    of_plan("print_groups", True),
    of_schedule("warmup", 7),
    of_schedule("warmup", 0.125),
    of_schedule("kind", "wsd"),
    of_schedule("final_fraction", 0.25),
    of_schedule("cooldown", 0.375),
    of_schedule("warmup_from_zero", True),
    of_callback("Muon", "lr", 0.0123),
    of_callback("Muon", "aux_optimizer.lr", 0.0123),
    of_callback("Muon", "scale", "rms"),
    of_callback("OptimizerPlan", "optimizer.lr", 0.0123),
    of_callback("OptimizerPlan", "optimizer.betas.1", 0.875),
    of_callback("OptimizerPlan", "rules.1.lr_scale", 0.5),
    of_callback("GradientClipping", "max_norm", 0.625),
    of_callback("GradientClipping", "max_value", 0.125),
    of_callback("EMA", "decay", 0.875),
    of_callback("LoRA", "rank", 3),
    of_callback("LoRA", "alpha", 5.0),
    of_callback("LoRA", "dropout", 0.125),
    of_callback("Quantization", "scheme", "int8"),
    of_callback("Pretrained", "path", "other.ckpt"),
    of_callback("GenerateSamples", "arguments.seed", 3),
    of_callback("RolloutTable", "every_n_steps", 3),
    of_callback("MetricPlot", "metrics.0", "train/lr"),
    of_callback("NaNGuard", "max_skips", 5),
    of_callback("Checkpoint", "save_top_k", 3),
    of_callback("EarlyStopping", "patience", 7),
    of_callback("FrechetDistance", "num_samples", 500),
    Change("--data.batch_size", 6, {}),
    Change("--data.context_length", 48, {}),
    Change("--data.val_fraction", 0.375, {}),
    Change("--data.seed", 5, {}),
    Change("--model.num_layers", 3, {}),
    Change("--model.d_model", 96, {}),
    Change("--model.dropout", 0.375, {}),
    Change("--model.guidance_scale", 1.5, {}),
    Change("--model.num_steps", 13, {}),
    Change("--model.max_new_tokens", 33, {}),
    Change("--model.kl.beta", 0.0625, {}),
    Change("--seed_everything", 5, {}),
    Change("--trainer.max_steps", 123, {}),
    Change("--trainer.val_check_interval", 11, {}),
    Change("--trainer.precision", "bf16-true", {}),
    Change("--trainer.accumulate_grad_batches", 3, {}),
    Change("--trainer.log_every_n_steps", 3, {}),
    Change("--trainer.limit_val_batches", 9, {}),
]


def preset_names() -> list[str]:
    """Return the presets that name a model; the others are overlays."""
    names = presets.list_presets()
    texts = {name: Path(presets.find_config(name)).read_text() for name in names}
    models = {name: (yaml.safe_load(text) or {}).get("model") for name, text in texts.items()}
    return [
        n for n, model in models.items() if isinstance(model, str) or "class_path" in (model or ())
    ]


class Preset:
    """A parsed preset, to which flags are applied.

    Args:
        name: the name of the preset.
        cli: the parser of another preset, which takes a tenth of a second to build.
    """

    def __init__(self, name: str, cli: ParsedCLI | None = None) -> None:
        self.name = name
        self.argv = ["fit", f"--config={presets.find_config(name)}", f"--trainer.name={name}"]
        self.cli = cli or parse(*self.argv)
        if cli is not None:
            cli.callback_flags = []
            cli.parse_arguments(cli.parser, self.argv)
        self.base = self.cli.config["fit"]
        self.values = self.base.as_dict()
        self.callbacks: list[dict[str, Any]] = self.values["trainer"]["callbacks"]
        self.classes = [c["class_path"].rpartition(".")[2] for c in self.callbacks]

    def with_flags(self, words: str) -> dict[str, Any]:
        """Return the configuration with these flags; flags of callbacks need no second parse."""
        argv, flags = callback_flags.split_flags(["fit", *shlex.split(words)])
        if len(argv) == 1:
            config = self.base.clone()
            callback_flags.apply_flags(self.cli.parser, "fit", config, flags)
            return config.as_dict()
        self.cli.callback_flags = flags
        self.cli.parse_arguments(self.cli.parser, [*self.argv, *argv[1:]])
        return self.cli.config["fit"].as_dict()

    def expected_key(self, change: Change) -> str | None:
        """Return the key of the change in the resolved configuration; None if it has none."""
        if not change.paths:
            section, _, path = change.flag.removeprefix("--").partition(".")
            return find_key(self.values[section], section, path)
        for position, name in enumerate(self.classes):
            for path in change.paths.get(name, ()):
                key = f"trainer.callbacks.{position}"
                if result := find_key(self.callbacks[position], key, path):
                    return result
        # a callback that the trainer adds itself gets an entry in the list
        for name in {*change.paths} & {cls.__name__ for cls in DEFAULT_CALLBACKS}:
            return f"trainer.callbacks.{len(self.callbacks)}.init_args.{change.paths[name][0]}"
        return None


def find_key(value: Any, key: str, path: str) -> str | None:
    """Return the key of an argument below a value of the configuration; None if it has none."""
    for name in path.split(".") if path else []:
        if isinstance(value, dict) and "class_path" in value and "init_args" in value:
            value, key = value["init_args"], f"{key}.init_args"
        if isinstance(value, list | tuple):
            value = value[int(name)] if int(name) < len(value) else ...
        elif isinstance(value, dict):
            value = value.get(name, None if key.endswith(".arguments") else ...)
        elif not key.endswith((".schedule", ".arguments")):  # null, which may become a mapping
            value = ...
        if value is ...:
            return None
        key = f"{key}.{name}"
    return key


def check(preset: Preset, change: Change) -> str:
    """Return the outcome of a change; raise AssertionError if another value differs."""
    key = preset.expected_key(change)
    try:
        after = preset.with_flags(change.words)
    except UsageError as error:
        return check_refusal(preset, change, key, error)
    assert key is not None, f"{preset.name} {change.words}: it was accepted"
    differing = changes(preset.values, after)
    parent = key.rpartition(".")[0]
    if leaves(preset.values).get(parent, ...) is None:  # a schedule that did not exist
        differing = {
            k: v for k, v in differing.items() if k == key or not f"{k}.".startswith(parent)
        }
    # a number in place of a list, such as one of batch sizes
    differing = {
        k: v for k, v in differing.items() if not (k.startswith(f"{key}.") and v[1] is ...)
    }
    added = f"trainer.callbacks.{len(preset.callbacks)}."
    if key.startswith(added):  # the new entry has the callback's defaults beside the value
        differing = {k: v for k, v in differing.items() if k == key or not k.startswith(added)}
    new = {k: tuple(v[1]) if isinstance(v[1], list) else v[1] for k, v in differing.items()}
    value = change.value
    if isinstance(value, list):
        new = {key: [differing.get(f"{key}.{i}", (old, old))[1] for i, old in enumerate(value)]}
        assert all(k.startswith(f"{key}.") for k in differing), f"{change.words}: {differing}"
    assert new == {key: value}, f"{preset.name} {change.words}: {differing}, expected {key}"
    return "changed"


def check_refusal(preset: Preset, change: Change, key: str | None, error: UsageError) -> str:
    """Return the outcome of a change that was refused."""
    text = f"{preset.name} {change.words}: {error}"
    assert change.flag in error.problem, text
    assert "\n" not in error.problem, text
    if "it may mean" in error.problem:
        for flag in error.allowed:
            assert len(changes(preset.values, preset.with_flags(flag))) in (1, 2), text
        return "several"
    assert key is None, text
    if not change.paths or error.label != "callbacks of the run":
        reasons = ("has no", "elements", "no class is")
        assert any(reason in error.problem for reason in reasons), text
        return "refused"
    assert error.allowed == list(dict.fromkeys(preset.classes)), text
    (first, *_) = error.flag.split(", or ")
    after = preset.with_flags(first.partition(", which")[0])  # it can be typed, and works
    assert changes(preset.values, after), text
    return "added"


def count_outcomes(
    names: Iterable[str], is_checked: Callable[[int, int], bool] = lambda preset, change: True
) -> Iterator[tuple[str, Counter[str], float]]:
    """Yield presets, with the number of changes of each outcome and the processor time in seconds.

    Args:
        names: the presets.
        is_checked: by position of the preset and of the change, whether the pair is checked.
    """
    cli = None
    for number, name in enumerate(names):
        start_s, preset = time.process_time(), Preset(name, cli)
        cli = preset.cli  # a parser takes a tenth of a second to build
        outcomes = Counter(
            check(preset, change)
            for position, change in enumerate(CHANGES)
            if is_checked(number, position)
        )
        yield name, outcomes, time.process_time() - start_s


def main() -> None:
    """Check all changes on all presets, and append a row for each preset."""
    from record import ROWS, append, machine

    parser = argparse.ArgumentParser(description="One flag for each change.")
    parser.add_argument("--only")
    parser.add_argument("--left", action="store_true", help="presets without a row")
    options = parser.parse_args()
    names = [options.only] if options.only else preset_names()
    stored = ROWS / "config_changes.jsonl"
    if options.left and stored.exists():
        rows = [yaml.safe_load(line) for line in stored.read_text().splitlines()]
        names = [n for n in names if n not in {row["preset"] for row in rows}]
    for name, outcomes, seconds in count_outcomes(names):
        row = {"preset": name, **outcomes, "changes": len(CHANGES)}
        row["processor_seconds"] = round(seconds, 2)
        print(row, flush=True)
        append("config_changes", row | machine())


if __name__ == "__main__":
    main()
