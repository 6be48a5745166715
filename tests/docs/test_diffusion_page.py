"""docs/diffusion.md: its presets exist, its Python runs, and its commands are accepted."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ravine.cli.commands import method_flags
from ravine.cli.config import presets
from ravine.lightning_modules import Diffusion

PAGE = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()


def untrained() -> Diffusion:
    model = Diffusion(class_conditional=True, base_channels=8, time_embed_dim=16)
    model.channels, model.image_size, model.num_classes = 1, (8, 8), 10
    model.configure_model()
    return model


def test_the_page_names_exactly_the_installed_presets() -> None:
    named = set(re.findall(r"diffusion/(\w+)`", PAGE))
    there = {name for name in presets.list_presets() if name.startswith("diffusion/")}
    assert {f"diffusion/{name}" for name in named} == there


def test_the_commands_of_the_page_are_accepted() -> None:
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    for line in filter(None, lines):
        _, command, *words = shlex.split(line)
        if command == "fit":  # a preset and no flags
            assert words[0] == "--config"
            assert words[1] in presets.list_presets()
            continue
        flags = dict(method_flags.parse_flags(words))
        flags.pop("ckpt_path")
        known = method_flags.method_flags(getattr(Diffusion, command)).keys() | {"folder"}
        assert flags.keys() <= known, line
    named = re.findall(r"--model\.(\w+)=(\w+)", PAGE)
    for name, value in named:
        kind = {"class_conditional": bool, "class_dropout_prob": float, "num_steps": int}.get(
            name, str
        )
        extra = {"class_dropout_prob": {"class_conditional": True}}.get(name, {})
        Diffusion(**{name: kind(float(value)) if kind is float else kind(value)}, **extra)


def test_its_python_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = untrained()
    monkeypatch.setattr(Diffusion, "load_from_checkpoint", lambda path: model)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert Path("digits.png").exists()
    mean, std = (float(n) for n in re.findall(r"tensor\((\d+\.\d+)\)", capsys.readouterr().out))
    assert abs(mean - 3) < 0.03
    assert abs(std - 0.5) < 0.01
