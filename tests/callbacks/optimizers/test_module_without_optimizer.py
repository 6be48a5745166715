"""OptimizerPlan on a LightningModule that has no `configure_optimizers`."""

from functools import partial

import lightning as L
import pytest
import torch
from external_modules.net_in_init import NetInInit
from ranks import furthest, whole
from torch.optim import SGD

from ravine import Trainer
from ravine.callbacks import EMA, GradientClipping, Lion, Muon, OptimizerPlan
from ravine.cli.main import main
from ravine.errors import UsageError

MODULE = """
import lightning as L
import torch
from torch.nn import Linear, Sequential
from torch.utils.data import DataLoader, TensorDataset

class NoOptimizer(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Sequential(Linear(4, 8), Linear(8, 8), Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

class Rows(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 4)), batch_size=4)
"""
OFF = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
OFF |= {"enable_model_summary": False, "log_every_n_steps": 1}


class NoOptimizer(NetInInit):
    """The module of the external modules without its optimizer."""

    configure_optimizers = L.LightningModule.configure_optimizers


class ByHand(NoOptimizer):
    """Manual optimization, for which a plan is no help."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnSGD(NetInInit):
    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.5)


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("stop")


def trainer_of(cls, *callbacks, **more):
    return cls(
        max_steps=4, accelerator="cpu", callbacks=list(callbacks), **{"devices": 1, **OFF, **more}
    )


def train(module_class=NoOptimizer, plan=None, strategy="auto", devices=1):
    """Return the weights after four steps on all 32 samples."""
    L.seed_everything(0, verbose=False)
    module = module_class(batch_size=32 // devices)
    callbacks = [] if plan is None else [plan]
    trainer = trainer_of(L.Trainer, *callbacks, strategy=strategy, devices=devices)
    trainer.fit(module)
    assert "configure_optimizers" not in vars(module)
    return whole(module)


def sgd():
    return OptimizerPlan(partial(SGD, lr=0.5))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_plan_trains_it_on_two_ranks_as_its_own_optimizer_does_in_one_process(ranks, strategy):
    expected = train(OwnSGD)
    assert furthest(train(plan=sgd()), expected) == 0
    for weights in ranks(train, 2, NoOptimizer, sgd(), strategy, 2):
        assert furthest(weights, expected) < 2e-6


@pytest.mark.parametrize("plan", [Muon, Lion], ids=["Muon", "Lion"])
@pytest.mark.parametrize("cls", [L.Trainer, Trainer], ids=["stock", "ravine"])
def test_each_subclass_of_the_plan_trains_it_with_other_callbacks(tmp_path, cls, plan):
    module = NoOptimizer()
    before = whole(module)
    others = EMA(), GradientClipping(1.0)
    trainer_of(cls, *others, plan(), default_root_dir=tmp_path).fit(module)
    assert furthest(whole(module), before) > 0


@pytest.mark.parametrize("form", ["the module's callbacks", "two fits", "two plans"])
def test_a_plan_may_be_the_modules_own_callback_and_be_used_twice(tmp_path, form):
    plan, module = sgd(), NoOptimizer()
    if form == "the module's callbacks":
        module.configure_callbacks = lambda: [plan]
        trainer = trainer_of(Trainer, default_root_dir=tmp_path)
    else:
        plans = [plan, Lion()] if form == "two plans" else [plan]
        trainer = trainer_of(Trainer, *plans, default_root_dir=tmp_path)
    trainer.fit(module)
    first = whole(module)
    trainer_of(Trainer, *trainer.callbacks, default_root_dir=tmp_path).fit(module)
    assert furthest(whole(module), first) > 0


def test_without_a_plan_the_error_names_the_callback(tmp_path):
    with pytest.raises(
        UsageError, match=r"no OptimizerPlan; pass callbacks=\[OptimizerPlan\("
    ) as e:
        trainer_of(Trainer, default_root_dir=tmp_path).fit(NoOptimizer())
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="manual optimization") as by_hand:
        trainer_of(Trainer, default_root_dir=tmp_path).fit(ByHand())
    assert "OptimizerPlan" not in str(by_hand.value)
    trainer_of(Trainer, default_root_dir=tmp_path).validate(NoOptimizer(), verbose=False)


def test_a_plan_leaves_the_module_after_an_exception():
    for kind in NoOptimizer, OwnSGD:
        module = kind()
        with pytest.raises(RuntimeError, match="stop"):
            trainer_of(L.Trainer, OptimizerPlan(partial(SGD, lr=0.1)), Stop()).fit(module)
        assert not {"configure_optimizers", "lr_schedulers"} & {*vars(module)}
    trainer = trainer_of(L.Trainer)
    trainer.fit(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_the_command_line_trains_it_with_each_plan_and_refuses_it_without(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text(MODULE)
    fit = ["fit", "--model=own_module.NoOptimizer", "--data=own_module.Rows"]
    fit += ["--trainer.max_steps=4", "--trainer.accelerator=cpu"]
    assert main(fit) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1] == "  type: --optimizer=AdamW"
    assert "NoOptimizer has no configure_optimizers" in error[-2]
    flags = error[-1].removeprefix("  type: ").split()
    assert main([*fit, *flags]) == 0
    assert main([*fit, "--trainer.callbacks+=Muon"]) == 0
    state = torch.load(
        tmp_path / "runs/nooptimizer/version_1/checkpoints/step=000004.ckpt", weights_only=True
    )
    assert state["optimizer_plan"]
