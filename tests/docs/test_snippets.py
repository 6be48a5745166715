"""The blocks of Python on the pages of lectures print the text below them, each by itself."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import DOCS

PAGES = ("cs336_lecture2.md", "lectures.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n+(?:^```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def list_blocks() -> Iterator[tuple[str, str, str]]:
    """Page with the heading of the section, code and text of each block."""
    for page in PAGES:
        text = (DOCS / page).read_text()
        for match in BLOCK.finditer(text):
            (heading,) = re.findall(r"^## (.*)$", text[: match.start()], re.MULTILINE)[-1:]
            yield f"{page}: {heading}", match[1], match[2]


BLOCKS = list(list_blocks())


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize(
    ("code", "expected"), [block[1:] for block in BLOCKS], ids=[b[0] for b in BLOCKS]
)
def test_each_block_of_the_page_prints_the_text_below_it(
    code: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == expected


def test_the_page_of_cs336_has_a_block_for_each_demonstration_of_the_lecture():
    headings = {heading.partition(": ")[2] for heading, *_ in BLOCKS if heading.startswith("cs336")}
    assert headings >= {
        "Sums in low precision",
        "Order of a product of matrices",
        "FLOPs of a forward and a backward pass",
        "Memory of a tiny model",
        "AdaGrad by hand",
        "Tokens in a memory-mapped file",
        "Checkpoints",
    }
