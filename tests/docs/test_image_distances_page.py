"""docs/image_distances.md runs as it is written."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/image_distances.md"


@pytest.mark.filterwarnings("ignore:The '\\w+' does not have many workers")
def test_the_page_on_distances_measures_noise_as_far_from_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(script, "painter.py", "exec"), {"__name__": "__main__"})
    distance, floor = map(float, capsys.readouterr().out.split("\n")[-2].split())
    assert distance > 50 * floor > 0
