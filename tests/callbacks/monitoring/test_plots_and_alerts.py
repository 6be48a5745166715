"""Alarm, curves and table work on whatever logs and shows what they look at, or say what to do."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers

from ravine.callbacks import MetricAlert, MetricPlot, RolloutTable
from ravine.cli.trainer import Trainer
from ravine.datamodules import PromptDataModule, TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import CharacterFraction, LanguageModel, Reinforce
from ravine.lightning_modules.nn import Transformer


class Scripted(NetInInit):
    """Logs what it is told to, a value a step, and shows two texts."""

    def __init__(self, **values: list[float]) -> None:
        super().__init__(batch_size=32)
        self.values, self.at = values, 0

    def training_step(self, batch, batch_idx):
        for name, row in self.values.items():
            self.log(f"train/{name}", row[min(self.at, len(row) - 1)])
        self.at += 1
        return super().training_step(batch, batch_idx)

    def last_samples(self) -> list[dict[str, Any]]:
        return [{"prompt": "O", "text": f" [bold]\x1b[31m\nline {self.at}", "reward": 0.5}] * 9


def fit(
    module: L.LightningModule,
    callback: L.Callback,
    folder: Path,
    steps: int,
    data: L.LightningDataModule | None = None,
    **how: Any,
) -> str:
    options = {"log_every_n_steps": 1, "limit_val_batches": 0, "accelerator": "cpu"} | how
    trainer = Trainer(max_steps=steps, callbacks=[callback], default_root_dir=folder, **options)
    trainer.fit(module, data)
    return str(trainer.log_dir)


def test_the_alarm_rings_once_when_texts_die_and_says_when_they_live_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarm = MetricAlert()
    fractions = {
        "frac_unique_texts": [1, 1, 0.01, 0.01, 1, 0.2],
        "frac_in_vocab": [0.8, 0.7, 0.3, 0.19, 0.19],
    }
    fit(Scripted(**fractions), alarm, tmp_path, 6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "train/" in line]
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 4", "step 5", "step 6"]
    assert "train/frac_unique_texts is 0.01, below 0.5: what is sampled has degenerated" in lines[0]
    assert "train/frac_in_vocab is 0.19, below 0.2 (it began at 0.8)" in lines[1]
    assert "train/frac_unique_texts has recovered" in lines[2]
    assert [each["step"] for each in alarm.events] == [3, 4, 6]


def test_the_alarm_is_silent_while_texts_live(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Scripted(frac_unique_texts=[1.0], jaccard_distance_mean=[0.99], frac_in_vocab=[0.8, 0.5]),
        alarm := MetricAlert(), tmp_path, 5)  # fmt: skip
    assert not alarm.events
    assert "degenerated" not in capsys.readouterr().out


def test_short_answers_have_no_word_n_grams_and_ring_no_alarm(tmp_path: Path) -> None:
    fit(
        Scripted(frac_unique_texts=[0.9], jaccard_distance_mean=[0.0]),
        alarm := MetricAlert(),
        tmp_path,
        3,
    )
    assert not alarm.events
    fit(Scripted(jaccard_distance_mean=[0.9, 0.9, 0.4]), alarm := MetricAlert(), tmp_path, 3)
    assert [each["metric"] for each in alarm.events] == ["train/jaccard_distance_mean"]


def test_the_alarm_goes_on_with_what_it_has_seen() -> None:
    alarm, again = MetricAlert(), MetricAlert()
    alarm.first_values, alarm.active = {"train/frac_in_vocab": 0.8}, ["train/frac_in_vocab"]
    again.load_state_dict(alarm.state_dict())
    assert again.state_dict() == alarm.state_dict()


@pytest.mark.parametrize("module", [NetInInit(), NetInConfigureModel(), TwoOptimizers()])
def test_a_module_that_logs_nothing_of_it_is_refused_by_name(
    module: L.LightningModule, tmp_path: Path
) -> None:
    for callback in (MetricAlert(), MetricPlot(["train/reward"]), RolloutTable()):
        with pytest.raises(ValueError, match=type(module).__name__) as error:
            fit(module, callback, tmp_path, 2)
        assert "\n" not in str(error.value)
    fit(module, MetricPlot(["train_loss"]), tmp_path, 2)  # of their own they are taken


def test_an_alarm_on_a_metric_that_nobody_logs_is_refused(tmp_path: Path) -> None:
    alarm = MetricAlert(min_value={"train/frac_unique_texts": 0.5, "train/distnct": 0.5})
    with pytest.raises(ValueError, match="monitors 'train/distnct', and no metric of that name"):
        fit(Scripted(frac_unique_texts=[1.0]), alarm, tmp_path, 2)


def test_a_curve_that_is_missing_is_said(tmp_path: Path, capsys) -> None:
    fit(Scripted(reward=[0.1]), MetricPlot(["train/reward", "train/e"]), tmp_path, 2)
    assert "MetricPlot: Scripted logs no train/e\n" in capsys.readouterr().out


def test_curves_are_drawn_and_continue(tmp_path: Path) -> None:
    curves = MetricPlot(["train/reward", "val/reward"])
    folder = fit(Scripted(reward=[0.1, 0.2, 0.3]), curves, tmp_path, 3)
    assert (Path(folder) / "curves.png").stat().st_size > 5000
    kept = curves.state_dict()["train/reward"]
    assert [step for step, _ in kept] == [1, 2, 3]
    assert [value for _, value in kept] == pytest.approx([0.1, 0.2, 0.3])
    again = MetricPlot(["train/reward"])
    again.load_state_dict(curves.state_dict())
    assert again.state_dict()["train/reward"] == kept


def test_the_table_shows_first_due_and_last_and_commands_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit(Scripted(), RolloutTable(every_n_steps=3, num_samples=2), tmp_path, 5)
    said = capsys.readouterr().out
    for step in (1, 3, 5):
        assert f"written in step {step}" in said
    assert "written in step 2" not in said
    assert "\x1b[31m" not in said
    assert "[bold]" in said
    written = (Path(folder) / "rollouts.txt").read_text()
    assert written.count("reward 0.5") == 6
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        RolloutTable(every_n_steps=0)


class Validated(Scripted):
    """Writes in validations too."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.rows = [{"text": "of a validation", "reward": 0.5}]

    def training_step(self, batch: Any, index: int) -> Any:
        self.rows = [{"text": "of a step", "reward": 0.5}]
        return super().training_step(batch, index)

    def last_samples(self) -> list[dict[str, Any]]:
        return self.rows


