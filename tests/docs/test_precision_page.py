"""docs/precision.md: its code prints the figures below it, and its presets exist."""

import re
from pathlib import Path

import pytest

from ravine.cli.config import presets

PAGE = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_each_figure_is_printed_by_the_code_above_it(capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") == 5
    names: dict = {"__name__": "page"}
    for code, expected in blocks:
        exec(code, names)
        assert capsys.readouterr().out == expected


def test_the_presets_on_the_page_exist() -> None:
    for name in re.findall(r"--config (\S+)", PAGE):
        assert name in presets.list_presets()
