"""Presets that are cut at a random step and continued as they print equal the uninterrupted run.

The benchmark does this for every preset, with the command typed in a shell.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from ravine.cli.config import saved_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "__loaded__"):
        spec.loader.exec_module(module)
        module.__loaded__ = True
    return module


load("resume_cover")
resume_presets = load("resume_presets")

pytestmark = pytest.mark.filterwarnings("ignore")
# callbacks with state and bases of their own; none needs a data set
PRESETS = ("spam/quick", "diffusion/lora", "reinforce/quick")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_continued_by_its_printed_command_equals_the_uninterrupted_run(
    preset: str, tmp_path: Path
) -> None:
    base = None
    if name := resume_presets.BASES.get(preset):
        base = resume_presets.train_base(name, tmp_path / "base")
    (tmp_path / "run").mkdir()
    result = resume_presets.cut_and_resume(preset, tmp_path / "run", base)
    assert result["outcome"] == "bitwise", result


def test_a_part_of_the_configuration_that_does_not_come_back_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        return resume_presets.cut_and_resume("spam/quick", tmp_path / name, None)

    with monkeypatch.context() as patch:
        patch.setattr(saved_config, "callbacks_argv", lambda *args: [])
        with pytest.raises(RuntimeError, match="fit --ckpt_path"):  # other optimizers are refused
            cut("callbacks")
    names = tuple(n for n in saved_config.RESTORED_ARGS if n != "limit_train_batches")
    monkeypatch.setattr(saved_config, "RESTORED_ARGS", names)
    assert cut("arguments")["outcome"] == "different"


def test_each_preset_with_a_model_is_cut() -> None:
    names = resume_presets.presets()
    assert {"spam", "gpt2/124m", "reinforce/avoid_e_v6", "shakespeare/qlora"} <= {*names}
    assert not {"debug/profiler", "strategy/zero3", "logger/csv"} & {*names}
    assert {*resume_presets.BASES} <= {*names}
