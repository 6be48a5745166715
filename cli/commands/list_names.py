"""`lightning list [KIND] [WORD]`: the configs, classes and names that a command line accepts."""

import sys
from collections.abc import Iterable
from itertools import groupby

from ravine.errors import UsageError

from ..discovery import class_pages, config_pages, registry
from ..discovery.config_pages import ConfigEntry, ConfigHeader
from ..discovery.registry import KINDS, Entry
from ..discovery.text_layout import fit_words, page_width, two_columns
from ..error_report import program_name, unknown_name_error


def run_argv(argv: list[str]) -> int:
    """Print the kinds, the names of a kind, or all names that contain a word.

    Args:
        argv: "list", then a kind such as optimizers and a word, both optional.
    """
    words = argv[1:]
    if flag := next((word for word in words if word.startswith("-")), None):
        raise UsageError(f"list has no flag {flag}", flag=f"{program_name()} list configs quick")
    if len(words) > 2:
        raise UsageError(
            f"list takes a kind and one word, but {' '.join(words[2:])!r} was also given",
            flag=f"{program_name()} list {words[0]} {words[1]}",
        )
    if not words:
        # the kinds, such as optimizers and configs, with what each is for
        lines = list_kinds()
    # the kind that the word names, or None
    elif kind := find_kind(words[0]):
        lines = list_kind(kind, words[1] if len(words) > 1 else "")
    elif len(words) == 1:
        # the names of all kinds that contain the word
        lines = search_all(words[0])
    else:
        raise unknown_kind_error(words[0])
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def list_kinds() -> list[str]:
    """Return the overview of kinds."""
    program = program_name()
    rows = [(name, [kind.description, kind.usage]) for name, kind in KINDS.items()]
    return [
        *two_columns(rows),
        "",
        f"{program} list KIND    the names of a kind",
        f"{program} list WORD    the names of all kinds that contain a word",
        f"{program} show NAME    the page of a name",
    ]


def find_kind(word: str) -> str | None:
    """Return the kind that a word names, in the plural or the singular."""
    singulars = {"strategy": "strategies"} | {kind.removesuffix("s"): kind for kind in KINDS}
    return word if word in KINDS else singulars.get(word)


def unknown_kind_error(word: str) -> UsageError:
    """Return the error for a kind that does not exist."""
    return unknown_name_error(
        f"no kind is called {word!r}", word, KINDS, f"{program_name()} list {{}}".format, "configs"
    )


def list_kind(kind: str, word: str) -> list[str]:
    """Return the names of a kind that contain a word; "" is in all of them.

    Args:
        kind: one of the lists, such as optimizers.
        word: a part of a name or of its description.

    Raises:
        UsageError: no name contains the word.
    """
    lines = find_lines(kind, word)
    if lines:
        return [f"{kind}: {KINDS[kind].usage}", *lines]
    names = [name for name, _ in searchable(kind)]
    # makes the error, with the nearest name in the suggested command
    raise unknown_name_error(
        f"no name of {kind} contains {word!r}",
        word,
        names,
        lambda near: f"{program_name()} list {kind} {near}",
        "WORD",
    )


def search_all(word: str) -> list[str]:
    """Return the names of all kinds that contain a word.

    Raises:
        UsageError: no name contains the word.
    """
    lines: list[str] = []
    for kind in KINDS:
        if matching := find_lines(kind, word, names_only=True):
            lines += ["", f"{kind}: {KINDS[kind].usage}", *matching]
    if not lines:
        raise unknown_kind_error(word)
    return lines[1:]


def searchable(kind: str) -> list[tuple[str, str]]:
    """Return the names of a kind and the texts in which a word is searched."""
    if kind == "configs":
        return [(c.name, c.header.text) for c in config_pages.list_configs()]
    return [(e.name, e.summary) for e in registry.entries_of(kind)]


def find_lines(kind: str, word: str, names_only: bool = False) -> list[str]:
    """Return the lines of the names that contain a word, in the name or its text."""

    def matches(name: str, text: str) -> bool:
        return word.lower() in (name if names_only else f"{name} {text}").lower()

    if kind == "configs":
        configs = [c for c in config_pages.list_configs() if matches(c.name, c.header.text)]
        return config_lines(configs)
    if names_only:
        return entry_lines(registry.entries_of(kind, lambda name: matches(name, "")))
    return entry_lines([e for e in registry.entries_of(kind) if matches(e.name, e.summary)])


def config_lines(configs: Iterable[ConfigEntry]) -> list[str]:
    """Return lines with machine, time and expected result of each config."""
    lines: list[str] = []
    for is_overlay, group in groupby(sorted(configs, key=_config_order), lambda c: c.is_overlay):
        if is_overlay:
            lines += ["", "  overlays, after another config: --config NAME --config OVERLAY"]
        lines += two_columns([(config.name, header_lines(config.header)) for config in group])
    return lines


def header_lines(header: ConfigHeader) -> list[str]:
    """Return machine and time in one line, and the expected result in another."""
    label = "machine" if header.time else "machine and time"
    machine = f"{label}: {header.machine}" if header.machine else ""
    time = f"time: {header.time}" if header.time else ""
    expected = f"expect: {header.expected}" if header.expected else ""
    return [". ".join(filter(None, (machine, time))), expected]


def _config_order(config: ConfigEntry) -> tuple[bool, str]:
    return config.is_overlay, config.name


def entry_lines(entries: Iterable[Entry]) -> list[str]:
    """Return lines with the first line and the arguments of each name, by group."""
    lines: list[str] = []
    for group, members in groupby(entries, lambda entry: entry.group):
        if group:
            lines += ["", f"  {group}"]
        members = [*members]
        width = page_width() - max(len(entry.name) for entry in members) - 6
        rows = [
            (e.name, [e.summary, fit_words(class_pages.short_arguments(e), width)]) for e in members
        ]
        lines += two_columns(rows)
    return lines
