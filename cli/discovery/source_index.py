"""Classes and functions read from source text: docstrings and signatures by `ast`, no import.

The import of torch takes four seconds, so the pages of `lightning list` and `lightning show` come
from the installed source files. Names are followed through the imports of a file. What is written
at run time (`setattr`, a metaclass) is not seen.
"""

import ast
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE_ROOT = Path(__file__).resolve().parents[2]  # folder of callbacks/, strategies/, cli/
MAX_LOOKUP_DEPTH = 20  # of classes or names followed one after the other, against a circle
# Base classes by which a class is recognized. The search for bases ends at them.
BASE_NAMES = frozenset(
    ("Callback", "Optimizer", "LightningModule", "LightningDataModule", "Strategy", "Reward")
)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Parameter:
    """An argument of a class or a function, as the source text writes it.

    Args:
        name: the name.
        annotation: text of the type hint; "" if there is none.
        default: text of the default; None if a value is required.
        description: its entry in the section "Args" of the docstring.
        source: the file that defines it, in which the names of the texts above are resolved.
    """

    name: str
    annotation: str = ""
    default: str | None = None
    description: str = ""
    source: "SourceFile | None" = None


class Definition(NamedTuple):
    """A definition at the top level of a file: a class, a function or an assignment."""

    name: str
    node: ast.AST
    source: "SourceFile"

    @property
    def path(self) -> str:
        """The dotted path: ravine.callbacks.checkpointing.ema.EMA."""
        return f"{self.source.name}.{self.name}"


class SourceFile:
    """The top-level definitions and imports of a Python file."""

    def __init__(self, name: str, path: Path) -> None:
        """Parse the file; `name` is its dotted module name."""
        self.name, self.path = name, path
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.definitions: dict[str, ast.AST] = {}
        self.imports: dict[str, tuple[str, str]] = {}  # local name: module, attribute or ""
        self.star_imports: list[str] = []
        self.docstrings: dict[str, ast.expr] = {}  # `Name.__doc__ = ...`
        self.exported_exprs: list[ast.expr] = []  # the values of `__all__`, in order
        self._read(self.tree.body)

    def _read(self, body: Iterable[ast.stmt]) -> None:
        # definitions: by name, the statement that defines it. setdefault keeps the first one.
        for node in body:
            match node:
                case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                    self.definitions.setdefault(node.name, node)
                case ast.Assign(targets=[ast.Name(id=name)]):
                    self._read_assignment(name, node.value, node)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    self.definitions.setdefault(name, node)
                # `__all__ += [...]`: the exported names
                case ast.AugAssign(target=ast.Name(id="__all__")):
                    self.exported_exprs.append(node.value)
                case ast.Assign(targets=[ast.Attribute(value=ast.Name(id=name), attr="__doc__")]):
                    self.docstrings[name] = node.value
                case ast.Import():
                    for alias in node.names:
                        # `import a.b` binds a, and `import a.b as c` binds c to a.b
                        local = alias.asname or alias.name.partition(".")[0]
                        self.imports.setdefault(local, (alias.name if alias.asname else local, ""))
                case ast.ImportFrom():
                    self._read_import_from(node)
                # definitions under `if` or `try` count as those of the module
                case ast.If():
                    self._read([*node.body, *node.orelse])
                case ast.Try():
                    handlers = [line for handler in node.handlers for line in handler.body]
                    self._read([*node.body, *handlers, *node.orelse])

    def _read_assignment(self, name: str, value: ast.expr, node: ast.AST) -> None:
        if name == "__all__":
            self.exported_exprs.append(value)
        else:
            self.definitions.setdefault(name, node)

    def _read_import_from(self, node: ast.ImportFrom) -> None:
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        module = ".".join(filter(None, (package, node.module))) if node.level else node.module or ""
        for alias in node.names:
            if alias.name == "*":
                self.star_imports.append(module)
            else:
                self.imports.setdefault(alias.asname or alias.name, (module, alias.name))

    def exported_names(self) -> list[str]:
        """Return the names in `__all__`, including those of another file's `__all__`."""
        names: list[str] = []
        for expr in self.exported_exprs:
            if isinstance(expr, ast.List | ast.Tuple):
                names += [str(e.value) for e in expr.elts if isinstance(e, ast.Constant)]
            elif isinstance(expr, ast.Attribute) and expr.attr == "__all__":
                module, attribute = self.imports.get(ast.unparse(expr.value), ("", ""))
                other = find_source(f"{module}.{attribute}" if attribute else module)
                names += other.exported_names() if other else []
        return names


