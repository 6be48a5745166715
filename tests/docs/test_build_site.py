"""The documentation site: each page is in its navigation, and each public name on a page."""

import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from doc_pages import DOCS

import ravine
from ravine import callbacks, datamodules, lightning_modules, strategies
from ravine.cli.main import main

ROOT = DOCS.parent
NEW_PAGES = ["index", "best_checkpoint", "early_stopping", "loggers", "seeds", "print_config"]
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
    assert re.findall(r"heading: (\w+)", text) == sorted(names)
    for path, name in zip(re.findall(r"^::: (\S+)", text, re.M), sorted(names), strict=True):
        home, _, attribute = path.rpartition(".")
        documented = getattr(importlib.import_module(home), attribute)
        assert documented is getattr(package, name)
        if inspect.isclass(documented):
            paragraphs = inspect.cleandoc(documented.__doc__ or "").split("\n\n")
            assert paragraphs[0], path
            assert [p for p in paragraphs if NOT_INDENTED.match(p)] == [], path


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
    assert not {"extra_javascript", "extra_css"} & set(CONFIG)
    for text in ('<script async src="https://host/a.js">', '<link rel="x" href="https://host/b">'):
        assert SITE.REMOTE.search(text)
    assert not SITE.REMOTE.search('<a href="https://host">x</a> <script src="assets/a.js">')


def page_commands() -> list[str]:
    """The commands in the bash blocks of the short pages, each once."""
    text = "\n".join((DOCS / f"{name}.md").read_text() for name in NEW_PAGES)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    return [*dict.fromkeys(line for line in lines if line.startswith("lightning "))]


def test_every_command_of_the_short_pages_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = "--trainer.max_steps=51 --trainer.val_check_interval=51 --data.source=embedded "
    tiny += "--trainer.limit_val_batches=1 "
    tiny += "--model.num_layers=1 --model.d_model=16 --data.context_length=8 --data.batch_size=2"
    fit = ["fit", "--config", "shakespeare/quick", *tiny.split()]
    assert main(fit) == 0  # the run that `last` and `best` name
    for line in page_commands():
        words = shlex.split(line)[1:]
        if words[0] in ("fit", "test") and "--print_config" not in words:
            words.append("--print_config")
        assert main(words) == 0, line
