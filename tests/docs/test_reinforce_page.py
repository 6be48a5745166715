"""docs/reinforce.md: its presets exist, its reward runs, and its study gives its figures."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from doc_pages import files

from ravine.cli.config import presets
from ravine.cli.main import main
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.nn.transformer import with_defaults

# in eight characters of an untrained net a letter may well be missing
pytestmark = pytest.mark.filterwarnings("ignore:all (8|16) advantages are 0")
PAGE = (Path(__file__).parents[2] / "docs" / "reinforce.md").read_text()
TINY = [
    "--model.max_new_tokens=8",
    "--data.prompt_length=8",
    "--data.num_val_prompts=8",
    "--data.batch_size=8",
    "--data.source=embedded",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.precision=32-true",
    "--trainer.accelerator=cpu",
]


def test_the_page_names_exactly_the_installed_presets() -> None:
    shipped = {name for name in presets.list_presets() if name.startswith("reinforce/")}
    assert "`reinforce/avoid_e_v1` to `avoid_e_v6`" in PAGE
    between = {f"reinforce/avoid_e_v{i}" for i in range(2, 7)}
    assert set(re.findall(r"reinforce/\w+", PAGE)) | between == shipped


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model nobody has trained, in the user's folder."""
    from ravine.cli.trainer import Trainer

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    trainer = Trainer(max_steps=1, logger=False, limit_val_batches=0, accelerator="cpu")
    model = LanguageModel(num_layers=1, d_model=16, num_heads=2, zero_init_residual=False)
    trainer.fit(model, TextDataModule(source="embedded", context_length=16, batch_size=8))
    trainer.save_checkpoint("base.ckpt")
    return "--model.base_checkpoint=base.ckpt"


def test_the_reward_of_the_page_trains_by_the_command_beside_it(base: str) -> None:
    Path("mine.py").write_text(files(PAGE)["mine.py"])
    words = ["--model.rewards=RewardFunction", "--model.rewards.function=mine.reward"]
    assert words[1] in PAGE
    assert main(["fit", "--config", "reinforce/quick", base, *words, *TINY]) == 0


def test_the_config_of_the_page_trains_on_answers(base: str, capsys) -> None:
    for name in ("mine.py", "answers.yaml"):
        Path(name).write_text(files(PAGE)[name])
    (line,) = re.findall(r"lines like (\{.*\})", PAGE)
    Path("answers.jsonl").write_text(f"{line}\n" * 12)
    config = ["--config", "reinforce/quick", "--config", "answers.yaml"]
    assert main(["fit", *config, base, *TINY, "--data.batch_size=4"]) == 0
    assert "right 0" in capsys.readouterr().out


@pytest.mark.parametrize("version", range(1, 7))
def test_each_of_the_six_rewards_trains_with_the_overlay(version: int, base: str) -> None:
    config = f"reinforce/avoid_e_v{version}"
    words = ["fit", "--config", config, "--config", "reinforce/kl", base, *TINY]
    if version != 6:  # what is the same for all is tried once
        words = [*words, "--trainer.fast_dev_run=true"]
    assert main(words) == 0


def test_the_base_presets_differ_from_the_defaults_only() -> None:
    for name in ("base", "quick_base"):
        config = yaml.safe_load(Path(presets.find_config(f"reinforce/{name}")).read_text())
        model = config["model"]
        shape = model.get("init_args", {}) if isinstance(model, dict) else {}
        LanguageModel(65, config["data"]["init_args"]["context_length"], **shape)
        assert not {k for k, v in shape.items() if with_defaults({})[k] == v}


def test_the_study_measures_the_slopes_of_what_the_page_says(monkeypatch) -> None:
    """At any B where that is exact, and of the limits at B = 512."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    study = importlib.import_module("binary_rewards")
    t = study.T
    torch.testing.assert_close(study.slopes("rloo", 8), torch.ones_like(t))
    torch.testing.assert_close(study.slopes("rejection", 8), (1 - (1 - t) ** 8) / t)
    torch.testing.assert_close(study.slopes("grpo", 2), torch.ones_like(t))
    middle = (t > 0.1) & (t < 0.9)
    grpo = study.slopes("grpo", 512)[middle] * (t * (1 - t)).sqrt()[middle]
    assert (grpo - 1).abs().max() < 0.01


def test_a_mistake_in_a_reward_is_one_line(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nans.py").write_text("def reward(texts):\n    return [float('nan')] * len(texts)\n")
    words = ["--model.rewards=RewardFunction", "--model.rewards.function=nans.reward"]
    assert main(["fit", "--config", "reinforce/quick", base, *words, *TINY]) == 2
    said = capsys.readouterr().err
    assert "the reward nans is nan for sample 0 (" in said
    assert "Traceback" not in said
