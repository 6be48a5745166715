"""EMA: the closed form of the average, who sees which weights, and both in every checkpoint."""

import lightning as L
import pytest
import torch
from ranks import furthest, whole
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import EMA, ExactResume
from ravine.datamodules.order import Order, Share, TrainLoader
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


def test_the_average_equals_its_recursion():
    ema = EMA(0.9, warmup=False)
    climbed(7, ema)
    assert ema.average["weight"].item() == pytest.approx(average_after(7, lambda n: 0.9))


def test_the_warmup_forgets_the_first_weights_faster():
    ema = EMA(0.9)
    climbed(7, ema)
    expected = average_after(7, lambda n: min(0.9, (1 + n) / (10 + n)))
    assert ema.average["weight"].item() == pytest.approx(expected)


def test_it_moves_once_an_optimizer_step_under_accumulation():
    ema = EMA(0.9, warmup=False)
    climbed(4, ema, accumulate_grad_batches=3)
    assert ema.average["weight"].item() == pytest.approx(average_after(4, lambda n: 0.9))


def test_zero_decay_is_the_weights_themselves():
    ema = EMA(0.0)
    climbed(5, ema)
    assert ema.average["weight"].item() == 5


def test_only_trainable_floating_parameters_are_averaged():
    ema = EMA()
    climbed(1, ema)
    assert list(ema.average) == ["weight"]


def test_validation_test_and_prediction_see_the_average_and_training_does_not():
    ema = EMA(0.9, warmup=False)
    module = Watched()
    trainer = L.Trainer(**QUIET, callbacks=[ema], max_steps=6, val_check_interval=3)
    trainer.fit(module, loader(), loader(1))
    expected = [average_after(n, lambda n: 0.9) for n in (3, 6)]
    assert module.seen == pytest.approx(expected)
    assert module.weight.item() == 6
    one = loader(1)
    trainer.test(module, one, verbose=False)
    assert module.seen[-1] == pytest.approx(expected[-1])
    assert trainer.predict(module, one)[0].item() == pytest.approx(expected[-1])
    assert module.weight.item() == 6


def test_an_interrupted_validation_leaves_the_raw_weights():
    class Broken(Watched):
        def validation_step(self, batch, index):
            raise RuntimeError("broken")

    module = Broken()
    trainer = L.Trainer(**QUIET, callbacks=[EMA(0.9)], max_steps=6, val_check_interval=3)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, loader(), loader(1))
    assert module.weight.item() == 3


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")  # rows are equal
def test_resume_continues_the_same_average(tmp_path):
    whole, first, second = EMA(0.9), EMA(0.9), EMA(0.9)
    climbed(9, whole)
    trainer, _ = climbed(4, first)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    module = Climb()
    resumed = L.Trainer(**QUIET, callbacks=[second], max_steps=9)
    resumed.fit(module, loader(), ckpt_path=tmp_path / "cut.ckpt")
    assert module.weight.item() == 9
    assert torch.equal(second.average["weight"], whole.average["weight"])


class SaveWhileValidating(L.Callback):
    """Writes the file at the worst moment: the model holds the average."""

    def __init__(self, path):
        self.path = path

    def on_validation_batch_end(self, trainer, *args, **kwargs):
        trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")  # rows are equal
def test_a_file_written_during_validation_resumes_the_same_run(tmp_path):
    one = loader(1)
    whole = EMA(0.9)
    climbed(9, whole)
    file = tmp_path / "validating.ckpt"
    callbacks = [EMA(0.9), SaveWhileValidating(file)]
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_steps=4, val_check_interval=4)
    trainer.fit(Watched(), loader(), one)
    module, resumed = Climb(), EMA(0.9)
    L.Trainer(**QUIET, callbacks=[resumed], max_steps=9).fit(module, loader(), ckpt_path=file)
    assert module.weight.item() == 9
    assert torch.equal(resumed.average["weight"], whole.average["weight"])


@pytest.mark.parametrize("while_validating", [False, True])
def test_a_new_process_tests_the_average_of_the_file(tmp_path, while_validating):
    one = loader(1)
    file = tmp_path / "some.ckpt"
    callbacks = [EMA(0.9, warmup=False)]
    if while_validating:
        callbacks.append(SaveWhileValidating(file))
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_steps=4, val_check_interval=4)
    trainer.fit(Watched(), loader(), one)
    if not while_validating:
        trainer.save_checkpoint(file)
    module = Watched()
    tester = L.Trainer(**QUIET, callbacks=[EMA(0.9)])
    tester.test(module, one, ckpt_path=file, verbose=False)
    assert module.seen == pytest.approx([average_after(4, lambda n: 0.9)])
    assert module.weight.item() == 4


def test_evaluating_with_nothing_averaged_says_so():
    module = Watched()
    with pytest.warns(UserWarning, match="averaged nothing yet"):
        L.Trainer(**QUIET, callbacks=[EMA()]).validate(module, loader(), verbose=False)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"decay=1\.0 is outside \[0, 1\); set e\.g\. 0\.999"):
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
        return TrainLoader(Order(0, 32), lambda items: ROWS[items], 32, 8, Share.of(self.trainer))

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
    return whole(module), ema.state_dict()["average"], module.scores


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
def test_an_average_saved_on_one_process_goes_on_in_every_layout(ranks, tmp_path, layout):
    weights, average, _ = averaged("single", save=tmp_path / "single.ckpt")
    for there in ranks(averaged, 2, layout, None, tmp_path / "single.ckpt"):
        assert furthest(there[0], weights) < 1e-6
        assert furthest(there[1], average) < 1e-6
