"""Networks that callbacks change before sharding: the values of one process, in shards."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import furthest, run_ranks, whole
from tensor_bytes import tensor_bytes
from torch.distributed.tensor import DTensor

from ravine.callbacks import LoRA, Pretrained, Quantization
from ravine.callbacks.transforms.base import Transform
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.lightning_modules.nn.transformer import with_defaults
from ravine.lightning_modules.pretrained import gpt2
from ravine.strategies.materialize import deferred_values, iter_value_blocks

SHAPE = {"num_layers": 2, "d_model": 64, "num_heads": 4} | gpt2.GPT2_KWARGS


class Doubled(Transform):
    """A change that somebody else has written: it reads and writes values."""

    phase = "quantize"

    def transform(self, module: L.LightningModule) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                assert not parameter.is_meta
                parameter.mul_(2)


class Halved(LoRA):
    """A change of this package, and one more."""

    def transform(self, module: Any) -> None:
        super().transform(module)
        with torch.no_grad():
            module.net.blocks["0"].mlp.up.weight.mul_(0.5)


class Model(LanguageModel):
    """With SGD: Adam would make a whole step of a gradient that is 0 but for rounding."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class OwnReader(Model):
    """Reads weights in a way of its own."""

    def load_pretrained(self, path: str) -> None:
        self.net.load_state_dict(torch.load(path, weights_only=True))  # type: ignore[union-attr]


class OtherNames(Model):
    """Reads checkpoints in which its weights have other names."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.register_load_state_dict_pre_hook(self.renamed)

    @staticmethod
    def renamed(module: Any, state: dict[str, Any], *args: Any) -> None:
        for name in [name for name in state if name.startswith("model.")]:
            state["net." + name.removeprefix("model.")] = state.pop(name)


KINDS = {
    "plain": [],
    "Pretrained": ["base"],
    "LoRA": ["lora"],
    "nf4": ["nf4"],
    "int8": ["int8"],
    "Pretrained + nf4 + LoRA": ["lora", "nf4", "base"],
    "safetensors + LoRA": ["folder", "lora"],
    "safetensors": ["folder"],
    "a change of others": ["doubled", "base"],
    "a change of ours with more": ["halved", "base"],
    "a reader of others": ["weights"],
}


def callbacks(kind: str, files: Path) -> list[L.Callback]:
    made = {
        "base": lambda: Pretrained(str(files / "base.ckpt")),
        "folder": lambda: Pretrained(str(files / "gpt2")),
        "weights": lambda: Pretrained(str(files / "weights")),
        "lora": lambda: LoRA(rank=4),
        "nf4": lambda: Quantization(),
        "int8": lambda: Quantization("int8"),
        "doubled": Doubled,
        "halved": lambda: Halved(rank=4),
    }
    return [made[each]() for each in KINDS[kind]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as a checkpoint, as GPT-2's safetensors, and as a file of others."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(7)
    model = Model(**SHAPE)
    trainer = quiet("auto", 1, [])
    trainer.fit(model, datamodule=data(folder))
    trainer.save_checkpoint(folder / "base.ckpt")
    assert model.net is not None
    gpt2.save_hf(model.net, with_defaults(SHAPE), folder / "gpt2", None)  # type: ignore[arg-type]
    torch.save(model.net.state_dict(), folder / "weights")
    return folder


def data(folder: Path) -> TextDataModule:
    """Batches of a short text, which is written once."""
    if not (folder / "text.txt").is_file():
        (folder / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    return TextDataModule(folder / "text.txt", context_length=32, batch_size=8)


def quiet(strategy: Any, devices: int, callbacks: list[L.Callback], steps: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=callbacks,
    )  # fmt: skip


class Look(L.Callback):
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.start = whole(module)
        self.sharded = any(isinstance(p, DTensor) for p in module.parameters())
        self.errors = {}
        for each in trainer.callbacks:
            self.errors |= getattr(each, "errors", {})


def run(strategy: str, devices: int, kind: str, files: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    look, own = Look(), callbacks(kind, files)
    model = OwnReader(**SHAPE) if kind == "a reader of others" else Model(**SHAPE)
    trainer = quiet(strategy, devices, [*own, look], steps=2)
    trainer.fit(model, datamodule=data(files))
    bases = [each.base["sha256"] for each in own if isinstance(each, LoRA)]
    found = {"start": look.start, "end": whole(model), "bases": bases, "errors": look.errors}
    return found | {"sharded": look.sharded}


def run_all(files: Path) -> dict[str, dict[str, Any]]:
    return {kind: run("zero3", 2, kind, files) for kind in KINDS}


@pytest.fixture(scope="module")
def zero3(files: Path) -> list[dict[str, dict[str, Any]]]:
    """What each of two ranks found, by kind."""
    return run_ranks(run_all, 2, files)


@pytest.mark.parametrize("kind", KINDS)
def test_zero3_starts_with_the_bits_of_one_process_and_trains_equally(zero3, kind, files):
    single = run("auto", 1, kind, files)
    assert zero3[0][kind]["bases"] == single["bases"]
    for each in (rank[kind] for rank in zero3):
        assert each["sharded"]
        assert each["start"].keys() == single["start"].keys()
        for name, value in single["start"].items():
            assert torch.equal(each["start"][name], value), name
            assert each["start"][name].dtype == value.dtype
        assert each["errors"] == single["errors"]
        real = [n for n, value in single["end"].items() if value.is_floating_point()]
        assert furthest(*({n: end["end"][n] for n in real} for end in (each, single))) < 1e-6


@pytest.mark.parametrize(
    ("strategy", "world", "kind"),
    [
        ("pp", 2, "Pretrained + nf4 + LoRA"),
        ("hsdp", 4, "Pretrained + nf4 + LoRA"),
        ("tp", 2, "safetensors + LoRA"),
    ],
)
def test_other_layouts_start_with_the_bits_of_one_process(ranks, strategy, world, kind, files):
    single = run("auto", 1, kind, files)
    seen = set()
    for each in ranks(run, world, strategy, world, kind, files):
        assert all(torch.equal(value, single["start"][n]) for n, value in each["start"].items())
        seen |= each["start"].keys()
    assert seen == single["start"].keys()


def renamed(path: str) -> dict[str, torch.Tensor]:
    look = Look()
    trainer = quiet("zero3", 2, [Pretrained(path), look])
    trainer.fit(OtherNames(**SHAPE), datamodule=data(Path(path).parent))
    return look.start


def test_a_module_that_renames_weights_while_loading_is_supported(ranks, files):
    checkpoint = torch.load(files / "base.ckpt", weights_only=True)
    weights = checkpoint["state_dict"]
    other = {"model." + name.removeprefix("net."): value for name, value in weights.items()}
    checkpoint |= {"task": "OtherNames", "state_dict": other}
    torch.save(checkpoint, files / "other.ckpt")
    for found in ranks(renamed, 2, str(files / "other.ckpt")):
        assert all(torch.equal(value, weights[name]) for name, value in found.items())


WIDE = {"num_layers": 3, "d_model": 384, "num_heads": 6} | gpt2.GPT2_KWARGS  # 5.3 M parameters
BLOCK = 4 * 12 * 384**2  # bytes of a block's matrices, the largest unit


class FromSetupOn(L.Callback):
    """Counts the bytes of tensors from before the network is built until the run begins."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.measure = tensor_bytes()
        self.found = self.measure.__enter__()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.measure.__exit__(None, None, None)
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
        self.share = sum(part.nbytes for part in parts)