def find_source(module: str) -> SourceFile | None:
    """Return the file of a module by its dotted name; None if it has no readable source text."""
    key = (module, os.getcwd())  # a module of the user is a file of the current folder
    path = _module_files.get(key) or find_module_file(module)
    if path is None:
        return None
    _module_files[key] = path
    try:
        return _parse_source(module, path, path.stat().st_mtime_ns)
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError, RecursionError):
        return None


_module_files: dict[tuple[str, str], Path] = {}


@cache
def _parse_source(module: str, path: Path, time_ns: int) -> SourceFile:
    return SourceFile(module, path)


def find_module_file(module: str) -> Path | None:
    """Return the path of a module's file without an import of its packages."""
    first, *remainder = module.split(".")
    if first == "ravine":
        import ravine

        # Most subpackages, such as ravine.callbacks, lie in PACKAGE_ROOT, beside the folder
        # `ravine`.
        folders = [Path(str(ravine.__file__)).parent, PACKAGE_ROOT]
        if remainder and remainder[0] != "lightning_compat":
            folders.reverse()
    else:
        try:
            # for a top-level name this imports nothing
            spec = importlib.util.find_spec(first)
        except (ImportError, ValueError, AttributeError):
            return None
        if spec is None:
            return None
        # a package's file is its __init__.py; a module in C has no source text
        if not remainder:
            is_python = spec.origin is not None and spec.origin.endswith(".py")
            return Path(spec.origin) if is_python and spec.origin else None
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        path = folder.joinpath(*remainder)
        for candidate in (path / "__init__.py", path.parent / f"{path.name}.py"):
            if candidate.is_file():
                return candidate
    return None


