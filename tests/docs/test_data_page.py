"""docs/data.md: its training commands are accepted, and its tables equal the code."""

import re
from pathlib import Path

import pytest
from doc_pages import DOCS, commands

from ravine.cli.main import main
from ravine.datamodules.image_formats import IMAGE_SUFFIXES, MAX_PIXELS
from ravine.datamodules.tables import LABEL_NAMES, TEXT_NAMES

PAGE = (DOCS / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [c for c in commands(PAGE) if c[0] == "fit"], ids=" ".join)
def test_the_training_command_of_the_page_is_accepted(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--print_config"]) == 0
    out = capsys.readouterr().out
    for word in words:
        key, _, value = word.rpartition("=")
        if key.startswith("--data."):
            name = key.removeprefix("--data.")
            assert f"{name}: {value}" in out


def test_the_page_names_the_suffixes_and_columns_that_are_known() -> None:
    for suffix in IMAGE_SUFFIXES - {".png", ".apng", ".gif", ".webp", ".bmp", ".tif", ".tiff"}:
        assert suffix in PAGE
    assert f"{MAX_PIXELS:,} pixels" in PAGE
    rows = dict(
        re.findall(r"^\| `--data\.(\w+_column)` \| [^`|]*((?:`\w+`[, ]*(?:or )?)+)", PAGE, re.M)
    )
    assert set(re.findall(r"\w+", rows["text_column"])) - {"or"} == set(TEXT_NAMES)
    assert set(re.findall(r"\w+", rows["label_column"])) - {"or"} == set(LABEL_NAMES)
