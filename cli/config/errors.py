"""Why a configuration was refused: each of its words held against the class that takes it.

A parser that tries every member of a union says that all of them failed, and not where. So its
message is not taken apart: the variables, the files and the flags are read once more beside the
parser's own types, in the order in which they count, and the first word that fits nothing is the
mistake. Only what stands nowhere (a missing model) is known from the message alone.
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from ravine.errors import UsageError
from ravine.lightning_compat import precision_names

from ..error_report import program, unknown_name
from . import presets, typehints
from .values import Given, in_environment, in_words

SPEC = ("class_path", "init_args", "dict_kwargs")
TAKERS = {"model": "NAME", "data": "NAME", "trainer.strategy": "MeshStrategy"}  # of arguments
Classes = list[tuple[type, int]]


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parse the words of a command line, or say in plain words which of them is wrong."""
    diagnosis = Diagnosis(parser, argv[0])
    for given in in_environment(argv[0]):  # the parser would pass over those it does not know
        diagnosis.variable(given)
    try:
        config = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        diagnosis.words(argv)
        named = [(key, kind) for key, (kind, _) in diagnosis.chosen.items()]
        raise stated(str(error), argv[0], named) from error
    trainer = config[argv[0]].get("trainer")
    if trainer is not None and isinstance(trainer.get("callbacks"), Namespace):
        trainer["callbacks"] = [trainer["callbacks"]]  # else what its constructor raises is lost
    for key, names in registered().items():
        if isinstance(name := config[argv[0]].get(key), str) and name.lower() not in names:
            diagnosis.words(argv)
    return config


def registered() -> dict[str, list[str]]:
    """Names that Lightning looks up when it builds the trainer: to the parser they are any text."""
    return {
        "trainer.strategy": ["auto", *StrategyRegistry.available_strategies()],
        "trainer.accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "trainer.precision": ["auto", *precision_names(), "64", "32", "16", "bf16"],
    }


class Diagnosis:
    """Reads what the user gave, in order, and raises the first mistake it meets."""

    def __init__(self, parser: ArgumentParser, command: str) -> None:
        """Begin with the parser of the command, no class being chosen yet."""
        self.parser = parser._subcommands_action._name_parser_map[command]  # type: ignore
        self.parser.allow_abbrev = False  # or max_step would silently be max_steps
        self.command = command
        self.chosen: dict[str, tuple[type, int]] = {}  # by key: the class whose arguments follow

    def words(self, argv: list[str]) -> None:
        """Read the variables, then the configs and the flags."""
        for given in [*in_environment(self.command), *in_words(argv[1:])]:
            self.key(self.parser, "", given.key, given)

    def variable(self, given: Given) -> None:
        """Refuse a variable the parser does not look for."""
        hints = {a.dest: getattr(a, "_typehint", None) for a in self.parser._actions}
        if given.key in hints:
            return
        if any(given.key.startswith(f"{key}.") for key, hint in hints.items() if hint):
            fix = f"--{given.key}={given.text}"
            raise UsageError(f"{given.place}: no variable reaches inside a class", flag=fix)
        self.key(self.parser, "", given.key, given)

    def key(self, parser: ArgumentParser, owner: str, key: str, given: Given) -> None:
        """Hold a value against the type of ``key``, an argument of ``parser``.

        Args:
            parser: parser of the command, or of a class
            owner: the key under which that class was chosen; empty for the command
            key: the key below it
            given: the value
        """
        actions = [a for a in parser._actions if not f".{a.dest}".endswith(".help")]
        hints = {action.dest: getattr(action, "_typehint", None) for action in actions}
        parts = [p.removesuffix("+") for p in key.split(".") if p not in ("init_args", "help")]
        starts = [".".join(parts[:n]) for n in range(len(parts) + 1)]
        sections = {start for start in starts if any(d.startswith(f"{start}.") for d in hints)}
        reach = next(s for s in reversed(starts) if s in hints or s in sections or not s)
        rest = parts[len(reach.split(".")) if reach else 0 :]
        if rest and (reach in sections or not reach):
            level = {
                d.removeprefix(f"{reach}.").split(".")[0] for d in hints if d.startswith(reach)
            }
            raise self.no_argument(owner, reach, rest[0], level, given)
        if reach in sections:
            for each in given.items():
                self.key(parser, owner, f"{key}.{each.name}", each)
        else:
            self.value(hints[reach], f"{owner}.{reach}".lstrip("."), rest, given)

    def no_argument(
        self, owner: str, section: str, wrong: str, names: set[str], given: Given
    ) -> UsageError:
        """The mistake of a key that does not exist, of the command or of a class."""
        names -= {"config", "print_config"}
        kind = self.chosen[owner][0].__name__ if owner in self.chosen else section or self.command
        what = f"{given.place}: {kind} has no argument {wrong!r}"
        return unknown_name(what, wrong, names, lambda right: given.renamed(wrong, right), "KEY")

    def value(self, hint: Any, key: str, rest: list[str], given: Given) -> None:
        """Hold a value against the type ``hint`` of the argument ``key``, or of one inside it."""
        kinds = typehints.classes(hint)
        record = bool(kinds) and dataclasses.is_dataclass(kinds[0][0])  # it needs no class_path
        if record:
            self.chosen[key] = kinds[0]
        if rest and rest != ["class_path"]:
            if key in self.chosen:
                self.key(typehints.arguments(*self.chosen[key]), key, ".".join(rest), given)
            elif name := TAKERS.get(key):
                fix = f"--{key}={name} {given.renamed('', '')}"
                raise UsageError(f"{given.place}: no class is named that could take it", flag=fix)
        elif isinstance(given.node, yaml.SequenceNode) and kinds and typehints.takes_list(hint):
            for each in given.items():
                self.chosen.pop(key, None)
                self.value(typehints.elements(hint), key, [], each)
        elif kinds and isinstance(given.node, yaml.MappingNode):
            self.spec(kinds, key, given)
        elif names := registered().get(key):
            known = typehints.subclasses(kind for kind, _ in kinds)
            if kinds and ("." in given.text or given.text in known):
                self.choose(kinds, key, given)
            elif given.text.lower() not in names:
                what = f"no {given.name} is called {given.text!r}"
                raise no_name(given, what, [*names, *known])
        elif kinds and self._names_class(hint, given) and not record:
            self.choose(kinds, key, given)
        elif hint is not None and not typehints.accepts(hint, given.value):
            what = f"{given.place}: {given.name} cannot be {given.shown}"
            values, example = typehints.described(hint), typehints.sample(hint)
            raise unknown_name(what, given.text, values, given.valued, example)

    def _names_class(self, hint: Any, given: Given) -> bool:
        return given.node.tag.endswith(":str") and str not in typehints.members(hint)

    def spec(self, kinds: Classes, key: str, given: Given) -> None:
        """Read a mapping that names a class, or gives more arguments to the one chosen before."""
        inside = {each.name: each for each in given.items()}
        if "class_path" in inside:
            self.choose(kinds, key, inside["class_path"])
        if key not in self.chosen:
            raise UsageError(f"{given.place}: it names no class", flag="class_path: NAME")
        stray = [each for name, each in inside.items() if name not in SPEC]
        if stray and "class_path" in inside:
            fix = f"init_args: {{{stray[0].name}: {stray[0].text}}}"
            raise UsageError(f"{stray[0].place}: arguments stand under init_args", SPEC, flag=fix)
        if "init_args" in inside and not isinstance(inside["init_args"].node, yaml.MappingNode):
            what = f"{inside['init_args'].place}: it must map arguments to values"
            raise UsageError(what, flag="init_args: {KEY: VALUE}")
        for each in inside["init_args"].items() if "init_args" in inside else stray:
            self.key(typehints.arguments(*self.chosen[key]), key, each.name, each)

    def choose(self, kinds: Classes, key: str, given: Given) -> None:
        """Note the class that a name stands for; the arguments that follow are its."""
        name, bases = given.text, tuple(kind for kind, _ in kinds)
        base = " or ".join(dict.fromkeys(kind.__name__ for kind in bases))
        known = typehints.subclasses(bases)
        kind = imported(given, base, bases) if "." in name else known.get(name)
        if kind is None:
            raise no_name(given, f"no {base} is called {name!r}", known)
        for earlier in [k for k in self.chosen if k == key or k.startswith(f"{key}.")]:
            del self.chosen[earlier]
        if isinstance(kind, type):
            self.chosen[key] = (kind, next(n for base, n in kinds if issubclass(kind, base)))


