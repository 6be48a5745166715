"""Config values with their locations: the file and line, flag or variable that sets each key."""

import os
import shlex
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class ConfigValue:
    """A config value with its location.

    Args:
        key: the dotted path of the value: trainer.callbacks.0.init_args.decay
        node: the value as a YAML node, also for flags
        source: the file, the flag as typed, or the environment variable
        line: line in the file; 0 if the source is not a file
        is_missing: whether the source is a flag without a value
    """

    key: str
    node: yaml.Node
    source: str
    line: int = 0
    is_missing: bool = False

    @property
    def location(self) -> str:
        """Return the location for error messages."""
        if self.line:
            return f"in {self.source}, line {self.line}, {self.key}"
        if self.source.startswith("-"):
            return f"on the command line, {self.source}"
        return f"in the environment, {self.source}"

    @property
    def is_flag(self) -> bool:
        """Return whether the value, or the list or mapping around it, was typed as a flag."""
        return self.line == 0 and self.source.startswith("-")

    @property
    def name(self) -> str:
        """Return the last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def text(self) -> str:
        """Return the text of a single value, "..." for a list or mapping."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) else "..."

    @property
    def display_text(self) -> str:
        """Return the value in one line."""
        if isinstance(self.node, yaml.ScalarNode):
            return repr(self.text)
        return yaml.safe_dump(self.value, default_flow_style=True).strip()

    @property
    def flag_text(self) -> str:
        """Return the value as it follows a flag, also a list or a mapping."""
        if isinstance(self.node, yaml.ScalarNode):
            return self.text
        return yaml.safe_dump(self.value, default_flow_style=True, width=10**6).strip()

    @property
    def value(self) -> object:
        """Return the value for the parser, which parses a scalar's text itself."""
        if isinstance(self.node, yaml.ScalarNode):
            return None if self.node.tag.endswith(":null") else self.node.value
        return yaml.safe_load(yaml.serialize(self.node))

    @property
    def class_spec(self) -> dict[str, Any] | None:
        """Return a class with its arguments as a mapping with class_path; None for other values."""
        value = self.value
        if isinstance(value, str):
            return {"class_path": value}
        return value if isinstance(value, dict) and "class_path" in value else None

    @property
    def is_appended(self) -> bool:
        """Return whether the value is added to a list: `--trainer.callbacks+=EMA`."""
        return self.source.endswith("+") or self.key.endswith("+")

    def children(self) -> list["ConfigValue"]:
        """Return the values inside a list or a mapping."""
        prefix = f"{self.key}." if self.key else ""
        if isinstance(self.node, yaml.SequenceNode):
            entries = [(str(i), node, node) for i, node in enumerate(self.node.value)]
        elif isinstance(self.node, yaml.MappingNode):
            entries = [(key.value, key, node) for key, node in self.node.value]
        else:
            entries = []
        return [
            ConfigValue(prefix + name, node, self.source, self.line and mark.start_mark.line + 1)
            for name, mark, node in entries
        ]

    def with_key(self, old: str, new: str) -> str:
        """Return the argument to type with one part of its key corrected."""
        if self.line or not self._is_top_level:
            # a list or a mapping stays below its key
            return f"{new}: {self.text}" if isinstance(self.node, yaml.ScalarNode) else f"{new}:"
        if not self.source.startswith("-"):
            return f"export {self.source.replace(old.upper(), new.upper())}={self.flag_text}"
        segments = [new if name == old else name for name in self.source[2:].split(".")]
        return shlex.quote(f"--{'.'.join(segments)}={self.flag_text}")

    def with_value(self, value: str) -> str:
        """Return the argument to type with another value."""
        if self.line or not self._is_top_level:
            return f"- {value}" if self.name.isdigit() else f"{self.name}: {value}"
        if not self.source.startswith("-"):
            return f"export {self.source}={value}"
        return shlex.quote(f"{self.source}={value}")

    @property
    def _is_top_level(self) -> bool:
        """Return whether this is the whole value of a flag or variable, not a part of it."""
        typed_key = self.source.lstrip("-").rstrip("+")
        key = self.key.replace(".init_args.", ".")  # the parser adds init_args; users leave it out
        return typed_key in (key, self.key) or _env_var_key(self.source) == self.key


def gives_whole_run(values: Iterable[ConfigValue]) -> bool:
    """Return whether a config of the command names a model, so that it describes a whole run.

    An overlay, such as `debug/profiler`, names none.
    """
    # a value of a file has a line; a flag has none
    models = [value.value for value in values if value.line and value.key == "model"]
    return any("class_path" in m if isinstance(m, dict) else m is not None for m in models)


def from_yaml(path: str) -> list[ConfigValue]:
    """Return the top-level values of a YAML file."""
    node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    return [] if node is None else ConfigValue("", node, path, 1).children()


def from_argv(argv: list[str]) -> Iterator[ConfigValue]:
    """Yield the values of a command line in order: `--key=value`, `--key value`, and configs.

    A flag is never the value of the flag before it, as in the parser.
    """
    remaining = deque(argv)
    while remaining:
        flag, equals, value = remaining.popleft().partition("=")
        if flag == "--config":
            yield from from_yaml(value)
        elif flag.startswith("--") and flag not in ("--print_config", "--help"):
            is_missing = not equals and (not remaining or remaining[0].startswith("--"))
            if not equals and not is_missing:
                value = remaining.popleft()
            node = parse_node(None if is_missing else value)
            yield ConfigValue(flag[2:].rstrip("+"), node, flag, is_missing=is_missing)


def from_env(command: str) -> Iterator[ConfigValue]:
    """Yield the values of environment variables for ``command``: PL_FIT__TRAINER__MAX_STEPS."""
    for name in sorted(os.environ):
        if name.startswith(f"PL_{command.upper()}__"):
            yield ConfigValue(_env_var_key(name), parse_node(os.environ[name]), name)


def _env_var_key(name: str) -> str:
    return name.partition("__")[2].lower().replace("__", ".")


def parse_node(text: str | None) -> yaml.Node:
    """Return the value of a flag as a YAML node; a text that is no YAML is a string."""
    null = yaml.ScalarNode("tag:yaml.org,2002:null", "")
    if text == "":  # the parser also reads it as a text
        return yaml.ScalarNode("tag:yaml.org,2002:str", "")
    try:
        return null if text is None else yaml.compose(text, yaml.SafeLoader) or null
    except yaml.YAMLError:
        return yaml.ScalarNode("tag:yaml.org,2002:str", text)
