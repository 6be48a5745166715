"""Safe unpickling: read a pickle stream as plain values and records, without calling anything.

A pickle names classes and functions and calls them. Here each name becomes a `GlobalName`, and each
call a `CallRecord` of the name and its arguments. Names outside a given set are rejected. The
caller checks the records and builds the objects itself.

The stream is limited in operations, levels of nesting, and size of the tree. The size counts a
shared object as often as it is referenced, because nested shared lists grow exponentially.
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
MAX_UNFOLDED = 16_000_000  # values of the tree, each counted as often as it is referenced
SCALARS = (bool, int, float, complex, str, bytes, type(None))


class UnsafePickle(pickle.UnpicklingError):
    """A stream that is damaged, names a class that is not allowed, or is too large."""


@dataclass(frozen=True)
class GlobalName:
    """A class or a function that a stream names."""

    module: str
    name: str

    def __str__(self) -> str:
        """Return the name as a dotted path."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class CallRecord:
    """A call in a stream: the function, its arguments, and the state set on the result."""

    name: GlobalName
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)  # items that the stream adds to the result


def load_plain(
    content: bytes,
    is_allowed: Callable[[GlobalName], bool],
    resolve_persistent_id: Callable[[Any], Any] | None = None,
) -> Any:
    """Read a pickle stream as plain values, GlobalNames and CallRecords.

    Args:
        content: the stream.
        is_allowed: whether the name of a class or function may occur.
        resolve_persistent_id: called with each persistent id; None: they are not allowed.

    Raises:
        UnsafePickle: the stream is damaged, names another class, or is too large.
    """
    try:
        # it imports no name and calls no function; records stand for them
        unpickler = _PlainUnpickler(content, is_allowed, resolve_persistent_id)
        value = unpickler.load()
        # states: dicts of the stream that are not part of the value
        check_tree_size([value, unpickler.states])
    except UnsafePickle:  # a subclass of UnpicklingError, which is caught below
        raise
    except (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError) as error:
        raise UnsafePickle(f"the stream is damaged ({type(error).__name__})") from None
    except (RecursionError, TypeError, ValueError, pickle.UnpicklingError, struct.error) as error:
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise UnsafePickle(f"the stream is damaged ({text})") from None
    return value


def check_tree_size(
    value: Any, max_values: int = MAX_UNFOLDED, max_levels: int = MAX_LEVELS
) -> None:
    """Raise UnsafePickle if a value contains itself, is nested too deep or is too large.

    The size counts shared objects at each reference. The time is linear in the number of distinct
    objects. It is a depth-first search without recursion: a node is visited before its children,
    and again after them.
    """
    sizes: dict[int, tuple[int, int]] = {}  # by id: values in the tree, levels
    ancestors: set[int] = set()  # ids of the nodes above the current one
    todo: list[tuple[Any, bool]] = [(value, False)]  # a node, and whether its children are done
    while todo:
        node, has_visited_children = todo.pop()
        if id(node) in sizes:
            continue
        # _children: items of a container, or arguments and state of a record
        children = _children(node)
        if has_visited_children:
            ancestors.discard(id(node))
            child_sizes = [sizes[id(child)] for child in children if not _is_scalar(child)]
            num_scalars = len(children) - len(child_sizes)
            count = 1 + num_scalars + sum(child_count for child_count, _ in child_sizes)
            depth = 1 + max((child_depth for _, child_depth in child_sizes), default=0)
            if count > max_values:
                raise UnsafePickle(f"it unfolds to more than {max_values:,} values")
            if depth > max_levels:
                raise UnsafePickle(f"it is nested deeper than {max_levels} levels")
            sizes[id(node)] = count, depth
            continue
        if id(node) in ancestors:
            raise UnsafePickle("it contains itself")
        ancestors.add(id(node))
        todo.append((node, True))
        for child in children:
            if not _is_scalar(child) and id(child) not in sizes:
                if id(child) in ancestors:
                    raise UnsafePickle("it contains itself")
                todo.append((child, False))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (*SCALARS, GlobalName, bytearray))


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, CallRecord):
        return [value.arguments, value.state, value.items]
    return []