def bytes_at_start(devices: int, files: Path) -> dict[str, tuple[int, int]]:
    """Peak and share of each kind of start; what safetensors maps is counted, and is no memory."""
    found = {}
    for kind in ("LoRA", "Pretrained", "Pretrained + nf4 + LoRA", "safetensors + LoRA")[
        : 5 - devices // 2
    ]:
        torch.manual_seed(0)
        look = FromSetupOn()
        trainer = quiet("zero3", devices, [look, *callbacks(kind, files)], steps=0)
        trainer.fit(Model(**WIDE), datamodule=data(files))
        mapped = (files / "gpt2/model.safetensors").stat().st_size if "safe" in kind else 0
        found[kind] = look.found.peak - mapped, look.share
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    model = Model(**WIDE)
    trainer = quiet("auto", 1, [], steps=0)
    trainer.fit(model, datamodule=data(folder))
    trainer.save_checkpoint(folder / "base.ckpt", weights_only=True)
    gpt2.save_hf(model.net, with_defaults(WIDE), folder / "gpt2", None)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_holds_more_than_its_shard_and_one_unit_at_the_start(ranks, world, wide):
    for found in ranks(bytes_at_start, world, world, wide):
        for kind, (peak, share) in found.items():
            assert peak < share + BLOCK, (kind, peak / 2**20, share / 2**20)


def test_values_are_read_by_rows_and_zero_beyond_them():
    module = LanguageModel(vocab_size=50, context_length=8, **SHAPE)
    module.__dict__["strategy_draws_values"] = True  # as MeshStrategy does
    module.configure_model()
    parameter: Any = module.get_parameter("net.embed.weight")
    values, blocks = deferred_values(parameter), torch.cat(list(iter_value_blocks(parameter)))
    assert torch.equal(values.get_rows(3, 20), blocks[3:20])
    stored = torch.randn(40, 64, dtype=torch.float64)
    values.set_source(stored)
    assert torch.equal(values.get_rows(3, 20), stored[3:20].float())
    for start, stop in ((30, len(parameter)), (45, 47)):
        expected = torch.zeros(stop - start, 64)
        part = stored[start:stop].float()
        expected[: len(part)] = part
        assert torch.equal(values.get_rows(start, stop), expected)
