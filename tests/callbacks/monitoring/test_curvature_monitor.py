"""CurvatureMonitor equals the dense Hessian, on any ranks, and changes nothing in training."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import (
    ActivationCheckpointing,
    Compile,
    CurvatureMonitor,
    LoRA,
    OptimizerPlan,
    ParamRule,
)
from ravine.callbacks.monitoring.curvature_monitor import stability_limit
from ravine.datamodules import ImageDataModule, TextDataModule
from ravine.errors import UsageError
from ravine.lightning_modules import ImageClassifier, LanguageModel, Objective
from ravine.lightning_modules.nn.cross_entropy import chunked_cross_entropy

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
    optimizer: Any = None,
    **settings: Any,
) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    if optimizer is not None:
        callbacks = [*callbacks, OptimizerPlan(optimizer)]
    trainer = L.Trainer(**SETTINGS | {"max_steps": steps} | settings, callbacks=list(callbacks))
    trainer.fit(module, data)
    return trainer


def transformer() -> tuple[LanguageModel, TextDataModule]:
    model = LanguageModel(num_layers=1, d_model=8, num_heads=2, zero_init_residual=False)
    return model, TextDataModule("text.txt", context_length=8, batch_size=8, val_fraction=0.1)


def mlp() -> tuple[ImageClassifier, ImageDataModule]:
    data = ImageDataModule("digits", batch_size=64, val_fraction=0.0)
    return ImageClassifier("mlp", num_features=8), data


class DenseHessian(L.Callback):
    """The eigenvalues of the dense Hessian at the first batch, computed row by row."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        log, module.log = module.log, lambda *args, **kwargs: None
        with sdpa_kernel(SDPBackend.MATH):
            loss = module.training_step(batch, index)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradients])
            rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in flat]
        module.log = log
        dense = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).double()
        self.eigenvalues = torch.linalg.eigvalsh((dense + dense.T) / 2)


@pytest.mark.parametrize("make", [transformer, mlp])
def test_the_eigenvalues_are_those_of_the_dense_hessian_within_one_percent(make):
    monitor, dense = CurvatureMonitor(), DenseHessian()
    fit(*make(), [monitor, dense])
    found = monitor.eigenvalues
    assert found is not None
    assert found.has_converged
    assert 500 < len(dense.eigenvalues) < 2000
    assert found.largest == pytest.approx(float(dense.eigenvalues[-1]), rel=0.01)
    assert found.smallest == pytest.approx(float(dense.eigenvalues[0]), rel=0.01)
    assert found.smallest < 0 < found.largest
    assert found.num_products < 80


def test_a_quadratic_has_its_eigenvalues_exactly():
    monitor = CurvatureMonitor(every_n_steps=2, tolerance=1e-10)
    module = Objective("quadratic", start=[3.0, 2.0, 1.0], condition_number=100)
    trainer = fit(module, None, [monitor], 5, partial(SGD, lr=0.01))
    eigenvalues = torch.linalg.eigvalsh(
        torch.autograd.functional.hessian(module.function.value, torch.ones(3).double())
    )
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(100)
    for name, value in (("largest", eigenvalues[-1]), ("smallest", eigenvalues[0])):
        points = monitor.state_dict()[name]
        assert [step for step, _ in points] == [0, 2, 4]
        assert [v for _, v in points] == pytest.approx([float(value)] * 3, rel=1e-12)
    assert float(trainer.callback_metrics["curvature/stability_limit"]) == pytest.approx(200)
    assert Path("curvature.png").stat().st_size > 10_000


class Descent(Objective):
    """SGD with any settings; a plan would not decay a vector."""

    settings: dict[str, Any]

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), **self.settings)


@pytest.mark.parametrize(("factor", "is_stable"), [(0.97, True), (1.03, False)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"weight_decay": 0.5}],
)
def test_descent_is_stable_exactly_below_the_limit(settings, factor, is_stable):
    """The learning rate is set so that eigenvalue and decay are `factor` times the limit."""
    undecayed = {**settings, "weight_decay": 0}
    limit_at_one = stability_limit([SGD([nn.Parameter(torch.ones(1))], lr=1.0, **undecayed)])
    assert limit_at_one is not None
    lr = factor * limit_at_one / (1 + settings.get("weight_decay", 0))
    monitor = CurvatureMonitor(every_n_steps=200)
    module = Descent("quadratic", start=[1.0], steps_per_batch=200)
    module.settings = {"lr": lr, **settings}
    trainer = fit(module, None, [monitor], 400)
    assert monitor.eigenvalues is not None
    limit = float(trainer.callback_metrics["curvature/stability_limit"])
    assert (monitor.eigenvalues.largest < limit) == is_stable
    assert (abs(float(module.member_points())) < 1) == is_stable