def no_name(given: Given, what: str, names: Iterable[str], before: str = "") -> UsageError:
    """The mistake of a name that nothing has."""
    name = given.text.removeprefix(before)
    return unknown_name(
        f"{given.place}: {what}", name, names, lambda n: given.valued(before + n), "NAME"
    )


def imported(given: Given, base: str, bases: tuple[type, ...]) -> Any:
    """What a dotted path names, which has to be of one of the ``bases``."""
    path, _, name = given.text.rpartition(".")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a file of the user's does when it is imported
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{path}.".startswith(f"{missing}."):
            if os.path.isfile(given.text):  # a configuration that the parser could not read
                presets.check(given.text)
            files = [file.stem for file in Path().glob("[!.]*.py")]
            what = f"{given.place}: no module is called {missing!r}, in this folder or installed"
            fix = lambda file: given.valued(f"{file}.{name}")  # noqa: E731
            raise unknown_name(what, missing, files, fix, "FILE") from error
        why = f"importing {path} ends in {type(error).__name__}: {error}"
        raise UsageError(f"{given.place}: {why}", flag=f'python -c "import {path}"') from error
    known = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, bases)}
    kind = getattr(module, name, None)
    if kind is None:
        raise no_name(given, f"{path} has no {base} called {name!r}", known, f"{path}.")
    if isinstance(kind, type) and not issubclass(kind, bases):
        raise no_name(given, f"{given.text} is not a {base}", known, f"{path}.")
    return kind


def stated(message: str, command: str, chosen: Iterable[tuple[str, type]]) -> UsageError:
    """What the parser says of a mistake that stands nowhere: something is missing.

    Args:
        message: the parser's
        command: fit, or another
        chosen: the classes that were named, with the keys they stand under
    """
    if found := re.search(r"arguments are required: ([\w.]+)", message):
        key = found[1].removeprefix(f"{command}.")
        for above, kind in chosen:
            if key in inspect.signature(kind).parameters:
                return UsageError(f"{kind.__name__} needs {key!r}", flag=f"--{above}.{key}=VALUE")
        config = "--config shakespeare/quick" if command == "fit" else "--ckpt_path=FILE"
        return UsageError(f"no {key} was given", flag=f"{program()} {command} {config}")
    if found := re.search(r"argument (--[\w.]+)\S*: expected one argument", message):
        return UsageError(f"on the command line, {found[1]}: no value", flag=f"{found[1]}=VALUE")
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        what = f"on the command line, {found[1]}: it belongs to no flag"
        return UsageError(what, flag=f"--KEY={found[1]}")
    return UsageError(message.strip(), flag=f"{program()} {command} --help=all")
