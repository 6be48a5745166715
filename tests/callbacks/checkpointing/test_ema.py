"""EMA: the closed form of the average, where which weights are used, and both in checkpoints."""

import lightning as L
import pytest
import torch
from ranks import furthest, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import EMA, ExactResume, OptimizerPlan
from ravine.datamodules.loaders import DataParallelInfo, ResumableLoader
from ravine.datamodules.samplers import EpochSampler
from ravine.strategies import MeshStrategy

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Climb(L.LightningModule):
    """Its one weight is n after n steps: every average can be written down."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.seen = []

    def training_step(self, batch, index):
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Watched(Climb):
    """Remembers which weight its evaluation saw."""

    def validation_step(self, batch, index):
        self.seen.append(self.weight.item())

    test_step = validation_step

    def predict_step(self, batch, index):
        return self.weight.clone()


def loader(rows=40):
    return DataLoader(TensorDataset(torch.zeros(rows, 1)))


def climbed(steps, callback, **arguments):
    module = Climb()
    trainer = L.Trainer(**{**QUIET, "callbacks": [callback], "max_steps": steps, **arguments})
    trainer.fit(module, loader())
    return trainer, module


def average_after(steps, decay):
    average = 0.0
    for n in range(1, steps + 1):
        average += (1 - decay(n)) * (n - average)
    return average


def test_fit_leaves_the_average_which_equals_its_recursion():
    _, module = climbed(7, ema := EMA(0.9, warmup=False))
    assert module.weight.item() == pytest.approx(average_after(7, lambda n: 0.9))
    assert ema.weights_outside_model["weight"].item() == 7


def test_the_warmup_forgets_the_first_weights_faster():
    _, module = climbed(7, EMA(0.9))
    expected = average_after(7, lambda n: min(0.9, (1 + n) / (10 + n)))
    assert module.weight.item() == pytest.approx(expected)


def test_the_average_moves_once_per_optimizer_step_under_accumulation():
    _, module = climbed(4, EMA(0.9, warmup=False), accumulate_grad_batches=3)
    assert module.weight.item() == pytest.approx(average_after(4, lambda n: 0.9))


def test_with_decay_zero_the_average_equals_the_weights():
    _, module = climbed(5, EMA(0.0))
    assert module.weight.item() == 5


def test_only_trainable_floating_parameters_are_averaged():
    climbed(1, ema := EMA())
    assert list(ema.weights_outside_model) == ["weight"]


class Sample(L.Callback):
    """Generates after EMA has had its turn, as a callback further down the list does."""

    def on_validation_end(self, trainer, module):
        module.seen.append(module.weight.item())


def test_validation_samples_test_and_prediction_use_the_average_and_training_does_not():
    ema, module = EMA(0.9, warmup=False), Watched()
    callbacks = [ema, Sample()]
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_steps=6, val_check_interval=3)
    trainer.fit(module, loader(), loader(1))
    third, sixth = (average_after(n, lambda n: 0.9) for n in (3, 6))
    assert module.seen == pytest.approx([third, third, sixth, sixth])
    assert ema.weights_outside_model["weight"].item() == 6
    trainer.test(module, loader(1), verbose=False)
    assert module.seen[-1] == pytest.approx(sixth)
    assert trainer.predict(module, loader(1))[0].item() == pytest.approx(sixth)


def test_after_an_interrupted_validation_training_continues_with_the_raw_weights():
    class Broken(Watched):
        broken = True

        def validation_step(self, batch, index):
            if self.broken and self.trainer.global_step:  # not in the trial before the first step
                raise RuntimeError("broken")

    module, ema = Broken(), EMA(0.9)
    trainer = L.Trainer(**QUIET, callbacks=[ema], max_steps=6, val_check_interval=3)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, loader(), loader(1))
    module.broken = False
    module.train()  # which the interrupted validation no longer did
    trainer = L.Trainer(**QUIET, callbacks=[ema], max_steps=2, val_check_interval=2)
    trainer.fit(module, loader(), loader(1))
    assert ema.weights_outside_model["weight"].item() == 5


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")  # rows are equal
def test_resume_continues_the_same_average(tmp_path):
    _, whole = climbed(9, EMA(0.9))
    trainer, _ = climbed(4, EMA(0.9))
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    module, resumed = Climb(), EMA(0.9)
    trainer = L.Trainer(**QUIET, callbacks=[resumed], max_steps=9)
    trainer.fit(module, loader(), ckpt_path=tmp_path / "cut.ckpt")
    assert resumed.weights_outside_model["weight"].item() == 9
    assert torch.equal(module.weight, whole.weight)


class SaveWhileValidating(L.Callback):
    """Writes the file at the worst moment: the model holds the average."""

    def __init__(self, path):
        self.path = path

    def on_validation_batch_end(self, trainer, *args, **kwargs):
        trainer.save_checkpoint(self.path)


def saved_at_four(file, while_validating):
    """A file of step 4, written in training or while the model holds the average."""
    callbacks = [EMA(0.9)]
    if while_validating:
        callbacks.append(SaveWhileValidating(file))
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_steps=4, val_check_interval=4)
    trainer.fit(Watched(), loader(), loader(1))
    if not while_validating:
        trainer.save_checkpoint(file)
    return file


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")  # rows are equal
@pytest.mark.parametrize("while_validating", [False, True])
def test_a_file_resumes_the_same_run_whenever_it_was_written(tmp_path, while_validating):
    _, whole = climbed(9, EMA(0.9))
    file = saved_at_four(tmp_path / "four.ckpt", while_validating)
    module, resumed = Climb(), EMA(0.9)
    L.Trainer(**QUIET, callbacks=[resumed], max_steps=9).fit(module, loader(), ckpt_path=file)
    assert resumed.weights_outside_model["weight"].item() == 9
    assert torch.equal(module.weight, whole.weight)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.filterwarnings("ignore:.*max_steps=4.*")
def test_a_run_resumed_at_its_end_saves_the_same_raw_and_averaged_weights(tmp_path):
    files = [saved_at_four(tmp_path / "four.ckpt", False), tmp_path / "again.ckpt"]
    trainer = L.Trainer(**QUIET, callbacks=[EMA(0.9)], max_steps=4)
    trainer.fit(Watched(), loader(), loader(1), ckpt_path=files[0])
    trainer.save_checkpoint(files[1])
    first, second = (torch.load(file, weights_only=True) for file in files)
    assert second["state_dict"]["weight"] == first["state_dict"]["weight"] != 4
    assert second["ema"]["raw"]["weight"] == first["ema"]["raw"]["weight"] == 4


@pytest.mark.parametrize("while_validating", [False, True])
@pytest.mark.parametrize("callbacks", [[EMA(0.9)], []])
def test_an_evaluation_of_a_checkpoint_uses_the_average(tmp_path, while_validating, callbacks):
    file = saved_at_four(tmp_path / "four.ckpt", while_validating)
    module = Watched()
    L.Trainer(**QUIET, callbacks=callbacks).test(module, loader(1), ckpt_path=file, verbose=False)
    expected = average_after(4, lambda n: min(0.9, (1 + n) / (10 + n)))
    assert module.seen == pytest.approx([expected])
    assert torch.load(file, weights_only=True)["ema"]["raw"]["weight"].item() == 4


def test_two_averages_are_refused():
    callbacks = [EMA(0.9), EMA(0.99)]
    with pytest.raises(ValueError, match=r"EMA\(decay=0.9\) and EMA\(decay=0.99\); remove one"):
        L.Trainer(**QUIET, callbacks=callbacks, max_steps=1).fit(Climb(), loader())


def test_an_evaluation_without_an_average_prints_a_line():
    module = Watched()
    with pytest.warns(UserWarning, match="EMA has no average yet"):
        L.Trainer(**QUIET, callbacks=[EMA()]).validate(module, loader(), verbose=False)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"decay=1\.0 is outside \[0, 1\); .*; use decay=0\.999"):
        EMA(1.0)


# On layouts: the average of a sharded weight is sharded, and whole in the file.

ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
STRATEGIES = {
    "single": lambda: {"devices": 1},
    "ddp": lambda: {"strategy": "ddp", "devices": 2},
    "zero3": lambda: {"strategy": "zero3", "devices": 2},
    "folder": lambda: {"strategy": MeshStrategy(save_distributed_checkpoint=True), "devices": 2},
}


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.scores = []

    def loss(self, rows):
        return (self.net(rows) - rows.prod(1, keepdim=True)).square().mean()

    def training_step(self, rows, index):
        return self.loss(rows)

    def validation_step(self, rows, index):
        self.scores.append(self.loss(rows).item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Rows(L.LightningDataModule):
    def train_dataloader(self):
        return ResumableLoader(
            EpochSampler(0, 32),
            lambda items: ROWS[items],
            32,
            8,
            DataParallelInfo.from_trainer(self.trainer),
        )

    def val_dataloader(self):
        return DataLoader(ROWS, batch_size=32)  # every rank sees all


class SaveAt(SaveWhileValidating):
    def on_validation_batch_end(self, trainer, *args, **kwargs):
        if trainer.global_step == 4 and self.path:
            trainer.save_checkpoint(self.path)


def averaged(layout, save=None, resume=None):
    L.seed_everything(0, verbose=False)
    module, ema = Regression(), EMA(0.9)
    trainer = L.Trainer(
        **QUIET,
        callbacks=[ema, ExactResume(), SaveAt(save)],
        max_steps=8,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        **STRATEGIES[layout](),
    )
    trainer.fit(module, Rows(), ckpt_path=resume)
    raw = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t)
        for name, t in ema.weights_outside_model.items()
    }
    return raw, whole(module), module.scores


def cut_and_continued(layout, folder):
    straight = averaged(layout, save=folder / f"{layout}.ckpt")
    return straight, averaged(layout, resume=folder / f"{layout}.ckpt")


@pytest.mark.parametrize("layout", ["ddp", "zero3", "folder"])
def test_the_average_is_the_same_on_every_layout_and_resumes_bitwise(ranks, tmp_path, layout):
    weights, average, scores = averaged("single")
    for straight, continued in ranks(cut_and_continued, 2, layout, tmp_path):
        assert furthest(straight[0], weights) < 1e-6
        assert furthest(straight[1], average) < 1e-6
        assert straight[2] == pytest.approx(scores, abs=1e-6)
        assert furthest(continued[0], straight[0]) == 0
        assert furthest(continued[1], straight[1]) == 0
        assert continued[2][-1] == straight[2][-1]


@pytest.mark.parametrize("layout", ["ddp", "zero3"])
def test_an_average_saved_on_one_process_resumes_on_every_layout(ranks, tmp_path, layout):
    weights, average, _ = averaged("single", save=tmp_path / "single.ckpt")
    for there in ranks(averaged, 2, layout, None, tmp_path / "single.ckpt"):
        assert furthest(there[0], weights) < 1e-6
        assert furthest(there[1], average) < 1e-6


class Unfreezes(L.Callback):
    """Lets the frozen weight climb from one step on, in a hook after EMA's."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == self.step:
            module.frozen.requires_grad_(True)