def is_installed(module: str) -> bool:
    """Return whether the package of a module can be imported; nothing is imported."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def find_definition(dotted_name: str) -> Definition | None:
    """Return the definition at a dotted path, `torch.optim.AdamW`, followed through imports."""
    module, _, name = dotted_name.rpartition(".")
    source = find_source(module) if module else None
    return resolve(source, name) if source else None


def resolve(source: SourceFile, expression: str, depth: int = 0) -> Definition | None:
    """Return the definition of a name in a file, `Lion` or `L.Callback`, followed through imports.

    An assignment of another name (`Checkpoint = ModelCheckpoint`) is followed, too.

    Args:
        source: the file's definitions and imports, read from its text; nothing is imported.
        expression: the name, with dots for attributes.
        depth: number of steps so far, which ends a cycle.
    """
    if depth > MAX_LOOKUP_DEPTH:
        return None
    head, _, remainder = expression.partition(".")
    node = source.definitions.get(head)
    if node is not None:
        value = node.value if isinstance(node, ast.Assign) else None
        if not remainder and isinstance(value, ast.Name | ast.Attribute):
            return resolve(source, ast.unparse(value), depth + 1) or Definition(head, node, source)
        # an attribute of a class is not looked for
        return None if remainder else Definition(head, node, source)
    if head not in source.imports:
        # modules of `from module import *`
        for module in source.star_imports:
            other = find_source(module)
            if other and (resolved := resolve(other, expression, depth + 1)):
                return resolved
        return None
    # `from a import b as c` gives c: (a, b); `import a as c` gives c: (a, "")
    module, attribute = source.imports[head]
    names = [name for name in (attribute, *remainder.split(".")) if name]
    while names:  # each name is a submodule, or an attribute of the module
        other = find_source(module)
        if other and (resolved := resolve(other, ".".join(names), depth + 1)):
            return resolved
        module, names = f"{module}.{names[0]}", names[1:]
    return None


def bases_of(definition: Definition) -> Iterator[tuple[str, Definition | None]]:
    """Yield the direct base classes: the last name as written, and the definition if found."""
    if isinstance(definition.node, ast.ClassDef):
        for base in definition.node.bases:
            text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            name = text.rpartition(".")[2]
            yield name, resolve(definition.source, text) if text != definition.name else None


def ancestor_names(definition: Definition, depth: int = 0) -> list[str]:
    """Return the names of all base classes; the search ends at the classes of BASE_NAMES."""
    names = []
    if not isinstance(definition.node, ast.ClassDef) or depth > MAX_LOOKUP_DEPTH:
        return names
    for base in definition.node.bases:
        text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        names.append(text.rpartition(".")[2])
        if names[-1] not in BASE_NAMES and text != definition.name:
            resolved = resolve(definition.source, text)
            names += ancestor_names(resolved, depth + 1) if resolved else []
    return names


def is_dataclass(definition: Definition) -> bool:
    """Return whether a class is decorated with `dataclass`."""
    decorators = getattr(definition.node, "decorator_list", ())
    return any("dataclass" in ast.unparse(decorator) for decorator in decorators)


def parameters_of(definition: Definition, depth: int = 0) -> list[Parameter] | None:
    """Return the arguments of a class or function; None if its signature is not in source text.

    `**kwargs` is replaced by the arguments of the function or base class that receives it.

    Args:
        definition: the statement of a class or function, and its file.
        depth: number of base classes followed so far.
    """
    node = definition.node
    if depth > MAX_LOOKUP_DEPTH:
        return None
    if isinstance(node, FunctionNode):
        return _function_parameters(definition, node, None, depth)
    if not isinstance(node, ast.ClassDef):
        return None
    init = next(
        (f for f in node.body if isinstance(f, FunctionNode) and f.name == "__init__"), None
    )
    if init is not None:
        parameters = _function_parameters(definition, init, definition, depth)
        # adds the descriptions of the docstring's Args section
        return _described(parameters, definition, init)
    if is_dataclass(definition) or any(name == "NamedTuple" for name, _ in bases_of(definition)):
        return _described(_field_parameters(definition, depth), definition)
    # base: the definition of a base class; None if its source text is not found
    for name, base in bases_of(definition):
        if base is None and name not in ("object", "ABC", "Generic", "Protocol"):
            return None
        parameters = parameters_of(base, depth + 1) if base else None
        # a base without arguments counts only if it has an __init__ of its own
        if base and parameters is not None and (parameters or find_init(base)):
            return parameters
    # no class in the order of bases has an __init__
    return []


def find_init(definition: Definition) -> ast.FunctionDef | None:
    """Return the `__init__` that a class defines itself."""
    for node in getattr(definition.node, "body", ()):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node
    return None


def _function_parameters(
    definition: Definition, function: Any, owner: Definition | None, depth: int
) -> list[Parameter]:
    """Return the arguments of a function, in which `**kwargs` is replaced by what it may hold.

    Args:
        definition: the function or class, and its file.
        function: the syntax tree of the function, or of the class's __init__.
        owner: the class of which the function is __init__; None for a plain function.
        depth: number of calls and base classes followed so far, which ends a cycle.
    """
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    # the syntax tree has defaults of the last arguments only
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    pairs = [*zip(positional, defaults, strict=True)]
    pairs = pairs[1:] if owner else pairs  # without self
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parameters = [
        Parameter(
            arg.arg,
            _text(arg.annotation),
            None if default is None else ast.unparse(default),
            source=definition.source,
        )
        for arg, default in pairs
    ]
    if arguments.kwarg is not None:
        names = {parameter.name for parameter in parameters}
        # the arguments of the function or base class that **kwargs is passed to
        forwarded = _forwarded_parameters(definition, function, owner, depth)
        parameters += [p for p in forwarded if p.name not in names]
    return parameters


def _text(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted type hint
        return node.value
    return "" if node is None else ast.unparse(node)


def _forwarded_parameters(
    definition: Definition, function: Any, owner: Definition | None, depth: int
) -> list[Parameter]:
    """Return the arguments that `**kwargs` of a function may hold: those of the call it is in.

    Args:
        definition: the function or class, and its file.
        function: the syntax tree of the function, or of the class's __init__.
        owner: the class; None for a plain function.
        depth: number of calls and base classes followed so far, which ends a cycle.
    """
    name = function.args.kwarg.arg
    # the calls in the body that contain `**kwargs`
    for call in _calls_with_kwargs(function, name, owner):
        target = ast.unparse(call.func)
        if target == "super().__init__" and owner:
            receivers = [base for _, base in bases_of(owner) if base]
        else:
            resolved = resolve(definition.source, target)
            receivers = [resolved] if resolved else []
        # the call sets these itself, so `**kwargs` cannot contain them
        passed = {keyword.arg for keyword in call.keywords}
        for receiver in receivers:
            if parameters := parameters_of(receiver, depth + 1):
                # positional arguments of the call take the first places
                return [p for p in parameters[len(call.args) :] if p.name not in passed]
    return []


def _calls_with_kwargs(function: Any, name: str, owner: Definition | None) -> Iterator[ast.Call]:
    """Yield the calls with `**name`, and those with `**self.x` after `self.x = name`."""
    attributes = {
        ast.unparse(node.targets[0])
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == name
    }
    for scope in (function, owner.node if owner else function):
        for call in (node for node in ast.walk(scope) if isinstance(node, ast.Call)):
            unpacked = {ast.unparse(k.value) for k in call.keywords if k.arg is None}
            if (scope is function and name in unpacked) or unpacked & attributes:
                yield call


def _field_parameters(definition: Definition, depth: int) -> list[Parameter]:
    fields: dict[str, Parameter] = {}
    for _, base in bases_of(definition):
        if base and is_dataclass(base):
            fields |= {p.name: p for p in parameters_of(base, depth + 1) or ()}
    for node in getattr(definition.node, "body", ()):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if (annotation := _text(node.annotation)).startswith("ClassVar"):
            continue
        default, is_argument = _field_default(node.value)
        if is_argument:
            name = node.target.id
            fields[name] = Parameter(name, annotation, default, source=definition.source)
    return [*fields.values()]


def _field_default(value: ast.expr | None) -> tuple[str | None, bool]:
    """Return the text of a dataclass field's default, and whether the field is an argument."""
    if value is None:
        return None, True
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return ast.unparse(value), True
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
    default = options.get("default")
    if factory := options.get("default_factory"):
        default = {"list": "[]", "dict": "{}"}.get(factory, f"{factory}()")
    return default, options.get("init") != "False"


