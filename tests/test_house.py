"""The rules of CONTRIBUTING.md that a machine can check: the build fails where one is broken."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
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
FRONT = {"ravine", "errors", "lightning_compat"}
# The table of CONTRIBUTING.md: who may import whom.
MAY_IMPORT = {
    "ravine": set(FOLDERS),
    # the tokenizer travels with weights; one reader of checkpoints bounds what a file may ask for
    "lightning_modules": {"lightning_modules", "datamodules", "strategies.checkpoint_io"},
    "datamodules": {"datamodules", "strategies"},  # which part of the data is a process's
    "callbacks": {"callbacks", "strategies"},
    "strategies": {"strategies"},
    "cli": set(FOLDERS),
}


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
        for node in ast.walk(ast.parse(path.read_text())):
            for name in imported(node, ["ravine", *parts]) if folder in MAY_IMPORT else ():
                room, file = (*name.split(".")[1:3], "", "")[:2]
                allowed = MAY_IMPORT[folder] | FRONT
                ours = name.startswith("ravine.") and not {room, f"{room}.{file}"} & allowed
                ranks = folder == "lightning_modules" and name.startswith("torch.distributed")
                if ours or ranks:
                    found.append(f"{path.relative_to(root)}: imports {name}")
    return found


def test_no_line_is_too_wide() -> None:
    assert too_wide(ROOT) == []


def test_every_public_name_has_a_docstring() -> None:
    assert undocumented(ROOT) == []


def test_every_folder_with_code_is_installed() -> None:
    assert unpackaged(ROOT) == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [p for p in sources(ROOT) if p.stem in FORBIDDEN or p.parent.name in FORBIDDEN] == []


def test_only_the_six_folders_hold_product_code() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    tops = {path.split("/")[0] for path in tracked}
    assert tops <= {*FOLDERS, "tests", "benchmarks", "docs", ".typing"}


def test_no_folder_imports_what_it_must_never_know() -> None:
    assert trespassing(ROOT) == []


def test_no_preset_validates_within_an_optimizer_step() -> None:
    """`val_check_interval` counts micro-batches: of forty a step, 2,000 of them are 50 steps."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        trainer = (yaml.safe_load(path.read_text()) or {}).get("trainer", {})
        every = trainer.get("val_check_interval") or 0
        micro = trainer.get("accumulate_grad_batches") or 1
        assert every % micro == 0, path


def test_one_place_asks_which_part_of_the_data_is_a_process_s() -> None:
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
