"""Config presets as text: the header of a YAML file, and the resolved values of several configs.

The header of a preset names the command, the machine, the time and the expected result. The
resolved values are those of the files in order, with the defaults of each class. They are read
without torch; `lightning fit --config NAME --print_config` shows what the parser makes of them.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..config import presets
from . import registry, source_index
from .source_index import Parameter, UnknownValueError

FIELD = re.compile(r"^(Machine and time|Machine|Time|Expect): ?", re.MULTILINE)
FIELD_IN_LINE = re.compile(r"(?<=[.)]) (Time|Expect): ")  # "Machine: one CPU core. Time: 5 s."
MODEL_CLASS = re.compile(r"^model:(?: *[^\s#]|[^\n]*\n +class_path:)", re.MULTILINE)


@dataclass(frozen=True)
class ConfigHeader:
    """The comment at the top of a config.

    Args:
        command: the command of its first line.
        machine: the machine that the time is for.
        time: how long the command takes there; "" if one sentence tells machine and time.
        expected: the result to expect.
        text: the whole comment, without its # signs.
    """

    command: str = ""
    machine: str = ""
    time: str = ""
    expected: str = ""
    text: str = ""


def read_header(text: str) -> ConfigHeader:
    """Read the header of a config from the text of its file.

    The header is the block of comment lines at the top. It has a command, and fields such as
    `Machine: ...`, `Time: ...` and `Expect: ...`.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    comment = "\n".join(lines)
    # [text before the first field, name, text, name, text, ...]; each field gets a line first
    segments = FIELD.split(FIELD_IN_LINE.sub(r"\n\1: ", comment))
    fields = dict(zip(segments[1::2], segments[2::2], strict=True))
    # some headers state machine and time in one field, shown as the machine
    both = fields.get("Machine and time", "")

    def one_line(name: str) -> str:
        return first_sentence(fields.get(name, both))

    return ConfigHeader(
        command=segments[0].splitlines()[0] if segments[0].strip() else "",
        machine=one_line("Machine"),
        time="" if both else one_line("Time"),
        expected=first_sentence(fields.get("Expect", "")),
        text=comment,
    )


def first_sentence(text: str) -> str:
    """Return the first sentence of a text in one line, without its full stop."""
    line = " ".join(text.split())
    return re.split(r"(?<!\bvs)(?<=[^.\s])\.\s+(?=[A-Z`(])|\.$", line, maxsplit=1)[0]


class ConfigEntry(NamedTuple):
    """A config of the list: the name that --config takes, its file and its header."""

    name: str
    path: Path
    header: ConfigHeader
    is_overlay: bool  # whether it names no model, and is added to another config


def list_configs() -> list[ConfigEntry]:
    """Return the presets and the YAML files of the current folder."""
    paths = [(name, presets.CONFIGS_FOLDER / f"{name}.yaml") for name in presets.list_presets()]
    paths += [(path.name, path) for path in sorted(Path().glob("[!.]*.yaml")) if path.is_file()]
    entries = []
    for name, path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        entries.append(ConfigEntry(name, path, read_header(text), not MODEL_CLASS.search(text)))
    return entries


@cache
def preset_texts() -> dict[str, str]:
    """Return the texts of the presets by name."""
    folder = presets.CONFIGS_FOLDER
    names = presets.list_presets()
    return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in names}


def configs_with_class(name: str, complete_only: bool = False) -> list[str]:
    """Return the presets that name a class or a strategy; only those with a model if asked for."""
    pattern = re.compile(rf"(\b(class_path|strategy): |^ *- ){re.escape(name)}\b", re.MULTILINE)
    return [
        preset
        for preset, text in preset_texts().items()
        if pattern.search(text) and (not complete_only or MODEL_CLASS.search(text))
    ]


# Resolved values


@dataclass
class ConfigNode:
    """A value of a config with its comment, and whether it is a default of its class."""

    value: Any  # a plain value, or a dict or list of nodes
    comment: str = ""
    is_default: bool = False
    notes: list[str] = field(default_factory=list)  # comment lines after a mapping's values


def load_config(path: str) -> ConfigNode:
    """Load a YAML file with the comments at the end of its lines."""
    import yaml

    presets.check_config_file(path)
    text = Path(path).read_text(encoding="utf-8")
    return _make_node(yaml.compose(text, yaml.SafeLoader), text.splitlines(), yaml)


