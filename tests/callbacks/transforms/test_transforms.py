"""Transforms run once, between build and sharding, in a fixed order, or are refused."""

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from ranks import furthest, whole
from torch import nn

import ravine.strategies  # noqa: F401  the name zero3
from ravine.callbacks.transforms.base import Transform, make_param_generator, register_transform


class Late(BoringModel):
    """A foreign module whose net is built in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None

    def configure_model(self):
        if self.layer is None:
            self.layer = nn.Linear(32, 2)


class Log(Transform):
    """Appends its phase to the module and remembers with what it was asked."""

    def __init__(self, phase: str, **arguments: int) -> None:
        self.phase, self.arguments = phase, arguments

    def config_key(self):
        return self.arguments

    def transform(self, module):
        assert module.layer is not None
        module.log_of_phases = [*getattr(module, "log_of_phases", []), self.phase]


class Adapter(Log):
    pass


class Adapted(nn.Module):
    """A frozen layer and a low-rank change of it, both factors drawn by their names."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        for part in ("down", "up"):
            generator = make_param_generator(0, f"{name}.{part}")
            nn.init.normal_(getattr(self, part).weight, generator=generator)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Adapt(Transform):
    phase = "adapt"

    def transform(self, module):
        module.net[0] = Adapted(module.net[0], "net.0")


class Thief(L.Callback):
    """Replaces configure_model behind everybody's back."""

    def setup(self, trainer, pl_module, stage):
        pl_module.configure_model = type(pl_module).configure_model.__get__(pl_module)


class Crash(L.Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("crash")


def trainer(*callbacks, **options):
    defaults = {
        "max_steps": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


@pytest.mark.parametrize("kind", [BoringModel, Late])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_order_of_phases_is_fixed_whatever_the_callbacks_order(kind, order):
    callbacks = [Log("load"), Log("adapt"), Log("compile")]
    trainer(*(callbacks[i] for i in order)).fit(module := kind())
    assert module.log_of_phases == ["load", "adapt", "compile"]
    assert "configure_model" not in vars(module)


def test_an_equal_transform_of_a_later_trainer_is_not_applied_again():
    module = Late()
    run = trainer(Log("adapt", rank=4))
    run.fit(module)
    run.test(module, verbose=False)
    trainer(Log("adapt", rank=4)).fit(module)
    assert module.log_of_phases == ["adapt"]


def test_a_different_transform_of_a_later_trainer_is_refused():
    module = Late()
    trainer(Log("adapt", rank=4)).fit(module)
    with pytest.raises(ValueError, match=r"applied to this Late with \{'rank': 4\}.*'rank': 8"):
        trainer(Log("adapt", rank=8)).fit(module)


def test_a_phase_registered_after_a_later_one_was_applied_is_refused():
    module = Late()
    trainer(Log("adapt")).fit(module)
    with pytest.raises(ValueError, match="'load' must come before 'adapt'"):
        trainer(Log("load")).fit(module)


def test_a_later_phase_may_follow_in_a_later_trainer():
    module = Late()
    trainer(Log("load")).fit(module)
    trainer(Log("load"), Log("adapt")).fit(module)
    assert module.log_of_phases == ["load", "adapt"]


def test_two_callbacks_for_one_phase_are_refused_with_both_names():
    with pytest.raises(ValueError, match="Log and Adapter both belong to the phase 'adapt'"):
        trainer(Log("adapt"), Adapter("adapt")).fit(Late())


def test_a_phase_registered_and_not_applied_is_an_error():
    with pytest.raises(RuntimeError, match="Log: 'adapt' was not applied"):
        trainer(Log("adapt"), Thief()).fit(Late())


def test_the_error_for_an_unknown_phase_lists_the_known_phases():
    with pytest.raises(
        ValueError, match="allowed: load, quantize, adapt, freeze, recompute, compile"
    ):
        trainer(Log("prune")).fit(Late())


@pytest.mark.parametrize("first", [0, 1])
def test_stock_weight_averaging_is_refused_with_ema_as_the_hint(first):
    callbacks = [Log("adapt"), EMAWeightAveraging()]
    with pytest.raises(
        ValueError, match=r"EMAWeightAveraging copies the net.*ravine\.callbacks\.EMA"
    ):
        trainer(callbacks[first], callbacks[1 - first]).fit(BoringModel())


def test_a_transform_pending_from_a_crashed_setup_is_dropped():
    module, gone = Late(), Log("adapt")
    register_transform(trainer(gone), module, "adapt", gone.transform, gone)
    trainer(Log("load")).fit(module)
    assert module.log_of_phases == ["load"]


def test_after_a_crash_in_training_the_next_trainer_continues():
    module = Late()
    with pytest.raises(RuntimeError, match="crash"):
        trainer(Log("adapt"), Crash()).fit(module)
    trainer(Log("adapt"), Log("compile")).fit(module)
    assert module.log_of_phases == ["adapt", "compile"]


def test_the_generator_of_a_parameter_depends_on_seed_and_name_alone():
    draw = {
        (seed, name): torch.randn(4, generator=make_param_generator(seed, name))
        for seed in (0, 1)
        for name in ("a.weight", "b.weight")
    }
    assert torch.equal(
        draw[0, "a.weight"], torch.randn(4, generator=make_param_generator(0, "a.weight"))
    )
    assert len({tuple(values.tolist()) for values in draw.values()}) == 4


def adapted(strategy="auto", devices=1):
    L.seed_everything(0, verbose=False)
    module = NetInInit(batch_size=32 // devices)
    options = {"strategy": strategy, "devices": devices}
    trainer(Adapt(), max_steps=4, limit_val_batches=0, **options).fit(module)
    return whole(module)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_transform_trains_equally_on_one_process_and_on_many(ranks, strategy):
    for weights in ranks(adapted, 2, strategy, 2):
        assert furthest(weights, adapted()) < 2e-6
