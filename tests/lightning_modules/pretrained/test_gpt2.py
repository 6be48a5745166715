"""GPT-2 weights: import from Hugging Face's layout, export, and use by transformers."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from ravine.callbacks import Pretrained
from ravine.callbacks.transforms.pretrained import load_weights
from ravine.cli.main import main
from ravine.cli.trainer import Trainer
from ravine.datamodules import ByteTokenizer, TextDataModule
from ravine.errors import UsageError
from ravine.lightning_compat import checkpoint_connector
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.nn import Transformer
from ravine.lightning_modules.pretrained import gpt2

T, D, LAYERS, HEADS = 16, 24, 2, 3
SHAPE: dict[str, Any] = gpt2.GPT2_KWARGS | {"num_layers": LAYERS, "d_model": D, "num_heads": HEADS}


def save_hf_model(vocabulary: int, folder: Path, **config: Any) -> Any:
    """Their model, with random weights everywhere, and its files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_positions": T, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS}
    config = transformers.GPT2Config(
        vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes | config
    )
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
    model = save_hf_model(vocabulary, tmp_path / "hf")
    net = Transformer(vocabulary, T, **SHAPE).eval()
    gpt2.load_hf(tmp_path / "hf", net)
    tokens = torch.randint(vocabulary, (3, T))
    with torch.no_grad():
        assert (net(tokens) - model(tokens).logits).abs().max() < 1e-5

    gpt2.save_hf(
        net, SHAPE, tmp_path / "ours", eos_id=0
    )  # out: the same tensors under the same names
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "ours"))
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)

    again = Transformer(vocabulary, T, **SHAPE)  # and in again
    gpt2.load_hf(tmp_path / "ours" / "model.safetensors", again)
    assert all(p.equal(q) for p, q in zip(again.parameters(), net.parameters(), strict=True))

    loaded = type(model).from_pretrained(tmp_path / "ours").eval()  # and by their library
    with torch.no_grad():
        assert loaded(tokens).logits.equal(model(tokens).logits)


OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # of the config.json, of the model
    ({"n_head": 4}, {"num_heads": 4}),
    ({"layer_norm_epsilon": 0.01}, {"norm_eps": 0.01}),
    ({"activation_function": "relu"}, {"activation": "relu"}),
    ({"activation_function": "gelu"}, {"activation": "gelu"}),
    ({"n_inner": 40}, {"d_ff": 40}),
    ({"tie_word_embeddings": False}, {"tie_embeddings": False}),
    ({"n_layer": 3, "n_embd": 32, "n_head": 4}, {"num_layers": 3, "d_model": 32, "num_heads": 4}),
]


@pytest.mark.filterwarnings("ignore")  # their library's own
@pytest.mark.parametrize(("config", "shape"), OTHERS, ids=[" ".join(c) for c, _ in OTHERS])
def test_config_json_is_used_or_refused_with_the_needed_arguments(
    config: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    model = save_hf_model(101, tmp_path / "hf", **config)
    with pytest.raises(ValueError, match=r"load_hf: the weights in .* are a GPT-2 with ") as error:
        gpt2.load_hf(tmp_path / "hf", Transformer(101, T, **SHAPE))
    assert isinstance(error.value, UsageError)
    typed = error.value.flag.split()
    words = {key: str(value).lower() for key, value in shape.items()}
    assert dict(word.removeprefix("--model.").split("=") for word in typed).items() >= words.items()

    actual = SHAPE | shape
    net = Transformer(101, T, **actual).eval()
    gpt2.load_hf(tmp_path / "hf", net)
    tokens = torch.randint(101, (3, T))
    with torch.no_grad():
        expected = model(tokens).logits
        assert (net(tokens) - expected).abs().max() < 2e-5
    gpt2.save_hf(net, actual, tmp_path / "ours", eos_id=0)
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert (again(tokens).logits - expected).abs().max() < 2e-5
    copy = Transformer(101, T, **actual).eval()
    gpt2.load_hf(tmp_path / "ours", copy)
    assert all(p.equal(q) for p, q in zip(copy.parameters(), net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_an_untied_head_starts_as_the_embedding_of_a_tied_one(tmp_path: Path) -> None:
    model = save_hf_model(101, tmp_path / "hf")
    net = Transformer(101, T, **SHAPE | {"tie_embeddings": False}).eval()
    gpt2.load_hf(tmp_path / "hf", net)
    tokens = torch.randint(101, (2, T))
    with torch.no_grad():
        assert (net(tokens) - model(tokens).logits).abs().max() < 1e-5


def config_of(folder: Path, vocabulary: int = 256, **more: Any) -> None:
    said = {"n_head": HEADS, "n_embd": D, "n_layer": LAYERS, "n_positions": T}
    text = json.dumps(said | {"model_type": "gpt2", "vocab_size": vocabulary} | more)
    (folder / "config.json").write_text(text)


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, which Tran"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False, which Transformer does not support"),
    ({"add_cross_attention": True}, "add_cross_attention=True, which Transformer does not support"),
    ({"model_type": "gpt_neo"}, "model_type=gpt_neo, which Transformer does not support; allowed"),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, which"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]}, which"),
    ({"activation_function": "silu"}, "activation_function='silu', which Transformer does not"),
    ({"activation_function": ["relu"]}, "activation_function=['relu'], which Transformer does not"),
    ({"n_head": 5}, "n_head=5, which does not divide the width 24; allowed: divisors of 24"),
    ({"n_head": "three"}, "n_head='three', which does not divide the width"),
    ({"layer_norm_epsilon": -1}, "layer_norm_epsilon=-1; allowed: 0 or more"),
    ({"n_embd": 48}, "n_embd=48, but the tensors have 24: the two files do not belong together"),
    ({"vocab_size": 300}, "vocab_size=300, but the tensors have 256"),
    ({"n_inner": 50}, "n_inner=50, but the tensors have 96"),
]