def _make_node(node: Any, lines: list[str], yaml: Any) -> ConfigNode:
    comment = _line_comment(node, lines)
    if isinstance(node, yaml.MappingNode):
        mapping = {str(k.value): _make_node(v, lines, yaml) for k, v in node.value}
        for key, value in node.value:  # `optimizer: # of embedding and head`
            if key.end_mark.line != value.start_mark.line:
                mapping[str(key.value)].comment = _line_comment(key, lines)
        return ConfigNode(mapping, comment if node.flow_style else "")
    if isinstance(node, yaml.SequenceNode):
        items = [_make_node(item, lines, yaml) for item in node.value]
        return ConfigNode(items, comment if node.flow_style else "")
    loader = yaml.SafeLoader("")
    value = loader.construct_object(node)
    loader.dispose()
    return ConfigNode(value, comment)


def _line_comment(node: Any, lines: list[str]) -> str:
    """Return the comment behind a value; inside a flow collection it is the collection's."""
    mark = node.end_mark
    remainder = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    match = re.match(r":?\s+#\s?(.*)$", remainder)
    return match[1] if match else ""


def merge_configs(nodes: list[ConfigNode]) -> ConfigNode:
    """Merge configs in order, as the parser does: a later value replaces an earlier one."""
    merged = ConfigNode({})
    for node in nodes:
        merged = _merge(merged, _with_class_paths(node))
    return merged


def _with_class_paths(node: ConfigNode) -> ConfigNode:
    """Write `model: NAME` as `model: {class_path: NAME}`, and each callback in the same way."""
    for key in ("model", "data"):
        if key in node.value:
            node.value[key] = _as_class(node.value[key])
    trainer = node.value.get("trainer", ConfigNode({})).value
    for key in {"callbacks", "callbacks+"} & trainer.keys():
        callbacks = [_as_class(child) for child in _as_list(trainer[key])]
        trainer[key] = ConfigNode(callbacks, trainer[key].comment)
    return node


def _as_class(node: ConfigNode) -> ConfigNode:
    is_name = isinstance(node.value, str)
    return ConfigNode({"class_path": node}) if is_name else node


def _merge(old: ConfigNode, new: ConfigNode) -> ConfigNode:
    """Return a node in which values of a later config replace those of an earlier one.

    Mappings are merged key by key; any other value replaces the old one.

    Args:
        old: a value of the earlier config, with the comment of its line.
        new: the value of the same key in the later config.
    """
    if not isinstance(old.value, dict) or not isinstance(new.value, dict):
        return new
    merged = dict(old.value)
    # `_class_path`: the class that a mapping names, or an empty text
    changed_class = _class_path(new) and _class_path(old) and _class_path(new) != _class_path(old)
    if changed_class and "init_args" in merged:  # arguments that the new class has are kept
        accepted = {p.name for p in class_parameters(_class_path(new)) or ()}
        kept = {k: v for k, v in merged["init_args"].value.items() if k in accepted}
        merged["init_args"] = ConfigNode(kept)
    for key, value in new.value.items():
        # `callbacks+` adds to the list `callbacks`
        if key.endswith("+"):
            key = key[:-1]
            items = [*_as_list(merged.get(key)), *_as_list(value)]
            merged[key] = ConfigNode(items)
        else:
            # `_expand_plus` does the same inside of a value that is new
            merged[key] = _merge(merged[key], value) if key in merged else _expand_plus(value)
    return ConfigNode(merged, new.comment or old.comment)


def _expand_plus(node: ConfigNode) -> ConfigNode:
    """Write `callbacks+` as `callbacks` where no earlier config has any."""
    return _merge(ConfigNode({}), node) if isinstance(node.value, dict) else node


def _as_list(node: ConfigNode | None) -> list[ConfigNode]:
    if node is None:
        return []
    return node.value if isinstance(node.value, list) else [node]


def _class_path(node: ConfigNode) -> str:
    child = node.value.get("class_path") if isinstance(node.value, dict) else None
    return str(child.value) if child else ""


def class_parameters(name: str) -> list[Parameter] | None:
    """Return the arguments of a class by its bare name or dotted path; None if not known."""
    return _class_parameters(name, os.getcwd())


@cache
def _class_parameters(name: str, folder: str) -> list[Parameter] | None:
    entries = registry.find_named(name)
    if not entries and "." in name and (definition := source_index.find_definition(name)):
        entries = [registry.make_entry(definition, "", "")]
    return next((entry.parameters for entry in entries if entry.path), None)


