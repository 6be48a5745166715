"""Examples in docstrings are code blocks on the site: they are indented."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("callbacks", "cli", "datamodules", "lightning_modules", "ravine", "strategies")


def unindented_examples(source: str) -> Iterator[str]:
    """Yield the paragraphs of docstrings that are code with a call and are not indented."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        # `cleandoc` is what the site uses: a docstring of one margin loses it
        for paragraph in inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[1:]:
            try:
                tree = ast.parse(paragraph)
            except SyntaxError:
                continue
            if any(isinstance(child, ast.Call) for child in ast.walk(tree)):
                yield paragraph


def test_examples_in_docstrings_are_indented() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert not [*unindented_examples(path.read_text())], path


def test_an_example_without_a_margin_is_seen() -> None:
    margin = '"""F.\n\nFor example:\n\n    f(1)\n"""\n'
    assert not [*unindented_examples(margin)]
    assert [*unindented_examples(margin.replace("    f", "f"))] == ["f(1)"]