def test_the_limit_belongs_to_sgd_of_one_setting():
    w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert stability_limit([SGD([w], lr=0.1)]) == pytest.approx(20)
    assert stability_limit([SGD([{"params": [w]}, {"params": [v], "lr": 0.2}], lr=0.1)]) is None
    assert stability_limit([AdamW([w], lr=0.1)]) is None


class Everything(L.LightningModule):
    """BatchNorm, dropout, attributes that change, metrics and generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.frozen = nn.Linear(6, 1).requires_grad_(False)
        self.num_calls, self.losses = 0, []
        self.generator = torch.Generator().manual_seed(0)

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), 16, shuffle=True)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        self.num_calls += 1
        noise = torch.rand(len(x), 1, generator=self.generator)
        loss = (self.net(x) + self.frozen(x) - y + 0.1 * noise).square().mean()
        self.losses.append(float(loss.detach()))
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Recorder(L.Callback):
    """What a run leaves behind: gradients, metrics, modes and the default generator."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.metrics: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat([g.reshape(-1).clone() for g in gradients]))
        assert module.training

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        own = {k: v for k, v in trainer.callback_metrics.items() if "curvature" not in k}
        self.metrics.append({k: v.clone() for k, v in own.items()})


def test_training_is_bitwise_the_same_with_and_without_the_callback():
    runs = []
    for callbacks in ([], [CurvatureMonitor(every_n_steps=1)]):
        module, recorder = Everything(), Recorder()
        L.seed_everything(3, verbose=False)
        for layer in module.net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        module.frozen.reset_parameters()
        fit(module, None, [*callbacks, recorder], 9, accumulate_grad_batches=2)
        runs.append((module, recorder, torch.get_rng_state()))
    (plain, first, state), (watched, second, other_state) = runs
    assert torch.equal(state, other_state)
    assert (plain.num_calls, plain.losses) == (watched.num_calls, watched.losses)
    assert torch.equal(plain.generator.get_state(), watched.generator.get_state())
    state_dicts = plain.state_dict(), watched.state_dict()
    assert all(torch.equal(state_dicts[0][name], state_dicts[1][name]) for name in state_dicts[0])
    assert all(torch.equal(a, b) for a, b in zip(first.gradients, second.gradients, strict=True))
    assert first.metrics == second.metrics


def test_frozen_parameters_are_left_out():
    sizes = []

    class Sizes(CurvatureMonitor):
        def _measure(self, *args: Any) -> Any:
            result = super()._measure(*args)
            sizes.append(len(result[1].vector))
            return result

    fit(Everything(), None, [Sizes()])
    assert sizes == [6 * 8 + 8 + 16 + 8 + 1]


def measure_transformer(strategy: str, devices: int, folder: str) -> tuple[float, float]:
    import os

    os.chdir(folder)
    monitor = CurvatureMonitor(every_n_steps=1, tolerance=1e-6)
    fit(*transformer(), [monitor], 2, partial(SGD, lr=0.1), strategy=strategy, devices=devices)
    assert monitor.eigenvalues is not None
    return monitor.eigenvalues.largest, monitor.eigenvalues.smallest


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_two_ranks_measure_what_one_process_with_the_whole_batch_measures(
    ranks, strategy, tmp_path
):
    first, second = ranks(measure_transformer, 2, strategy, 2, str(tmp_path))
    assert first == second
    assert first == pytest.approx(measure_transformer("auto", 1, str(tmp_path)), rel=1e-5)


def test_activation_checkpointing_and_compile_change_no_eigenvalue():
    found = []
    full, selective = ActivationCheckpointing("full"), ActivationCheckpointing("selective")
    for callbacks in ([], [full], [selective], [Compile(backend="aot_eager")]):
        monitor = CurvatureMonitor(tolerance=1e-4)
        fit(*transformer(), [monitor, *callbacks])
        assert monitor.eigenvalues is not None
        found.append(monitor.eigenvalues[:2])
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 3


