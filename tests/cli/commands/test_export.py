"""From the command line: a base, adapters on it, text from them, and the merged model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import ravine.lightning_modules
from ravine.callbacks import LoRA, Pretrained
from ravine.callbacks.lora import inject_lora, lora_layers
from ravine.callbacks.quantization.layers import QuantizedLinear
from ravine.cli.commands.export import merge_adapters
from ravine.cli.loading import load_model
from ravine.cli.main import main
from ravine.errors import UsageError
from ravine.lightning_modules import Diffusion, LanguageModel
from ravine.strategies.checkpoint import sharded

TEXT = "to be or not to be, that is the question. " * 40
SMALL = [
    "--model=LanguageModel",
    "--model.num_layers=1",
    "--model.d_model=32",
    "--model.num_heads=2",
]
DATA = [
    "--data=TextDataModule",
    "--data.path=text.txt",
    "--data.context_length=16",
    "--data.batch_size=4",
]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]
LORA = ["--trainer.callbacks+=LoRA", "--trainer.callbacks.rank=4"]


def fit(name: str, *words: str) -> str:
    """Train for four steps; the checkpoint's path."""
    run = ["--trainer.callbacks+=Checkpoint", f"--trainer.callbacks.dirpath={name}"]
    steps = ["--trainer.max_steps=4", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    assert main(["fit", *SMALL, *DATA, *QUIET, *steps, *run, *words]) == 0
    (file,) = Path(name).glob("*.ckpt")
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters over it in float and in four bits."""
    place = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Path("text.txt").write_text(TEXT)
        base = fit("base")
        start = ["--trainer.callbacks+=Pretrained", f"--trainer.callbacks.path={base}"]
        fast = ["--trainer.callbacks+=OptimizerPlan", "--trainer.callbacks.optimizer=AdamW",
                "--trainer.callbacks.optimizer.lr=0.1"]  # fmt: skip
        fit("lora", *start, *fast, *LORA)
        fit("qlora", *LORA, *start, *fast, "--trainer.callbacks+=Quantization")
    return place


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def file_of(name: str) -> str:
    (file,) = Path(name).glob("*.ckpt")
    return str(file)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_checkpoint_of_adapters_is_a_complete_model(here: Path, name: str, capsys) -> None:
    state = torch.load(file_of(name), weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in key for key in state)
    model = load_model(file_of(name))
    assert len(lora_layers(model)) == 6
    bits = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(bits) == (6 if name == "qlora" else 0)
    assert (
        main(["generate", f"--ckpt_path={file_of(name)}", "--prompt=to", "--max_new_tokens=5"]) == 0
    )
    text = model.generate("to", max_new_tokens=5)
    assert capsys.readouterr().out.rstrip("\n").endswith(text)


def losses(words: list[str], capsys) -> float:
    assert main([*words, *QUIET, "--trainer.accelerator=cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "loss" in line)
    return float("".join(c if c in "0123456789." else " " for c in line).split()[-1])


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_merged_model_needs_no_callback_and_has_the_same_loss(
    here: Path, name: str, capsys
) -> None:
    words = ["export", f"--ckpt_path={file_of(name)}", "--merge", f"--folder=plain_{name}"]
    assert main(words) == 0
    written = f"plain_{name}/model.ckpt"
    assert capsys.readouterr().out.endswith(f"written: {written}, model.safetensors\n")
    adapted, plain = load_model(file_of(name)), LanguageModel.load_from_checkpoint(written)
    assert type(plain.net.blocks["0"].mlp.up) is nn.Linear
    tokens = torch.randint(plain.vocab_size, (2, 16))
    difference = (adapted(tokens) - plain(tokens)).abs().max()
    assert 0 <= difference < 1e-5
    base = LanguageModel.load_from_checkpoint(file_of("base"))
    assert (base(tokens) - plain(tokens)).abs().max() > 0.01
    state = load_file(f"plain_{name}/model.safetensors")
    assert state.keys() == plain.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    before = losses(["validate", f"--ckpt_path={file_of(name)}"], capsys)
    assert losses(["validate", f"--ckpt_path={written}"], capsys) == pytest.approx(before, abs=1e-4)
    model = LanguageModel(
        num_layers=1, d_model=32, num_heads=2, vocab_size=plain.vocab_size, context_length=16
    )
    model.configure_model()
    Pretrained(written).transform(model)
    assert torch.equal(model(tokens), plain(tokens))


def write_in_parts(source: str, target: str) -> None:
    dist.init_process_group("gloo")
    sharded.save_sharded(torch.load(source, weights_only=True), Path(target))


def test_a_sharded_checkpoint_is_merged_as_a_file_is(here: Path, ranks: Any) -> None:
    ranks(write_in_parts, 2, str(here / file_of("lora")), str(here / "parts.ckpt"))
    for path in (file_of("lora"), "parts.ckpt"):
        words = ["export", f"--ckpt_path={path}", "--merge", f"--folder=of_{Path(path).stem}"]
        assert main(words) == 0
    one = load_file(f"of_{Path(file_of('lora')).stem}/model.safetensors")
    other = load_file("of_parts/model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_int8_is_exported_after_training_and_loads_as_it_was_written(here: Path, capsys) -> None:
    words = ["export", f"--ckpt_path={file_of('base')}", "--quantize=int8", "--folder=eight"]
    assert main(words) == 0
    model, base = (
        load_model("eight/model.ckpt"),
        LanguageModel.load_from_checkpoint(file_of("base")),
    )
    tokens = torch.randint(base.vocab_size, (2, 16))
    assert 0 < (model(tokens) - base(tokens)).abs().max() < 0.05
    state = load_file("eight/model.safetensors")
    assert state["net.blocks.0.mlp.up.weight_codes"].dtype == torch.int8
    assert "net.blocks.0.mlp.up.weight" not in state
    plain = losses(["validate", f"--ckpt_path={file_of('base')}"], capsys)
    assert losses(["validate", "--ckpt_path=eight/model.ckpt"], capsys) == pytest.approx(
        plain, abs=0.01
    )


def test_a_run_of_adapters_resumes_from_its_checkpoint(here: Path) -> None:
    before = Path(file_of("qlora")).read_bytes()
    words = ["fit", f"--ckpt_path={file_of('qlora')}", *QUIET, "--trainer.accelerator=cpu"]
    assert main([*words, "--trainer.max_steps=6", "--trainer.limit_val_batches=1"]) == 0
    assert Path(file_of("qlora")).read_bytes() == before  # and the folder has no other file: the
    assert list(Path("runs").rglob("checkpoints/step=000006.ckpt"))  # run wrote below its own


BAD = {
    "a target that matches nothing": (
        ["--trainer.callbacks+=LoRA", "--trainer.callbacks.targets=[querry]"],
        "LoRA.targets: 'querry' matches no layer\n  nearest: net.blocks.0.attention.query",
    ),
    "a rank larger than the layer": (
        ["--trainer.callbacks+=LoRA", "--trainer.callbacks.rank=64"],
        "rank=64 for net.blocks.0.attention.query (32 to 32)",
    ),
    "a base that is not there": (
        ["--trainer.callbacks+=Pretrained", "--trainer.callbacks.path=nowhere.ckpt"],
        "the checkpoint nowhere.ckpt does not exist\n  type: "
        "--trainer.callbacks.Pretrained.path=FILE",
    ),
    "a base that has adapters itself": (
        ["--trainer.callbacks+=Pretrained", "--trainer.callbacks.path=LORA"],
        "were changed by LoRA\n  allowed: plain weights\n  type: lightning export --merge",
    ),
    "kernels for another device": (
        ["--trainer.callbacks+=Quantization", "--trainer.callbacks.backend=bitsandbytes"],
        "needs CUDA, and this run is on cpu",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_user_error_is_one_message_and_changes_no_file(here: Path, what: str, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()}
    words, said = BAD[what]
    words = [word.replace("LORA", file_of("lora")) for word in words]
    steps = ["--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    assert main(["fit", *SMALL, *DATA, *QUIET, *steps, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    after = {p: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()}
    assert before.items() <= after.items()
    assert {p.name for p in after.keys() - before.keys()} <= {"config.yaml"}


def test_an_export_does_not_overwrite_its_input(here: Path, capsys) -> None:
    assert main(["export", f"--ckpt_path={file_of('lora')}", "--merge", "--folder=once"]) == 0
    before = Path("once/model.ckpt").read_bytes()
    words = ["export", "--ckpt_path=once/model.ckpt", "--quantize=int8", "--folder=once"]
    assert main(words) == 2
    assert "once/model.ckpt is the checkpoint to export" in capsys.readouterr().err
    assert Path("once/model.ckpt").read_bytes() == before


def test_a_full_disk_is_one_line(here: Path, monkeypatch, capsys) -> None:
    def full(*args: object, **how: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    words = ["export", f"--ckpt_path={file_of('lora')}", "--merge", "--folder=disk"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "disk cannot be written: I/O error: No space left" in error
    assert "Traceback" not in error
    assert not list(Path("disk").iterdir())


def test_tied_weights_that_differ_after_the_merge_are_not_exported() -> None:
    model = LanguageModel(
        num_layers=1, d_model=32, num_heads=2, vocab_size=9, context_length=16, tie_embeddings=True
    )
    model.configure_model()
    inject_lora(model, "embed", rank=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b)
    with pytest.raises(
        UsageError, match="share one weight in this model, but differ after the merge"
    ):
        merge_adapters(model)


PRESETS = ["shakespeare/lora", "shakespeare/qlora", "diffusion/lora", "gpt2/lora"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_adapters_of_a_preset_fit_its_net(preset: str) -> None:
    file = Path(__file__).parents[3] / "configs" / f"{preset}.yaml"
    config = yaml.safe_load(file.read_text())
    given = config["model"].get("init_args", {})
    kind = getattr(ravine.lightning_modules, config["model"]["class_path"])
    if kind is LanguageModel:  # the shape alone
        given |= {
            "num_layers": 1,
            "d_model": 32,
            "num_heads": 2,
            "vocab_size": 65,
            "context_length": 16,
        }
    module = kind(**given)
    if kind is Diffusion:
        module.channels, module.num_classes = 1, 10
    module.configure_model()
    callbacks = [each for each in config["trainer"]["callbacks"] if isinstance(each, dict)]
    (lora,) = [c.get("init_args", {}) for c in callbacks if c["class_path"] == "LoRA"]
    LoRA(**lora).transform(module)
    assert lora_layers(module)


def test_merging_a_model_without_adapters_is_refused(here: Path, capsys) -> None:
    words = ["export", f"--ckpt_path={file_of('base')}", "--merge", "--folder=nothing"]
    assert main(words) == 2
    assert "has no adapters to merge" in capsys.readouterr().err
    assert not Path("nothing").exists()


def test_weights_without_their_adapters_are_refused_with_a_hint(here: Path) -> None:
    content = torch.load(file_of("lora"), weights_only=True)
    with pytest.raises(ValueError, match=r"changed by LoRA.*; use ravine\.load_model\(path\)$"):
        LanguageModel.from_checkpoint_dict(content)
