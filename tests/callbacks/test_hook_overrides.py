"""A method has one owner: the error names both callbacks, and every method is restored."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from ravine.callbacks.hook_overrides import hook_owner, override_hook, restore_hook


class Taker(L.Callback):
    """Replaces the optimizer, wraps the module's own one, and may crash the fit."""

    def __init__(self, crash: bool = False) -> None:
        self.crash = crash
        self.seen: list[torch.optim.Optimizer] = []

    def setup(self, trainer, pl_module, stage):
        def configure_optimizers(module):
            self.original = original()
            return torch.optim.Adam(module.parameters(), lr=1e-3)

        original = override_hook(
            trainer, pl_module, "configure_optimizers", configure_optimizers, self
        )

    def on_train_start(self, trainer, pl_module):
        self.seen += trainer.optimizers
        if self.crash:
            raise RuntimeError("crash")

    def teardown(self, trainer, pl_module, stage):
        restore_hook(pl_module, "configure_optimizers", self)


class OtherTaker(Taker):
    pass


def trainer(*callbacks):
    return L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


def test_a_patched_method_is_called_and_restored():
    module, taker = BoringModel(), Taker()
    own = module.configure_optimizers
    trainer(taker).fit(module)
    assert isinstance(taker.seen[0], torch.optim.Adam)
    assert isinstance(taker.original[0][0], torch.optim.SGD)
    assert module.configure_optimizers == own
    assert "configure_optimizers" not in vars(module)


def test_a_second_active_owner_is_refused_with_both_names():
    with pytest.raises(ValueError, match="Taker and OtherTaker both override configure_optimizers"):
        trainer(Taker(), OtherTaker()).fit(BoringModel())


def test_an_owner_left_by_a_crashed_fit_is_stale():
    module, next_taker = BoringModel(), OtherTaker()
    with pytest.raises(RuntimeError, match="crash"):
        trainer(Taker(crash=True)).fit(module)
    assert "configure_optimizers" in vars(module)
    trainer(next_taker).fit(module)
    assert isinstance(next_taker.original[0][0], torch.optim.SGD)
    assert "configure_optimizers" not in vars(module)


def test_a_method_that_the_user_set_on_the_instance_is_restored():
    module = BoringModel()
    module.configure_optimizers = own = lambda: torch.optim.SGD(module.parameters(), lr=0.5)
    trainer(Taker()).fit(module)
    assert module.configure_optimizers is own


def test_an_owner_may_patch_again():
    module, taker = BoringModel(), Taker()
    run = trainer(taker)
    taker.setup(run, module, "fit")
    taker.setup(run, module, "fit")
    assert hook_owner(run, module, "configure_optimizers") is taker
    taker.teardown(run, module, "fit")
    assert "configure_optimizers" not in vars(module)


def test_unpatching_by_another_changes_nothing():
    module, taker = BoringModel(), Taker()
    run = trainer(taker)
    taker.setup(run, module, "fit")
    restore_hook(module, "configure_optimizers", OtherTaker())
    assert hook_owner(run, module, "configure_optimizers") is taker


def test_a_copy_of_a_patched_module_is_patched_on_the_copy():
    module, taker = BoringModel(), Taker()
    taker.setup(trainer(taker), module, "fit")
    assert copy.deepcopy(module).configure_optimizers.__self__ is not module
