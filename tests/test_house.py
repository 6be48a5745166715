"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ravine", "lightning_modules", "datamodules", "callbacks", "strategies", "cli")
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "misc"}
PRAGMA = re.compile(r"\s+# (type|noqa|pyright|fmt).*")  # words to a tool, as ruff counts
COLUMNS = 100


def sources(root: Path) -> list[Path]:
    """Every Python file that is installed, and the benchmarks beside it."""
    return sorted(p for folder in (*FOLDERS, "benchmarks") for p in (root / folder).rglob("*.py"))


def too_wide(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        found += [
            f"{path.relative_to(root)}:{i}: {len(line)} columns, at most {COLUMNS}"
            for i, line in enumerate(path.read_text().splitlines(), 1)
            if len(PRAGMA.sub("", line)) > COLUMNS
        ]
    return found


def undocumented(root: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring."""
    found = []
    for path in sources(root):
        if path.name == "__init__.py" or path.is_relative_to(root / "benchmarks"):
            continue
        tree = ast.parse(path.read_text())
        name = path.relative_to(root)
        if not ast.get_docstring(tree):
            found.append(f"{name}: the file says nothing of its idea")
        scopes: list[ast.Module | ast.ClassDef] = [tree]
        scopes += [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
        for scope in scopes:
            for node in scope.body:
                public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
                if public and not ast.get_docstring(node):
                    found.append(f"{name}:{node.lineno} {node.name}")
    return found


def unpackaged(root: Path) -> list[str]:
    """Folders with code that pyproject.toml does not install."""
    table = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        str(p.parent.relative_to(root)) for folder in FOLDERS for p in (root / folder).rglob("*.py")
    }
    inside = {f"ravine.{folder.removeprefix('ravine/').replace('/', '.')}" for folder in there}
    expected = inside - {"ravine.ravine"} | {"ravine", "ravine.configs"}
    listed, mapped = set(table["packages"]), set(table["package-dir"])
    return sorted((expected ^ listed) | (expected ^ mapped))


# Files of the front door that every folder may import: they import none of the folders, or only
# at the first use of a name.
FRONT = {"ravine", "errors", "files", "checkpoint_format", "lightning_compat"}
# The table of CONTRIBUTING.md: who may import whom.
MAY_IMPORT = {
    "ravine": set(FOLDERS),
    # the tokenizer travels with weights; one reader of checkpoints bounds what a file may ask for
    "lightning_modules": {"lightning_modules", "datamodules", "strategies.checkpoint"},
    "datamodules": {"datamodules", "strategies"},  # which part of the data is a process's
    "callbacks": {"callbacks", "strategies"},
    "strategies": {"strategies"},
    "cli": set(FOLDERS),
}

# The one import upward: a method of one file, so that importing the folder does not need it.
UPWARD = {"lightning_modules/task_module.py": "ravine.load_model"}


def imported(node: ast.AST, package: list[str]) -> list[str]:
    """What a statement of a file in ``package`` imports, relative names written out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package[: len(package) + 1 - node.level] if node.level else []
    start = [*above, node.module] if node.module else above
    return [".".join([*start, alias.name]) for alias in node.names]


def trespassing(root: Path) -> list[str]:
    """Imports across the folders that the table does not allow."""
    found = []
    for path in sources(root):
        folder, *_ = parts = path.relative_to(root).parent.parts
        tree = ast.parse(path.read_text())
        late = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            for inner in ast.walk(node)
        }
        upward = UPWARD.get(str(path.relative_to(root)))
        for node in ast.walk(tree):
            for name in imported(node, ["ravine", *parts]) if folder in MAY_IMPORT else ():
                if name == upward and node in late:
                    continue
                room, file = (*name.split(".")[1:3], "", "")[:2]
                allowed = MAY_IMPORT[folder] | FRONT
                is_ravine = name.startswith("ravine.") and not {room, f"{room}.{file}"} & allowed
                ranks = folder == "lightning_modules" and name.startswith("torch.distributed")
                if is_ravine or ranks:
                    found.append(f"{path.relative_to(root)}: imports {name}")
    return found


# What a receiver is called when it is a part of Lightning, whatever else has an attribute of the
# same name: `loader._iterator` may be torch's, `combined._iterator` is Lightning's.
LIGHTNING_PARTS = {
    *("trainer", "module", "pl_module", "lightning_module", "callback", "finder", "strategy"),
    *("loop", "fit_loop", "epoch_loop", "val_loop", "fit", "fetcher", "combined", "connector"),
    *("precision_plugin", "precision", "accelerator", "launcher", "profiler"),
}
OF_TORCH = {"_modules", "_parameters", "_buffers", "_version", "_load_from_state_dict", "_spec"}
OF_LOADERS = {"_iterator"}
COMPAT = "ravine/lightning_compat"


@functools.cache
class LightningNames:
    """Names that begin with one underscore, by the class of Lightning that defines them."""

    def __init__(self) -> None:
        self.all: set[str] = set()
        self.methods: set[str] = set()  # of loops, strategies, connectors and plugins
        self.of: dict[str, set[str]] = {}
        bases: dict[str, list[str]] = {}
        (root,) = importlib.util.find_spec("lightning").submodule_search_locations  # type: ignore
        for path in sorted(Path(root).rglob("*.py")):
            tree = ast.parse(path.read_text())
            self.all |= {name for node in tree.body for name in defined(node) if private(name)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    names = {name for inner in ast.walk(node) for name in defined(inner)}
                    self.of.setdefault(node.name, set()).update(filter(private, names))
                    bases.setdefault(node.name, []).extend(map(last_name, node.bases))
                    if {"loops", "strategies", "connectors", "plugins"} & set(path.parts):
                        functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                        self.methods |= {n.name for n in functions if not n.decorator_list}
        for _ in range(10):  # deeper than any hierarchy
            for name, above in bases.items():
                self.of[name] |= {n for base in above for n in self.of.get(base, ())}
        self.all |= {name for names in self.of.values() for name in names}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def last_name(node: ast.AST) -> str:
    """The last word of a dotted name, or of what is called or indexed; empty for anything else."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "attr", getattr(node, "id", ""))


def defined(node: ast.AST) -> list[str]:
    """Names that a statement or an assignment to an attribute defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr] if last_name(node.value) in ("self", "cls") else []
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def word(node: ast.AST) -> str:
    """The text of a string constant; empty for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def namespace_of(node: ast.AST) -> ast.AST | None:
    """The object of `object.__dict__` or `vars(object)`."""
    if isinstance(node, ast.Attribute) and node.attr == "__dict__":
        return node.value
    called = isinstance(node, ast.Call) and last_name(node.func) == "vars" and node.args
    return node.args[0] if called else None  # type: ignore[union-attr]


def uses(node: ast.AST) -> list[tuple[ast.AST, str, bool]]:
    """The attributes that an expression uses: of what, which, and whether it sets it."""
    if isinstance(node, ast.Attribute):
        return [(node.value, node.attr, isinstance(node.ctx, ast.Store))]
    if isinstance(node, ast.Subscript) and (owner := namespace_of(node.value)) is not None:
        return [(owner, word(node.slice), isinstance(node.ctx, ast.Store))]
    if not isinstance(node, ast.Call):
        return []
    name = last_name(node.func)
    if name in ("getattr", "setattr", "hasattr", "delattr") and len(node.args) > 1:
        return [(node.args[0], word(node.args[1]), name == "setattr")]
    if isinstance(node.func, ast.Attribute) and node.args:  # vars(x).pop("name")
        owner = namespace_of(node.func.value)
        return [] if owner is None else [(owner, word(node.args[0]), True)]
    return []


def private_lightning(root: Path) -> list[str]:
    """Uses of private parts of Lightning, and replaced methods, outside of COMPAT.

    Four kinds: a private name that is imported; a private attribute of a part of Lightning, also
    by `getattr` and `__dict__`; a private name of its base class that a class of ours uses or
    defines; a method of a loop, strategy, connector or plugin that is set on an object.
    """
    lightning, trees = LightningNames(), {}
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        if not name.startswith(COMPAT):
            trees[name] = ast.parse(path.read_text())
    own = {name for tree in trees.values() for node in ast.walk(tree) for name in defined(node)}
    bases = {
        node.name: [last_name(base) for base in node.bases]
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = []

    def inherited(kind: str, depth: int = 10) -> set[str]:
        above = bases.get(kind, []) if depth else []
        return lightning.of.get(kind, set()) | {
            name for base in above for name in inherited(base, depth - 1)
        }

    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                for name in imported(node, []):
                    parts = name.split(".")
                    if parts[0] in ("lightning", "lightning_fabric", "pytorch_lightning") and any(
                        map(private, parts)
                    ):
                        found.append(f"{path}:{node.lineno}: imports {name}")
            for owner, name, sets in uses(node):
                receiver = last_name(owner)
                part = receiver in LIGHTNING_PARTS
                known = name in lightning.all and receiver not in ("self", "cls", "super")
                of_another = name in OF_TORCH or (not part and name in own | OF_LOADERS)
                if private(name) and known and not of_another:
                    found.append(f"{path}:{node.lineno}: {receiver}.{name}")
                elif sets and part and name in lightning.methods:
                    found.append(f"{path}:{node.lineno}: replaces {receiver}.{name}")
            if isinstance(node, ast.ClassDef):
                above = {n for base in bases[node.name] for n in inherited(base)}
                for inner in ast.walk(node):
                    own_uses = [(o, n) for o, n, _ in uses(inner)]
                    names = [n for o, n in own_uses if last_name(o) in ("self", "cls", "super")]
                    if isinstance(inner, ast.FunctionDef):
                        names.append(inner.name)
                    found += [
                        f"{path}:{inner.lineno}: {name} of a class above {node.name}"  # type: ignore
                        for name in names
                        if private(name) and name in above
                    ]
    return sorted(found)


def test_no_line_is_too_wide() -> None:
    assert too_wide(ROOT) == []


def test_every_public_name_has_a_docstring() -> None:
    assert undocumented(ROOT) == []


def test_every_folder_with_code_is_installed() -> None:
    assert unpackaged(ROOT) == []


def test_no_file_has_a_forbidden_name() -> None:
    assert [p for p in sources(ROOT) if p.stem in FORBIDDEN or p.parent.name in FORBIDDEN] == []


def test_only_the_six_folders_hold_product_code() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    tops = {path.split("/")[0] for path in tracked}
    assert tops <= {*FOLDERS, "tests", "benchmarks", "docs", ".typing"}


def test_no_folder_imports_a_folder_that_the_table_forbids() -> None:
    assert trespassing(ROOT) == []


def test_private_parts_of_lightning_are_used_in_one_package_only() -> None:
    assert private_lightning(ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        "from lightning.fabric.utilities.data import _set_sampler_epoch",
        "from lightning.pytorch.loops.fetchers import _DataFetcher as Fetcher",
        "def f(trainer):\n    return trainer.fit_loop._combined_loader",
        "def f(loop):\n    loop._restarting = False",
        "def f(x):\n    return getattr(x, '_last_global_step_saved', None)",
        "def f(x):\n    return x.a._logger_connector.should_update_logs",
        "def f(trainer):\n    vars(trainer.fit_loop.epoch_loop)['advance'] = print",
        "def f(strategy):\n    strategy.setup_environment = print",
        "def f(loop):\n    loop.__dict__['_on_before_fetch'] = print",
        "def f(connector):\n    connector.__dict__.pop('register_signal_handlers', None)",
        "class A(_CheckpointConnector):\n    def _restore_modules_and_callbacks(self): ...",
        "class A(ModelCheckpoint): ...\nclass B(A):\n    def f(self): self._last_global_step_saved",
        "class A(L.LightningModule):\n    def f(self):\n        return self._trainer",
        "class A(LightningCLI):\n    def f(self):\n        super()._run_subcommand('fit')",
    ],
)
def test_a_use_of_private_lightning_is_caught(scratch: Path, text: str) -> None:
    assert private_lightning(scratch) == []
    (scratch / "cli" / "bad.py").write_text(text + "\n")
    assert len(private_lightning(scratch)) == 1


def test_private_names_of_ravine_and_public_lightning_are_allowed(scratch: Path) -> None:
    text = """
class Watch(Callback):
    def __init__(self): self._group = self._trainer = None
    def f(self, trainer, module, loader):
        trainer.callbacks = []
        trainer.strategy.optimizers = trainer.fit_loop.epoch_loop.global_step
        return self._group, self._trainer, module._modules, loader._iterator, self._state
"""
    (scratch / "cli" / "fine.py").write_text(text)
    assert private_lightning(scratch) == []


def test_no_preset_validates_within_an_optimizer_step() -> None:
    """`val_check_interval` counts micro-batches: of forty a step, 2,000 of them are 50 steps."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        trainer = (yaml.safe_load(path.read_text()) or {}).get("trainer", {})
        every = trainer.get("val_check_interval") or 0
        micro = trainer.get("accumulate_grad_batches") or 1
        assert every % micro == 0, path


def test_one_folder_decides_which_data_a_process_reads() -> None:
    asking = [p for p in sources(ROOT) if "distributed_sampler_kwargs" in p.read_text()]
    assert {p.relative_to(ROOT).parent.name for p in asking} == {"strategies"}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A tiny house with one good file, into which a fault is planted."""
    for folder in (*FOLDERS, "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    packages = ["ravine", *(f"ravine.{f}" for f in (*FOLDERS[1:], "configs"))]
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.setuptools]\npackages = {packages}\n[tool.setuptools.package-dir]\n"
        + "".join(f'"{p}" = "{p[7:] or p}"\n' for p in packages)
    )
    (tmp_path / "cli" / "good.py").write_text('"""Good."""\n')
    return tmp_path


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (too_wide, '"""Wide."""\nx = "' + "a" * COLUMNS + '"\n'),
        (undocumented, '"""A class with a bare method."""\n\n\nclass A:\n    """A."""\n\n'
                       "    def f(self):\n        return 1\n"),
        (undocumented, "x = 1\n"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_caught(scratch: Path, check, text: str) -> None:
    assert check(scratch) == []
    (scratch / "cli" / "bad.py").write_text(text)
    assert len(check(scratch)) == 1


def test_the_one_import_upward_stands_in_a_method_of_one_file(scratch: Path) -> None:
    line = "from ravine import load_model\n"
    late = f"def load():\n    {line}"
    for file, text, faults in (
        ("task_module", late, 0),
        ("task_module", line, 1),
        ("task_module", late.replace("load_model", "Trainer"), 1),
        ("other", late, 1),
    ):
        (scratch / "lightning_modules" / f"{file}.py").write_text(text)
        assert len(trespassing(scratch)) == faults
        (scratch / "lightning_modules" / f"{file}.py").unlink()


@pytest.mark.parametrize(
    "line",
    [
        "from ravine.strategies import names",
        "from ravine import callbacks",
        "from ..callbacks import EMA",
        "import ravine.cli.main",
        "from torch import distributed",
    ],
)
def test_an_import_across_the_folders_is_caught(scratch: Path, line: str) -> None:
    assert trespassing(scratch) == []
    (scratch / "lightning_modules" / "bad.py").write_text(line + "\n")
    assert len(trespassing(scratch)) == 1


def test_a_folder_missing_from_packages_is_caught(scratch: Path) -> None:
    assert unpackaged(scratch) == []
    (scratch / "callbacks" / "optimizers").mkdir()
    (scratch / "callbacks" / "optimizers" / "new.py").write_text('"""New."""\n')
    assert unpackaged(scratch) == ["ravine.callbacks.optimizers"]


# Raised where the caller in the same file catches it, where a caller's program is wrong, or where
# Python's own protocols expect the class.
PLAIN_ERRORS = {
    "callbacks/optimizers/plan.py": {"TypeError"},
    "callbacks/checkpointing/exact_resume.py": {"TypeError"},
    "lightning_modules/plots/diffusion.py": {"RuntimeError"},
    "lightning_modules/generation/kv_cache.py": {"RuntimeError"},
}


def errors_with_a_traceback(root: Path) -> list[str]:
    """Exceptions that the command line would show with a traceback; ravine/errors.py has others."""
    plain = {"ValueError", "TypeError", "FileNotFoundError", "RuntimeError"}
    found = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        if name.startswith("benchmarks/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                kind = last_name(node.exc.func)
                if kind in plain - PLAIN_ERRORS.get(name, set()):
                    found.append(f"{name}:{node.lineno}: {kind}; use a class of ravine.errors")
    return found


def test_errors_written_for_the_user_are_of_the_classes_that_the_command_line_knows() -> None:
    assert errors_with_a_traceback(ROOT) == []


def test_names_are_suggested_by_one_function() -> None:
    users = [p.relative_to(ROOT).as_posix() for p in sources(ROOT) if "difflib" in p.read_text()]
    assert users == ["ravine/errors.py"]


LIBRARY = ("lightning_modules", "datamodules", "callbacks", "strategies")
COMMAND_WORDS = re.compile(
    r"(?<![-\w])--[a-z]"  # a flag
    r"|\b(lightning|ravine) (fit|validate|test|predict|generate|export)\b"
    r"|(^|[;:,] |\bor |\bthen )type "  # an instruction to type
)


def is_flag_scope(node: ast.AST) -> bool:
    """Return whether `node` names a command-line flag: an argument, a variable or a function.

    `flag=...`, `resume_flag = ...`, `flags += ...`, `flags.append(...)`, `def flag_of(...)`.
    """
    if isinstance(node, ast.keyword):
        names = [node.arg or ""]
    elif isinstance(node, ast.FunctionDef):
        names = [node.name]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        names = [last_name(node.func.value)]
    elif isinstance(node, ast.Assign):
        names = [last_name(n) for target in node.targets for n in ast.walk(target)]
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        names = [last_name(node.target)]
    elif isinstance(node, ast.arguments):
        names = [argument.arg for argument in (*node.args, *node.kwonlyargs)]
    else:
        return False
    return any({"flag", "flags"} & {*name.lower().split("_")} for name in names)


def strings_outside_flags(node: ast.AST) -> list[ast.Constant]:
    """Return the string constants of a tree that no flag holds, docstrings excluded."""
    if is_flag_scope(node) or (isinstance(node, ast.Expr) and word(node.value)):
        return []
    found = [node] if isinstance(node, ast.Constant) and word(node) else []
    return found + [c for child in ast.iter_child_nodes(node) for c in strings_outside_flags(child)]


def library_trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the files of LIBRARY with their relative paths."""
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        if name.startswith(tuple(f"{folder}/" for folder in LIBRARY)):
            yield name, ast.parse(path.read_text())


def flags_in_text(root: Path) -> dict[str, list[int]]:
    """Lines of strings that name a flag or a command outside of an argument `flag=`, by file.

    A script has no command line. The command line shows `flag`, and a script shows `hint`.
    """
    found: dict[str, list[int]] = {}
    for name, tree in library_trees(root):
        for constant in strings_outside_flags(tree):
            if COMMAND_WORDS.search(str(constant.value)):
                found.setdefault(name, []).append(constant.lineno)
    return found


def flags_without_hint(root: Path) -> dict[str, list[int]]:
    """Lines of errors that say what to type on the command line, and not what to do in a script."""
    bases = {
        node.name: {last_name(base) for base in node.bases}
        for path in sources(root)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    errors = {"UsageError", "RunError"}
    for _ in range(5):  # deeper than any hierarchy
        errors |= {name for name, above in bases.items() if above & errors}
    found: dict[str, list[int]] = {}
    for name, tree in library_trees(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and last_name(node.func) in errors:
                keywords = {keyword.arg for keyword in node.keywords}
                if "flag" in keywords and "hint" not in keywords and len(node.args) < 3:
                    found.setdefault(name, []).append(node.lineno)
    return found


def flags_of_the_last_callback(root: Path) -> dict[str, list[int]]:
    """Lines of flags with an argument of a callback, but without its class, by file.

    `--trainer.callbacks.decay` is an argument of the last callback of the run, whichever that is:
    only behind `--trainer.callbacks+=EMA` in the same text it is sure to be of EMA.
    """
    found: dict[str, list[int]] = {}
    for name, tree in library_trees(root):
        docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        parts = {id(p) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for p in n.values}
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.JoinedStr) or bool(word(node))
            if not is_text or id(node) in docstrings | parts:
                continue
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(word(v) or "{}" for v in values)
            before, flag, after = text.partition("--trainer.callbacks.")
            named = re.match(r"([A-Z]\w*|\{\})\.", after) or "--trainer.callbacks+=" in before
            if flag and not named:
                found.setdefault(name, []).append(node.lineno)
    return found


@pytest.mark.parametrize("check", [flags_in_text, flags_without_hint, flags_of_the_last_callback])
def test_library_errors_have_flags_only_in_the_argument_flag_and_a_hint_beside_it(
    check: Callable[[Path], dict[str, list[int]]],
) -> None:
    assert check(ROOT) == {}


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("raise UsageError('b is 0; type --model.b=1')", 1),
        ("raise UsageError('b is 0', hint=f'--data.b={b}')", 1),
        ("print(f'type a narrower {b}')", 1),
        ("print('next: lightning test')", 1),
        ("raise UsageError('b is 0', hint='use b=1', flag='--model.b=1')", 0),
        ("resume_flag = '--ckpt_path=last'", 0),
        ("flags = []\nflags.append(f'--model.b={b}')\nflags += ['--b']", 0),
        ("def to_flag(b):\n    return f'--data.{b}'", 0),
        ("class A:\n    '''lightning fit --config a'''", 0),
        ("print('a value of another type, or 2 - 1 --')", 0),
    ],
)
def test_a_flag_in_the_text_of_a_library_error_is_caught(
    scratch: Path, text: str, faults: int
) -> None:
    (scratch / "callbacks" / "bad.py").write_text(text + "\n")
    assert sum(map(len, flags_in_text(scratch).values())) == faults


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("class OwnError(UsageError): ...\nraise OwnError('b is 0', flag='--model.b=1')", 1),
        ("raise RunError('b is 0', [1], flag='--model.b=1')", 1),
        ("raise UsageError('b is 0', [1], 'use b=1', flag='--model.b=1')", 0),
        ("raise UsageError('b is 0', hint='use b=1', flag='--model.b=1')", 0),
        ("raise UsageError('b is 0', [1])", 0),
    ],
)
def test_a_flag_without_a_hint_for_a_script_is_caught(
    scratch: Path, text: str, faults: int
) -> None:
    (scratch / "strategies" / "bad.py").write_text(text + "\n")
    assert sum(map(len, flags_without_hint(scratch).values())) == faults


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("flag = '--trainer.callbacks.decay=0.9'", 1),
        ("flag = '--a=1, or ' '--trainer.callbacks.decay=0.9'", 1),
        ("flag = f'--trainer.callbacks.{key}={value}'", 1),
        ("flags = format_flags('--trainer.callbacks.', {'decay': 0.9})", 1),
        ("flag = '--trainer.callbacks.EMA.decay=0.9'", 0),
        ("flag = f'--trainer.callbacks.{type(self).__name__}.decay=0.9'", 0),
        ("flag = '--trainer.callbacks+=EMA --trainer.callbacks.decay=0.9'", 0),
        ("class A:\n    '''lightning fit --trainer.callbacks.decay=0.9'''", 0),
    ],
)
def test_a_flag_of_a_callback_without_its_class_is_caught(
    scratch: Path, text: str, faults: int
) -> None:
    (scratch / "callbacks" / "bad.py").write_text(text + "\n")
    assert sum(map(len, flags_of_the_last_callback(scratch).values())) == faults
