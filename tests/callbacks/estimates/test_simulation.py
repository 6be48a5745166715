"""A simulated step holds, counts and computes what a real one does, for any module."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from real_step import real_step
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.data import DataLoader, TensorDataset

from ravine import UsageError, estimate
from ravine.callbacks import (
    EMA,
    ActivationCheckpointing,
    GradientClipping,
    LoRA,
    Muon,
    NaNGuard,
    OptimizerPlan,
    Quantization,
)
from ravine.callbacks.estimates.tensor_tracker import TensorTracker
from ravine.datamodules import SpamDataModule, TextDataModule
from ravine.lightning_modules import LanguageModel, SpamClassifier
from ravine.lightning_modules.spam_classifier import hash_ngrams


def plan(*others: Any) -> dict[str, Any]:
    return {"callbacks": [OptimizerPlan(torch.optim.AdamW), *others], "max_steps": 9}


TRANSFORMERS: dict[str, Any] = {  # arguments of the trainer, made anew for each run
    "Muon, clipping and NaNGuard": lambda: {
        "callbacks": [Muon(), GradientClipping(max_norm=1.0), NaNGuard()]
    },
    "accumulation": lambda: plan() | {"accumulate_grad_batches": 4},
    "EMA": lambda: plan(EMA()),
    "LoRA": lambda: plan(LoRA()),
    "LoRA over NF4": lambda: plan(LoRA(), Quantization()),
    "recomputation": lambda: plan(ActivationCheckpointing()),
    "bf16-mixed": lambda: plan() | {"precision": "bf16-mixed"},
    "bf16-true": lambda: plan() | {"precision": "bf16-true"},
}


def transformer(**kwargs: Any) -> LanguageModel:
    return LanguageModel(**{"num_layers": 1, "d_model": 64, "num_heads": 2} | kwargs)


def text() -> TextDataModule:
    return TextDataModule(source="embedded", context_length=32, batch_size=8)


class Plain(L.LightningModule):
    """A module of a user: BatchNorm, a schedule, a logged loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 4)
        )

    def training_step(self, batch: Any, index: int) -> Any:
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


