"""The language model: its metric is the loss of the split, and training beats bigrams."""

import math
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from ravine.datamodules import TextDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import LanguageModel, SpamClassifier, TaskModule

# Two-byte characters, one of them at the very end, which is predicted and predicts nothing.
POEM = "".join(f"Verse {i}: the café fox jumps över {i * i} lazy dogs.\n" for i in range(60)) + "é"


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def poem(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text(POEM, encoding="utf-8")
    return path


def data_of(path: Path | None, **options: Any) -> TextDataModule:
    options = {"context_length": 16, "batch_size": 5, "seed": 0} | options
    return TextDataModule(path, **options)


def tiny(**shape: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**{"num_layers": 1, "d_model": 16, "num_heads": 2} | shape)


def trainer(**options: Any) -> L.Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)


def validate(model: LanguageModel, data: TextDataModule) -> dict[str, float]:
    return trainer().validate(model, data, verbose=False)[0]


def test_validation_is_the_mean_over_every_predicted_character_of_the_split(poem):
    model, data = tiny(zero_init_residual=False), data_of(poem)
    report = validate(model, data)
    text = POEM[int(len(POEM) * 0.9) :]
    ids = data.tokenizer.encode(text)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):  # side by side; the last one is short
            targets = ids[start + 1 : start + 17]
            logits = model(ids[start : start + len(targets)][None])[0]
            total += F.cross_entropy(logits, targets, reduction="sum").item()
    loss = total / (len(ids) - 1)
    size = len(text[1:].encode())
    assert size > len(text) - 1  # the poem has characters of two bytes
    assert report["val/loss"] == pytest.approx(loss, rel=1e-6)
    assert report["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert report["val/bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-6)


def test_validation_does_not_depend_on_the_batch_size(poem):
    model = tiny(zero_init_residual=False)
    losses = [validate(model, data_of(poem, batch_size=b))["val/loss"] for b in (1, 4, 100)]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)


def test_the_loss_of_an_untrained_model_is_that_of_guessing(poem):
    model = tiny()
    report = validate(model, data_of(poem))
    assert report["val/loss"] == pytest.approx(math.log(len(set(POEM))), rel=1e-6)
    assert report["val/perplexity"] == pytest.approx(len(set(POEM)), rel=1e-5)


def test_the_test_loop_reports_the_metrics_of_validation(poem):
    model, data = tiny(zero_init_residual=False), data_of(poem)
    report = trainer().test(model, data, verbose=False)[0]
    assert {k.replace("test", "val"): v for k, v in report.items()} == validate(model, data)


