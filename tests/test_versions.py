"""The supported versions of pyproject.toml, and no call of a deprecated function."""

import ast
import importlib
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from test_house import sources

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TABLE = PROJECT["tool"]["ravine"]
REQUIREMENTS = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}


@pytest.mark.parametrize("name", TABLE["lowest"])
def test_the_lowest_version_tested_is_the_lowest_that_may_be_installed(name: str):
    allowed = REQUIREMENTS[name].specifier
    lower = [s.version for s in allowed if s.operator == ">="]
    lowest, highest = Version(TABLE["lowest"][name]), Version(TABLE["highest"][name])
    assert [Version(v) for v in lower] == [lowest]
    assert lowest < highest
    assert highest in allowed
    assert Version(version(name)) >= lowest


def test_torch_has_no_upper_bound():
    assert [s.operator for s in REQUIREMENTS["torch"].specifier] == [">="]


def test_the_lowest_run_has_files_of_each_part():
    files = TABLE["lowest_tests"]
    assert [f for f in files if not (ROOT / f).is_file()] == []
    assert len(set(files)) == len(files)
    parts = (
        "strategies/test_mesh_strategy",
        "callbacks/checkpointing/test_exact_resume",
        "callbacks/optimizers/test_optimizer_table",
        "cli/test_command",
    )
    for part in parts:
        assert f"tests/{part}.py" in files


def test_the_readme_states_the_tested_versions():
    low, high = TABLE["lowest"], TABLE["highest"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"torch {low['torch']} to {high['torch']}" in text
    assert f"Lightning {low['lightning']} to {high['lightning']}" in text


def chains(tree: ast.AST) -> list[tuple[int, list[str]]]:
    """Every dotted name of a file with its line: `dist.nn.f` is ["dist", "nn", "f"]."""
    found = []
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            found.append((inner.lineno, [inner.id, *reversed(parts)]))
    return found


def imported_names(tree: ast.AST) -> dict[str, Any]:
    """What a file imports of other packages, by the name that it uses."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        try:
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                module = importlib.import_module(node.module)
                names |= {a.asname or a.name: getattr(module, a.name, None) for a in node.names}
            elif isinstance(node, ast.Import):
                for a in node.names:
                    module = importlib.import_module(a.name)
                    top = importlib.import_module(a.name.partition(".")[0])
                    names[a.asname or top.__name__] = module if a.asname else top
        except ImportError:
            continue  # an optional package
    return names


def deprecated_calls(text: str) -> list[str]:
    """Names of a source text that carry the mark of `typing_extensions.deprecated`."""
    tree = ast.parse(text)
    names, found = imported_names(tree), []
    for line, parts in chains(tree):
        value = names.get(parts[0])
        for part in parts[1:]:
            value = getattr(value, part, None)
        if isinstance(getattr(value, "__deprecated__", None), str):
            found.append(f"{line}: {'.'.join(parts)}")
    return found


@pytest.mark.filterwarnings("ignore")  # of modules that are only imported
def test_no_source_file_calls_what_this_torch_or_lightning_deprecates():
    found = [f"{p}:{call}" for p in sources(ROOT) for call in deprecated_calls(p.read_text())]
    assert found == []


def test_a_deprecated_call_is_found():
    text = "import torch.distributed as dist\ndist.all_reduce_coalesced([])\n"
    assert deprecated_calls(text) == ["2: dist.all_reduce_coalesced"]
