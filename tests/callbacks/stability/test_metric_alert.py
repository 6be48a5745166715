"""MetricAlert warns once of a metric below its bound, and refuses a module that logs none."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from scripted_module import Scripted, fit

from ravine.callbacks import MetricAlert, MetricPlot, RolloutTable
from ravine.cli.trainer import Trainer
from ravine.datamodules import PromptDataModule, TextDataModule
from ravine.datamodules.text import python_docs_text
from ravine.lightning_modules import CharacterFraction, LanguageModel, Reinforce
from ravine.lightning_modules.nn import Transformer


def test_the_alert_is_logged_once_at_a_collapse_and_again_at_recovery(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarm = MetricAlert()
    fractions = {
        "frac_unique_texts": [1, 1, 0.01, 0.01, 1, 0.2],
        "frac_in_vocab": [0.8, 0.7, 0.3, 0.19, 0.19],
    }
    fit(Scripted(**fractions), alarm, tmp_path, 6)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if "train/" in line and line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 3", "step 4", "step 5", "step 6"]
    assert "train/frac_unique_texts is 0.01, below 0.5: the samples have degenerated" in lines[0]
    assert "train/frac_in_vocab is 0.19, below 0.2 (at first 0.8)" in lines[1]
    assert "train/frac_unique_texts has recovered" in lines[2]
    assert [each["step"] for each in alarm.events] == [3, 4, 6]


def test_no_alert_is_logged_for_diverse_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Scripted(frac_unique_texts=[1.0], jaccard_distance_mean=[0.99], frac_in_vocab=[0.8, 0.5]),
        alarm := MetricAlert(), tmp_path, 5)  # fmt: skip
    assert not alarm.events
    assert "degenerated" not in capsys.readouterr().out


def test_short_answers_without_word_n_grams_give_no_alert(tmp_path: Path) -> None:
    fit(
        Scripted(frac_unique_texts=[0.9], jaccard_distance_mean=[0.0]),
        alarm := MetricAlert(),
        tmp_path,
        3,
    )
    assert not alarm.events
    fit(Scripted(jaccard_distance_mean=[0.9, 0.9, 0.4]), alarm := MetricAlert(), tmp_path, 3)
    assert [each["metric"] for each in alarm.events] == ["train/jaccard_distance_mean"]


def test_the_alert_resumes_with_its_state() -> None:
    alarm, again = MetricAlert(), MetricAlert()
    alarm.first_values, alarm.active = {"train/frac_in_vocab": 0.8}, ["train/frac_in_vocab"]
    again.load_state_dict(alarm.state_dict())
    assert again.state_dict() == alarm.state_dict()


@pytest.mark.parametrize("module", [NetInInit(), NetInConfigureModel(), TwoOptimizers()])
def test_a_module_that_does_not_log_the_metric_is_refused_by_name(
    module: L.LightningModule, tmp_path: Path
) -> None:
    for callback in (MetricAlert(), MetricPlot(["train/reward"]), RolloutTable()):
        with pytest.raises(ValueError, match=type(module).__name__) as error:
            fit(module, callback, tmp_path, 2)
        assert "\n" not in str(error.value)
    fit(module, MetricPlot(["train_loss"]), tmp_path, 2)  # of their own they are taken


def test_an_alert_on_a_metric_that_is_not_logged_is_refused(tmp_path: Path) -> None:
    alarm = MetricAlert(min_value={"train/frac_unique_texts": 0.5, "train/distnct": 0.5})
    with pytest.raises(
        ValueError,
        match=r"monitors 'train/distnct', which Scripted does not log; .*; use MetricAlert",
    ):
        fit(Scripted(frac_unique_texts=[1.0]), alarm, tmp_path, 2)


def certain(self: Transformer, tokens: torch.Tensor, *cache: Any) -> torch.Tensor:
    """Logits of a net that writes a's and nothing else."""
    logits = FORWARD(self, tokens, *cache) * 0
    return logits + 50 * (torch.arange(self.vocab_size) == ord("a"))


FORWARD = Transformer.forward


@pytest.mark.filterwarnings("ignore:all 16 advantages are 0")
@pytest.mark.parametrize("forced", [False, True])
def test_no_alert_is_logged_for_a_base_model_and_one_is_logged_for_equal_texts(
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
