"""Import safety: which classes a checkpoint may name, since importing a module runs its code.

    lightning validate --ckpt_path=FILE --trust=mine       classes of mine.py are imported
    ravine.load_model("FILE", trust=["mine"])              the same in a script

Names that the user types in flags, configs or the environment are trusted. A checkpoint alone may
name classes of Ravine, torch.nn, torch.optim and Lightning's callbacks. Any other class is rejected
unless the same command names it.
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
from .values import ConfigValue

TRUSTED_PACKAGES = ("ravine", "torch.nn", "torch.optim", "lightning.pytorch.callbacks")
DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
TRUST_FLAG = "--trust"
CLASS_SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")  # the keys of a class specification
FILE_KEYS = (
    "ckpt_path",
    "config",
    "trainer.name",
    "trainer.default_root_dir",
)  # values that name no class


def split_trust_flags(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without `--trust`, and its packages: `--trust=a,b --trust c`.

    Raises:
        UsageError: a value is not the name of a package.
    """
    other_words, package_names = [], []
    remaining = iter(argv)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag != TRUST_FLAG:
            other_words.append(word)
            continue
        value = value if equals else next(remaining, "")
        # an empty text is no identifier: a missing value is an error too
        names = [name.strip() for name in value.split(",")]
        if not all(all(segment.isidentifier() for segment in name.split(".")) for name in names):
            problem = f"{TRUST_FLAG}={value} is not the name of a package"
            raise UsageError(problem, flag=f"{TRUST_FLAG}=PACKAGE, or {TRUST_FLAG}=ONE,ANOTHER")
        package_names += names
    return other_words, package_names


def find_dotted_names(config_values: Iterable[ConfigValue]) -> set[str]:
    """Return the dotted names among the user's values.

    File names are excluded: `--ckpt_path=model.ckpt` must not allow an import of model.py.
    """
    dotted_names: set[str] = set()
    # YAML nodes that are not yet searched.
    # FILE_KEYS: keys whose values name no class, such as ckpt_path
    pending = [value.node for value in config_values if value.key not in FILE_KEYS]
    while pending:
        node = pending.pop()
        if isinstance(node, yaml.ScalarNode):
            name = str(node.value)
            # the form a.b.C; a text that is also the name of a file is not admitted
            if DOTTED_PATH.fullmatch(name) and not os.path.lexists(name):
                dotted_names.add(name)
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            pending += [value for _, value in node.value]
    return dotted_names