def test_training_step_changes_nothing_and_repeats(poem):
    model, data = tiny(zero_init_residual=False), data_of(poem)
    validate(model, data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = next(iter(data.train_dataloader()))
    model.log = lambda *args, **kwargs: None
    losses = [model.training_step(batch, i) for i in range(2)]
    assert losses[0].equal(losses[1])
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    expected = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert model.count_units(batch) == 5 * 16
    assert model.unit == "tokens"


def bigram_loss(train: torch.Tensor, val: torch.Tensor, vocabulary: int) -> float:
    """Cross-entropy of add-one bigram counts: no model that sees one character does better."""
    pairs = train[:-1] * vocabulary + train[1:]
    counts = torch.bincount(pairs, minlength=vocabulary**2).reshape(vocabulary, vocabulary) + 1.0
    probability = counts / counts.sum(1, keepdim=True)
    return -probability[val[:-1], val[1:]].log().mean().item()


@pytest.mark.parametrize(
    "kind", [{}, {"activation": "swiglu", "norm": "layernorm", "tie_embeddings": True}]
)
def test_two_hundred_steps_on_the_embedded_text_beat_bigrams(kind):
    data = data_of(None, source="embedded", context_length=32, batch_size=32)
    model = tiny(d_model=64, **kind)
    model.lr = 1e-2
    fit = trainer(max_steps=200, limit_val_batches=0, gradient_clip_val=1.0)
    fit.fit(model, data)
    ids = data.corpus.tokens.long()
    cut = int(len(ids) * 0.9)
    floor = bigram_loss(ids[:cut], ids[cut:], data.tokenizer.vocab_size)
    assert validate(model, data)["val/loss"] < floor - 0.1


def test_a_checkpoint_alone_restores_the_trained_model(poem, tmp_path):
    model, data = tiny(), data_of(poem)
    fit = trainer(max_steps=3, limit_val_batches=0)
    fit.fit(model, data)
    fit.save_checkpoint(tmp_path / "poem.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "poem.ckpt")
    ids = model.tokenizer.encode("the fox")[None]
    assert loaded.tokenizer.state_dict() == model.tokenizer.state_dict()
    assert loaded.context_length == 16
    assert not loaded.training
    assert loaded(ids).equal(model(ids))
    assert loaded.generate("the", max_new_tokens=20) == model.generate("the", max_new_tokens=20)


def test_a_file_that_would_expand_in_memory_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "small.ckpt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
            small.getinfo(name).external_attr = 0  # torch writes no rights of a file
    assert torch.load(tmp_path / "small.ckpt", weights_only=True)  # torch unpacks what it finds
    with pytest.raises(RuntimeError, match="its records are compressed"):
        LanguageModel.load_from_checkpoint(tmp_path / "small.ckpt")


def test_a_checkpoint_of_another_task_is_refused_by_name(poem, tmp_path):
    model = tiny()
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(model, data_of(poem))
    fit.save_checkpoint(tmp_path / "poem.ckpt")
    with pytest.raises(
        ValueError, match="written by LanguageModel, but the model is a SpamClassifier"
    ):
        SpamClassifier.load_from_checkpoint(tmp_path / "poem.ckpt")
    other = tmp_path / "other.txt"
    other.write_text("abc def " * 100)
    with pytest.raises(
        ValueError, match=r"come from different texts; .*; use the text that the model was"
    ):
        trainer().validate(tiny(), data_of(other), ckpt_path=tmp_path / "poem.ckpt", verbose=False)


def test_sizes_come_from_the_data_and_contradictions_are_refused(poem):
    model = tiny()
    validate(model, data_of(poem))
    assert (model.vocab_size, model.context_length) == (len(set(POEM)), 16)
    with pytest.raises(
        ValueError, match=r"windows of .* 17 tokens; .*TextDataModule\(context_length=16"
    ):
        validate(model, data_of(poem, context_length=17))
    with pytest.raises(
        ValueError, match=r"vocab_size=3 differs from the \d+ tokens .*; remove vocab_size"
    ):
        validate(tiny(vocab_size=3), data_of(poem))
    longer = tiny(context_length=64)
    validate(longer, data_of(poem))
    assert longer.context_length == 64


@pytest.mark.parametrize(
    "wrong", [{"num_heads": 3}, {"num_layers": 0}, {"vocab_size": 0}, {"context_length": -1}]
)
def test_an_invalid_shape_is_refused_before_any_work(wrong):
    (name,) = wrong
    with pytest.raises(
        UsageError, match=rf"Transformer: {name}=.*; allowed: .*; use {name}="
    ) as error:
        tiny(**wrong)
    assert error.value.flag.startswith(f"--model.{name}=")


def test_the_error_for_a_model_without_sizes_names_what_is_missing():
    with pytest.raises(ValueError, match="vocab_size and context_length must come from the data"):
        tiny().configure_model()
    with pytest.raises(RuntimeError, match="has no net yet"):
        tiny()(torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(NotImplementedError, match=r"TaskModule has no method build_net\(\)"):
        TaskModule().configure_model()


def test_sizes_given_as_arguments_need_no_data():
    model = tiny(vocab_size=7, context_length=16)
    model.configure_model()
    net = model.net
    model.configure_model()
    assert model.net is net
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 7)


def test_a_prompt_with_an_unknown_character_names_it(poem):
    model = tiny()
    validate(model, data_of(poem))
    with pytest.raises(ValueError, match=r"character '@' \(U\+0040\) at position 2"):
        model.generate("at@home")
