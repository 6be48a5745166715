"""docs/finding_names.md is true: its commands work, and its list of kinds is complete."""

import re
import sys
from pathlib import Path

import pytest
from doc_pages import DOCS, commands

from ravine.cli.discovery import registry
from ravine.cli.main import main

PAGE = (DOCS / "finding_names.md").read_text()


@pytest.mark.parametrize("words", commands(PAGE), ids=" ".join)
def test_a_command_of_the_page_works(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(words) == 0


def test_the_page_names_every_kind() -> None:
    (sentence,) = re.findall(r"prints the kinds: (.*?)\.", PAGE)
    assert re.findall(r"`(\w+)`", sentence) == [*registry.KINDS]