def _described(
    parameters: list[Parameter], definition: Definition, *functions: Any
) -> list[Parameter]:
    """Add the descriptions of the docstrings of a class and its `__init__`."""
    texts = [docstring_of(definition), *(ast.get_docstring(f) or "" for f in functions)]
    descriptions = {k: v for text in texts for k, v in argument_descriptions(text).items()}
    return [replace(p, description=descriptions.get(p.name, p.description)) for p in parameters]


def docstring_of(definition: Definition) -> str:
    """Return the docstring of a class or function, also one that is assigned to `__doc__`."""
    source, node = definition.source, definition.node
    if expr := source.docstrings.get(definition.name):
        return inspect.cleandoc("".join(_constant_texts(expr, source)))
    is_documented = isinstance(node, ast.ClassDef | FunctionNode)
    if is_documented and (text := ast.get_docstring(node)):
        return text
    init = find_init(definition)
    return (ast.get_docstring(init) or "") if init else ""


def _constant_texts(expr: ast.expr, source: SourceFile, depth: int = 0) -> Iterator[str]:
    """Yield the texts of a concatenation or an f-string; names of other texts are looked up.

    Args:
        expr: the expression in the syntax tree.
        source: its file, in which names are looked up.
        depth: number of names followed so far, which ends a cycle.
    """
    match expr:
        case ast.Constant(value=str(text)):
            yield text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from _constant_texts(left, source, depth)
            yield from _constant_texts(right, source, depth)
        case ast.JoinedStr(values=values):
            for value in values:
                yield from _constant_texts(value, source, depth)
        case ast.FormattedValue(value=value):
            yield from _constant_texts(value, source, depth)
        case ast.Name(id=name) if depth < MAX_LOOKUP_DEPTH:
            resolved = resolve(source, name)
            value = getattr(resolved.node, "value", None) if resolved else None
            if resolved and isinstance(value, ast.Constant):
                yield str(value.value)
            elif resolved and isinstance(value, ast.expr):
                yield from _constant_texts(value, resolved.source, depth + 1)
        # "...".format(...): the text before the fields are filled
        case ast.Call(func=ast.Attribute(attr="format", value=value)):
            yield from _constant_texts(value, source, depth)