class TrustPolicy:
    """Decides which classes a checkpoint may name.

    Args:
        trusted_paths: packages, modules or classes that the user trusts, by dotted path.
        named_paths: dotted paths that the user named elsewhere in the command.
    """

    def __init__(self, trusted_paths: Iterable[str] = (), named_paths: Iterable[str] = ()) -> None:
        """Store the paths."""
        self.trusted_paths, self.named_paths = tuple(trusted_paths), frozenset(named_paths)

    def is_admitted(self, path: str) -> bool:
        """Return whether the class at a dotted path may be imported.

        Admitted are paths that the user named, classes below a trusted path, and classes that are
        defined in TRUSTED_PACKAGES.
        """
        # The dot at the end keeps a trusted "mine" from admitting "mine_too.Net".
        is_trusted = any(f"{path}.".startswith(f"{trusted}.") for trusted in self.trusted_paths)
        if path in self.named_paths or is_trusted:
            return True
        if "." not in path:  # the parser finds it among the imported classes
            return path.isidentifier()
        # TRUSTED_PACKAGES: ravine, torch.nn, torch.optim and lightning.pytorch.callbacks
        package_prefixes = tuple(f"{package}." for package in TRUSTED_PACKAGES)
        if not DOTTED_PATH.fullmatch(path) or not path.startswith(package_prefixes):
            return False
        module, _, name = path.rpartition(".")
        try:
            imported = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            return False  # `ravine.cli.main.sys.exit`, whose dots a parser would follow
        # A module may also hold classes that it imports from elsewhere.
        defining_module = f"{getattr(imported, '__module__', '')}."
        return isinstance(imported, type) and defining_module.startswith(package_prefixes)

    def check_config(
        self, config: dict[str, Any], source: str, with_callbacks: bool = True
    ) -> None:
        """Raise an error if a saved configuration names a class that is not admitted.

        Args:
            config: model, data and callbacks, as `ConfigSaver` writes them.
            source: the path of the checkpoint.
            with_callbacks: whether the callbacks are needed; callbacks that are not admitted are
                never imported.
        """
        # Of callbacks only the class is checked here; `check_callback` checks the arguments of
        # those that are used.
        callbacks = (config.get("trainer.callbacks") or []) if with_callbacks else []
        for key, value in (("model", config.get("model")), ("data", config.get("data"))):
            # every class path and function name in the value, however deep
            for path in iter_imported_names(value, self, is_class_path=True):
                # raises the error
                self.require_admitted(path, f"{key} in {source}")
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            path = callback.get("class_path") if isinstance(callback, dict) else callback
            if path is not None:
                self.require_admitted(path, f"trainer.callbacks in {source}")

    def check_callback(self, spec: dict[str, Any], source: str) -> None:
        """Raise an error if the arguments of a callback name a class that is not admitted."""
        for path in iter_imported_names(spec, self, is_class_path=True):
            self.require_admitted(path, f"trainer.callbacks in {source}")

    def require_admitted(self, path: Any, location: str) -> None:
        """Raise an error if the class is not admitted.

        Args:
            path: the dotted path of the class; in a malformed checkpoint any value.
            location: the key and the checkpoint, for errors.
        """
        if isinstance(path, str) and self.is_admitted(path):
            return
        if not DOTTED_PATH.fullmatch(str(path)):
            raise UsageError(
                f"{location} has {str(path)[:80]!r} instead of the name of a class; it is not "
                "imported, because that could run any code",
                "a class of Ravine, torch.nn, torch.optim or lightning.pytorch.callbacks",
                hint="use another checkpoint, or build the model and pass ckpt_path to trainer.fit",
                flag="--ckpt_path=ANOTHER",
            )
        # cut off, because a checkpoint may hold a text of any length
        path_text = str(path)[:80]
        package = path_text.partition(".")[0]
        raise UsageError(
            f"{location} names {path_text!r}, which is not a class of Ravine; it is not imported, "
            "because that would run its code",
            "classes of Ravine, torch.nn, torch.optim and lightning.pytorch.callbacks, and of "
            "packages that you trust",
            hint=f"pass trust=[{package!r}] if you trust the author of the checkpoint",
            flag=f"{TRUST_FLAG}={package}, if you trust the author of the checkpoint",
        )


class _AdmitAll(TrustPolicy):
    """Admits every class, for the configuration of a run in this process."""

    def is_admitted(self, path: str) -> bool:
        return True


def packages_to_trust(config: dict[str, Any]) -> list[str]:
    """Return the packages that `--trust` must name when a run of this process is resumed.

    Args:
        config: model, data and callbacks of the run, as `ConfigSaver` writes them.
    """
    # The classes are imported already. Their type hints tell which texts are names.
    return _untrusted_packages(config, _AdmitAll())


def packages_of_checkpoint(config: dict[str, Any]) -> list[str]:
    """Return the packages that `--trust` must name for a checkpoint; none of them is imported.

    Args:
        config: the configuration in the checkpoint.
    """
    return _untrusted_packages(config, TrustPolicy())


def _untrusted_packages(config: dict[str, Any], imports: TrustPolicy) -> list[str]:
    """Return the packages of names that are not admitted; `imports` admits what is imported."""
    callbacks = config.get("trainer.callbacks") or []
    values = [config.get("model"), config.get("data")]
    values += callbacks if isinstance(callbacks, list) else [callbacks]
    names = {
        str(name)
        for value in values
        for name in iter_imported_names(value, imports, is_class_path=True)
    }
    trust = TrustPolicy()
    packages = {name.partition(".")[0] for name in names if not trust.is_admitted(name)}
    return sorted(package for package in packages if package.isidentifier())


