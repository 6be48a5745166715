"""Guessed flags: the argument that a user means by `--lr`, `--epochs` or `--model.layers`.

The table GUESSES of `guessed_names.py` holds the names that other programs use. A name that is in
no table may still be an argument of another part of the command, such as `max_steps` of the
trainer. A flag is suggested only if the parser accepts its value.
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from ravine.callbacks import LRSchedule, OptimizerPlan
from ravine.errors import UsageError, suggest_names

from . import presets, typehints
from .callback_arguments import (
    CallbackSpec,
    argument_paths,
    class_name,
    find_argument,
    is_plan,
    load_class,
    optimizers_of,
)
from .guessed_names import GUESSES, OFF, ON, PRECISIONS, STRATEGIES, canonical
from .values import ConfigValue, from_argv

if TYPE_CHECKING:
    from .errors import ConfigErrorFinder

MAX_SUGGESTIONS = 3


class FlagGuesser:
    """Suggests flags for one command, from the arguments of its classes."""

    def __init__(
        self,
        parser: ArgumentParser,
        specs: Sequence[CallbackSpec],
        classes: dict[str, tuple[type, int]],
        new_finder: Callable[[], "ConfigErrorFinder"],
    ) -> None:
        """Store what the command chose.

        Args:
            parser: the parser of the command.
            specs: the callbacks of the run, in order.
            classes: by key, the class that the command chose and the number of supplied arguments.
            new_finder: makes a finder for which these classes are chosen.
        """
        self.parser, self.classes, self.new_finder = parser, classes, new_finder
        self.specs = {class_name(spec): spec for spec in specs}
        self.plans = [spec for spec in specs if is_plan(spec)]
        self.callback_classes = typehints.subclasses_by_name([Callback])

    def suggest(self, name: str, value: ConfigValue, exact: bool = False) -> list[tuple[str, str]]:
        """Return the arguments that a name may mean, each with the flags to type, the best first.

        Args:
            name: the name that the command or a class does not have.
            value: its value.
            exact: only names of the table and arguments that are called exactly so.
        """
        suggestions: dict[str, str] = {}
        for key, text in self._meanings(name, value, exact):
            for flags in self._spellings(key, text):
                label = flags.removeprefix("--trainer.callbacks+=")
                if " --" in label or label == flags:
                    label = flags.rpartition("--")[2].partition("=")[0]
                if label not in suggestions and self.is_accepted(flags):
                    suggestions[label] = flags
                    break
            if len(suggestions) == MAX_SUGGESTIONS:
                break
        return list(suggestions.items())

    def switches_off(self, name: str, value: ConfigValue) -> bool:
        """Return whether a flag such as `--compile=false` sets what is the default anyway."""
        guess = GUESSES.get(canonical(name))
        is_switch = guess is not None and (guess.value != "" or "." not in guess.keys[0])
        word = canonical(value.text)
        return bool(is_switch and guess and word in OFF and word not in guess.values)

    def corrected(self, flag: str) -> str:
        """Return a flag whose name is right; its value is replaced if it is not accepted.

        "" if nothing is accepted.
        """
        if self.is_accepted(flag):
            return flag
        finder = self.new_finder()
        try:
            for value in from_argv(shlex.split(flag)):
                self._check(finder, value)
        except UsageError as error:
            if error.flag.startswith("--") and self.is_accepted(error.flag):
                return error.flag
        example = self.example_flag(flag)
        return example if example and self.is_accepted(example) else ""

    def _meanings(self, name: str, value: ConfigValue, exact: bool) -> Iterator[tuple[str, str]]:
        """Yield keys that a name may mean, each with the value, the best first."""
        word = canonical(name)
        text = "" if value.is_missing else value.flag_text
        guess = GUESSES.get(word)
        if guess:
            typed = canonical(text).removeprefix("cuda:") if text else ""
            new_text = guess.values.get(typed, text)
            if guess.value and typed in ON and typed not in guess.values:
                new_text = guess.value
            for key in guess.keys:
                if key == "trainer.accelerator" and guess.value == "":
                    new_text = accelerator_value(text)
                if key == "trainer.precision":
                    new_text = usable_precision(new_text)
                yield key, new_text
                # a word for the value that is not a value here, such as wandb_project=NAME
                if guess.value and new_text != guess.value:
                    yield key, guess.value
        known_keys = list(self.known_keys())
        leaves: dict[str, list[str]] = {}
        for key in known_keys:
            leaves.setdefault(key.rpartition(".")[2], []).append(key)
        # the same name below another section
        for key in leaves.get(word, []):
            yield key, text
        if exact:
            return
        near = suggest_names(word, {*leaves, *GUESSES}, least=0.8)
        for leaf in near:
            for key in leaves.get(leaf, []):
                yield key, text
            if leaf in GUESSES and leaf not in leaves:
                for key in GUESSES[leaf].keys:
                    yield key, text or GUESSES[leaf].value

    def known_keys(self) -> Iterator[str]:
        """Yield the arguments of the trainer, of model and data, and of the callbacks."""
        for action in self.parser._actions:
            if action.dest.startswith("trainer.") or action.dest in ("seed_everything", "config"):
                yield action.dest
        for owner in ("data", "model"):
            if owner in self.classes:
                yield from (f"{owner}.{name}" for name in argument_names(*self.classes[owner]))
        for name, spec in self.specs.items():
            yield from (f"{name}.{path}" for path in argument_paths(spec))

    def _spellings(self, key: str, text: str) -> Iterator[str]:
        """Yield flags for a key of a Guess with a value; the first that is accepted is the best."""
        owner, _, argument = key.partition(".")
        if key == "optimizer":
            yield from self._optimizer_flags(text)
        elif owner in ("optimizer", "schedule"):
            yield from self._plan_flags(owner, argument, text)
        elif owner in ("trainer", "data", "model", "seed_everything", "ckpt_path", "config"):
            yield self._flag(key, text)
        elif owner in self.callback_classes:
            in_run = owner in self.specs
            prefix = f"--trainer.callbacks.{owner}" if in_run else "--trainer.callbacks"
            add = "" if in_run else f"--trainer.callbacks+={owner}"
            if not argument:
                yield add
                return
            required = [
                f"{prefix}.{name}={REQUIRED_VALUES[name]}"
                for name in required_arguments(self.callback_classes[owner])
                if not in_run and name != argument and name in REQUIRED_VALUES
            ]
            text = text or default_text(self.callback_classes[owner], argument)
            yield " ".join(filter(None, [add, *required, f"{prefix}.{argument}={text}"]))

    def _flag(self, key: str, text: str) -> str:
        """Return a flag; without a value it gets the default of the argument."""
        if text:
            return f"--{key}={text}"
        owner, _, argument = key.partition(".")
        if owner in self.classes:
            return f"--{key}={default_text(*self.classes[owner][:1], argument)}"
        action = next((a for a in self.parser._actions if a.dest == key), None)
        return f"--{key}={typehints.example_value(getattr(action, '_typehint', None))}"

    def _plan_flags(self, owner: str, argument: str, text: str) -> Iterator[str]:
        """Yield flags for an argument of the optimizer or the schedule."""
        if not text and owner == "schedule":
            text = str(getattr(LRSchedule(), argument, "10"))
        text = text or {"lr": "0.001", "weight_decay": "0.01"}.get(argument, "0.1")
        if self.plans:
            yield f"--{owner}.{argument}={text}"
        elif owner == "optimizer" and "model" in self.classes:
            for name in ("lr", "learning_rate") if argument == "lr" else (argument,):
                if name in argument_names(*self.classes["model"]):
                    yield f"--model.{name}={text}"
        if not self.plans:
            yield f"--optimizer=AdamW --{owner}.{argument}={text}"

    def _optimizer_flags(self, text: str) -> Iterator[str]:
        """Yield flags that choose an optimizer by name: a callback such as Muon, or a class."""
        optimizers = typehints.subclasses_by_name([torch.optim.Optimizer])
        plans = {
            name: plan_class
            for name, plan_class in self.callback_classes.items()
            if issubclass(plan_class, OptimizerPlan) and plan_class is not OptimizerPlan
        }
        word = canonical(text or "AdamW").partition("_")[0]
        named = {name.lower(): name for name in (*optimizers, *plans)}
        name = named.get(word) or next(iter(suggest_names(word, named.values())), "AdamW")
        yield f"--optimizer={name}"

    def is_accepted(self, flags: str) -> bool:
        """Return whether the parser of the command accepts these flags."""
        finder = self.new_finder()
        if not flags.lstrip("'").startswith("--"):
            return False  # another command
        if flags.startswith("--config="):
            return flags.partition("=")[2] in presets.list_presets()
        try:
            for value in from_argv(shlex.split(flags)):
                self._check(finder, value)
        except UsageError:
            return False
        return True

    def example_flag(self, flag: str) -> str:
        """Return a flag with an example of its value; "" for a name that does not exist."""
        finder, name = self.new_finder(), flag.strip("'").partition("=")[0]
        try:
            for value in from_argv([name]):
                self._check(finder, value)
        except UsageError as error:  # the value is missing: the error has an example
            return error.flag
        return ""

    def _check(self, finder: "ConfigErrorFinder", value: ConfigValue) -> None:
        """Raise UsageError if a flag of a suggestion has a wrong name or value."""
        owner, _, path = value.key.removeprefix("trainer.callbacks.").partition(".")
        if value.key == "optimizer":
            if finder.command != "fit":
                raise UsageError(f"{value.location}: {finder.command} trains nothing")
            finder.choose_class([(torch.optim.Optimizer, 1), (OptimizerPlan, 0)], owner, value)
            return
        if value.key.startswith(("optimizer.", "schedule.")) and "optimizer" in (
            chosen := finder.chosen_classes
        ):
            # of the optimizer that `--optimizer=NAME` has chosen before
            target = (LRSchedule, 0) if owner == "schedule" else chosen["optimizer"]
            finder.check_key(typehints.class_parser(*target), owner, path, value)
            return
        if owner in ("optimizer", "schedule") and value.key.startswith(owner) and self.plans:
            spec = self.plans[-1]
            key = path if owner == "optimizer" else f"schedule.{path}"
            # such a flag is refused if several arguments of the plan match
            paths = find_argument(spec, key)
            if len(paths) != 1:
                raise UsageError(f"{value.location}: not one argument")
            path = paths[0]
        elif owner in self.specs and value.key != owner:
            spec = self.specs[owner]
        else:
            finder.check_key(self.parser, "", value.key, value)
            return
        callback_class = load_class(str(spec["class_path"]))
        if callback_class is None:
            raise UsageError(f"{value.location}: no class")
        for optimizer_path, optimizer_class in optimizers_of(spec).items():
            # the parameters of an optimizer are supplied later
            finder.chosen_classes[f"trainer.callbacks.{optimizer_path}"] = optimizer_class, 1
        parser = typehints.class_parser(callback_class, 0)
        finder.check_key(parser, "trainer.callbacks", path, value)


REQUIRED_VALUES = {"monitor": "val/loss"}  # of callbacks that a suggestion adds


def argument_names(target_class: type, num_supplied: int = 0) -> list[str]:
    """Return the names of the arguments of a class that a config can set."""
    actions = typehints.class_parser(target_class, num_supplied)._actions
    names = [action.dest.split(".")[0] for action in actions if not action.dest.endswith(".help")]
    return [name for name in dict.fromkeys(names) if name != "help"]


def required_arguments(target_class: type) -> list[str]:
    """Return the arguments of a class that have no default."""
    actions = typehints.class_parser(target_class, 0)._actions
    return [action.dest for action in actions if action.required]


def default_text(target_class: type, argument: str) -> str:
    """Return the default of an argument of a class as it is typed, or else an example."""
    if argument in REQUIRED_VALUES:
        return REQUIRED_VALUES[argument]
    for action in typehints.class_parser(target_class, 0)._actions:
        if action.dest == argument:
            return typehints.example_of(getattr(action, "_typehint", None), action.default)
    return "VALUE"


def accelerator_value(text: str) -> str:
    """Return the accelerator for a device of torch: gpu for cuda:1 if there is one, else auto."""
    word = canonical(text).partition(":")[0]
    if word in ("cuda", "gpu", "nvidia", "true", ""):
        return "gpu" if torch.cuda.is_available() else "auto"
    return word


def known_name(key: str, text: str) -> str | None:
    """Return Lightning's name for another word, such as fp16 for a precision; None if none."""
    word = canonical(text)
    if key == "trainer.accelerator" and word.partition(":")[0] in ("nvidia", "cuda"):
        return accelerator_value(text)
    if key == "trainer.precision" and word in PRECISIONS:
        return usable_precision(PRECISIONS[word])
    return STRATEGIES.get(word) if key == "trainer.strategy" else None


def usable_precision(name: str) -> str:
    """Return a precision that this machine has: without a GPU there is no 16-mixed."""
    return "bf16-mixed" if name == "16-mixed" and not torch.cuda.is_available() else name
