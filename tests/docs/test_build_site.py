"""The documentation site: each page is in its navigation, and each public name on a page."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from doc_pages import DOCS

import ravine
from ravine import callbacks, datamodules, lightning_modules, strategies

ROOT = DOCS.parent
NOT_INDENTED = re.compile(r"# |lightning |(?:def|class|from) \w+[ (:]|\w+ = ")  # an example
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def script() -> ModuleType:
    """Import docs/build_site.py."""
    spec = importlib.util.spec_from_file_location("build_site", DOCS / "build_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = script()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages of the site as Markdown."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    SITE.stage(folder)
    return folder


def navigation(entry: object) -> list[str]:
    """The pages of mkdocs.yml, in order."""
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in navigation(part)]


CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
NAVIGATION = navigation(CONFIG["nav"])


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page(pages: Path) -> None:
    found = {p.relative_to(pages).as_posix() for p in pages.rglob("*.md")}
    assert sorted(NAVIGATION) == sorted(page for page in found if not page.startswith("source/"))
    assert {page.name for page in DOCS.rglob("*.md")} <= set(NAVIGATION)
    assert CONFIG["docs_dir"] == SITE.STAGED.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", [callbacks, strategies, datamodules, lightning_modules, ravine])
def test_every_public_name_of_a_package_is_on_its_page_with_a_docstring(
    package: ModuleType, pages: Path
) -> None:
    text = (pages / "api" / f"{package.__name__.removeprefix('ravine.')}.md").read_text()
    names = [name for name in package.__all__ if not name.startswith("_")]
    in_modules = SITE.MODULE_NAMES.get(package.__name__, ())
    headings = [*sorted(names), *(path.rpartition(".")[2] for path in in_modules)]
    assert re.findall(r"heading: (\w+)", text) == headings
    for path, name in zip(re.findall(r"^::: (\S+)", text, re.M), headings, strict=True):
        home, _, attribute = path.rpartition(".")
        documented = getattr(importlib.import_module(home), attribute)
        assert name not in names or documented is getattr(package, name)
        if inspect.isclass(documented):
            paragraphs = inspect.cleandoc(documented.__doc__ or "").split("\n\n")
            assert paragraphs[0], path
            assert [p for p in paragraphs if NOT_INDENTED.match(p)] == [], path


def test_every_public_class_and_every_name_that_a_page_imports_is_on_a_page_of_the_api(
    pages: Path,
) -> None:
    for package in SITE.API_PACKAGES:
        text = (pages / "api" / f"{package}.md").read_text()
        known = {*re.findall(r"heading: (\w+)|^\| `(\w+)`", text, re.M)}
        known = {name for pair in known for name in pair}
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                    assert node.name in known, f"{file}: {node.name}"
    everything = "".join(page.read_text() for page in pages.glob("api/*.md"))
    for page in pages.glob("*.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ravine"):
                    for alias in node.names:
                        named = getattr(importlib.import_module(str(node.module)), alias.name)
                        if inspect.isclass(named) or inspect.isroutine(named):
                            assert f"heading: {alias.name}\n" in everything, alias.name


def test_every_relative_link_of_the_site_is_a_page_or_a_figure(pages: Path) -> None:
    count = 0
    for page in pages.rglob("*.md"):
        for target in LINK.findall(SITE.CODE.sub("", page.read_text())):
            count += 1
            assert (page.parent / target).is_file(), f"{page.relative_to(pages)}: {target}"
    assert count > 80


def test_links_to_source_files_lead_to_the_repository_if_there_is_one() -> None:
    text = "[a](../callbacks/base.py) [b](data.md#images) `[c](../x.py)` [d](../README.md)"
    page = DOCS / "callbacks.md"
    kept = "[b](data.md#images) `[c](../x.py)` [d](results.md)"
    assert SITE.rewrite_links(text, page, "callbacks.md", "https://host/ravine") == (
        f"[a](https://host/ravine/blob/main/callbacks/base.py) {kept}"
    )
    assert SITE.rewrite_links(text, page, "callbacks.md", None) == (
        f"[a](source/callbacks/base.py.md) {kept}"
    )


def test_a_link_that_shows_the_name_of_a_file_shows_the_title_of_its_page(pages: Path) -> None:
    titles = {"runs.md": "Runs"}
    for shown, kept in (("runs.md", "Runs"), ("docs/runs.md", "Runs"), ("this", "this")):
        assert SITE.name_links(f"[{shown}](runs.md#a)", "x.md", titles) == f"[{kept}](runs.md#a)"
    for page in pages.glob("*.md"):
        assert page.read_text().startswith("# ")
        assert re.findall(r"\[[\w/]+\.md\]", SITE.CODE.sub("", page.read_text())) == []


def test_the_site_names_no_font_or_script_of_the_network() -> None:
    assert CONFIG["theme"]["font"] is False
    assert "extra_javascript" not in CONFIG
    assert all((DOCS / sheet).is_file() for sheet in CONFIG["extra_css"])
    for text in ('<script async src="https://host/a.js">', '<link rel="x" href="https://host/b">'):
        assert SITE.REMOTE.search(text)
    assert not SITE.REMOTE.search('<a href="https://host">x</a> <script src="assets/a.js">')


def test_a_long_command_continues_on_the_next_line_before_a_flag() -> None:
    line = "lightning fit " + " ".join(f"--trainer.max_steps={n}" for n in range(9))
    text = f"{line}\n```bash\n{line}\ncd runs\n```\n```python\n{line}\n```\n"
    wrapped = SITE.wrap_commands(text)
    block = wrapped.partition("```bash\n")[2].partition("cd runs\n")[0]
    assert max(map(len, block.splitlines())) <= SITE.COMMAND_WIDTH + 2
    assert block.replace(" \\\n   ", "") == f"{line}\n"
    assert wrapped.count("\\\n") == block.count("\\\n") == 3