def first_paragraph(text: str) -> str:
    """Return the first paragraph of a docstring in one line, without roles of Sphinx."""
    return plain_text(inspect.cleandoc(text).strip().split("\n\n")[0])


def plain_text(text: str) -> str:
    """Return text in one line; a role such as :class:`~torch.nn.Module` becomes its last name."""
    text = re.sub(r":[\w:]+:`~?\.?([^`<]*?)(?:\s*<[^>]*>)?`", r"`\1`", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`>]*>`_", r"\1", text)  # a link
    return " ".join(text.replace("``", "`").split())


def without_directives(text: str) -> str:
    """Return a docstring without the formulas, links and notes of Sphinx."""
    lines: list[str] = []
    skipped_indent: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if skipped_indent is not None and (not line.strip() or indent > skipped_indent):
            continue
        skipped_indent = indent if line.lstrip().startswith(".. ") else None
        if skipped_indent is None:
            line = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^>`]*>)?`", r"`\1`", line)
            lines.append(re.sub(r"`([^`<]*?)\s*(?:<[^`>]*>)?`__?", r"\1", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


SECTION = re.compile(r"^(Args?|Arguments|Parameters):\s*$")


def split_docstring(text: str) -> tuple[str, list[str]]:
    """Split a docstring into its text and the lines of its section "Args"."""
    lines = inspect.cleandoc(text).splitlines()
    start = next((i for i, line in enumerate(lines) if SECTION.match(line.strip())), None)
    if start is None:
        return "\n".join(lines).strip(), []
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines):
        line = lines[end]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        end += 1
    return "\n".join([*lines[:start], *lines[end:]]).strip(), lines[start + 1 : end]


ARGUMENT = re.compile(r"^\*{0,2}`{0,2}(\w+)`{0,2}(?:\s*\([^)]*\))?\s*:\s*(.*)$")


def argument_descriptions(text: str) -> dict[str, str]:
    """Return the entries of a docstring's section "Args" by name, each in one line."""
    entries: dict[str, str] = {}
    name, _, indent = "", None, None
    for line in split_docstring(text)[1]:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if depth <= indent and (match := ARGUMENT.match(line.strip())):
            name = match[1]
            entries[name] = match[2]
        elif name:
            entries[name] += f" {line.strip()}"
    return {key: plain_text(value) for key, value in entries.items()}


class UnknownValueError(Exception):
    """An expression whose value is not known without an import."""


def evaluate(text: str, source: SourceFile | None, depth: int = 0) -> Any:
    """Return the value of a default as a plain value; a call of a dataclass becomes a mapping.

    Raises:
        UnknownValueError: the expression is of another kind, such as a call of a function.
    """
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise UnknownValueError(text) from error
    return _evaluate(node, source, depth)


def default_value(parameter: Parameter) -> Any:
    """Return the default of an argument as the parser has it: 0 is 0.0 for a float.

    Raises:
        UnknownValueError: it is not known without an import.
    """
    value = evaluate(parameter.default or "", parameter.source)
    names = re.findall(r"\w+", parameter.annotation)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_integer and "float" in names and "int" not in names else value


def _evaluate(node: ast.expr, source: SourceFile | None, depth: int) -> Any:
    """Return the value of an expression, which is read from source text and not run.

    Args:
        node: the expression in the syntax tree: constants, operators, names or a dataclass.
        source: its file, in which names are looked up; None without one.
        depth: number of nested expressions and names so far.

    Raises:
        UnknownValueError: it is another kind of expression.
    """
    if depth > MAX_LOOKUP_DEPTH:
        raise UnknownValueError(ast.unparse(node))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        pass
    match node:
        case ast.Tuple(elts=elements):
            return tuple(_evaluate(element, source, depth + 1) for element in elements)
        case ast.List(elts=elements):
            return [_evaluate(element, source, depth + 1) for element in elements]
        case ast.BinOp(left=left, op=op, right=right):
            values = _evaluate(left, source, depth + 1), _evaluate(right, source, depth + 1)
            return _operate(op, *values)
        # the value that the name is assigned, in this file or the one it is imported from
        case ast.Name() | ast.Attribute() if source:
            resolved = resolve(source, ast.unparse(node))
            value = getattr(resolved.node, "value", None) if resolved else None
            if resolved and isinstance(value, ast.expr):
                return _evaluate(value, resolved.source, depth + 1)
        case ast.Call() if source:
            resolved = resolve(source, ast.unparse(node.func))
            if resolved and is_dataclass(resolved):
                return _evaluate_dataclass(node, resolved, source, depth)
    raise UnknownValueError(ast.unparse(node))


def _operate(op: ast.operator, left: Any, right: Any) -> Any:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if numbers and isinstance(op, ast.Pow) and abs(right) < 100:
        return left**right
    if numbers and isinstance(op, ast.Mult):
        return left * right
    if numbers and isinstance(op, ast.Div) and right:
        return left / right
    raise UnknownValueError(f"{left} {type(op).__name__} {right}")


def _evaluate_dataclass(
    call: ast.Call, definition: Definition, source: SourceFile, depth: int
) -> dict[str, Any]:
    parameters = parameters_of(definition) or []
    values = {p.name: arg for p, arg in zip(parameters, call.args, strict=False)}
    values |= {k.arg: k.value for k in call.keywords if k.arg}
    result = {}
    for p in parameters:
        if p.name in values:
            result[p.name] = _evaluate(values[p.name], source, depth + 1)
        elif p.default is not None:
            result[p.name] = evaluate(p.default, p.source, depth + 1)
    return result


def literal_choices(annotation: str, source: SourceFile | None, depth: int = 0) -> list[Any]:
    """Return the values of the Literals in a type hint: `Scale | None` -> spectral, rms, ..."""
    try:
        node = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return []
    return [] if depth > MAX_LOOKUP_DEPTH else _literal_choices(node, source, depth)


def _literal_choices(node: ast.expr, source: SourceFile | None, depth: int) -> list[Any]:
    """Return the values of Literal[...] in a type hint; [] for another hint.

    Args:
        node: the hint in the syntax tree; `X | Y` gives the values of both.
        source: its file, in which names are looked up; None without one.
        depth: number of nested hints and names so far; `literal_choices` limits it.
    """
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return [
                *_literal_choices(left, source, depth + 1),
                *_literal_choices(right, source, depth + 1),
            ]
        case ast.Subscript(value=value, slice=index) if ast.unparse(value).endswith("Literal"):
            elements = index.elts if isinstance(index, ast.Tuple) else [index]
            return [e.value for e in elements if isinstance(e, ast.Constant)]
        case ast.Name() | ast.Attribute() if source:
            resolved = resolve(source, ast.unparse(node))
            value = getattr(resolved.node, "value", None) if resolved else None
            if resolved and isinstance(value, ast.expr):  # the hint is a name for another hint
                return literal_choices(ast.unparse(value), resolved.source, depth + 1)
    return []


def annotation_dataclass(annotation: str, source: SourceFile | None) -> Definition | None:
    """Return the first dataclass in a type hint, such as `LRSchedule | None`."""
    for name in re.findall(r"[A-Za-z_][\w.]*", annotation) if source else ():
        resolved = resolve(source, name) if source else None
        if resolved and is_dataclass(resolved):
            return resolved
    return None
