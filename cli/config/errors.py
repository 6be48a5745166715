"""Config error messages: find the argument that the parser rejected, and the class that takes it.

For a union the parser reports that all members failed, but not where. So its message is not parsed.
Environment variables, files and flags are read again in order of precedence and compared with the
parser's own types. The first value that fits no type is reported. Only a missing argument (such as
the model) is taken from the parser's message.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from ravine.errors import UsageError, suggest_names
from ravine.lightning_compat import precision_names

from ..discovery import class_pages
from ..error_report import program_name, unknown_name_error
from . import callback_arguments, flag_guesses, presets, stray_words, trust, typehints
from .flag_guesses import FlagGuesser
from .guessed_names import DISCOURAGED_PRECISIONS, GENERATE_FLAGS
from .values import ConfigValue, from_argv, from_env

CLASS_SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
DEFAULT_CLASSES = {
    "model": "LanguageModel",
    "data": "TextDataModule",
    "trainer.strategy": "MeshStrategy",
}  # class to suggest, by argument
# base classes of an argument, each with the number of arguments that the code supplies
ClassChoices = list[tuple[type, int]]


def parse_argv(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parse the arguments of a command, or raise an error that names the wrong one.

    Args:
        parser: the parser of all commands.
        argv: the command and its arguments.

    Raises:
        UsageError: an argument, a value or a variable is wrong.
    """
    # checks values in the order of the command line, and raises an error that names the wrong one
    finder = ConfigErrorFinder(parser, argv[0])
    # values of environment variables such as PL_FIT__SEED_EVERYTHING
    for config_value in from_env(argv[0]):  # the parser ignores unknown variables
        finder.check_variable(config_value)
    try:
        config = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        finder.check_argv(argv)  # raises an error for a wrong name or value
        # raises an error for a word without a flag
        stray_words.check_stray_words(argv, partial(stray_words.parser_fix, finder))
        chosen_classes = [
            (key, chosen_class) for key, (chosen_class, _) in finder.chosen_classes.items()
        ]
        # chosen_classes: by key, the class that the command chose for an argument
        raise missing_argument(str(error), argv[0], chosen_classes) from error
    trainer = config[argv[0]].get("trainer")
    if trainer is not None and isinstance(trainer.get("callbacks"), Namespace):
        # A single callback is put into a list. Otherwise its constructor's error is lost.
        trainer["callbacks"] = [trainer["callbacks"]]
    # Lightning resolves these names later, so the parser accepts any.
    # `registered_names`: strategies, accelerators and precisions, by key.
    for key, names in registered_names().items():
        if isinstance(name := config[argv[0]].get(key), str) and name.lower() not in names:
            finder.check_argv(argv)
    return config


def registered_names() -> dict[str, list[str]]:
    """Return names that Lightning resolves when it builds the trainer; the parser accepts any."""
    return {
        "trainer.strategy": ["auto", *StrategyRegistry.available_strategies()],
        "trainer.accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "trainer.precision": ["auto", *precision_names(), *DISCOURAGED_PRECISIONS],
    }