def test_products_are_in_full_precision_in_mixed_precision():
    found = []
    for precision in ("32-true", "bf16-mixed"):
        monitor = CurvatureMonitor(tolerance=1e-4)
        fit(*transformer(), [monitor], precision=precision)
        assert monitor.eigenvalues is not None
        found.append(monitor.eigenvalues[:2])
    assert found[0] == found[1]


def test_adapters_are_measured_without_their_frozen_base():
    monitor = CurvatureMonitor()
    fit(*transformer(), [LoRA(rank=2), monitor])
    assert monitor.eigenvalues is not None
    assert monitor.eigenvalues.largest > 0
    assert len(monitor.eigenvalues.vector) < 500


class LargeVocabulary(NetInInit):
    """Its loss has a hand-written backward that autograd takes for a constant."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, _ = batch
        features = self.net(x)[:, None] * torch.tensor([0.0, 1.0, 4.0])  # (b 1 3)
        weight = torch.eye(3)
        return chunked_cross_entropy(features, weight, torch.zeros(features.shape[:2]).long(), 3)


def test_a_backward_without_a_second_derivative_is_refused():
    with pytest.raises(UsageError, match=r"without a second derivative.*differences of gradients"):
        fit(LargeVocabulary(), None, [CurvatureMonitor()])


class FlashOnly(NetInInit):
    """An operation that torch cannot differentiate twice."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, _ = batch
        return torch.nn.functional.ctc_loss(
            self.net(x)[:, None].expand(-1, 1, 4).log_softmax(-1),
            torch.ones(1, 2).long(),
            torch.tensor([len(x)]),
            torch.tensor([2]),
        )


def test_torch_s_error_for_a_second_derivative_is_one_line():
    with pytest.raises(UsageError, match=r"FlashOnly has an operation without a second") as caught:
        fit(FlashOnly(), None, [CurvatureMonitor()])
    assert "\n" not in str(caught.value)


class WithoutLoss(NetInInit):
    def training_step(self, batch: Any, index: int) -> Any:
        return None


@pytest.mark.parametrize(
    ("make", "settings", "text"),
    [
        (partial(TwoOptimizers, 4), {}, r"steps its own optimizers \(manual optimization\)"),
        (NetInInit, {"precision": "bf16-true"}, "needs weights in fp32.*allowed: 32-true"),
        (WithoutLoss, {}, "training_step returned NoneType"),
    ],
)
def test_a_module_that_cannot_be_measured_is_refused_in_one_line(make, settings, text):
    with pytest.raises(UsageError, match=text) as caught:
        fit(make(), None, [CurvatureMonitor()], **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [{"every_n_steps": 0}, {"max_products": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}]
)
def test_an_argument_out_of_range_is_refused(arguments):
    with pytest.raises(UsageError, match=f"CurvatureMonitor: {next(iter(arguments))}="):
        CurvatureMonitor(**arguments)


def test_an_unfinished_search_prints_its_error(capsys):
    fit(*transformer(), [CurvatureMonitor(max_products=3)])
    assert "after 3 products the largest eigenvalue is" in capsys.readouterr().out


def test_a_resumed_run_draws_the_whole_curve():
    first, second = CurvatureMonitor(every_n_steps=3), CurvatureMonitor(every_n_steps=3)
    torch.manual_seed(0)
    trainer = fit(NetInInit(), None, [first], 4)  # an epoch
    trainer.save_checkpoint("four.ckpt")
    resumed = L.Trainer(**SETTINGS, max_steps=8, callbacks=[second])
    resumed.fit(NetInInit(), ckpt_path="four.ckpt")
    whole = CurvatureMonitor(every_n_steps=3)
    torch.manual_seed(0)
    fit(NetInInit(), None, [whole], 8)
    assert [step for step, _ in second.state_dict()["largest"]] == [0, 3, 6]
    assert second.state_dict() == whole.state_dict()


def test_the_limit_of_a_plan_with_two_rates_is_not_drawn():
    rules = [ParamRule("bias", lr_scale=0.5), ParamRule()]
    plan = OptimizerPlan(partial(SGD, lr=0.1), rules=rules)
    trainer = fit(*mlp(), [CurvatureMonitor(), plan])
    assert "curvature/largest" in trainer.callback_metrics
    assert "curvature/stability_limit" not in trainer.callback_metrics