@pytest.mark.parametrize(("more", "message"), UNFIT)
def test_options_that_the_net_does_not_have_are_refused_by_name(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = small(tmp_path / "hf")
    config_of(folder, **more)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        gpt2.load_hf(folder, Transformer(256, T, **SHAPE))
    assert message in str(error.value)


def test_options_that_change_nothing_are_accepted_and_damaged_files_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    net = Transformer(256, T, **SHAPE)
    config_of(folder, reorder_and_upcast_attn=True, attn_pdrop=0.3, summary_type="mean")
    gpt2.load_hf(folder, net)
    for text in ("{", "[" * 100_000, "[1]", " " * (1 << 21)):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not (JSON|a JSON object)"):
            gpt2.load_hf(folder, net)


WRONG: dict[str, Any] = {
    "qk_norm": True,
    "residual": False,
    "activation": "gelu",
    "norm_eps": 1e-3,
    "num_heads": 2,
    "positional_encoding": "rope",
    "norm": "rmsnorm",
    "bias": "none",
    "num_layers": 1,
    "d_model": 12,
    "d_ff": 24,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_net_that_computes_something_else_is_refused(name: str, tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    config_of(folder)
    net = Transformer(256, T, **SHAPE | {name: WRONG[name]})
    message = rf"the model has .*{name}=.*; use LanguageModel\(.*{name}="
    with pytest.raises(UsageError, match=message) as error:
        gpt2.load_hf(folder, net)
    assert f"--model.{name}=" in error.value.flag


def test_another_vocabulary_and_a_longer_context_name_the_data(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    config_of(folder)
    message = r"vocab_size=256, but .*; use TextDataModule\(tokenizer='FILE'\)"
    with pytest.raises(UsageError, match=message) as error:
        gpt2.load_hf(folder, Transformer(300, T, **SHAPE))
    assert error.value.flag == "--data.tokenizer=FILE"
    message = r"context_length=16, but .* context_length=17; .*TextDataModule\(context_length=16\)"
    with pytest.raises(UsageError, match=message) as error:
        gpt2.load_hf(folder, Transformer(256, T + 1, **SHAPE))
    assert error.value.flag == "--data.context_length=16"


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    for change, message in {
        "int8": lambda w: w.to(torch.int8),
        "NaN": lambda w: w * torch.nan,
    }.items():
        save_file(
            weights | {"wpe.weight": message(weights["wpe.weight"])}, folder / "model.safetensors"
        )
        with pytest.raises(ValueError, match=rf"pos_embed.weight (is of torch|holds) ?\.?{change}"):
            gpt2.load_hf(folder, Transformer(256, T, **SHAPE))


def test_without_config_json_a_line_names_what_could_not_be_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2.load_hf(small(tmp_path / "hf"), Transformer(256, T, **SHAPE))
    said = " ".join(capsys.readouterr().out.split())
    assert "it is not known whether its weights were trained with num_heads=3, " in said
    assert "activation=gelu_tanh, norm_eps=1e-05; add config.json" in said


def small(folder: Path, vocabulary: int = 256) -> Path:
    """A file as it was published: no prefix, causal masks inside."""
    torch.manual_seed(1)
    net = Transformer(vocabulary, T, **SHAPE, zero_init_residual=False)
    weights = gpt2.to_hf(dict(net.state_dict()), vocabulary)
    weights = {name.removeprefix(gpt2.HF_PREFIX): tensor for name, tensor in weights.items()}
    weights |= {f"h.{n}.attn.bias": torch.ones(1, 1, T, T).tril() for n in range(LAYERS)}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_net_may_have_a_shorter_context_than_its_weights(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    whole, half = (Transformer(256, t, **SHAPE).eval() for t in (T, T // 2))
    for net in (whole, half):
        gpt2.load_hf(folder, net)
    tokens = torch.randint(256, (2, T // 2))
    torch.testing.assert_close(half(tokens), whole(tokens))


def fit(path: Path, text: Path, tmp_path: Path, **how: Any) -> LanguageModel:
    model = LanguageModel(**SHAPE)
    data = TextDataModule(text, context_length=T, batch_size=2, tokenizer="bytes")
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
def test_fine_tuning_starts_from_the_file_and_resumes_from_the_checkpoint(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small(tmp_path / "hf")
    monkeypatch.setattr(LanguageModel, "lr", 0.0)  # so that a step changes nothing
    model = fit(folder, text, tmp_path)
    expected = Transformer(256, T, **SHAPE)
    gpt2.load_hf(folder, expected)
    assert model.net is not None
    pairs = zip(model.net.parameters(), expected.parameters(), strict=True)
    assert all(actual.equal(loaded) for actual, loaded in pairs)
    (folder / "model.safetensors").unlink()  # a run that goes on does not need it
    fit(folder, text, tmp_path, ckpt_path=tmp_path / "last.ckpt", max_steps=2)


def test_the_command_export_writes_gpt2_files(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = fit(small(tmp_path / "hf"), text, tmp_path)
    words = ["export", "--ckpt_path=last.ckpt", "--format", "gpt2"]
    assert main([*words, "--folder=out"]) == 0
    assert capsys.readouterr().out.endswith("written: out/model.safetensors, config.json\n")
    net = Transformer(256, T, **SHAPE)
    gpt2.load_hf("out", net)
    assert model.net is not None
    assert all(p.equal(q) for p, q in zip(net.parameters(), model.net.parameters(), strict=True))
    assert main(words) == 2
    assert "export needs a folder\n  type: --folder=exported" in capsys.readouterr().err


def test_a_model_that_is_not_gpt2_is_not_exported_as_gpt2(tmp_path: Path) -> None:
    model = LanguageModel(256, T, num_layers=1, d_model=8, num_heads=1)
    model.tokenizer = ByteTokenizer()
    model.configure_model()
    with pytest.raises(
        ValueError,
        match=r"not a GPT-2, because it has positional_encoding=rope, not learned, norm=rmsnorm",
    ):
        model.export(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    folder = small(tmp_path / "hf")
    other = Transformer(256, T, **SHAPE | {"num_layers": 3, "d_model": 48})
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text follows
        gpt2.load_hf(folder, other)
    assert (
        "are a GPT-2 with num_layers=2, d_model=24, d_ff=96, but the model has num_layers=3"
        in str(error.value)
    )
    assert str(error.value).endswith("use LanguageModel(num_layers=2, d_model=24, d_ff=96)")
    assert isinstance(error.value, UsageError)
    assert error.value.flag == "--model.num_layers=2 --model.d_model=24 --model.d_ff=96"
    with pytest.raises(FileNotFoundError, match=r"no weights at .*use Pretrained\(FOLDER\)"):
        gpt2.load_hf(tmp_path / "nowhere", other)
    (tmp_path / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="does not contain GPT-2 weights"):
        gpt2.load_hf(tmp_path, other)


def test_a_module_that_cannot_load_these_weights_is_refused(tmp_path: Path) -> None:
    class Foreign(L.LightningModule):
        pass

    message = "Foreign has no method load_pretrained"
    for path in ("x", str(tmp_path)):  # missing, and existing
        with pytest.raises(ValueError, match=message):
            Pretrained(path).setup(L.Trainer(logger=False), Foreign(), "fit")
    # a resumed run does not need the path, which may have been a folder of runs
    trainer = Trainer(logger=False)
    with pytest.raises(ValueError, match=message):
        Pretrained("x").setup(trainer, Foreign(), "fit")
    checkpoint_connector(trainer).selected_path = "last.ckpt"
    Pretrained("x").setup(trainer, Foreign(), "fit")
    with pytest.raises(ValueError, match=message):
        Pretrained(str(tmp_path)).setup(trainer, Foreign(), "fit")


@pytest.mark.parametrize(
    ("name", "value"), [("num_heads", 2), ("activation", "relu"), ("qk_norm", True)]
)
def test_a_checkpoint_that_would_compute_something_else_is_refused(
    name: str, value: Any, tmp_path: Path, text: Path
) -> None:
    fit(small(tmp_path / "hf"), text, tmp_path)
    other = LanguageModel(256, T, **SHAPE | {name: value})
    other.configure_model()
    message = rf"checkpoint has {name}={SHAPE[name]!r}, .*; use LanguageModel\({name}="
    with pytest.raises(ValueError, match=message):
        load_weights(other, str(tmp_path / "last.ckpt"))
    LanguageModel.load_from_checkpoint(tmp_path / "last.ckpt")
