"""ScaleMonitor measures the layers of a step, equal on any ranks, and changes nothing."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from torch import Tensor
from torch.optim import SGD

from ravine.callbacks import (
    ActivationCheckpointing,
    Compile,
    CurvatureMonitor,
    OptimizerPlan,
    ScaleMonitor,
    TokenWeightedLoss,
)
from ravine.datamodules import TextDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import LanguageModel, Objective

SETTINGS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the ravine is deep and the river is cold; " * 40)


def fit(
    module: L.LightningModule,
    data: Any = None,
    callbacks: Any = (),
    steps: int = 1,
    **settings: Any,
) -> dict[str, float]:
    """The scales of the last measured step."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(**SETTINGS | {"max_steps": steps} | settings, callbacks=list(callbacks))
    trainer.fit(module, data)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("scale/")}


class Chain(NetInInit):
    """Keeps the output of each layer of its last step, with its gradient."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        self.outputs = {}
        for name, layer in self.net.named_children():
            x = layer(x)
            x.retain_grad()
            self.outputs[f"net.{name}"] = x
        return (x - y).square().mean()


def test_the_scales_are_root_mean_squares_of_outputs_and_of_their_gradients():
    module = Chain()
    scales = fit(module, None, [ScaleMonitor(every_n_steps=1)], 3)
    expected = {}
    for name in ("net.0", "net.2"):  # the layers with parameters
        output = module.outputs[name]
        expected[f"scale/activation/{name}"] = float(output.detach().square().mean().sqrt())
        expected[f"scale/gradient/{name}"] = float(output.grad.square().mean().sqrt())
    assert scales == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
    assert Path("scale.png").stat().st_size > 10_000


@pytest.mark.parametrize("callbacks", [[], [ActivationCheckpointing()]])
def test_training_is_bitwise_the_same_with_and_without_the_callback(callbacks):
    runs = []
    for monitors in ([], [ScaleMonitor(every_n_steps=1)]):
        model, data = transformer(dropout=0.2)
        plan = OptimizerPlan(partial(SGD, lr=0.1, momentum=0.9))
        fit(model, data, [*callbacks, *monitors, plan], 3, accumulate_grad_batches=2)
        runs.append((model.state_dict(), torch.get_rng_state()))
    (plain, state), (watched, other_state) = runs
    assert torch.equal(state, other_state)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def transformer(**kwargs: Any) -> tuple[LanguageModel, TextDataModule]:
    model = LanguageModel(num_layers=2, d_model=8, num_heads=2, zero_init_residual=False, **kwargs)
    return model, TextDataModule("text.txt", context_length=8, batch_size=8, val_fraction=0.1)


INNER = ["net.embed", "blocks.*.attention", "blocks.*.mlp.down", "head"]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_layers_are_counted_once(mode):
    plain = fit(*transformer(), [ScaleMonitor(layers=INNER)])
    assert len(plain) == 12
    recomputed = fit(*transformer(), [ScaleMonitor(layers=INNER), ActivationCheckpointing(mode)])
    assert recomputed == plain


def test_micro_batches_have_the_scales_of_the_whole_batch():
    whole = fit(*transformer(), [ScaleMonitor()])
    parts = fit(*transformer(), [ScaleMonitor()], accumulate_grad_batches=4)
    assert list(parts) == list(whole)
    assert parts == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}
    depths = [name.rpartition("/")[2] for name in whole if name.startswith("scale/activation")]
    assert depths == ["net.embed", "net.blocks.0", "net.blocks.1", "net.norm", "net.head"]


def measure_ranks(strategy: str, devices: int, folder: str) -> dict[str, float]:
    os.chdir(folder)
    callbacks = [ScaleMonitor(every_n_steps=1), TokenWeightedLoss()]
    plan = OptimizerPlan(partial(SGD, lr=0.1))
    return fit(*transformer(), [*callbacks, plan], 2, strategy=strategy, devices=devices)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_have_the_scales_of_one_process_with_the_whole_batch(ranks, strategy, tmp_path):
    """TokenWeightedLoss multiplies the loss of each rank; the scales are those of their mean."""
    first, second = ranks(measure_ranks, 2, strategy, 2, str(tmp_path))
    assert first == second
    single = measure_ranks("auto", 1, str(tmp_path))
    assert len(single) == 10
    assert first == {name: pytest.approx(value, rel=1e-5) for name, value in single.items()}


def test_the_losses_of_a_curvature_measurement_are_not_counted():
    plain = fit(*transformer(), [ScaleMonitor()])
    monitors = [ScaleMonitor(), CurvatureMonitor(max_products=2)]
    assert fit(*transformer(), monitors) == plain


def test_manual_optimization_is_measured():
    scales = fit(TwoOptimizers(), None, [ScaleMonitor()], 2)
    assert {"scale/gradient/predictor.0", "scale/activation/critic.2"} <= set(scales)


class Untouched(NetInInit):
    def training_step(self, batch: Any, index: int) -> Tensor:
        weights = self.net[0].weight
        return weights.square().sum()


class Compiled(NetInInit):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "callbacks", "text"),
    [
        (Untouched, [], "none of the layers of Untouched ran"),
        (Compiled, [], "Compiled has compiled layers"),
        (NetInInit, [Compile(backend="eager")], "NetInInit has compiled layers"),
        (partial(NetInInit), [ScaleMonitor(layers="nets.0")], "ScaleMonitor.layers: 'nets.0'"),
    ],
)
def test_layers_that_cannot_be_measured_are_refused_in_one_line(make, callbacks, text):
    has_monitor = any(isinstance(callback, ScaleMonitor) for callback in callbacks)
    with pytest.raises(UsageError, match=text) as caught:
        fit(make(), None, [*callbacks, *([] if has_monitor else [ScaleMonitor()])])
    assert "\n" not in str(caught.value)


def test_a_module_whose_parameters_are_in_no_layer_is_refused():
    with pytest.raises(UsageError, match="ScaleMonitor: none of the layers of Objective ran"):
        fit(Objective("quadratic", start=[1.0]), None, [ScaleMonitor()])


def test_a_resumed_run_draws_all_its_steps():
    torch.manual_seed(0)
    first, second, whole = (ScaleMonitor(every_n_steps=3) for _ in range(3))
    trainer = L.Trainer(**SETTINGS, max_steps=4, callbacks=[first])
    trainer.fit(NetInInit())
    trainer.save_checkpoint("four.ckpt")
    L.Trainer(**SETTINGS, max_steps=8, callbacks=[second]).fit(NetInInit(), ckpt_path="four.ckpt")
    torch.manual_seed(0)
    L.Trainer(**SETTINGS, max_steps=8, callbacks=[whole]).fit(NetInInit())
    assert [step for step, _ in second.curves["scale/activation/net.0"]] == [1, 4, 7]
    assert second.state_dict() == whole.state_dict()


def test_frozen_trunks_have_no_gradient_scale():
    class Frozen(NetInInit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            self.net[0].requires_grad_(False)
            return super().training_step(batch, index)

    scales = fit(Frozen(), None, [ScaleMonitor()])
    assert "scale/activation/net.0" in scales
    assert "scale/gradient/net.0" not in scales
    assert "scale/gradient/net.2" in scales
