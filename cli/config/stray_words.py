"""Stray words: words of a command that belong to no flag, and what they may mean.

`fit spam` names a config, `fit lr=3` lacks two dashes, `test last.ckpt` names a checkpoint, and
`--lr = 3` has spaces around its sign. Each gets one error with the command or the flag to type.
The correction of `lr=3` may need the parser of the command, and with it torch: `parser_fix`.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ravine.errors import UsageError, suggest_names

from ..discovery import registry
from ..error_report import program_name
from ..run_folders import index, record
from . import presets

if TYPE_CHECKING:
    from .errors import ConfigErrorFinder

FlagFix = dict[str, Any]  # arguments of UsageError: allowed, flag, label
# Flags without a value.
SWITCHES = ("--print_config", "--print_groups", "--help", "--debug", "--allow_changed_data")
CHECKPOINT_WORDS = ("auto", "last", "best")
# By list of `lightning list`: how a name of it is typed.
FLAG_OF_KIND = {
    "tasks": "--model={}",
    "data": "--data={}",
    "callbacks": "--trainer.callbacks+={}",
    "strategies": "--trainer.strategy={}",
    "configs": "--config {}",
}


class StrayWord(NamedTuple):
    """A word that is neither a flag nor the value of one, and the word after it, or ""."""

    word: str
    next_word: str


def find_stray_words(argv: list[str]) -> Iterator[StrayWord]:
    """Yield the words after the command that belong to no flag, as the parser reads them."""
    remaining = list(argv[1:])
    while remaining:
        word = remaining.pop(0)
        next_word = remaining[0] if remaining else ""
        if not word.startswith("--"):
            yield StrayWord(word, next_word)
        # the next word is the value, unless it is a flag
        elif "=" not in word and word not in SWITCHES and not next_word.startswith("--"):
            del remaining[:1]


def check_names_of_files(argv: list[str]) -> None:
    """Raise UsageError for a word without a flag that names a config or a checkpoint.

    Args:
        argv: the command and its arguments.
    """
    check_spaced_signs(argv)
    for word, _ in find_stray_words(argv):
        location = f"on the command line, {word}"
        # a pair for the name of a run, such as spam/quick/3
        is_run = index.split_run_request(word, Path("runs")) is not None
        if is_run or word.endswith(".ckpt") or word in CHECKPOINT_WORDS:
            raise UsageError(
                f"{location}: a checkpoint without its flag",
                flag=replaced_command(word, f"--ckpt_path={word}"),
            )
        if (name := config_name(word)) and argv[0] in ("fit", "validate", "test", "predict"):
            raise UsageError(
                f"{location}: a config without its flag",
                flag=replaced_command(word, "--config", name),
            )


def check_spaced_signs(argv: list[str]) -> None:
    """Raise UsageError for `--lr = 3` or `--lr =3`: a shell makes several words of it."""
    for i, word in enumerate(argv[:-1]):
        following = argv[i + 1]
        if word.startswith("--") and "=" not in word and following.startswith("="):
            words = [following[1:]] if following != "=" else argv[i + 2 : i + 3]
            fixed = f"{word}={words[0] if words else ''}"
            spaced_words = [word, following, *(words if following == "=" else [])]
            raise UsageError(
                f"on the command line, {' '.join(spaced_words)}: a space beside the sign =",
                flag=replaced_command(spaced_words, fixed),
            )
        if word.startswith("--") and word.endswith("=") and not following.startswith("-"):
            raise UsageError(
                f"on the command line, {word} {following}: a space beside the sign =",
                flag=replaced_command([word, following], word + following),
            )


def config_name(word: str) -> str | None:
    """Return the config that a word names: a preset, a YAML file, or nearly one; else None."""
    if Path(word).suffix in (".yaml", ".yml") or word in presets.list_presets():
        return word
    if re.fullmatch(r"[\w./-]+", word) and Path(f"{word}.yaml").is_file():
        return word
    # a typing error in the name of a preset: spma
    near = suggest_names(word, presets.list_presets(), least=0.75)
    return near[0] if near and "=" not in word and not word.startswith("-") else None


def replaced_command(replaced_words: str | list[str], *replacement: str) -> str:
    """Return the command as typed, with other words in place of wrong ones, for the shell.

    Args:
        replaced_words: the wrong word, or the wrong words in a row.
        replacement: the words in their place; none to leave the wrong ones out.
    """
    words, replaced_words = (
        record.typed_command()[1:],
        [replaced_words] if isinstance(replaced_words, str) else list(replaced_words),
    )
    for i in range(len(words) - len(replaced_words) + 1):
        if words[i : i + len(replaced_words)] == replaced_words:
            words[i : i + len(replaced_words)] = replacement
            break
    return shlex.join([program_name(), *words])


def command_without(flag: str) -> str:
    """Return the command as typed without a flag and its value, for the shell."""
    words = record.typed_command()[1:]
    for i, word in enumerate(words):
        if word.partition("=")[0] == flag:
            has_value = "=" not in word and not "".join(words[i + 1 : i + 2]).startswith("--")
            return replaced_command(words[i : i + 1 + has_value])
    return replaced_command([flag])


def check_stray_words(argv: list[str], fix_of: Callable[[str], FlagFix | None]) -> None:
    """Raise UsageError for the first word that belongs to no flag.

    Args:
        argv: the command and its arguments.
        fix_of: returns what to type in place of a flag that may have a wrong name; None if it is
            not known yet, and then nothing is raised.
    """
    for word, next_word in find_stray_words(argv):
        if word == "help":
            flag = shlex.join([program_name(), argv[0], "--help"])
            raise UsageError(f"on the command line, {word}: a word without a flag", flag=flag)
        name, equals, value = word.lstrip("-+").partition("=")
        location = f"on the command line, {word}"
        is_number = re.fullmatch(r"-?[\d.,]+", word)
        if re.fullmatch(r"[A-Za-z_][\w.+-]*", name) and (equals or word.startswith("-")):
            # Hydra's key=value, or a single dash
            if not equals and next_word and not next_word.startswith("-"):
                equals, value = "=", next_word
            if (fix := fix_of(f"--{name}{equals}{value}")) is None:
                return
            raise UsageError(f"{location}: a flag begins with two dashes", **fix)
        if is_number or not (flag := flag_of(word)):
            problem = f"{location}: a value without a flag"
            raise UsageError(problem, flag=replaced_command(word))
        raise UsageError(f"{location}: a name without a flag", flag=replaced_command(word, *flag))


def parser_fix(finder: "ConfigErrorFinder", flag: str) -> FlagFix:
    """Return the flag to type in place of one that may itself have a wrong name.

    Args:
        finder: has the parser of the command.
        flag: the flag with its value.
    """
    from .values import from_argv  # imports yaml, which `runs` does not need

    try:
        for value in from_argv([flag]):
            finder.check_key(finder.parser, "", value.key, value)
    except UsageError as error:
        return {"allowed": error.allowed, "flag": error.flag, "label": error.label}
    return {"flag": shlex.quote(flag)}


def flag_of(word: str) -> list[str] | None:
    """Return the words of the flag that a name may be the value of; None if it is not known."""
    if Path(word).exists():
        return [f"--data.path={word}"]
    for entry in registry.find_named(word):
        if entry.kind in FLAG_OF_KIND:
            return FLAG_OF_KIND[entry.kind].format(word).split(" ")
        if entry.is_plan:
            return [f"--trainer.callbacks+={word}"]
        if entry.kind == "optimizers":
            return [f"--optimizer={word}"]
    return None