class ConfigErrorFinder:
    """Reads the user's values in order and raises the first error found."""

    def __init__(self, parser: ArgumentParser, command: str, explains: bool = True) -> None:
        """Store the parser of the command; no class is chosen yet.

        Args:
            parser: the parser of all commands.
            command: the command.
            explains: whether an error for an unknown name suggests others.
        """
        self.explains = explains
        self.root_parser = parser
        self.parser = parser._subcommands_action._name_parser_map[command]  # type: ignore
        self.parser.allow_abbrev = False  # otherwise max_step would silently mean max_steps
        self.command = command
        # by key: the class and the number of supplied arguments
        self.chosen_classes: dict[str, tuple[type, int]] = {}
        self.callbacks: list[ConfigValue] = []  # those of the run so far
        self.values: list[ConfigValue] = []  # all values of the command, for suggestions

    def check_argv(self, argv: list[str]) -> None:
        """Check the environment variables, then the configs and flags."""
        self.values = [*from_env(self.command), *from_argv(argv[1:])]
        for config_value in self.values:
            self.check_key(self.parser, "", config_value.key, config_value)

    def make_guesser(self) -> FlagGuesser:
        """Return a FlagGuesser with the classes of all values, for the error of a wrong name."""
        survey = ConfigErrorFinder(self.root_parser, self.command, explains=False)
        for config_value in self.values:
            with suppress(UsageError):  # the error that is reported, and those after it
                survey.check_key(survey.parser, "", config_value.key, config_value)

        def new_finder() -> ConfigErrorFinder:
            finder = ConfigErrorFinder(self.root_parser, self.command, explains=False)
            finder.chosen_classes = dict(survey.chosen_classes)
            return finder

        specs = [spec for value in survey.callbacks if (spec := value.class_spec)]
        return FlagGuesser(self.parser, specs, survey.chosen_classes, new_finder)

    def check_variable(self, config_value: ConfigValue) -> None:
        """Raise an error for an environment variable that the parser does not read."""
        hints = {a.dest: getattr(a, "_typehint", None) for a in self.parser._actions}
        if config_value.key in hints:
            return
        if any(config_value.key.startswith(f"{key}.") for key, hint in hints.items() if hint):
            fix = f"--{config_value.key}={config_value.text}"
            raise UsageError(
                f"{config_value.location}: no variable can set an argument of a class",
                flag=fix,
            )
        self.check_key(self.parser, "", config_value.key, config_value)

    def check_key(
        self, parser: ArgumentParser, owner: str, key: str, config_value: ConfigValue
    ) -> None:
        """Check a value against the type of ``key``, an argument of ``parser``.

        Args:
            parser: parser of the command, or of a class
            owner: the key under which that class was chosen; empty for the command
            key: the key relative to ``owner``
            config_value: the value, with its YAML node, its text, and its location for errors
        """
        # the arguments of the parser, without its help flags
        actions = [a for a in parser._actions if not f".{a.dest}".endswith(".help")]
        # by key: the type hint, the default, and whether the flag takes no value
        hints = {action.dest: getattr(action, "_typehint", None) for action in actions}
        defaults = {action.dest: action.default for action in actions}
        switches = {action.dest for action in actions if action.nargs == 0}
        # "data.init_args.batch_size" has the segments data, batch_size and the prefixes "", "data",
        # "data.batch_size". A section is a prefix with arguments below it, such as "trainer".
        segments = [p.removesuffix("+") for p in key.split(".") if p not in ("init_args", "help")]
        prefixes = [".".join(segments[:n]) for n in range(len(segments) + 1)]
        sections = {start for start in prefixes if any(d.startswith(f"{start}.") for d in hints)}
        # the longest prefix that the parser has; "" if it has none
        matched_prefix = next(s for s in reversed(prefixes) if s in hints or s in sections or not s)
        remaining = segments[len(matched_prefix.split(".")) if matched_prefix else 0 :]
        if remaining and (matched_prefix in sections or not matched_prefix):
            known_names = {
                d.removeprefix(f"{matched_prefix}.").split(".")[0]
                for d in hints
                if d.startswith(matched_prefix)
            }
            # makes the error with the nearest of the known names
            raise self.unknown_argument(
                owner, matched_prefix, remaining[0], known_names, config_value
            )
        if matched_prefix in sections:
            is_mapping = isinstance(config_value.node, yaml.MappingNode)
            if config_value.is_flag and not is_mapping and not os.path.isfile(config_value.text):
                problem = f"{config_value.location}: {matched_prefix} maps arguments to values"
                raise UsageError(problem, flag=f"{program_name()} show Trainer")
            # the entries of a mapping
            for child in config_value.children():
                self.check_key(parser, owner, f"{key}.{child.name}", child)
        elif matched_prefix not in switches:
            self.check_value(
                hints[matched_prefix],
                f"{owner}.{matched_prefix}".lstrip("."),
                remaining,
                config_value,
                defaults[matched_prefix],
            )

    def unknown_argument(
        self, owner: str, section: str, name: str, allowed: set[str], config_value: ConfigValue
    ) -> UsageError:
        """Return the error for an unknown key of the command or of a class.

        A name that resembles an argument of the class is a typing error. Another name may be an
        argument of another part of the command, or have another name in Ravine.
        """
        allowed -= {"print_config"} if config_value.line == 0 else {"config", "print_config"}
        owner_name = (
            self.chosen_classes[owner][0].__name__
            if owner in self.chosen_classes
            else section or self.command
        )
        problem = f"{config_value.location}: {owner_name} has no argument {name!r}"
        if not self.explains:
            return UsageError(problem)
        if owner == "trainer.callbacks" and config_value.is_flag:
            # `--trainer.callbacks.lr` is of the last callback, and another one may be meant
            specs = [spec for value in self.callbacks if (spec := value.class_spec)]
            key = config_value.key.removeprefix(f"{owner}.")
            if flags := callback_arguments.flags_of_argument(specs, key, config_value.flag_text):
                return UsageError(problem, flags, flag=flags[0], label="arguments of the run")
        if not self.values:  # one value is checked, and the command is not known here
            fix = lambda right: config_value.with_key(name, right)  # noqa: E731
            return unknown_name_error(problem, name, allowed, fix, "KEY", self.help_command(owner))
        guesser = self.make_guesser()
        # arguments with exactly this name elsewhere, or rows of the table of guesses
        guesses = guesser.suggest(name, config_value, exact=True)
        near = suggest_names(name, allowed)
        is_typing_error = bool(suggest_names(name, allowed, least=0.85))
        if near and (is_typing_error or not guesses):
            # of `--modl.layrs=3` only the first part is known to be wrong
            has_more_parts = config_value.name != name
            if not config_value.is_flag or has_more_parts:
                return UsageError(
                    problem, near, flag=config_value.with_key(name, near[0]), label="nearest"
                )
            # the value may be wrong, too
            flags = [guesser.corrected(config_value.with_key(name, right)) for right in near]
            if accepted := [pair for pair in zip(near, flags, strict=True) if pair[1]]:
                names = [right for right, _ in accepted]
                return UsageError(problem, names, flag=accepted[0][1], label="nearest")
        if config_value.is_flag and not owner and not section and name in GENERATE_FLAGS:
            words = [f"--{name}={config_value.flag_text or 10}", "--ckpt_path=last"]
            problem = f"{problem}, but generate has"
            return UsageError(problem, flag=shlex.join([program_name(), "generate", *words]))
        guesses = guesses or guesser.suggest(name, config_value)
        if not guesses:
            if near:
                return UsageError(problem, near, flag=self.help_command(owner), label="nearest")
            return unknown_name_error(problem, name, allowed, str, "", self.help_command(owner))
        names, flags = [near_name for near_name, _ in guesses], guesses[0][1]
        if guesser.switches_off(name, config_value) and config_value.is_flag:
            command = stray_words.command_without(config_value.source)
            return UsageError(problem, names, flag=command, label="nearest")
        if config_value.line:
            fix = {"hint": f"remove this line, and type {flags}"}
        elif not config_value.is_flag:
            fix = {"flag": f"unset {config_value.source}, and type {flags}"}
        else:
            fix = {"flag": flags}
        return UsageError(problem, names, **fix, label="nearest")

    def help_command(self, owner: str) -> str:
        """Return the command that shows the arguments of a class, or of the command if none."""
        if owner in self.chosen_classes:
            chosen = self.chosen_classes[owner][0]
            if class_pages.find_pages(chosen.__name__):
                return f"{program_name()} show {chosen.__name__}"
        return f"{program_name()} {self.command} --help=all"

    def check_value(
        self,
        hint: Any,
        key: str,
        remaining: list[str],
        config_value: ConfigValue,
        default: Any = None,
    ) -> None:
        """Check a value against the type ``hint`` of the argument ``key``, or of one below it.

        Args:
            hint: the type hint of the argument; None if it has none.
            key: the full key of the argument.
            remaining: the segments of the typed key below ``key``: arguments of its class.
            config_value: the value, with its YAML node, its text, and its location for errors.
            default: the default of the argument, for suggestions.

        Raises:
            UsageError: the value does not fit.
        """
        if key == "trainer.callbacks" and not remaining:
            self._record_callback(config_value)
        # base classes that the type hint accepts, each with the number of arguments that the code
        # supplies
        class_choices = typehints.configurable_classes(hint)
        # a dataclass needs no class_path
        is_dataclass_hint = bool(class_choices) and dataclasses.is_dataclass(class_choices[0][0])
        if is_dataclass_hint:
            self.chosen_classes[key] = class_choices[0]
        if remaining and remaining != ["class_path"]:  # an argument of the chosen class
            if key in self.chosen_classes:
                self.check_key(
                    # a parser of the arguments of that class
                    typehints.class_parser(*self.chosen_classes[key]),
                    key,
                    ".".join(remaining),
                    config_value,
                )
            # DEFAULT_CLASSES: by argument, a class to suggest
            elif name := DEFAULT_CLASSES.get(key):
                fix = f"--{key}={name} {config_value.with_key('', '')}"
                # the class may have another argument in place of the wrong one, or none
                if config_value.is_flag and not self.make_guesser().is_accepted(fix):
                    fix = f"--{key}={name}"
                raise UsageError(
                    f"{config_value.location}: no class is given that has this argument", flag=fix
                )
        elif config_value.is_missing:
            raise UsageError(
                f"{config_value.location}: the value is missing",
                typehints.describe(hint) if hint is not None else (),
                flag=config_value.with_value(typehints.example_of(hint, default)),
            )
        elif (
            isinstance(config_value.node, yaml.SequenceNode)
            and class_choices
            and typehints.accepts_list(hint)
        ):
            for child in config_value.children():
                self.chosen_classes.pop(key, None)  # each element chooses its own class
                self.check_value(typehints.element_type(hint), key, [], child)
        elif class_choices and isinstance(config_value.node, yaml.MappingNode):
            self.check_class_spec(class_choices, key, config_value)
        elif names := registered_names().get(key):  # a name of Lightning, or a class
            subclasses_by_name = typehints.subclasses_by_name(
                candidate for candidate, _ in class_choices
            )
            if class_choices and (
                "." in config_value.text or config_value.text in subclasses_by_name
            ):
                self.choose_class(class_choices, key, config_value)
            elif config_value.text.lower() not in names:
                problem = f"no {config_value.name} is called {config_value.text!r}"
                usual_names = [n for n in names if n not in DISCOURAGED_PRECISIONS]
                known_name = flag_guesses.known_name(key, config_value.text)
                raise unknown_class_name(
                    config_value,
                    problem,
                    [known_name] if known_name else [*usual_names, *subclasses_by_name],
                    is_known=known_name is not None,
                )
        # `_names_class`: whether the value is a text, for an argument that accepts no plain text
        elif class_choices and self._names_class(hint, config_value) and not is_dataclass_hint:
            # plain names, such as those of the loggers, that stand beside classes
            choices = typehints.literal_choices(hint)
            if config_value.text not in choices:
                self.choose_class(class_choices, key, config_value, choices)
        elif hint is not None and not typehints.is_valid(hint, config_value.value):
            name, text = config_value.name, config_value.display_text
            problem = f"{config_value.location}: {name} cannot be {text}"
            values, example = typehints.describe(hint), typehints.example_of(hint, default)
            # the same value in another notation, such as 1000 for 1e3
            if (corrected := typehints.corrected_value(hint, config_value.flag_text)) is not None:
                raise UsageError(problem, values, flag=config_value.with_value(corrected))
            # replaces the wrong value by the nearest accepted one, or else by an example
            choices = typehints.literal_choices(hint)
            near = suggest_names(config_value.text, choices)
            raise UsageError(
                problem,
                near or values,
                flag=config_value.with_value(near[0] if near else example),
                label="nearest" if near else "allowed",
            )

    def _record_callback(self, config_value: ConfigValue) -> None:
        """Add a value of `trainer.callbacks`, or an element of one, to the callbacks of the run."""
        if isinstance(config_value.node, yaml.SequenceNode):  # its elements follow
            self.callbacks = self.callbacks if config_value.is_appended else []
        elif config_value.is_appended or config_value.name.isdigit():
            self.callbacks.append(config_value)
        else:
            self.callbacks = [config_value]

    def _names_class(self, hint: Any, config_value: ConfigValue) -> bool:
        return config_value.node.tag.endswith(":str") and str not in typehints.union_members(hint)

    def check_class_spec(
        self, class_choices: ClassChoices, key: str, config_value: ConfigValue
    ) -> None:
        """Check a mapping that names a class, or adds arguments to the class chosen before.

        Args:
            class_choices: the base classes that the argument accepts.
            key: the full key of the argument.
            config_value: the mapping: class_path and init_args, or arguments alone.

        Raises:
            UsageError: the mapping has another form, or a value in it does not fit.
        """
        # the entries of the mapping; each knows its file and line, for errors
        children = {child.name: child for child in config_value.children()}
        if "class_path" in children:
            self.choose_class(class_choices, key, children["class_path"])
        if key not in self.chosen_classes:
            raise missing_class_path(class_choices, children, config_value)
        # CLASS_SPEC_KEYS: class_path, init_args and dict_kwargs
        stray_args = [child for name, child in children.items() if name not in CLASS_SPEC_KEYS]
        if stray_args and "class_path" in children:
            fix = f"init_args: {{{stray_args[0].name}: {stray_args[0].text}}}"
            raise UsageError(
                f"{stray_args[0].location}: arguments of a class belong under init_args",
                CLASS_SPEC_KEYS,
                flag=fix,
            )
        if "init_args" in children and not isinstance(children["init_args"].node, yaml.MappingNode):
            problem = f"{children['init_args'].location}: it must map arguments to values"
            chosen, num_supplied = self.chosen_classes[key]
            raise UsageError(problem, flag=f"init_args: {example_arguments(chosen, num_supplied)}")
        # without class_path the mapping holds arguments of the class chosen before
        for child in children["init_args"].children() if "init_args" in children else stray_args:
            self.check_key(
                typehints.class_parser(*self.chosen_classes[key]), key, child.name, child
            )

    def choose_class(
        self,
        class_choices: ClassChoices,
        key: str,
        config_value: ConfigValue,
        other_names: Iterable[str] = (),
    ) -> None:
        """Record the class with a given name; later arguments under this key belong to it.

        Args:
            class_choices: the base classes that the argument accepts.
            key: the full key of the argument.
            config_value: the name of a known class, or a dotted path.
            other_names: names that are accepted instead of a class, for suggestions.

        Raises:
            UsageError: no such class exists, or it is not a subclass of a base class.
        """
        check_class_text(config_value)
        name, bases = config_value.text, tuple(base for base, _ in class_choices)
        base_names = " or ".join(dict.fromkeys(base.__name__ for base in bases))
        # the subclasses that are imported now, and a base that is a dataclass: LRSchedule
        subclasses_by_name = {b.__name__: b for b in bases if dataclasses.is_dataclass(b)}
        subclasses_by_name |= typehints.subclasses_by_name(bases)
        chosen_class = (
            import_class(config_value, base_names, bases)
            if "." in name
            else subclasses_by_name.get(name)
        )
        if chosen_class is None:
            # an error with the nearest of these classes
            raise unknown_class_name(
                config_value,
                f"no {base_names} is called {name!r}",
                [*other_names, *subclasses_by_name],
                bases=bases,
            )
        # forget the class chosen before, and the classes chosen for its arguments
        for stale_key in [k for k in self.chosen_classes if k == key or k.startswith(f"{key}.")]:
            del self.chosen_classes[stale_key]
        if isinstance(chosen_class, type):  # not a function
            # number of arguments that the code supplies later, such as an optimizer's parameters
            num_supplied = next(n for base, n in class_choices if issubclass(chosen_class, base))
            self.chosen_classes[key] = chosen_class, num_supplied


