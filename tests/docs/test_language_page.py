"""docs/language.md: its presets exist, its Python runs, and its commands are accepted."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ravine.cli.config import presets
from ravine.datamodules import ByteTokenizer
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.nn.attention import LEARNED_PROJECTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "language.md").read_text()


def test_every_preset_on_the_page_exists() -> None:
    named = re.findall(r"^\| `((?:bigram|running|attention|transformer)\w*)` ", PAGE, re.MULTILINE)
    stages = ("bigram", "running_mean", "attention_", "transformer_")
    listed = [name.removeprefix("shakespeare/") for name in presets.list_presets()]
    assert sorted(named) == [name for name in listed if name.startswith(stages)]
    assert len(named) == 9
    for name in re.findall(r"--config (\S+)", PAGE):
        if "`" not in name:
            assert name in presets.list_presets()


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    model = LanguageModel(256, 64, num_layers=1, d_model=16, num_heads=2, zero_init_residual=False)
    model.tokenizer = ByteTokenizer()
    model.configure_model()
    monkeypatch.setattr(LanguageModel, "load_from_checkpoint", lambda path: model)
    monkeypatch.setitem(LEARNED_PROJECTIONS, "kv", ())  # the page sets it; undone after the test
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.startswith("ROMEO:")
    written, forced = names["written"], names["sequence_logprobs"](
        model.net, names["prompts"], names["written"], names["DecodingConfig"](0.8)
    )  # fmt: skip
    torch.testing.assert_close(written.logprobs, forced, rtol=0, atol=1e-5)