def add_defaults(node: ConfigNode) -> ConfigNode:
    """Add the defaults of each class in a config, and those of dataclass arguments."""
    if isinstance(node.value, list):
        return ConfigNode([add_defaults(item) for item in node.value], node.comment)
    if not isinstance(node.value, dict):
        return node
    values = {key: add_defaults(child) for key, child in node.value.items()}
    if name := _class_path(node):
        parameters = class_parameters(name)
        arguments = values.get("init_args", ConfigNode({}))
        if parameters and isinstance(arguments.value, dict):
            values["init_args"] = _with_defaults(arguments, parameters)
    return ConfigNode(values, node.comment)


def _with_defaults(arguments: ConfigNode, parameters: list[Parameter]) -> ConfigNode:
    values, notes = dict(arguments.value), []
    for p in parameters:
        value_node = values.get(p.name)
        if value_node is not None:
            values[p.name] = _fill_dataclass(value_node, p)
        elif p.default is not None:
            try:
                values[p.name] = _default_node(source_index.default_value(p))
            except UnknownValueError:
                notes.append(f"{p.name}: {p.default}")
    return ConfigNode(values, arguments.comment, notes=notes)


def _fill_dataclass(node: ConfigNode, parameter: Parameter) -> ConfigNode:
    """Add the defaults of a dataclass to a mapping of some of its fields: kl: {beta: 0.1}."""
    definition = source_index.annotation_dataclass(parameter.annotation, parameter.source)
    if definition is None or not isinstance(node.value, dict | list):
        return node
    if isinstance(node.value, list):
        items = [_fill_dataclass(item, parameter) for item in node.value]
        return ConfigNode(items, node.comment)
    fields = node
    if _class_path(node):  # {class_path: LRSchedule, init_args: {kind: cosine}} is the same
        if _class_path(node).rpartition(".")[2] != definition.name:
            return node
        fields = ConfigNode(node.value.get("init_args", ConfigNode({})).value, node.comment)
    return _with_defaults(fields, source_index.parameters_of(definition) or [])


def _default_node(value: Any) -> ConfigNode:
    if isinstance(value, dict) and value:
        return ConfigNode({k: _default_node(v) for k, v in value.items()}, is_default=True)
    if isinstance(value, tuple):
        value = [*value]
    return ConfigNode(value, is_default=True)


def to_yaml(node: ConfigNode) -> str:
    """Write a config as YAML with its comments; defaults are marked by a comment."""
    return "".join(f"{line}\n" for line in _yaml_lines(node, 0))


def _yaml_lines(node: ConfigNode, indent: int) -> Iterator[str]:
    pad = " " * indent
    for key, child in node.value.items():
        yield from _yaml_entry(f"{pad}{key}:", child, indent)
    for note in node.notes:
        yield f"{pad}# {note}  # default"


def _yaml_entry(head: str, node: ConfigNode, indent: int) -> Iterator[str]:
    comment = node.comment or ("default" if node.is_default else "")
    suffix = f"  # {comment}" if comment else ""
    if isinstance(node.value, dict) and node.value:
        yield f"{head}{suffix}"
        yield from _yaml_lines(node, indent + 2)
    elif isinstance(node.value, list) and any(isinstance(i.value, dict) for i in node_items(node)):
        yield f"{head}{suffix}"
        for item in node.value:
            lines = [*_yaml_lines(item, 0)] if isinstance(item.value, dict) else [scalar(item)]
            yield f"{' ' * indent}- {lines[0]}"
            yield from (f"{' ' * indent}  {line}" for line in lines[1:])
    else:
        yield f"{head} {scalar(node)}{suffix}"


def node_items(node: ConfigNode) -> list[ConfigNode]:
    """Return the items of a list as nodes; a default has plain items."""
    return [i if isinstance(i, ConfigNode) else ConfigNode(i) for i in node.value]


def plain_value(node: Any) -> Any:
    """Return the value of a node without comments."""
    value = node.value if isinstance(node, ConfigNode) else node
    if isinstance(value, dict):
        return {key: plain_value(child) for key, child in value.items()}
    if isinstance(value, list):
        return [plain_value(item) for item in value]
    return value


def scalar(node: Any) -> str:
    """Write a value in one line of YAML, as it can be typed on the command line."""
    import yaml

    value = plain_value(node)
    if isinstance(value, float):
        return _float_text(value)
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").rstrip("\n")


def _float_text(value: float) -> str:
    """Write 1e-05 as 1.0e-05: YAML reads a number without a dot as text."""
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}[text]
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}{e}{exponent}"