def missing_class_path(
    class_choices: ClassChoices, children: dict[str, ConfigValue], config_value: ConfigValue
) -> UsageError:
    """Return the error for a mapping without class_path, which is often a mapping of classes.

    Args:
        class_choices: the base classes that the argument accepts.
        children: the entries of the mapping.
        config_value: the mapping.
    """
    names = typehints.subclasses_by_name(base for base, _ in class_choices)
    named = [child for name, child in children.items() if name in names]
    is_list = config_value.name.rstrip("+") == "callbacks"
    problem = f"{config_value.location}: class_path is missing"
    if not named:
        example = next((n for n in typehints.EXAMPLE_CLASSES if n in names), min(names, default=""))
        fix = (
            f"{config_value.name}: [{{class_path: {example}}}]"
            if is_list
            else (f"class_path: {example}")
        )
        return UsageError(problem, flag=fix)
    specs = []
    for child in named:
        arguments = f", init_args: {child.display_text}" if child.children() else ""
        specs.append(f"{{class_path: {child.name}{arguments}}}")
    if is_list:
        problem = f"{config_value.location}: a mapping, but {config_value.name} is a list"
        return UsageError(problem, flag=f"{config_value.name}: [{', '.join(specs)}]")
    prefix = "- " if config_value.name.isdigit() else f"{config_value.name}: "
    return UsageError(problem, flag=prefix + specs[0])


