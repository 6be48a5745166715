"""Which classes a checkpoint may name: importing a module runs its code.

    lightning validate --ckpt_path=FILE --trust=mine       classes of mine.py are imported
    ravine.cli.trained.load("FILE", trust=["mine"])        the same in a script

What the user types, in flags, in a config or in the environment, is trusted as a program is. What
stands only in a checkpoint may name a class of Ravine, one of torch's layers and optimizers, one of
Lightning's callbacks, and a class that the words of the same command name. Any other is refused.
"""

import inspect
import re
from collections.abc import Callable as AnyCallable
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from . import typehints
from .errors import Mistake
from .given import Given

HOMES = ("ravine", "torch.nn", "torch.optim", "lightning.pytorch.callbacks")
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
FLAG = "--trust"


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
            raise Mistake(wrong, [], f"{FLAG}=PACKAGE, or {FLAG}=ONE,ANOTHER")
        found += names
    return rest, found


def named_in(given: Iterable[Given]) -> set[str]:
    """The dotted names among what the user gave."""
    found, todo = set(), [each.node for each in given]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.ScalarNode):
            found.update([node.value] if DOTTED.fullmatch(str(node.value)) else [])
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
        shown = str(path)[:80]
        package = shown.partition(".")[0] if DOTTED.fullmatch(str(path)) else "PACKAGE"
        raise Mistake(
            f"{place} names {shown!r}, which is no class of Ravine, and no word of this command "
            "names it: it is not imported, since that would run its code",
            [f"{FLAG}={package}", f"in Python trust=[{package!r}]"],
            f"the same with {FLAG}={package}, if you trust whoever wrote the checkpoint",
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
        hints = _hints(path) if isinstance(path, str) and trust.admits(path) else {}
        for part in ("init_args", "dict_kwargs"):
            arguments = value.get(part) or {}
            for key, each in arguments.items() if isinstance(arguments, dict) else ():
                imports = hints is None or key not in hints or _takes_name(hints[key])
                yield from _dotted(each) if imports else ()
                yield from names(each, trust)
    elif isinstance(value, dict):
        for each in value.values():
            yield from names(each, trust, top)


def _dotted(value: Any) -> Iterator[str]:
    if isinstance(value, str) and DOTTED.fullmatch(value):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _dotted(each)
    elif isinstance(value, dict) and "class_path" not in value:
        for each in value.values():
            yield from _dotted(each)


def _hints(path: str) -> dict[str, Any] | None:
    """Types of the arguments of a class and of those it inherits; None if they are not known."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name) if module else None
        if kind is None:
            return None
        found: dict[str, Any] = {}
        for each in reversed(kind.__mro__ if isinstance(kind, type) else ()):
            if "__init__" in vars(each) and inspect.isfunction(each.__init__):
                found |= get_type_hints(each.__init__)
        return found
    except Exception:  # a hint that cannot be read, or a module that has gone
        return None


def _takes_name(hint: Any) -> bool:
    """Whether a text for this type may be the dotted path of a class or a function."""
    for member in typehints.members(hint):
        if member is Any or get_origin(member) in (AnyCallable, type) or member is AnyCallable:
            return True
        if typehints.classes(member) or any(_takes_name(p) for p in get_args(member)):
            return True
    return False
