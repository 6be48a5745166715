"""`load_from_checkpoint` and `load_model` restore every task, adapters and quantized weights."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from external_modules.net_in_init import NetInInit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine import load_model
from ravine.callbacks import LoRA, Quantization
from ravine.callbacks.lora import lora_layers, merge_lora
from ravine.callbacks.quantization.layers import QuantizedLinear
from ravine.checkpoint_format import record_format
from ravine.datamodules import ImageDataModule, PromptDataModule, SpamDataModule, TextDataModule
from ravine.errors import MissingFileError, UsageError, UsageTypeError
from ravine.lightning_modules import (
    Diffusion,
    ImageClassifier,
    LanguageModel,
    LineLength,
    Reinforce,
    SpamClassifier,
    TaskModule,
)
from ravine.strategies.checkpoint import sharded
from ravine.strategies.checkpoint.atomic_io import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use .self.log"),
    pytest.mark.filterwarnings("ignore:all . advantages are 0"),
]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "max_steps": 1,
    "log_every_n_steps": 1,
}
TEXT = "the fox jumps over the dog and the dog sleeps on\n" * 8


def trained(module: L.LightningModule, data: Any, path: Path, *callbacks: L.Callback) -> Path:
    """A checkpoint after one step."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(callbacks=list(callbacks), **QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    return path


def text(folder: Path) -> TextDataModule:
    (folder / "text.txt").write_text(TEXT)
    return TextDataModule(folder / "text.txt", context_length=16, batch_size=2)


def language_model(folder: Path) -> tuple[TaskModule, Any]:
    return LanguageModel(num_layers=1, d_model=16, num_heads=2, zero_init_residual=False), text(
        folder
    )


def policy(folder: Path) -> tuple[TaskModule, Any]:
    path = trained(*language_model(folder), folder / "base.ckpt")
    data = PromptDataModule(folder / "text.txt", prompt_length=4, batch_size=2, num_val_prompts=2)
    return Reinforce(str(path), LineLength(), max_new_tokens=4, reference="none"), data


def images() -> ImageDataModule:
    return ImageDataModule("digits", batch_size=4)


# by name: the task with its data, and layers that have adapters
TASKS: dict[str, tuple[Callable[[Path], tuple[TaskModule, Any]], list[str]]] = {
    "SpamClassifier": (
        lambda folder: (
            SpamClassifier("handcrafted", hidden_size=8),
            SpamDataModule(source="embedded", batch_size=4),
        ),
        ["net.1", "net.3"],
    ),
    "LanguageModel": (language_model, ["net.blocks.*.attention.query", "net.blocks.*.mlp.*"]),
    "Diffusion": (
        lambda folder: (Diffusion(base_channels=8, time_embed_dim=16), images()),
        ["net.blocks.*.time_proj"],
    ),
    "ImageClassifier": (lambda folder: (ImageClassifier("mlp"), images()), ["net.backbone.1"]),
    "Reinforce": (policy, ["net.blocks.*.attention.query", "net.blocks.*.mlp.*"]),
}
CHANGES = {
    "plain": lambda targets: [],
    "LoRA": lambda targets: [LoRA(targets, rank=1)],
    "nf4 + LoRA": lambda targets: [Quantization(targets=targets), LoRA(targets, rank=1)],
}


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    actual, expected = one.state_dict(), other.state_dict()
    return actual.keys() == expected.keys() and all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in actual.items()
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("task", TASKS)
def test_both_ways_give_the_bits_that_were_trained(task: str, change: str, tmp_path: Path) -> None:
    make, targets = TASKS[task]
    module, data = make(tmp_path)
    path = trained(module, data, tmp_path / "task.ckpt", *CHANGES[change](targets))
    one, other = type(module).load_from_checkpoint(path), load_model(path)
    general = TaskModule.load_from_checkpoint(str(path))  # the class that the checkpoint names
    for model in (one, other, general):
        assert type(model) is type(module)
        assert not model.training
        assert same_bits(model, module)
    changed = [m for m in one.modules() if isinstance(m, QuantizedLinear)]
    assert bool(changed) == (change == "nf4 + LoRA")
    assert bool(lora_layers(one)) == (change != "plain")