def example_arguments(chosen_class: type, num_supplied: int) -> str:
    """Return one argument of a class with an example of a value, as a mapping in YAML."""
    names = flag_guesses.argument_names(chosen_class, num_supplied)
    text = flag_guesses.default_text(chosen_class, names[0]) if names else ""
    return f"{{{names[0]}: {text}}}" if names else "{}"


# By base class: how a class of it is given, and the list that has its names.
CLASS_FLAGS: dict[type, tuple[str, str]] = {
    L.LightningModule: ("--model={}", "tasks"),
    L.LightningDataModule: ("--data={}", "data"),
    L.Callback: ("--trainer.callbacks+={}", "callbacks"),
    torch.optim.Optimizer: ("--optimizer={}", "optimizers"),
    Strategy: ("--trainer.strategy={}", "strategies"),
}


DATA_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".bin", ".md")


def check_class_text(config_value: ConfigValue) -> None:
    """Raise UsageError for a flag whose value is no class name, but a file or several names.

    Args:
        config_value: the value of an argument that takes a class.
    """
    text, key = config_value.text, config_value.source
    if not config_value.is_flag or "=" in key:
        return
    if key == "--data" and (text.endswith(DATA_SUFFIXES) or os.path.exists(text)):
        raise UsageError(
            f"{config_value.location}: {text} is a file, not a class",
            flag=shlex.quote(f"--data.path={text}"),
        )
    if key == "--model" and text.endswith(".ckpt"):
        raise UsageError(
            f"{config_value.location}: {text} is a checkpoint, not a class",
            flag=shlex.quote(f"--ckpt_path={text}"),
        )
    if re.fullmatch(r"[\w.]+(, *[\w.]+)+", text) and key.startswith("--trainer.callbacks"):
        raise UsageError(
            f"{config_value.location}: {text} is no class; several are a list in brackets",
            flag=config_value.with_value(f"[{text}]"),
        )
    if match := re.fullmatch(r"([\w.]+)\((.*)\)", text):
        arguments = [word.partition("=") for word in match[2].split(",") if "=" in word]
        prefix = key.rstrip("+")
        flags = [f"{key}={match[1]}"]
        flags += [f"{prefix}.{name.strip()}={value.strip()}" for name, _, value in arguments]
        raise UsageError(
            f"{config_value.location}: {text} is a call; a class and its arguments are flags",
            flag=shlex.join(flags),
        )


