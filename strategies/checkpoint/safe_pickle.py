"""Read a pickle stream as plain values and records: nothing is imported, called or built.

A pickle names classes and functions and calls them. Here each name becomes a `Name`, and each
call a `Record` of the name and its arguments; names outside a fixed set are refused. The caller
checks the records and makes the objects itself.

The stream is bounded as well: in operations, in levels of nesting, and in the size of the tree when
shared references are counted in full (a list that holds one list nine times, and so on).
"""

import io
import pickle
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

MAX_OPERATIONS = 4_000_000  # of one stream; a tensor of a checkpoint takes about 30
MAX_LEVELS = 200  # of nested values
MAX_UNFOLDED = 16_000_000  # values of the tree, each counted as often as it is referred to
SCALARS = (bool, int, float, complex, str, bytes, type(None))


class UnsafePickle(pickle.UnpicklingError):
    """A stream that is damaged, names a class that is not allowed, or is too large."""


@dataclass(frozen=True)
class Name:
    """A class or a function that a stream names."""

    module: str
    name: str

    def __str__(self) -> str:
        """As a dotted path."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """A call in a stream: the function, its arguments, and the state that is set."""

    name: Name
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)  # added to it afterwards


def load(
    content: bytes,
    allowed: Callable[[Name], bool],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read a stream.

    Args:
        content: the stream.
        allowed: whether a name may occur.
        persistent: called with each persistent id; without it there may be none.

    Raises:
        UnsafePickle: if the stream is damaged, names another class, or is too large.
    """
    try:
        reader = _Reader(content, allowed, persistent)
        value = reader.load()
        check_size([value, reader.states])
    except UnsafePickle:
        raise
    except (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError) as error:
        raise UnsafePickle(f"the stream is damaged ({type(error).__name__})") from None
    except (RecursionError, TypeError, ValueError, pickle.UnpicklingError, struct.error) as error:
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise UnsafePickle(f"the stream is damaged ({text})") from None
    return value


def check_size(value: Any, most: int = MAX_UNFOLDED, levels: int = MAX_LEVELS) -> None:
    """Refuse a value that contains itself, is nested deeper than `levels`, or unfolds to too much.

    Takes time in proportion to the objects that there are, not to what they unfold to.
    """
    sizes: dict[int, tuple[int, int]] = {}  # by id: values in the tree, levels
    open_: set[int] = set()
    todo: list[tuple[Any, bool]] = [(value, False)]
    while todo:
        each, done = todo.pop()
        if id(each) in sizes:
            continue
        inside = _inside(each)
        if done:
            open_.discard(id(each))
            parts = [sizes[id(part)] for part in inside if not _is_scalar(part)]
            count = 1 + len(inside) - len(parts) + sum(part[0] for part in parts)
            depth = 1 + max((part[1] for part in parts), default=0)
            if count > most:
                raise UnsafePickle(f"it unfolds to more than {most:,} values")
            if depth > levels:
                raise UnsafePickle(f"it is nested deeper than {levels} levels")
            sizes[id(each)] = count, depth
            continue
        if id(each) in open_:
            raise UnsafePickle("it contains itself")
        open_.add(id(each))
        todo.append((each, True))
        for part in inside:
            if not _is_scalar(part) and id(part) not in sizes:
                if id(part) in open_:
                    raise UnsafePickle("it contains itself")
                todo.append((part, False))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (*SCALARS, Name, bytearray))


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Record):
        return [value.arguments, value.state, value.items]
    return []


def _key(value: Any) -> Any:
    """Check a key of a dict or a member of a set: hashing nested tuples can take unbounded time."""
    flat = isinstance(value, tuple) and all(isinstance(part, SCALARS) for part in value)
    if flat or isinstance(value, (*SCALARS, Name)):
        return value
    if isinstance(value, Record):  # hashed by its identity
        return value
    raise UnsafePickle(f"a key is a {type(value).__name__}")


class _Reader(pickle._Unpickler):  # the one in C allocates the sizes that a stream states
    stack: list[Any]  # these are set by the base class when it begins to load
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes, allowed: Callable[[Name], bool], persistent: Any) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8", errors="surrogatepass")
        self.allowed, self.persistent = allowed, persistent
        self.left = MAX_OPERATIONS
        self.states: list[Any] = []  # of dicts; checked, but not part of the value

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = Name(module, name)
        if "." in name or not self.allowed(found):
            raise UnsafePickle(f"it asks for {found}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise UnsafePickle("it refers to another file")
        return self.persistent(pid)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, OrderedDict) and isinstance(state, dict):
            if state.keys() - {"_metadata"}:  # another attribute could hide a method
                raise UnsafePickle(f"it sets {next(iter(state))} of a dict")
            self.states.append(state)
            return
        if not isinstance(target, Record):
            raise UnsafePickle(f"it sets the state of a {type(target).__name__}")
        target.state = state

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items += items
            return
        if not isinstance(target, dict):
            raise UnsafePickle(f"it sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise UnsafePickle(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise UnsafePickle(f"it adds to a {type(target).__name__}")
        target.update(_key(item) for item in items)

    def load_frozenset(self) -> None:
        self.append(frozenset(_key(item) for item in self.pop_mark()))

    def refused(self) -> None:
        raise UnsafePickle("it uses an operation that no checkpoint has")


def _called(name: Any, arguments: Any) -> Any:
    if not isinstance(name, Name) or not isinstance(arguments, tuple):
        raise UnsafePickle("it calls an object that is no function")
    match (name.module, name.name), arguments:
        case ("collections", "OrderedDict"), ():
            return OrderedDict()
        case ("collections", "Counter"), (dict() as counts,):
            return Counter(counts)
        case ("builtins" | "__builtin__", "set"), (list() | tuple() as members,):
            return {_key(member) for member in members}
        case ("builtins" | "__builtin__", "bytearray"), _ if isinstance(
            next(iter(arguments), b""), int
        ):
            raise UnsafePickle("it asks for memory by a number of bytes")
    return Record(name, arguments)


def _counted(read: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(self: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise UnsafePickle(f"it has more than {MAX_OPERATIONS:,} operations")
        read(self)

    return counted


_OWN: Iterable[tuple[bytes, Callable[[Any], None]]] = (
    (pickle.REDUCE, _Reader.load_reduce),
    (pickle.BUILD, _Reader.load_build),
    (pickle.NEWOBJ, _Reader.load_newobj),
    (pickle.SETITEM, _Reader.load_setitem),
    (pickle.SETITEMS, _Reader.load_setitems),
    (pickle.APPEND, _Reader.load_append),
    (pickle.APPENDS, _Reader.load_appends),
    (pickle.DICT, _Reader.load_dict),
    (pickle.ADDITEMS, _Reader.load_additems),
    (pickle.FROZENSET, _Reader.load_frozenset),
    *((op, _Reader.refused) for op in (pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ, pickle.EXT1,
      pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)),
)  # fmt: skip
_Reader.dispatch |= {op[0]: read for op, read in _OWN}
_Reader.dispatch = {op: _counted(read) for op, read in _Reader.dispatch.items()}