def _check_key(value: Any) -> Any:
    """Check a key of a dict or a member of a set: hashing nested tuples can take unbounded time."""
    is_scalar_tuple = isinstance(value, tuple) and all(isinstance(item, SCALARS) for item in value)
    if is_scalar_tuple or isinstance(value, (*SCALARS, GlobalName)):
        return value
    if isinstance(value, CallRecord):  # hashed by identity
        return value
    raise UnsafePickle(f"a key is a {type(value).__name__}")


class _PlainUnpickler(pickle._Unpickler):  # the C version allocates sizes given in the stream
    stack: list[Any]  # the base class sets these attributes when it starts to load
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, content: bytes, allowed: Callable[[GlobalName], bool], persistent: Any
    ) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8", errors="surrogatepass")
        self.is_allowed, self.resolve_persistent_id = allowed, persistent
        self.num_operations_left = MAX_OPERATIONS
        self.states: list[Any] = []  # of dicts; checked, but not part of the value

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        global_name = GlobalName(module, name)
        if "." in name or not self.is_allowed(global_name):
            raise UnsafePickle(f"it refers to {global_name}")
        return global_name

    def persistent_load(self, pid: Any) -> Any:
        if self.resolve_persistent_id is None:
            raise UnsafePickle("it refers to another file")
        return self.resolve_persistent_id(pid)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _build_call(self.stack[-1], arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, OrderedDict) and isinstance(state, dict):
            if state.keys() - {"_metadata"}:  # another attribute could hide a method
                raise UnsafePickle(f"it sets {next(iter(state))} of a dict")
            self.states.append(state)
            return
        if not isinstance(target, CallRecord):
            raise UnsafePickle(f"it sets the state of a {type(target).__name__}")
        target.state = state

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, CallRecord):
            target.items += items
            return
        if not isinstance(target, dict):
            raise UnsafePickle(f"it sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_check_key(key)] = value

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
        self._set_items(items)

    def load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise UnsafePickle(f"it adds to a {type(target).__name__}")
        target.update(_check_key(item) for item in items)

    def load_frozenset(self) -> None:
        self.append(frozenset(_check_key(item) for item in self.pop_mark()))

    def refuse_operation(self) -> None:
        raise UnsafePickle("it uses an operation that no checkpoint has")


def _build_call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
        raise UnsafePickle("it calls an object that is not a function")
    match (function.module, function.name), arguments:
        case ("collections", "OrderedDict"), ():
            return OrderedDict()
        case ("collections", "Counter"), (dict() as counts,):
            return Counter(counts)
        case ("builtins" | "__builtin__", "set"), (list() | tuple() as members,):
            return {_check_key(member) for member in members}
        case ("builtins" | "__builtin__", "bytearray"), _ if isinstance(
            next(iter(arguments), b""), int
        ):
            raise UnsafePickle("it allocates a given number of bytes")
    return CallRecord(function, arguments)


def _count_operations(handler: Callable[[Any], None]) -> Callable[[Any], None]:
    def counting_handler(self: Any) -> None:
        self.num_operations_left -= 1
        if self.num_operations_left < 0:
            raise UnsafePickle(f"it has more than {MAX_OPERATIONS:,} operations")
        handler(self)

    return counting_handler


_HANDLERS: Iterable[tuple[bytes, Callable[[Any], None]]] = (
    (pickle.REDUCE, _PlainUnpickler.load_reduce),
    (pickle.BUILD, _PlainUnpickler.load_build),
    (pickle.NEWOBJ, _PlainUnpickler.load_newobj),
    (pickle.SETITEM, _PlainUnpickler.load_setitem),
    (pickle.SETITEMS, _PlainUnpickler.load_setitems),
    (pickle.APPEND, _PlainUnpickler.load_append),
    (pickle.APPENDS, _PlainUnpickler.load_appends),
    (pickle.DICT, _PlainUnpickler.load_dict),
    (pickle.ADDITEMS, _PlainUnpickler.load_additems),
    (pickle.FROZENSET, _PlainUnpickler.load_frozenset),
    *((op, _PlainUnpickler.refuse_operation) for op in (
        pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ, pickle.EXT1,
      pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)),
)  # fmt: skip
_PlainUnpickler.dispatch |= {op[0]: read for op, read in _HANDLERS}
_PlainUnpickler.dispatch = {
    op: _count_operations(read) for op, read in _PlainUnpickler.dispatch.items()
}