def unknown_class_name(
    config_value: ConfigValue,
    problem: str,
    allowed: Iterable[str],
    prefix: str = "",
    bases: Iterable[type] = (),
    is_known: bool = False,
) -> UsageError:
    """Return the error for a class name that does not exist.

    Args:
        config_value: the value with the name.
        problem: what is wrong.
        allowed: the names that exist.
        prefix: the module of the class, with a dot at its end.
        bases: the base classes of the argument.
        is_known: whether ``allowed`` has just the name that is meant.
    """
    name, problem = config_value.text.removeprefix(prefix), f"{config_value.location}: {problem}"
    allowed, bases = list(allowed), tuple(bases)
    if is_known:
        return UsageError(
            problem, allowed, flag=config_value.with_value(prefix + allowed[0]), label="nearest"
        )
    # a class of another kind, such as an optimizer among the callbacks
    for base, (flag, _) in CLASS_FLAGS.items():
        known = {n.lower(): n for n in typehints.subclasses_by_name([base])}.get(name.lower())
        is_other_kind = known and known not in allowed and base not in bases and not prefix
        if is_other_kind and config_value.is_flag:
            article = "an" if base.__name__[0] in "AEIOU" else "a"
            return UsageError(
                f"{problem}; it is {article} {base.__name__}", flag=flag.format(known)
            )
    kinds = [kind for base, (_, kind) in CLASS_FLAGS.items() if base in bases]
    return unknown_name_error(
        problem,
        name,
        allowed,
        lambda n: config_value.with_value(prefix + n),
        next(iter(sorted(allowed, key=len)), "NAME"),
        f"{program_name()} list {kinds[0]}" if kinds and not prefix else "",
    )


