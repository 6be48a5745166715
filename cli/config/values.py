"""What the user gave: each key with its value and the place it stands in, to point a finger at."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Given:
    """A value in its place.

    Args:
        key: the dotted path down to it: trainer.callbacks.0.init_args.decay
        node: the value as YAML; a flag's too
        source: the file, the flag as it was typed, or the environment variable
        line: line in the file; 0 if it is none
    """

    key: str
    node: yaml.Node
    source: str
    line: int = 0

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        if self.line:
            return f"in {self.source}, line {self.line}, {self.key}"
        if self.source.startswith("-"):
            return f"on the command line, {self.source}"
        return f"in the environment, {self.source}"

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.key.rpartition(".")[2]

    @property
    def text(self) -> str:
        """The value, if it is a single one."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) else "..."

    @property
    def shown(self) -> str:
        """The value in one line, whatever it is."""
        if isinstance(self.node, yaml.ScalarNode):
            return repr(self.text)
        return yaml.safe_dump(self.value, default_flow_style=True).strip()

    @property
    def value(self) -> object:
        """The value as the parser should read it: a text is left to its own reading."""
        if isinstance(self.node, yaml.ScalarNode):
            return None if self.node.tag.endswith(":null") else self.node.value
        return yaml.safe_load(yaml.serialize(self.node))

    def items(self) -> list["Given"]:
        """The values inside this one, if it is a list or a mapping."""
        below = f"{self.key}." if self.key else ""
        if isinstance(self.node, yaml.SequenceNode):
            inside = [(str(i), node, node) for i, node in enumerate(self.node.value)]
        elif isinstance(self.node, yaml.MappingNode):
            inside = [(key.value, key, node) for key, node in self.node.value]
        else:
            inside = []
        return [
            Given(below + name, node, self.source, self.line and mark.start_mark.line + 1)
            for name, mark, node in inside
        ]

    def renamed(self, wrong: str, right: str) -> str:
        """What to type for it with one part of its key put right."""
        if self.line or not self._whole:
            return f"{right}: {self.text}"
        if not self.source.startswith("-"):
            return f"export {self.source.replace(wrong.upper(), right.upper())}={self.text}"
        parts = self.source[2:].split(".")
        return f"--{'.'.join(right if part == wrong else part for part in parts)}={self.text}"

    def valued(self, value: str) -> str:
        """What to type for it with another value."""
        if self.line or not self._whole:
            return f"- {value}" if self.name.isdigit() else f"{self.name}: {value}"
        export = "" if self.source.startswith("-") else "export "
        return f"{export}{self.source}={value}"

    @property
    def _whole(self) -> bool:
        """Whether this is all the value of a flag or a variable, not a part of it."""
        typed = self.source.lstrip("-").rstrip("+")
        return self.key == typed or _variable_key(self.source) == self.key


def in_file(path: str) -> list[Given]:
    """The keys of a YAML file."""
    node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    return [] if node is None else Given("", node, path, 1).items()


def in_words(words: list[str]) -> Iterator[Given]:
    """The keys of a command line in their order: `--key=value`, `--key value`, and configs'."""
    each = iter(words)
    for word in each:
        flag, equals, value = word.partition("=")
        if flag == "--config":
            yield from in_file(value)
        elif flag.startswith("--") and flag not in ("--print_config", "--help"):
            value = value if equals else next(each, None)
            yield Given(flag[2:].rstrip("+"), _value(value), flag)


def in_environment(command: str) -> Iterator[Given]:
    """The variables meant for ``command``: PL_FIT__TRAINER__MAX_STEPS."""
    for name in sorted(os.environ):
        if name.startswith(f"PL_{command.upper()}__"):
            yield Given(_variable_key(name), _value(os.environ[name]), name)


def _variable_key(name: str) -> str:
    return name.partition("__")[2].lower().replace("__", ".")


def _value(text: str | None) -> yaml.Node:
    null = yaml.ScalarNode("tag:yaml.org,2002:null", "")
    if text == "":  # a text to the parser too
        return yaml.ScalarNode("tag:yaml.org,2002:str", "")
    try:
        return null if text is None else yaml.compose(text, yaml.SafeLoader) or null
    except yaml.YAMLError:
        return yaml.ScalarNode("tag:yaml.org,2002:str", text)