def iter_imported_names(
    value: Any, trust: TrustPolicy, is_class_path: bool = False
) -> Iterator[Any]:
    """Yield the names that the parser imports for a saved value: class paths and function names.

    A malformed checkpoint may have any value instead of a name; it is yielded too.

    Args:
        value: a class specification (a mapping with a `class_path`), or any value.
        trust: an admitted class is imported, to see which of its arguments accept a name.
        is_class_path: whether a text is itself a class path.
    """
    if isinstance(value, str):
        if is_class_path:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from iter_imported_names(item, trust, is_class_path)
    elif isinstance(value, dict) and "class_path" in value:
        path = value["class_path"]
        yield path
        # The parser also reads dotted keys such as init_args.optimizer. They are no valid names,
        # so they are rejected.
        yield from (f"{key}." for key in value if key not in CLASS_SPEC_KEYS)
        is_importable = isinstance(path, str) and trust.is_admitted(path)
        # the type hints of the class's arguments, by name
        hints = _argument_hints(path) if is_importable else {}  # None: not readable
        for section in ("init_args", "dict_kwargs"):
            arguments = value.get(section) or {}
            for key, item in arguments.items() if isinstance(arguments, dict) else ():
                # UNKNOWN_HINT accepts names and classes, so that any text is searched
                hint = UNKNOWN_HINT if hints is None else hints.get(key)
                yield from _names_in_texts(item, hint, trust)
                yield from iter_imported_names(item, trust)
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_imported_names(item, trust, is_class_path)


def _names_in_texts(value: Any, hint: Any, trust: TrustPolicy, level: int = 0) -> Iterator[str]:
    """Yield the names that the parser imports for the texts in a value of this type.

    The parser reads a text as YAML. For a class it also reads the file that the text names. Both
    may contain a `class_path`. A text for a class or function may be a dotted import path.

    Args:
        value: the saved value of an argument.
        hint: the type hint of the argument; None if it has none.
        trust: passed to `iter_imported_names`.
        level: the depth of this value below the argument.
    """
    hint = UNKNOWN_HINT if hint is None else hint
    # whether a text may name a class or function; `_accepts_class_spec`: whether a mapping may
    accepts_name = _accepts_name(hint)
    if not accepts_name and not _accepts_class_spec(hint):
        return
    if level > presets.MAX_CONFIG_LEVELS:
        return
    if isinstance(value, str):
        text = _load_named_file(value) if accepts_name else value  # `value` itself if no file
        # the mapping or list that the text is as YAML, else the text
        parsed = _parse_container(text) if text is not None else value
        if text is None:  # a file that is too large to search: no valid name, so it is rejected
            yield value
        elif isinstance(parsed, dict | list):
            yield from iter_imported_names(parsed, trust)
            yield from _names_in_texts(parsed, hint, trust, level + 1)
        elif accepts_name and "." in parsed and _may_be_import_path(parsed):
            yield parsed
    elif isinstance(value, list):
        inner_hint = typehints.element_type(hint) if typehints.accepts_list(hint) else hint
        for item in value:
            yield from _names_in_texts(item, inner_hint, trust, level + 1)
    elif isinstance(value, dict) and "class_path" not in value:
        classes = [candidate for candidate, _ in typehints.configurable_classes(hint)]
        dataclasses = [candidate for candidate in classes if is_dataclass(candidate)]
        field_hints = _inherited_hints(dataclasses[0]) if dataclasses else {}  # also of its bases
        # the second argument of a mapping type: dict[str, Net]
        mapping_hints = [
            get_args(m)[-1] for m in typehints.union_members(hint) if len(get_args(m)) == 2
        ]
        item_hint = mapping_hints[0] if mapping_hints else hint
        for key, item in value.items():
            inner_hint = (field_hints or {}).get(key) or item_hint
            yield from _names_in_texts(item, inner_hint, trust, level + 1)


