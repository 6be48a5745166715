"""The parsed configuration of a command; nothing is built, and nothing runs."""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from jsonargparse import set_parsing_settings

from ravine.cli import resume_path
from ravine.cli.command import RavineCLI, expand_strategy_preset
from ravine.cli.main import normalize_argv


class ParsedCLI(RavineCLI):
    """Parses a command, and stops before classes are built."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def parse(*words: str) -> ParsedCLI:
    """Return the parsed command; `config_of` reads it."""
    set_parsing_settings(import_path_denylist=[], config_read_mode_fsspec_enabled=False)
    argv, checkpoint = resume_path.resolve_argv(expand_strategy_preset(normalize_argv([*words])))
    with redirect_stderr(StringIO()):  # "Seed set to 0"
        return ParsedCLI(argv, checkpoint)


def config_of(*words: str) -> dict[str, Any]:
    """Return the resolved configuration of a command, with all defaults."""
    cli = parse(*words)
    return cli.config[cli.command].as_dict()


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Return the values of nested mappings and lists by dotted key."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        found: dict[str, Any] = {}
        for name, child in pairs:
            found |= leaves(child, f"{key}.{name}".lstrip("."))
        return found or {key: value}
    return {key: value}


def changes(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ, by dotted key; `...` stands for a value that is not there."""
    old, new = leaves(before), leaves(after)
    return {
        key: (old.get(key, ...), new.get(key, ...))
        for key in {*old, *new}
        if old.get(key, ...) != new.get(key, ...)
    }
