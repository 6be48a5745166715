"""Which classes a checkpoint may name: importing a module runs its code.

    lightning validate --ckpt_path=FILE --trust=mine       classes of mine.py are imported
    ravine.load_model("FILE", trust=["mine"])              the same in a script

What the user types, in flags, in a config or in the environment, is trusted as a program is. What
stands only in a checkpoint may name a class of Ravine, one of torch's layers and optimizers, one of
Lightning's callbacks, and a class that the words of the same command name. Any other is refused.
"""

import datetime
import enum
import inspect
import os
import re
from collections.abc import Callable as AnyCallable
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml

from ravine.errors import UsageError

from . import presets, typehints
from .values import Given

HOMES = ("ravine", "torch.nn", "torch.optim", "lightning.pytorch.callbacks")
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
FLAG = "--trust"
SPEC = ("class_path", "init_args", "dict_kwargs")  # the keys of a class's specification
FILES = ("ckpt_path", "config", "trainer.name", "trainer.default_root_dir")  # that name no class


def packages(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words without `--trust`, and the packages that it names: `--trust=a,b --trust c`."""
    rest, found = [], []
    each = iter(words)
    for word in each:
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        value = value if equals else next(each, "")
        names = [name.strip() for name in value.split(",")]
        if not all(all(part.isidentifier() for part in name.split(".")) for name in names):
            wrong = f"{FLAG} is {value!r}, which is no name of a package"
            raise UsageError(wrong, flag=f"{FLAG}=PACKAGE, or {FLAG}=ONE,ANOTHER")
        found += names
    return rest, found


def named_in(given: Iterable[Given]) -> set[str]:
    """The dotted names among what the user gave.

    Names of files are none: `--ckpt_path=model.ckpt` must not let that file import model.py.
    """
    found, todo = set(), [each.node for each in given if each.key not in FILES]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.ScalarNode):
            name = str(node.value)
            found.update([name] if DOTTED.fullmatch(name) and not os.path.lexists(name) else [])
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            todo += [value for _, value in node.value]
    return found


class Trust:
    """The classes that a checkpoint may name.

    Args:
        trusted: packages, modules or classes that the user trusts, by dotted path.
        named: dotted paths that the user named in another place.
    """

    def __init__(self, trusted: Iterable[str] = (), named: Iterable[str] = ()) -> None:
        """Keep both."""
        self.trusted, self.named = tuple(trusted), frozenset(named)

    def admits(self, path: str) -> bool:
        """Whether the class may be imported."""
        if path in self.named or any(f"{path}.".startswith(f"{t}.") for t in self.trusted):
            return True
        if "." not in path:  # the parser finds it among the classes that are imported already
            return path.isidentifier()
        if not DOTTED.fullmatch(path) or not path.startswith(tuple(f"{h}." for h in HOMES)):
            return False
        module, _, name = path.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            return False  # `ravine.cli.main.sys.exit`, where a parser would follow the dots
        home = f"{getattr(found, '__module__', '')}."
        return isinstance(found, type) and home.startswith(tuple(f"{h}." for h in HOMES))

    def check(self, config: dict[str, Any], source: str, with_callbacks: bool = True) -> None:
        """Refuse a saved configuration that names another class.

        Args:
            config: model, data and callbacks, as `SavedConfig` writes them.
            source: the checkpoint's path.
            with_callbacks: whether the callbacks are needed; those that are not admitted are not
                imported either way.
        """
        callbacks = (config.get("trainer.callbacks") or []) if with_callbacks else []
        for key, value in (("model", config.get("model")), ("data", config.get("data"))):
            for path in names(value, self, top=True):
                self.demand(path, f"{key} in {source}")
        for each in callbacks if isinstance(callbacks, list) else [callbacks]:
            path = each.get("class_path") if isinstance(each, dict) else each
            if path is not None:
                self.demand(path, f"trainer.callbacks in {source}")

    def check_callback(self, spec: dict[str, Any], source: str) -> None:
        """Refuse a callback whose arguments name another class, before it is made."""
        for path in names(spec, self, top=True):
            self.demand(path, f"trainer.callbacks in {source}")

    def demand(self, path: Any, place: str) -> None:
        """Refuse one class."""
        if isinstance(path, str) and self.admits(path):
            return
        if not DOTTED.fullmatch(str(path)):
            raise UsageError(
                f"{place} has {str(path)[:80]!r} where a class may be named: it is not read, since"
                " that could import anything",
                ["a class of Ravine, torch.nn, torch.optim or lightning.pytorch.callbacks"],
                flag="another checkpoint, or in a script ckpt_path=FILE with the model built there",
            )
        shown = str(path)[:80]
        package = shown.partition(".")[0]
        raise UsageError(
            f"{place} names {shown!r}, which is no class of Ravine, and no word of this command "
            "names it: it is not imported, since that would run its code",
            [f"{FLAG}={package}", f"in Python trust=[{package!r}]"],
            flag=f"the same with {FLAG}={package}, if you trust the author of the checkpoint",
        )


def names(value: Any, trust: Trust, top: bool = False) -> Iterator[Any]:
    """What a saved value makes the parser import: class paths, and names of functions.

    Args:
        value: a specification of a class, or any value.
        trust: a class that it admits is imported, to see which arguments take a name.
        top: whether a text is a class path itself.
    """
    if isinstance(value, str):
        if top:
            yield value
    elif isinstance(value, list):
        for each in value:
            yield from names(each, trust, top)
    elif isinstance(value, dict) and "class_path" in value:
        path = value["class_path"]
        yield path
        yield from (f"{key}." for key in value if key not in SPEC)  # such as init_args.optimizer
        hints = _hints(path) if isinstance(path, str) and trust.admits(path) else {}
        for part in SPEC[1:]:
            arguments = value.get(part) or {}
            for key, each in arguments.items() if isinstance(arguments, dict) else ():
                yield from _in_texts(each, UNKNOWN if hints is None else hints.get(key), trust)
                yield from names(each, trust)
    elif isinstance(value, dict):
        for each in value.values():
            yield from names(each, trust, top)


def _in_texts(value: Any, hint: Any, trust: Trust, level: int = 0) -> Iterator[str]:
    """What the texts in a value of this type make the parser import.

    The parser reads a text as YAML, and for a class the file that it names: either may hold a
    `class_path`. In a text for a class or a function a dot may part a module from a name.
    """
    hint = UNKNOWN if hint is None else hint
    if level > presets.MAX_LEVELS or (not (by_name := _takes_name(hint)) and not _takes_any(hint)):
        return
    if isinstance(value, str):
        text = _of_file(value) if by_name else value
        read = _read(text) if text is not None else value
        if text is None:
            yield value
        elif isinstance(read, dict | list):
            yield from names(read, trust)
            yield from _in_texts(read, hint, trust, level + 1)
        elif by_name and "." in read and _could_be_path(read):
            yield read
    elif isinstance(value, list):
        inside = typehints.elements(hint) if typehints.takes_list(hint) else hint
        for each in value:
            yield from _in_texts(each, inside, trust, level + 1)
    elif isinstance(value, dict) and "class_path" not in value:
        records = [kind for kind, _ in typehints.classes(hint) if is_dataclass(kind)]
        fields = _all_hints(records[0]) if records else {}
        of_values = [get_args(m)[-1] for m in typehints.members(hint) if len(get_args(m)) == 2]
        for key, each in value.items():
            inside = (fields or {}).get(key) or (of_values[0] if of_values else hint)
            yield from _in_texts(each, inside, trust, level + 1)


def _read(text: str) -> Any:
    """A text as YAML if it holds a list or a mapping, else a text."""
    try:
        presets.check_size(text, "")
        read = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # also one that is too large
        return text
    return read if isinstance(read, dict | list | str) else text


def _of_file(text: str) -> str | None:
    """The content of a file that the text names, else the text; None for one that is too large."""
    try:
        path = os.path.expanduser(text)
        if not os.path.lexists(path):
            return text
        if not os.path.isfile(path) or os.path.getsize(path) > presets.MAX_BYTES:
            return None if not os.path.isdir(path) else text
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):  # a name that no file can have
        return text


def _could_be_path(text: str) -> bool:
    """Whether importing a text with a dot in it could find a module: `mine.Net`, `mine..Net`."""
    first = text.partition(".")[0].strip()
    return bool(first) and not re.search(r"[\s/]", first)


def _hints(path: str) -> dict[str, Any] | None:
    """Types of the arguments of a class and of those it inherits; None if they are not known."""
    module, _, name = path.rpartition(".")
    try:
        return _all_hints(getattr(import_module(module), name)) if module else None
    except Exception:  # a module that has gone
        return None


def _all_hints(kind: Any) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    try:
        for each in reversed(kind.__mro__ if isinstance(kind, type) else ()):
            if "__init__" in vars(each) and inspect.isfunction(each.__init__):
                named = inspect.signature(each.__init__).parameters
                found |= dict.fromkeys(named, Any) | _resolved(each.__init__)
    except Exception:  # a hint that cannot be read
        return None
    return {key: Any if hint is None else hint for key, hint in found.items()}


def _resolved(function: Any) -> dict[str, Any]:
    """The hints of a function; UNKNOWN for one that cannot be read, such as of TYPE_CHECKING."""
    try:
        return get_type_hints(function)
    except Exception:
        found = {}
        for key, hint in function.__annotations__.items():
            try:
                alone = SimpleNamespace(__annotations__={key: hint})
                found[key] = get_type_hints(alone, function.__globals__)[key]
            except Exception:
                found[key] = UNKNOWN
        return found


PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.device, torch.dtype)
PLAIN_BASES = (enum.Enum, PurePath, datetime.date, datetime.time, datetime.timedelta)
BARE = (list, tuple, set, frozenset, dict, *map(get_origin, (Iterable[int], Mapping[int, int])))
UNKNOWN = object  # an argument whose type is not known: any class


def _takes_name(hint: Any) -> bool:
    """Whether a text for this type may be the dotted path of a class or a function."""
    return any(
        get_origin(member) in (AnyCallable, type)
        or any(_takes_name(part) for part in get_args(member) if part is not ...)
        if get_args(member)
        else not _is_plain(member) and member not in BARE and member is not Any
        for member in typehints.members(hint)
        if get_origin(member) is not Literal
    )


def _takes_any(hint: Any) -> bool:
    """Whether a value for this type may hold a class, given as a mapping with a `class_path`."""
    return any(
        any(_takes_any(part) for part in get_args(member) if part is not ...)
        if get_args(member)
        else not _is_plain(member)
        for member in typehints.members(hint)
        if get_origin(member) is not Literal
    )


def _is_plain(kind: Any) -> bool:
    return kind in PLAIN or (isinstance(kind, type) and issubclass(kind, PLAIN_BASES))