def _parse_container(text: str) -> Any:
    """Parse a text as YAML if it holds a list or a mapping; otherwise return a text."""
    try:
        presets.check_yaml_size(text, "")
        parsed = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # also if it is too large
        return text
    return parsed if isinstance(parsed, dict | list | str) else text


def _load_named_file(text: str) -> str | None:
    """Return the content of the file that a text names, else the text; None for a large file."""
    try:
        path = os.path.expanduser(text)
        if not os.path.lexists(path):
            return text
        if not os.path.isfile(path) or os.path.getsize(path) > presets.MAX_CONFIG_BYTES:
            return None if not os.path.isdir(path) else text
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):  # not a valid file name
        return text


def _may_be_import_path(text: str) -> bool:
    """Return whether a text with a dot can be an import path: `mine.Net`, `mine..Net`."""
    first = text.partition(".")[0].strip()
    return bool(first) and not re.search(r"[\s/]", first)


def _argument_hints(path: str) -> dict[str, Any] | None:
    """Return the argument types of a class and its bases; None if they are not known."""
    module, _, name = path.rpartition(".")
    try:
        return _inherited_hints(getattr(import_module(module), name)) if module else None
    except Exception:  # a module that was removed
        return None


def _inherited_hints(owner_class: Any) -> dict[str, Any] | None:
    hints: dict[str, Any] = {}
    try:
        for base in reversed(owner_class.__mro__ if isinstance(owner_class, type) else ()):
            if "__init__" in vars(base) and inspect.isfunction(base.__init__):
                parameters = inspect.signature(base.__init__).parameters
                hints |= dict.fromkeys(parameters, Any) | _resolve_hints(base.__init__)
    except Exception:  # an unreadable hint
        return None
    return {key: Any if hint is None else hint for key, hint in hints.items()}


def _resolve_hints(function: Any) -> dict[str, Any]:
    """Return a function's type hints; UNKNOWN_HINT for unreadable ones, e.g. of TYPE_CHECKING."""
    try:
        return get_type_hints(function)
    except Exception:
        hints = {}
        for key, hint in function.__annotations__.items():
            try:
                single_hint = SimpleNamespace(__annotations__={key: hint})
                hints[key] = get_type_hints(single_hint, function.__globals__)[key]
            except Exception:
                hints[key] = UNKNOWN_HINT
        return hints


PLAIN_TYPES = (str, bytes, bool, int, float, complex, type(None), torch.device, torch.dtype)
PLAIN_BASES = (enum.Enum, PurePath, datetime.date, datetime.time, datetime.timedelta)
BARE_CONTAINERS = (
    list,
    tuple,
    set,
    frozenset,
    dict,
    *map(get_origin, (Iterable[int], Mapping[int, int])),
)
UNKNOWN_HINT = object  # type of an argument without a known type: any class


def _accepts_name(hint: Any) -> bool:
    """Return whether a text for this type may be the dotted path of a class or function."""
    return any(
        get_origin(member) in (AnyCallable, type)
        or any(_accepts_name(argument) for argument in get_args(member) if argument is not ...)
        if get_args(member)
        else not _is_plain_type(member) and member not in BARE_CONTAINERS and member is not Any
        for member in typehints.union_members(hint)
        if get_origin(member) is not Literal
    )


def _accepts_class_spec(hint: Any) -> bool:
    """Return whether a value for this type may hold a class as a mapping with a `class_path`."""
    return any(
        any(_accepts_class_spec(argument) for argument in get_args(member) if argument is not ...)
        if get_args(member)
        else not _is_plain_type(member)
        for member in typehints.union_members(hint)
        if get_origin(member) is not Literal
    )


def _is_plain_type(hint: Any) -> bool:
    return hint in PLAIN_TYPES or (isinstance(hint, type) and issubclass(hint, PLAIN_BASES))