class Both(Watched):
    def training_step(self, batch, index):
        return -self.weight.sum() - (self.frozen.sum() if self.frozen.requires_grad else 0)


def unfrozen(steps, **arguments):
    module, ema = Both(), EMA(0.9, warmup=False)
    options = {**QUIET, "max_steps": steps, "val_check_interval": 1, **arguments}
    trainer = L.Trainer(**options, callbacks=[ema, Unfreezes(2)])
    return trainer, module, ema


def test_a_weight_that_is_unfrozen_is_averaged_from_its_value_before_its_first_step(tmp_path):
    trainer, module, ema = unfrozen(5)
    trainer.fit(module, loader(), loader(1))
    average = 1.0
    for value in (2.0, 3.0, 4.0):  # after steps 3, 4 and 5
        average += 0.1 * (value - average)
    assert module.frozen.item() == pytest.approx(average)
    assert ema.weights_outside_model["frozen"].item() == 4
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    saved = torch.load(tmp_path / "five.ckpt", weights_only=True)
    assert saved["state_dict"]["frozen"].item() == pytest.approx(average)
    assert saved["ema"]["raw"]["frozen"].item() == 4


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")  # rows are equal
def test_the_average_of_a_weight_frozen_again_at_a_resume_continues(tmp_path):
    trainer, module, _ = unfrozen(4)
    trainer.fit(module, loader(), loader(1))
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    trainer, resumed, ema = unfrozen(5)
    trainer.fit(resumed, loader(), loader(1), ckpt_path=tmp_path / "four.ckpt")
    assert ema.weights_outside_model["frozen"].item() == 3  # as it was: nothing has unfrozen it
    assert 1 < resumed.frozen.item() < 3  # the average goes on towards it


class TwoSetsSGD(torch.optim.SGD):
    def train(self):
        """Show the weights that train."""

    def eval(self):
        """Show the average."""


@pytest.mark.parametrize("plan_first", [True, False])
def test_an_optimizer_with_an_average_of_its_own_is_refused(plan_first):
    both = [OptimizerPlan(TwoSetsSGD), EMA()]
    trainer = L.Trainer(**QUIET, max_steps=1, callbacks=both if plan_first else both[::-1])
    with pytest.raises(ValueError, match="EMA: the optimizer TwoSetsSGD keeps its own average"):
        trainer.fit(Climb(), loader())
    assert trainer.global_step == 0


def test_a_module_with_an_averaging_optimizer_is_refused():
    class Own(Climb):
        def configure_optimizers(self):
            return TwoSetsSGD(self.parameters(), lr=1.0)

    trainer = L.Trainer(**QUIET, max_steps=1, callbacks=[EMA()])
    with pytest.raises(ValueError, match="EMA: the optimizer TwoSetsSGD keeps its own average"):
        trainer.fit(Own(), loader())
