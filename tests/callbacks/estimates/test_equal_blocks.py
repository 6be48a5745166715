"""Two and three blocks, extrapolated, give what the simulation of all blocks gives."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine import estimate
from ravine.callbacks import ActivationCheckpointing, LoRA, Muon, OptimizerPlan
from ravine.callbacks.estimates.equal_blocks import find_equal_blocks
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel


class Block(nn.Module):
    def __init__(self, width: int = 32, scale: float = 1.0, layer_idx: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, width), nn.Linear(width, 16)
        self.scale, self.layer_idx = scale, layer_idx

    def forward(self, x: Any) -> Any:
        return x + self.scale * self.down(torch.relu(self.up(x)))


class Stack(L.LightningModule):
    """A module of a user, whose blocks have their numbers."""

    def __init__(self, blocks: list[Block] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.layers = nn.ModuleList(blocks or [Block(layer_idx=i) for i in range(7)])

    def training_step(self, batch: Any, index: int) -> Any:
        x = self.first(batch[0])
        for block in self.layers:
            x = block(x)
        return x.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


class Numbered(Stack):
    """Reads a block by its number, so that none may be removed."""

    def training_step(self, batch: Any, index: int) -> Any:
        sixth: Any = self.layers[6]
        return super().training_step(batch, index) + sixth.up.weight.sum()


def rows() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=16)


def transformer() -> LanguageModel:
    return LanguageModel(num_layers=6, d_model=16, num_heads=2)


def text() -> TextDataModule:
    return TextDataModule(source="embedded", context_length=8, batch_size=4)


def check_same(build: Any, data: Any, arguments: Any = dict) -> None:
    few = estimate(build(), data(), max_steps=9, **arguments())
    full = estimate(build(), data(), max_steps=9, full=True, **arguments())
    a, b = few.simulation, full.simulation
    assert a.num_equal_blocks > 5
    assert b.num_equal_blocks == 0
    assert a.parameters == b.parameters
    assert (a.state_bytes, a.buffer_bytes) == (b.state_bytes, b.buffer_bytes)
    assert (a.flops, a.optimizer_flops) == (b.flops, b.optimizer_flops)
    assert a.alternative is not None
    assert b.alternative is not None
    assert a.alternative.flops == b.alternative.flops
    for one, other in ((a, b), (a.alternative, b.alternative)):
        # data sets are cached, so that a second run can have fewer tensors of them
        peaks = [step.peak.total - step.peak.of("data") for step in (one, other)]
        assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
        assert len(one.moments) > 20
    assert a.peak.in_blocks == pytest.approx(b.peak.in_blocks, rel=0.01)


def test_a_transformer_with_muon_and_accumulation() -> None:
    check_same(transformer, text, lambda: {"callbacks": [Muon()], "accumulate_grad_batches": 2})


def test_adapters_and_a_run_that_has_activation_checkpointing() -> None:
    def callbacks() -> dict[str, Any]:
        return {"callbacks": [OptimizerPlan(torch.optim.AdamW), LoRA(), ActivationCheckpointing()]}

    check_same(transformer, text, callbacks)


def test_a_module_of_a_user() -> None:
    check_same(Stack, rows)


@pytest.mark.parametrize("change", [{"width": 48}, {"scale": 0.5}])
def test_blocks_of_another_shape_or_with_another_argument_are_not_equal(change: Any) -> None:
    blocks = [Block(layer_idx=i) for i in range(7)]
    assert find_equal_blocks(Stack(blocks)) is not None
    blocks[4] = Block(layer_idx=4, **change)
    assert find_equal_blocks(Stack(blocks)) is None
    result = estimate(Stack(blocks), rows(), max_steps=9)
    assert result.simulation.num_equal_blocks == 0
    assert result.num_parameters == sum(p.numel() for p in Stack(blocks).parameters())


def test_two_lists_of_blocks_and_few_blocks_are_simulated_whole() -> None:
    assert find_equal_blocks(nn.ModuleList([Stack(), Stack()])) is None
    assert find_equal_blocks(Stack([Block() for _ in range(5)])) is None


def test_code_that_needs_a_certain_block_is_simulated_whole() -> None:
    result = estimate(Numbered(), rows(), max_steps=9)
    assert result.simulation.num_equal_blocks == 0
    assert result.num_parameters == sum(p.numel() for p in Numbered().parameters())
