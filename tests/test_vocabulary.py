"""No name and no sentence uses the old vocabulary; old_vocabulary.json lists it with new words.

Six kinds are read: identifiers and import aliases by `ast`, config keys and class names by `yaml`,
metrics in string constants and texts, names of files, and words in prose. CHANGELOG.md tells of the
old names and is exempt. The rows of benchmarks keep the keys that they were recorded with.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("ravine", "lightning_modules", "datamodules", "callbacks", "strategies", "cli")
OLD: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "old_vocabulary.json").read_text())
EXEMPT = {"CHANGELOG.md", "tests/test_vocabulary.py"}  # they name old metrics and words
ROWS = "benchmarks/rows/"
TEXTS = (".md", ".yaml", ".yml", ".sh", ".toml")
# `train/drift`; `x` stands for a value in an f-string, and `fd_*_floor` for each extractor
METRIC_NAMES = "|".join(
    sorted({old.partition("/")[2].replace("*", "[a-z0-9]+") for old in OLD["metrics"]})
)
STAGES = "|".join(sorted({old.partition("/")[0] for old in OLD["metrics"]}))
METRICS = re.compile(rf"(?<![\w/])(?:{STAGES}|x)/(?:{METRIC_NAMES})(?![\w/])")
PROSE = re.compile(
    "|".join(
        rf"\b(?:{forms})\b" if word == "Fork" else rf"(?i:\b(?:{forms})\b)"
        for word, forms in OLD["prose"].items()
    )
)


def tracked(root: Path) -> list[str]:
    """Names of the files that git tracks, or all of them outside of a repository."""
    if not (root / ".git").exists():
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    result = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    )
    return [name for name in result.stdout.splitlines() if (root / name).is_file()]


def is_source(name: str) -> bool:
    return name.startswith(tuple(f"{folder}/" for folder in SOURCE))


@functools.cache
def python_nodes(root: Path) -> list[tuple[str, list[ast.AST]]]:
    """Python files with their nodes, which are listed once for all checks."""
    names = [name for name in tracked(root) if name.endswith(".py")]
    return [(name, [*ast.walk(ast.parse((root / name).read_text()))]) for name in names]


def bound_names(node: ast.AST) -> list[str]:
    """Names that a node defines: functions, arguments, variables, aliases, keywords of calls."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.arg() | ast.keyword():
            return [node.arg] if node.arg else []
        case ast.Name(ctx=ast.Store()):
            return [node.id]
        case ast.Attribute(ctx=ast.Store()):
            return [node.attr]
        case ast.alias() | ast.MatchAs() | ast.MatchStar() | ast.ExceptHandler():
            name = node.asname if isinstance(node, ast.alias) else node.name
            return [name] if name else []
        case ast.MatchMapping():
            return [node.rest] if node.rest else []
    return []


def old_identifiers(root: Path) -> list[str]:
    """Identifiers of the old vocabulary; some plain words are refused in the source only."""
    results = []
    for file, nodes in python_nodes(root):
        words = OLD["identifiers"] | (OLD["identifiers_in_source"] if is_source(file) else {})
        for node in nodes:
            for name in bound_names(node):
                if (word := name.strip("_")) in words:
                    line = getattr(node, "lineno", getattr(node, "end_lineno", "?"))
                    results.append(f"{file}:{line}: {name}; use {words[word]}")
    return results


def renamed_modules(root: Path) -> list[str]:
    """Imports of our modules under a name that does not contain the module's own."""
    modules = {Path(name).stem for name in tracked(root) if name.endswith(".py")}
    return [
        f"{file}:{node.lineno}: {alias.name} as {alias.asname}"
        for file, nodes in python_nodes(root)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").split(".")[0] == "ravine")
        for alias in node.names
        if alias.asname and alias.name in modules and alias.name not in alias.asname
    ]


def old_config_keys(root: Path) -> list[str]:
    """Keys of configs that their class no longer takes, and classes with an old name."""
    results = []

    def visit(value: Any, file: str) -> None:
        if isinstance(value, list):
            for item in value:
                visit(item, file)
        if not isinstance(value, dict):
            return
        class_name = str(value.get("class_path", "")).rpartition(".")[2]
        if class_name in OLD["identifiers"]:
            results.append(f"{file}: {class_name}; use {OLD['identifiers'][class_name]}")
        renamed = OLD["config_keys"].get(class_name, {})
        for key in value.get("init_args") or {}:
            if key in renamed:
                results.append(f"{file}: {class_name}.{key}; use {renamed[key]}")
        for key, item in value.items():
            if str(key).strip("_") in OLD["identifiers"]:
                results.append(f"{file}: {key}; use {OLD['identifiers'][str(key).strip('_')]}")
            visit(item, file)

    for name in tracked(root):
        if name.startswith("configs/") and name.endswith(".yaml"):
            visit(yaml.safe_load((root / name).read_text()), name)
    return results


