"""Throughput and compiling: reported figures equal a clock and a formula."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from ravine.callbacks import Compile, Summary, Throughput
from ravine.callbacks.monitoring import throughput
from ravine.lightning_modules import LanguageModel, model_stats

SHAPE: dict[str, Any] = {"num_layers": 2, "d_model": 16, "num_heads": 2}


class Naps(L.LightningModule):
    """Batches of 6 rows; a step takes 10 ms, and getting a batch another 10."""

    unit = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def flops_per_unit(self) -> int:
        return 1000

    def train_dataloader(self) -> list[torch.Tensor]:
        class Slow(list):
            def __iter__(self):  # type: ignore[no-untyped-def]
                for item in super().__iter__():
                    time.sleep(0.01)
                    yield item

        return Slow(torch.ones(6, 1) for _ in range(100))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        time.sleep(0.01)
        return self.line(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    options = {"logger": False, "log_every_n_steps": 4, "max_steps": 12} | quiet | options
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **options)
    trainer.fit(module)
    return trainer


def test_rates_follow_from_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "find_peak_flops", lambda *_: (1e6, "as told"))
    callback = Throughput()
    fit(Naps(), callback, logger=CSVLogger(tmp_path))
    assert len(callback.windows) == 3
    for row in callback.windows:
        assert 0 < row["rows_per_second"] < 6 / 0.02  # no faster than the naps allow
        assert row["mfu"] == pytest.approx(row["rows_per_second"] * 1000 / 1e6)
        assert 0 < row["frac_waiting_for_data"] < 1
        assert row["peak_memory_gb"] > 0.05
    assert callback.windows[1]["frac_waiting_for_data"] > 0.1  # about half: naps are long and equal
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "throughput/rows_per_second" in header
    out = capsys.readouterr().out
    assert "peak for MFU: 1e-06 TFLOP/s (as told)" in out
    assert re.search(r"rows/s, MFU [\d.]+% of 1e-06 TFLOP/s, peak memory .* GB, waiting for", out)


class Told(Naps):
    """Its clock is told the time: 1 s for a batch, 3 for a micro-step, 100 for a validation."""

    now = 0.0

    def train_dataloader(self) -> list[torch.Tensor]:
        module = self

        class Slow(list):
            def __iter__(self):  # type: ignore[no-untyped-def]
                for item in super().__iter__():
                    module.now += 1.0
                    yield item

        return Slow(torch.ones(6, 1) for _ in range(100))

    def val_dataloader(self) -> list[torch.Tensor]:
        return [torch.ones(6, 1)]

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.now += 3.0
        return self.line(batch).mean()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.now += 100.0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_micro_batch_counts_and_validation_does_not(
    accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "find_peak_flops", lambda *_: (1e6, "as told"))
    module, callback = Told(), Throughput()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: module.now))
    how = {"accumulate_grad_batches": accumulate, "val_check_interval": 3 * accumulate}
    fit(module, callback, num_sanity_val_steps=0, **how)  # windows of 4 steps, a validation in each
    assert len(callback.windows) == 3
    for row in callback.windows:
        assert row["rows_per_second"] == pytest.approx(6 / 4)
        waits = 4 * accumulate - 1  # that after a validation, or the first of all, is no waiting
        assert row["frac_waiting_for_data"] == pytest.approx(waits / (16 * accumulate), abs=0.07)


def test_a_module_without_formula_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Naps, "flops_per_unit", None)
    callback = Throughput()
    fit(Naps(), callback, max_steps=2)  # less than a window: reported at the end
    assert set(callback.windows[0]) == {
        "rows_per_second",
        "peak_memory_gb",
        "frac_waiting_for_data",
    }


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("NVIDIA A10G", 7.0),  # not in the table: measured
        ("NVIDIA GeForce RTX 4090 D", 165e12),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_device(
    name: str, flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "measure_peak_flops", lambda *_: 7.0)
    device = torch.device("cuda")
    assert throughput.find_peak_flops(device, torch.bfloat16)[0] == flops
    assert throughput.find_peak_flops(device, torch.float32) == (
        7.0,
        "a product of 8192 x 8192, measured, torch.float32",
    )


def test_the_peak_of_an_unknown_device_is_measured_with_a_line() -> None:
    flops, source = throughput.find_peak_flops(torch.device("cpu"), torch.float32)
    assert flops > 1e9
    assert source == "a product of 1024 x 1024, measured, torch.float32"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), ("32-true", torch.float32)],
)
def test_the_peak_is_that_of_the_precision(name: str, dtype: torch.dtype) -> None:
    assert throughput.precision_to_dtype(name) == dtype


def test_training_flops_are_six_for_each_weight_and_the_scores() -> None:
    """GPT-2 small: 124 M weights and 12 * 12 * 768 * 1024 for attention, by hand."""
    gpt2: dict[str, Any] = {"positional_encoding": "learned", "norm": "layernorm", "bias": "all"}
    shape = gpt2 | {
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "num_layers": 12,
        "d_model": 768,
    }
    terms = model_stats.count_parameters(50257, 1024, **shape)
    assert sum(terms.values()) == 124_439_808 + 47 * 768  # the head is padded to 50,304 rows
    flops = model_stats.count_training_flops(50257, 1024, **shape)
    weights = 50304 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert flops == 6 * weights + 12 * 12 * 768 * 1024
    assert 523_000 * flops / 793e12 == pytest.approx(0.56, abs=0.01)  # nanoGPT on an H200
    assert (
        model_stats.kv_cache_bytes(64, 512, 8, 512, bytes_per_element=2)
        == 2 * 8 * 64 * 512 * 512 * 2
    )


def test_the_flops_of_the_net_of_the_lecture_equal_a_count_by_hand() -> None:
    shape: dict[str, Any] = {
        "positional_encoding": "none",
        "norm": "none",
        "out_proj": False,
        "d_model": 256,
    }
    full = model_stats.count_training_flops(
        65, 128, num_layers=4, activation="relu", bias="mlp", **shape
    )
    assert full == 6 * (65 * 256 + 4 * (11 * 256**2 + 5 * 256)) + 12 * 4 * 256 * 128
    bigrams = model_stats.count_training_flops(
        65, 128, num_layers=1, activation="none", attention_variant="identity", **shape
    )
    assert bigrams == 6 * 65 * 256


def test_the_summary_has_the_results_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Naps(), Summary(), max_steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"train/loss, last 3 steps  -?\d+\.\d{4}", lines[-2])
    assert re.fullmatch(r"parameters +2", lines[-1])


def model() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(13, 8, **SHAPE, zero_init_residual=False)
    model.configure_model()
    tokens = torch.randint(13, (2, 8))
    loader = DataLoader([(tokens, tokens)] * 12, batch_size=None)  # type: ignore[arg-type]
    model.train_dataloader = model.val_dataloader = lambda: loader  # type: ignore
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
@pytest.mark.parametrize("blocks", [False, True])
def test_a_compiled_net_trains_as_before_under_the_same_names(blocks: bool) -> None:
    plain, compiled = model(), model()
    fit(plain, max_steps=2)
    trainer = fit(compiled, Compile(blocks=blocks, backend="aot_eager"), max_steps=2)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    marked = [m for m in compiled.modules() if m._compiled_call_impl is not None]
    assert [type(m).__name__ for m in marked] == (
        ["TransformerBlock"] * 2 if blocks else ["Transformer"]
    )
    assert trainer.global_step == 2


def test_generation_uses_the_uncompiled_net() -> None:
    from ravine.lightning_modules.generation.generate_text import generate

    module = model()
    net: Any = module.net
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    net.compile(backend=backend)
    net.blocks["1"].forward = torch.compile(net.blocks["1"].forward, backend=backend)
    assert generate(net, [torch.tensor([1, 2])], 4, 8).tokens.shape == (1, 4)
    assert not graphs
    net(torch.tensor([[1, 2]]))
    assert graphs


def test_a_mode_that_the_backend_does_not_have_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"is not available with backend='eager'.*use mode='default'"
    ):
        Compile(mode="reduce-overhead", backend="eager")


def test_compiling_blocks_of_a_net_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Naps has no blocks .*use blocks=False"):
        fit(Naps(), Compile(blocks=True))
    bare = SimpleNamespace(children=lambda: iter(()))
    with pytest.raises(
        ValueError, match=r"has no submodule with parameters; remove Compile\(\) from"
    ):
        Compile().transform(bare)  # type: ignore[arg-type]