def test_the_last_table_shows_the_last_step_and_no_validation(tmp_path: Path) -> None:
    table = RolloutTable(every_n_steps=10)
    folder = fit(Validated(), table, tmp_path, 2, limit_val_batches=1)
    written = (Path(folder) / "rollouts.txt").read_text()
    assert written.count("of a step") == 2
    assert "of a validation" not in written


def certain(self: Transformer, tokens: torch.Tensor, *cache: Any) -> torch.Tensor:
    """Logits of a net that writes a's and nothing else."""
    logits = FORWARD(self, tokens, *cache) * 0
    return logits + 50 * (torch.arange(self.vocab_size) == ord("a"))


FORWARD = Transformer.forward


@pytest.mark.filterwarnings("ignore:all 16 samples weigh 0")
@pytest.mark.parametrize("forced", [False, True])
def test_the_alarm_is_silent_on_a_base_and_rings_if_all_texts_are_one(
    forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("".join(python_docs_text())[:20_000])
    base = LanguageModel(num_layers=1, d_model=16, num_heads=2, zero_init_residual=False)
    base.lr = 0.03
    data = TextDataModule(tmp_path / "text.txt", context_length=96, batch_size=8, tokenizer="bytes")
    trainer = Trainer(max_steps=40, default_root_dir=tmp_path, limit_val_batches=0, logger=False)
    trainer.fit(base, data)
    trainer.save_checkpoint(tmp_path / "base.ckpt")
    if forced:
        monkeypatch.setattr(Transformer, "forward", certain)
    policy = Reinforce(str(tmp_path / "base.ckpt"), [CharacterFraction("e")], max_new_tokens=80)
    policy.lr = 0.0
    prompts = PromptDataModule(tmp_path / "text.txt", prompt_length=8, batch_size=16)
    fit(policy, alarm := MetricAlert(), tmp_path, 2, data=prompts)
    assert bool(alarm.events) is forced