def import_class(config_value: ConfigValue, base_names: str, bases: tuple[type, ...]) -> Any:
    """Import the class at a dotted path, which must be a subclass of one of ``bases``.

    Args:
        config_value: the value with the dotted path.
        base_names: the names of the bases, for errors.
        bases: the allowed base classes.

    Returns:
        The class, or a function that builds an object.

    Raises:
        UsageError: the import fails, or the module has no such class.
    """
    path, _, name = config_value.text.rpartition(".")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # importing a user's file may raise any error
        missing = isinstance(error, ModuleNotFoundError) and error.name
        # the module itself or a package of its path, not a module that its code imports
        if missing and f"{path}.".startswith(f"{missing}."):
            if os.path.isfile(config_value.text):  # a config that the parser could not read
                # raises an error that names the mistake in the file
                presets.check_config_file(config_value.text)
            files = [file.stem for file in Path().glob("[!.]*.py")]
            problem = (
                f"{config_value.location}: no module is called {missing!r}, in this folder or "
                "among the installed packages"
            )
            fix = lambda file: config_value.with_value(f"{file}.{name}")  # noqa: E731
            # suggests the nearest file of this folder as the module
            lists = {"model": "tasks", "data": "data", "callbacks": "callbacks"}
            fallback = f"{program_name()} list {lists.get(config_value.name, '')}".rstrip()
            raise unknown_name_error(problem, missing, files, fix, "FILE", fallback) from error
        reason = f"the import of {path} raises {type(error).__name__}: {error}"
        raise UsageError(
            f"{config_value.location}: {reason}", flag=f'python -c "import {path}"'
        ) from error
    classes_by_name = {  # for suggestions
        k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, bases)
    }
    imported_class = getattr(module, name, None)
    if imported_class is None:
        # an error with the nearest of these classes
        raise unknown_class_name(
            config_value, f"{path} has no {base_names} called {name!r}", classes_by_name, f"{path}."
        )
    if isinstance(imported_class, type) and not issubclass(imported_class, bases):
        raise unknown_class_name(
            config_value, f"{config_value.text} is not a {base_names}", classes_by_name, f"{path}."
        )
    if inspect.isfunction(imported_class) and "return" not in imported_class.__annotations__:
        problem = f"{config_value.text} is a function without the return type {base_names}"
        raise unknown_class_name(config_value, problem, classes_by_name, f"{path}.")
    return imported_class


