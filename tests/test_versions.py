"""The supported versions: those that pyproject.toml names, and no call that one deprecates."""

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest
from test_house import sources

ROOT = Path(__file__).resolve().parent.parent


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
