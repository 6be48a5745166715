"""GPT-2's weights: in from Hugging Face's layout, out again, and used by its own library."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from ravine.callbacks import Pretrained
from ravine.cli.main import main
from ravine.datamodules import ByteTokenizer, TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.language import Transformer, gpt2

T, D, LAYERS, HEADS = 16, 24, 2, 3
SHAPE: dict[str, Any] = gpt2.SHAPE | {"layers": LAYERS, "width": D, "heads": HEADS}


def theirs(vocabulary: int, folder: Path) -> Any:
    """Their model, with random weights everywhere, and its files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=T, n_embd=D, n_layer=LAYERS, n_head=HEADS,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # their library's own
@pytest.mark.parametrize("vocabulary", [101, 5000])  # the second is padded
def test_logits_are_those_of_transformers_and_files_survive_the_round_trip(
    vocabulary: int, tmp_path: Path
) -> None:
    model = theirs(vocabulary, tmp_path / "hf")
    net = Transformer(vocabulary, T, **SHAPE).eval()
    gpt2.read(tmp_path / "hf", net)
    tokens = torch.randint(vocabulary, (3, T))
    with torch.no_grad():
        assert (net(tokens) - model(tokens).logits).abs().max() < 1e-5

    gpt2.write(net, SHAPE, tmp_path / "ours", end=0)  # out: the same tensors under the same names
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "ours"))
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)

    again = Transformer(vocabulary, T, **SHAPE)  # and in again
    gpt2.read(tmp_path / "ours" / "model.safetensors", again)
    assert all(p.equal(q) for p, q in zip(again.parameters(), net.parameters(), strict=True))

    loaded = type(model).from_pretrained(tmp_path / "ours").eval()  # and by their library
    with torch.no_grad():
        assert loaded(tokens).logits.equal(model(tokens).logits)


def small(folder: Path, vocabulary: int = 256) -> Path:
    """A file as it was published: no prefix, causal masks inside."""
    torch.manual_seed(1)
    net = Transformer(vocabulary, T, **SHAPE, zero_init=False)
    weights = gpt2.untranslated(dict(net.state_dict()), vocabulary)
    weights = {name.removeprefix(gpt2.PREFIX): tensor for name, tensor in weights.items()}
    weights |= {f"h.{n}.attn.bias": torch.ones(1, 1, T, T).tril() for n in range(LAYERS)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_net_may_see_less_than_its_weights_have_learned(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    whole, half = (Transformer(256, t, **SHAPE).eval() for t in (T, T // 2))
    for net in (whole, half):
        gpt2.read(folder, net)
    tokens = torch.randint(256, (2, T // 2))
    torch.testing.assert_close(half(tokens), whole(tokens))


def fit(path: Path, text: Path, tmp_path: Path, **how: Any) -> LanguageModel:
    model = LanguageModel(**SHAPE)
    data = TextDataModule(text, context=T, batch_size=2, tokenizer="bytes")
    quiet = dict.fromkeys(
        ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
    )
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[Pretrained(str(path))], default_root_dir=tmp_path,
        limit_val_batches=0, max_steps=how.pop("max_steps", 1), **quiet,
    )  # fmt: skip
    trainer.fit(model, data, **how)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    return tmp_path / "text.txt"


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
def test_fine_tuning_starts_from_the_file_and_goes_on_from_the_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small(tmp_path / "hf")
    monkeypatch.setattr(LanguageModel, "lr", 0.0)  # so that a step changes nothing
    model = fit(folder, text, tmp_path)
    expected = Transformer(256, T, **SHAPE)
    gpt2.read(folder, expected)
    assert model.net is not None
    pairs = zip(model.net.parameters(), expected.parameters(), strict=True)
    assert all(ours.equal(loaded) for ours, loaded in pairs)
    (folder / "model.safetensors").unlink()  # a run that goes on does not need it
    fit(folder, text, tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=2)


def test_export_is_a_command(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = fit(small(tmp_path / "hf"), text, tmp_path)
    words = ["export", "--ckpt_path=last.ckpt", "--format", "gpt2"]
    assert main([*words, "--folder=out"]) == 0
    assert capsys.readouterr().out.endswith("written: out/model.safetensors, config.json\n")
    net = Transformer(256, T, **SHAPE)
    gpt2.read("out", net)
    assert model.net is not None
    assert all(p.equal(q) for p, q in zip(net.parameters(), model.net.parameters(), strict=True))
    assert main(words) == 2
    assert "export needs a folder\n  type: --folder=NAME" in capsys.readouterr().err


def test_what_is_no_gpt2_is_not_written_as_one(tmp_path: Path) -> None:
    model = LanguageModel(256, T, layers=1, width=8, heads=1)
    model.tokenizer = ByteTokenizer()
    model.configure_model()
    with pytest.raises(ValueError, match=r"no GPT-2: positions=rope, not learned, norm=rmsnorm"):
        model.export(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    other = Transformer(256, T, **SHAPE | {"layers": 3, "width": 48})
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        gpt2.read(folder, other)
    assert "blocks.0.attention.key.bias is [48] in the model and [24] in the file" in str(
        error.value
    )
    assert "type --config gpt2/finetune" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no weights at .*type --trainer.callbacks.path="):
        gpt2.read(tmp_path / "nowhere", other)
    (tmp_path / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="does not hold GPT-2 weights"):
        gpt2.read(tmp_path, other)


def test_a_module_that_reads_no_weights_is_refused() -> None:
    class Foreign(L.LightningModule):
        pass

    with pytest.raises(ValueError, match="Foreign has no method load_pretrained"):
        Pretrained("x").setup(L.Trainer(logger=False), Foreign(), "fit")