def check_model_of_checkpoint(
    saved_config: dict[str, Any], values: Iterable[ConfigValue], path: str, command: str
) -> None:
    """Raise UsageError if the user's model is of another class than that of the checkpoint.

    Otherwise the first value of the checkpoint that the other task lacks would be reported, which
    the user has not typed.

    Args:
        saved_config: the configuration in the checkpoint; empty if it has none.
        values: the user's values, in order.
        path: the checkpoint.
        command: the command.
    """
    saved_name = str((saved_config.get("model") or {}).get("class_path", "")).rpartition(".")[2]
    # the names in `model: NAME` and in `model: {class_path: NAME}`; the last one is used
    specs = [[value, *value.children()] for value in values if value.key == "model"]
    names = [v.text for spec in specs for v in spec if v.name in ("model", "class_path")]
    names = [name.rpartition(".")[2] for name in names if name != "..."]
    known = typehints.subclasses_by_name([L.LightningModule])
    if not saved_name or not names or not {saved_name, names[-1]} <= known.keys():
        return
    saved_class, typed_class = known[saved_name], known[names[-1]]
    if issubclass(saved_class, typed_class) or issubclass(typed_class, saved_class):
        return
    words = [program_name(), command, f"--ckpt_path={path}"]
    # of data and callbacks that are not Ravine's
    if packages := trust.packages_of_checkpoint(saved_config):
        words.append(f"{trust.TRUST_FLAG}={','.join(packages)}")
    raise UsageError(
        f"{path} contains the weights of a {saved_name}, which do not fit the model {names[-1]} of "
        "the command",
        [saved_name],
        flag=shlex.join(words),
    )


def missing_argument(
    message: str, command: str, chosen_classes: Iterable[tuple[str, type]]
) -> UsageError:
    """Return the error for a missing argument or value, from the parser's message.

    The texts below are those of argparse and jsonargparse; another message is shown as it is.

    Args:
        message: the parser's message
        command: fit, or another command
        chosen_classes: the classes that were named, with their keys
    """
    if match := re.search(r"arguments are required: ([\w.]+)", message):
        key = match[1].removeprefix(f"{command}.")
        for parent_key, chosen_class in chosen_classes:
            # the parser names the argument without the key of its class
            if key in inspect.signature(chosen_class).parameters:
                example = flag_guesses.default_text(chosen_class, key)
                return UsageError(
                    f"{chosen_class.__name__} needs {key!r}", flag=f"--{parent_key}.{key}={example}"
                )
        config = "--config shakespeare/quick" if command == "fit" else "--ckpt_path=last"
        return UsageError(f"no {key} was given", flag=f"{program_name()} {command} {config}")
    return UsageError(message.strip(), flag=f"{program_name()} {command} --help=all")