def strings(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """String constants with their lines; in an f-string, `x` stands for each value."""
    inside = set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            texts = [part.value if isinstance(part, ast.Constant) else "x" for part in node.values]
            yield node.lineno, "".join(map(str, texts))
        elif isinstance(value := getattr(node, "value", None), str) and id(node) not in inside:
            yield node.lineno, value  # type: ignore[attr-defined]


def texts(root: Path) -> Iterator[tuple[str, int, str]]:
    """The lines of pages, configs and scripts: file, number, text."""
    for name in tracked(root):
        if name.endswith(TEXTS) and name not in EXEMPT and not name.startswith(ROWS):
            for number, line in enumerate((root / name).read_text().splitlines(), 1):
                yield name, number, line


def old_metrics(root: Path) -> list[str]:
    """Metrics with an old name: in strings of Python, in configs and on pages."""
    lines = [*texts(root)]
    lines += [
        (file, number, text)
        for file, nodes in python_nodes(root)
        if file not in EXEMPT
        for number, text in strings(nodes)
    ]
    return [
        f"{file}:{number}: {match[0]}"
        for file, number, text in lines
        for match in METRICS.finditer(text)
    ]


def old_files(root: Path) -> list[str]:
    """Files with the name of an old module or preset, tests of it included."""
    return [
        name
        for name in tracked(root)
        if not name.startswith((ROWS, "."))
        and Path(name).name.split(".")[0].removeprefix("test_") in OLD["files"]
    ]


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def old_prose(root: Path) -> list[str]:
    """Words of the old vocabulary in docstrings, comments, messages, pages and configs."""
    lines = [*texts(root)]
    for file, nodes in python_nodes(root):
        if is_source(file) or file.startswith("benchmarks/"):
            lines += [
                (file, n, text) for n, text in strings(nodes) if re.search(r"\s", text.strip())
            ]
            lines += [(file, n, text) for n, text in comments((root / file).read_text())]
    return [
        f"{file}:{number}: {match[0]}"
        for file, number, text in lines
        for match in PROSE.finditer(text)
    ]


CHECKS = (
    old_identifiers,
    renamed_modules,
    old_config_keys,
    old_metrics,
    old_files,
    old_prose,
)


@pytest.mark.parametrize("check", CHECKS)
def test_no_word_of_the_old_vocabulary_is_left(check: Any) -> None:
    assert check(ROOT) == []


def test_the_list_has_about_300_identifiers_and_25_words_of_prose() -> None:
    assert len(OLD["identifiers"]) >= 300
    assert len(OLD["prose"]) == 25
    assert all(OLD["identifiers"].values())


def test_no_new_name_is_an_old_one() -> None:
    new_names = {*OLD["identifiers"].values()}
    assert new_names & OLD["identifiers"].keys() == set()


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (old_identifiers, "cli/a.py", "def let_go(): ..."),
        (old_identifiers, "cli/a.py", "class _Pen: ..."),
        (old_identifiers, "tests/a.py", "def f(*, rung): ..."),
        (old_identifiers, "cli/a.py", "for told in (): ..."),
        (old_identifiers, "cli/a.py", "self.headline = 1"),
        (old_identifiers, "cli/a.py", "import errors as diagnosis_\nimport os as theirs"),
        (old_identifiers, "cli/a.py", "f(two_sets=True)"),
        (old_identifiers, "cli/a.py", "try: ...\nexcept ValueError as culprit: ..."),
        (old_identifiers, "cli/a.py", "match x:\n    case [twin]: ..."),
        (old_identifiers, "cli/a.py", "for each in (): ..."),
        (renamed_modules, "cli/help_text.py", "from . import help_text as pages"),
        (renamed_modules, "tests/plots.py", "from ravine.cli import plots as curves"),
        (old_config_keys, "configs/a.yaml", "callbacks: [{class_path: CollapseAlarm}]"),
        (
            old_config_keys,
            "configs/a.yaml",
            "model: {class_path: ravine.Diffusion, init_args: {process: linear}}",
        ),
        (old_config_keys, "configs/a.yaml", "model: {init_args: {net: {rung: qkv}}}"),
        (old_metrics, "cli/a.py", "log('train/drift', 1)"),
        (old_metrics, "cli/a.py", "log(f'{stage}/zero_advantages', 1)"),
        (old_metrics, "cli/a.py", "log(f'val/fd_{name}_floor', 1)"),
        (old_metrics, "configs/a.yaml", "monitor: val/fid_ratio"),
        (old_metrics, "docs/a.md", "See `train/surrogate`."),
        (old_files, "strategies/weighting.py", ""),
        (old_files, "configs/shakespeare/seed_last.yaml", ""),
        (old_files, "tests/test_ladder.py", ""),
        (old_prose, "cli/a.py", '"""The judge of samples."""'),
        (old_prose, "cli/a.py", "x = 1  # let go of blocks"),
        (old_prose, "cli/a.py", "raise ValueError('two rungs are missing')"),
        (old_prose, "docs/a.md", "A module adopts the data."),
        (old_prose, "configs/a.yaml", "# The headline of the run."),
    ],
)
def test_a_planted_word_is_caught(tmp_path: Path, check: Any, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{text}\n")
    assert len(check(tmp_path)) == 1


def test_plain_words_stay_allowed_in_prose_and_in_names_of_tests(tmp_path: Path) -> None:
    for name, text in {
        "cli/a.py": '"""Each part of a page, and the rest; a fork of the process."""\n',
        "tests/a.py": "part, page, each = 1, 2, 3\n",
        "docs/a.md": "Read the rest of the page; `train/loss` and `runs/drift/x` are fine.\n",
        "configs/a.yaml": "data: {class_path: TextDataModule, init_args: {context_length: 8}}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert [fault for check in CHECKS for fault in check(tmp_path)] == []