def test_a_loaded_model_that_is_trained_and_saved_again_is_loaded_again(tmp_path: Path) -> None:
    make, targets = TASKS["LanguageModel"]
    module, data = make(tmp_path)
    path = trained(module, data, tmp_path / "one.ckpt", *CHANGES["nf4 + LoRA"](targets))
    loaded = LanguageModel.load_from_checkpoint(path).train()
    again = trained(loaded, data, tmp_path / "two.ckpt")  # without the callbacks
    assert not same_bits(loaded, module)
    assert same_bits(LanguageModel.load_from_checkpoint(again), loaded)
    merge_lora(loaded)
    loaded.get_parameter("net.embed.weight").requires_grad_(True)
    plain = trained(loaded, data, tmp_path / "three.ckpt")
    assert not lora_layers(LanguageModel.load_from_checkpoint(plain))


def test_weights_saved_alone_are_loaded_with_their_adapters(tmp_path: Path) -> None:
    module, data = language_model(tmp_path)
    trainer = L.Trainer(callbacks=[LoRA(["net.head"], rank=1, save="adapter")], **QUIET)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert same_bits(load_model(tmp_path / "weights.ckpt"), module)


class Line(TaskModule):
    """A task of a user's own file: its size comes from the data."""

    def __init__(self, lr: float = 0.5, hidden: int = 3, loss: Any = F.mse_loss) -> None:
        super().__init__()
        self.save_hyperparameters("lr", "hidden")
        self.lr, self.hidden, self.loss, self.inputs = lr, hidden, loss, 0

    def configure_from_data(self, datamodule: Any) -> None:
        self.inputs = datamodule.inputs

    def build_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.inputs, self.hidden), nn.Linear(self.hidden, 1))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.loss(self(batch[0]), batch[1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # without super()
        checkpoint["inputs"] = self.inputs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.inputs = checkpoint["inputs"]


def first_layer(model: TaskModule) -> torch.Tensor:
    return model.state_dict()["net.0.weight"]


class Configured(Line):
    """Made from one dict of hyperparameters."""

    def __init__(self, config: dict[str, Any], twice: bool = False) -> None:
        super().__init__(config["lr"], config["hidden"])
        self.save_hyperparameters(config)
        self.twice = twice


class Named(Line):
    """Leaves its name in the checkpoint, as TaskModule does."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        TaskModule.on_save_checkpoint(self, checkpoint)
        super().on_save_checkpoint(checkpoint)


class Wider(Named):
    """A variant in the same file."""


class Points(L.LightningDataModule):
    inputs = 5

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(4, 5), torch.randn(4, 1)), batch_size=2)


@pytest.fixture(scope="module")
def poem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("poem")
    model, data = language_model(folder)
    return trained(model, data, folder / "poem.ckpt", LoRA(["net.head"], rank=1))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(Line(), Points(), tmp_path_factory.mktemp("line") / "line.ckpt")


def test_a_user_class_is_loaded_through_itself(line: Path, tmp_path: Path) -> None:
    assert first_layer(Line.load_from_checkpoint(line)).shape == (3, 5)
    for kind in (Named, Wider):
        path = trained(kind(hidden=2), Points(), tmp_path / f"{kind.__name__}.ckpt", LoRA("net.0"))
        loaded = Named.load_from_checkpoint(path)
        assert type(loaded) is type(load_model(path)) is kind
        assert "net.0.lora_a" in loaded.state_dict()
    with pytest.raises(
        UsageError, match="written by Named, but the model is a SpamClassifier; allowed"
    ):
        SpamClassifier.load_from_checkpoint(tmp_path / "Named.ckpt")
    config = {"lr": 0.1, "hidden": 2}
    path = trained(Configured(config), Points(), tmp_path / "configured.ckpt")
    loaded = Configured.load_from_checkpoint(path, lr=0.2, twice=True)
    assert (loaded.lr, loaded.hidden, loaded.twice) == (0.2, 2, True)


def test_arguments_given_replace_those_saved(line: Path, poem: Path) -> None:
    loaded = Line.load_from_checkpoint(line, lr=0.1, loss=F.l1_loss)
    assert (loaded.lr, loaded.hparams["lr"], loaded.loss) == (0.1, 0.1, F.l1_loss)
    assert Line.load_from_checkpoint(line).lr == 0.5
    model = LanguageModel.load_from_checkpoint(poem, lr=0.1, dropout=0.25, qk_norm=False)
    assert (model.lr, model.net_kwargs["dropout"], model.net_kwargs["qk_norm"]) == (
        0.1,
        0.25,
        False,
    )
    assert LanguageModel.lr != 0.1
    with pytest.raises(UsageTypeError, match="Line has no argument 'hiden'; allowed: hidden; use"):
        Line.load_from_checkpoint(line, hiden=4)
    with pytest.raises(
        UsageError, match=r"with hidden=4 does not fit Line: .*; allowed: .*; remove hid"
    ):
        Line.load_from_checkpoint(line, hidden=4)
    with pytest.raises(
        UsageError, match=r"deep=2 does not fit LanguageModel: .*'deep'; .*remove deep$"
    ):
        LanguageModel.load_from_checkpoint(poem, deep=2)


def test_hyperparameters_of_a_file_replace_those_saved(line: Path, tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("lr: 0.25\nhidden: 3\n")
    (tmp_path / "hparams.csv").write_text("key,value\nlr,0.125\nhidden,3\n")
    (tmp_path / "hparams.txt").touch()
    (tmp_path / "list.yaml").write_text("[1]")
    for name, lr in (("yaml", 0.25), ("csv", 0.125)):
        file = tmp_path / f"hparams.{name}"
        assert Line.load_from_checkpoint(line, hparams_file=file).lr == lr
        assert Line.load_from_checkpoint(line, hparams_file=str(file), lr=2.0).lr == 2.0
    for name, error, words in (
        ("hparams.txt", UsageError, "allowed: .csv, .yml, .yaml"),
        ("list.yaml", UsageError, "contains a list; allowed: a mapping"),
        ("none.yaml", MissingFileError, "hparams_file=.*none.yaml' does not exist"),
    ):
        with pytest.raises(error, match=words):
            Line.load_from_checkpoint(line, hparams_file=tmp_path / name)


def test_names_of_weights_must_be_equal_unless_strict_is_false(line: Path, tmp_path: Path) -> None:
    content = torch.load(line, weights_only=True)
    content["state_dict"]["more"] = content["state_dict"].pop("net.1.bias")
    torch.save(content, tmp_path / "other.ckpt")
    for strict in (None, True):
        with pytest.raises(UsageError, match=r"does not fit Line: .*net\.1\.bias"):
            Line.load_from_checkpoint(tmp_path / "other.ckpt", strict=strict)
    with (
        pytest.warns(UserWarning, match=r"in the model but .*\['net\.1\.bias'\]"),
        pytest.warns(UserWarning, match=r"in the checkpoint but .*\['more'\]"),
    ):
        loaded = Line.load_from_checkpoint(tmp_path / "other.ckpt", strict=False)
    assert torch.equal(first_layer(loaded), content["state_dict"]["net.0.weight"])

    class Lenient(Line):
        strict_loading = False  # pyright: ignore[reportAssignmentType]

    with pytest.warns(UserWarning, match="found weights"):
        Lenient.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(UsageError, match=r"strict=True contradicts Lenient\.strict_loading="):
        Lenient.load_from_checkpoint(line, strict=True)


def test_tensors_are_on_the_device_of_map_location(line: Path) -> None:
    for place in (None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda tensor, _: tensor):
        loaded = Line.load_from_checkpoint(line, map_location=place)
        assert loaded.device == torch.device("cpu")
        assert first_layer(loaded).device == torch.device("cpu")
    with pytest.raises(
        UsageError, match=r"='meta' has no values; allowed: cpu.*; use map_location='cpu'$"
    ):
        Line.load_from_checkpoint(line, map_location="meta")
    for place in ("cuda", {"cpu": "cuda:0"}) if not torch.cuda.is_available() else ():
        with pytest.raises(
            UsageError, match=r"has no device for map_location='cuda.*; allowed: cpu; use"
        ):
            Line.load_from_checkpoint(line, map_location=place)


class OfCuda:
    """Stands for a storage that was saved on a device."""

    def cpu(self) -> str:
        return "on the CPU"


def test_a_tensor_of_a_missing_device_is_loaded_on_the_cpu(monkeypatch: Any) -> None:
    from ravine.cli.loading import where_saved

    storage: Any = OfCuda()
    for name, count, found in (
        ("cuda:0", 0, "on the CPU"),
        ("cuda:0", 1, None),
        ("cuda:1", 1, "on the CPU"),
        ("cpu", 0, storage),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert where_saved(storage, name) is found or where_saved(storage, name) == found


def write_in_parts(source: str, target: str) -> None:
    dist.init_process_group("gloo")
    sharded.save_sharded(torch.load(source, weights_only=True), Path(target))


def test_a_folder_and_an_open_file_load_as_the_file_does(
    poem: Path, tmp_path: Path, ranks: Any
) -> None:
    ranks(write_in_parts, 2, str(poem), str(tmp_path / "parts.ckpt"))
    alone = LanguageModel.load_from_checkpoint(poem)
    assert same_bits(LanguageModel.load_from_checkpoint(tmp_path / "parts.ckpt"), alone)
    assert same_bits(load_model(tmp_path / "parts.ckpt"), alone)
    content = poem.read_bytes()
    assert same_bits(LanguageModel.load_from_checkpoint(io.BytesIO(content)), alone)
    with poem.open("rb") as file:
        assert same_bits(load_model(file), alone)
    with pytest.raises(CheckpointError, match=r"in the open file cannot be used: it is cut short"):
        LanguageModel.load_from_checkpoint(io.BytesIO(content[:-100]))
    with pytest.raises(CheckpointError, match=r"no checkpoint .*none\.ckpt"):
        LanguageModel.load_from_checkpoint(tmp_path / "none.ckpt")


class Loss(nn.MSELoss):
    """An object that no safely read checkpoint holds."""


def test_objects_are_read_only_if_weights_only_is_false(line: Path, tmp_path: Path) -> None:
    content = torch.load(line, weights_only=True)
    content["hyper_parameters"]["loss"] = Loss()
    torch.save(content, tmp_path / "object.ckpt")
    for safe in (None, True):
        with pytest.raises(CheckpointError, match=r"holds .*Loss, more than tensors and plain"):
            Line.load_from_checkpoint(tmp_path / "object.ckpt", weights_only=safe)
    loaded = Line.load_from_checkpoint(tmp_path / "object.ckpt", weights_only=False)
    assert isinstance(loaded.loss, Loss)


def test_a_checkpoint_of_another_class_is_refused(poem: Path, line: Path, tmp_path: Path) -> None:
    for kind, path, writer in (
        (SpamClassifier, poem, "LanguageModel"),
        (LanguageModel, line, "another program"),
        (ImageClassifier, poem, "LanguageModel"),
    ):
        words = f"written by {writer}, but the model is a {kind.__name__}; .*; use ravine.load_"
        with pytest.raises(UsageError, match=words):
            kind.load_from_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, tmp_path / "odd.ckpt")
    with pytest.raises(
        UsageError, match="not a checkpoint of LanguageModel, because it has no state_dict"
    ):
        LanguageModel.load_from_checkpoint(tmp_path / "odd.ckpt")


def test_a_checkpoint_without_what_came_from_the_data_is_refused_by_name() -> None:
    for model, section in (
        (LanguageModel(8, 8, num_layers=1, d_model=8, num_heads=1), "language"),
        (ImageClassifier(), "images"),
        (Diffusion(base_channels=8), "images"),
    ):
        task = type(model).__name__
        record_format(content := {"task": task})
        for damaged in ({}, {section: None}, {section: {"context_length": 8, "channels": 1}}):
            message = rf"^{task}: the checkpoint does not contain .* of a {task}; allowed: "
            with pytest.raises(UsageError, match=message) as error:
                model.on_load_checkpoint(content | damaged)
            assert error.value.flag == "--ckpt_path=FILE"


def test_called_on_an_instance_it_is_a_type_error_as_in_lightning(poem: Path) -> None:
    words = r"The classmethod `{}.load_from_checkpoint` cannot be called on an instance"
    for model in (LanguageModel(8, 8, num_layers=1, d_model=8, num_heads=1), NetInInit()):
        with pytest.raises(TypeError, match=words.format(type(model).__name__)):
            model.load_from_checkpoint(poem)


@pytest.mark.filterwarnings("ignore:.weights_only. was not set")
def test_a_plain_lightning_module_is_loaded_by_lightning_s_own_method(tmp_path: Path) -> None:
    own: Any = NetInInit.load_from_checkpoint
    assert own.__func__ is vars(L.LightningModule)["load_from_checkpoint"].method
    module = NetInInit()
    path = trained(module, None, tmp_path / "plain.ckpt")
    assert same_bits(NetInInit.load_from_checkpoint(path), module)