class OwnSteps(Plain):
    """Manual optimization, with two backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for part in (slice(0, 32), slice(32, 64)):
            self.manual_backward(F.cross_entropy(self.layers(batch[0][part]), batch[1][part]))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def vectors() -> DataLoader[Any]:
    data = TensorDataset(torch.randn(256, 16), torch.randint(4, (256,)))
    return DataLoader(data, batch_size=64)


class Residual(L.LightningModule):
    """torchvision's resnet18."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.net = resnet18(num_classes=4)

    def training_step(self, batch: Any, index: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def images() -> DataLoader[Any]:
    data = TensorDataset(torch.randn(12, 3, 32, 32), torch.randint(4, (12,)))
    return DataLoader(data, batch_size=4)


class HuggingFace(L.LightningModule):
    """A GPT-2 of the package transformers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 300, "n_positions": 32}
        self.net = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch: Any, index: int) -> Any:
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def tokens() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randint(300, (32, 32))), batch_size=8)


def check(build: Any, data: Any, arguments: Any = dict, tolerance: float = 0.05) -> None:
    """Peak within the tolerance; parameters and states equal; FLOPs within 1 %."""
    result = estimate(build(), data(), **arguments())
    hash_ngrams.cache_clear()  # its tensors are counted where they are made
    real = real_step(build, data, **arguments())
    assert result.num_parameters == real.parameters
    assert result.state_bytes == real.state_bytes
    assert result.simulation.flops == pytest.approx(real.flops, rel=0.01)
    assert result.peak_bytes == pytest.approx(real.peak, rel=tolerance)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_peak_states_and_flops_of_a_transformer_are_those_of_a_real_step(name: str) -> None:
    check(transformer, text, TRANSFORMERS[name])


def test_the_formula_of_a_transformer_gives_the_counted_flops() -> None:
    result = estimate(transformer(), text(), **plan())
    counted = result.simulation.flops / result.simulation.units
    assert counted == pytest.approx(result.simulation.flops_per_unit, rel=0.01)


@pytest.mark.parametrize(
    ("build", "data"),
    [(Plain, vectors), (OwnSteps, vectors), (Residual, images), (HuggingFace, tokens)],
)
def test_modules_that_do_not_import_ravine_are_estimated_too(build: Any, data: Any) -> None:
    check(build, data, lambda: {"max_steps": 9})


def test_the_spam_classifier_is_estimated() -> None:
    hash_ngrams.cache_clear()
    check(
        SpamClassifier,
        lambda: SpamDataModule(source="embedded", batch_size=8),
        lambda: {"callbacks": [OptimizerPlan(torch.optim.SGD)], "max_steps": 9},
    )


def test_without_a_forward_pass_parameters_and_states_are_the_same() -> None:
    quick = estimate(transformer(), text(), level="quick", **plan())
    full = estimate(transformer(), text(), **plan())
    assert quick.state_bytes == full.state_bytes
    assert quick.simulation.parameters == full.simulation.parameters
    assert not quick.simulation.operations


def test_real_steps_measure_the_same_as_a_simulation() -> None:
    measured = estimate(Plain(), vectors(), level="measure", max_steps=9)
    simulated = estimate(Plain(), vectors(), max_steps=9)
    assert measured.peak_bytes == simulated.peak_bytes
    assert measured.simulation.flops == simulated.simulation.flops


def test_the_tracker_agrees_with_that_of_torch() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    peaks = []
    for other in (False, True):
        module = copy.deepcopy(net)
        x = torch.randn(16, 32)
        tracker: Any = MemTracker() if other else TensorTracker()
        if other:
            tracker.track_external(module, x)
        else:
            tracker.label([*module.parameters(), x], "parameters")
            tracker.phase = "forward"
            tracker.start_recording()
        with tracker:
            module(x).square().mean().backward()
        if other:
            (total,) = (s["Total"] for s in tracker.get_tracker_snapshot("peak").values())
            peaks.append(total)
        else:
            peaks.append(max(m.total for m in tracker.moments))
    assert peaks[0] == peaks[1]


def reads_item(module: Any, loss: Any) -> Any:
    return loss * float(loss.item() > 0)


def branches(module: Any, loss: Any) -> Any:
    if loss > 5:
        loss = 2 * loss
    return loss


def selects(module: Any, loss: Any) -> Any:
    weight = module.layers[0].weight
    return loss + weight[weight > 0].sum()


@pytest.mark.parametrize("read", [reads_item, branches, selects])
def test_code_that_needs_values_is_named_by_file_and_line(read: Any) -> None:
    class Reading(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            return read(self, super().training_step(batch, index))

    with pytest.raises(UsageError) as error:
        estimate(Reading(), vectors(), max_steps=9)
    code = read.__code__
    problem = error.value.problem
    assert f"{code.co_filename}:" in problem
    assert f"in {code.co_name}" in problem
    line = int(problem.split(f"{code.co_filename}:")[1].split()[0])
    assert code.co_firstlineno < line <= code.co_firstlineno + 2
    assert error.value.flag == "--measure"
    assert "level='measure'" in error.value.hint
    measured = estimate(Reading(), vectors(), level="measure", max_steps=9)
    assert measured.peak_bytes > 0


def test_ranks_share_the_batches_of_a_loader_that_does_not_divide_them() -> None:
    for ranks, steps in ((1, 8), (2, 4), (3, 3)):
        result = estimate(Plain(), vectors(), max_epochs=2, devices=ranks)
        assert result.simulation.total_steps == steps  # 4 batches in each of 2 epochs
        assert result.simulation.samples == 64


def test_a_mask_of_the_batch_selects_its_real_number_of_elements() -> None:
    class Masked(Plain):
        def training_step(self, batch: Any, index: int) -> Any:
            logits = self.layers(batch[0])
            known = batch[1] > 0
            return F.cross_entropy(logits[known], batch[1][known])

    check(Masked, vectors, lambda: {"max_steps": 9})


def test_a_module_without_memory_for_its_parameters_gives_the_same() -> None:
    from ravine.callbacks.estimates.fake_parameters import parameters_on_meta

    with parameters_on_meta():
        module = Plain()
    assert all(p.is_meta for p in module.parameters())
    result = estimate(module, vectors(), max_steps=9)
    assert result.peak_bytes == estimate(Plain(), vectors(), max_steps=9).peak_bytes
