"""Validation, saving and metrics are tried before the first step, without an effect on training."""

import enum
from functools import partial
from pathlib import Path

import lightning as L
import numpy
import pytest
import torch
from external_modules.net_in_init import NetInInit
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ravine.callbacks import (
    Checkpoint,
    FrechetDistance,
    GenerateSamples,
    GradientClipping,
    MetricAlert,
    OptimizerPlan,
    Pretrained,
)
from ravine.callbacks.checks.run_checks import RunChecks, get_first_batch
from ravine.cli.trainer import Trainer
from ravine.datamodules import TextDataModule
from ravine.datamodules.loaders import ResumableLoader
from ravine.datamodules.samplers import EpochSampler
from ravine.lightning_modules import Diffusion, LanguageModel

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Noisy(L.LightningModule):
    """Dropout, BatchNorm, a shuffled loader and own sums: everything that a trial could change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.totals = [], {"loss": torch.zeros(())}
        self.own = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.calls += 1
        return self.net(x + torch.randn(x.shape, generator=self.own))

    def training_step(self, batch, index):
        loss = (self(batch[0]) - 1).square().mean()
        self.seen.append(batch[0].sum().item())
        self.totals["loss"] += loss.detach()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.seen.append(numpy.random.rand())
        self.log("val/loss", (self(batch[0]) - 1).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
                "monitor": "train/loss",
                "strict": self.strict,
            },
        }

    def train_dataloader(self):
        rows = TensorDataset(torch.arange(64.0).view(16, 4) / 64)
        return DataLoader(rows, 4, shuffle=True, generator=torch.Generator().manual_seed(5))

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 4)), 4)


class Disturb(L.Callback):
    """Draws, counts and changes what it can during its check."""

    def __init__(self):
        self.calls = []

    def check(self, trainer, module, batch):
        self.calls.append((trainer.global_step, tuple(batch[0].shape), module.training))
        torch.rand(3), numpy.random.rand(), module(batch[0])
        module.net[1].running_mean += 1
        module.seen.append("a check")
        module.added = 1


def trained(
    trial: bool,
    strategy: str = "auto",
    devices: int = 1,
    sanity: int = 1,
    common: tuple = (partial(GradientClipping, 1.0),),
) -> tuple:
    L.seed_everything(0, verbose=False)
    module, disturb = Noisy(), Disturb()
    module.strict = trial and bool(common)
    early = EarlyStopping("val/loss", patience=99, strict=module.strict)
    callbacks = [*(each() for each in common), early]
    added = [disturb] if common else [RunChecks()]
    trainer = L.Trainer(
        **QUIET,
        max_epochs=2,
        num_sanity_val_steps=sanity,
        callbacks=[*callbacks, *(added if trial else [])],
        strategy=strategy,
        devices=devices,
    )
    trainer.fit(module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    moments = trainer.optimizers[0].state_dict()["state"]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    random_values = (torch.rand(2).tolist(), numpy.random.rand(), module.own.get_state().tolist())
    counted = (module.seen, module.totals, metrics, random_values, "added" in vars(module))
    return state, moments, counted, disturb.calls


def assert_same(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0)
    assert one[2] == other[2]


def test_a_checked_run_equals_an_unchecked_one_bit_for_bit() -> None:
    checked, plain = trained(True), trained(False)
    assert checked[3] == [(0, (4, 4), False)]
    assert_same(checked, plain)


def test_a_trial_of_the_validation_step_changes_no_state() -> None:
    assert_same(trained(True, sanity=0, common=()), trained(False, sanity=0, common=()))


def checked_and_plain(*arguments) -> tuple:
    return trained(True, *arguments), trained(False, *arguments)


def test_a_checked_run_on_two_ranks_equals_an_unchecked_one(ranks) -> None:
    for checked, plain in ranks(checked_and_plain, 2, "ddp", 2):
        assert len(checked[3]) == 1
        assert_same(checked, plain)


class FailsOn(L.Callback):
    def __init__(self, rank):
        self.rank = rank

    def check(self, trainer, module, batch):
        if trainer.global_rank == self.rank:
            raise ValueError("cannot be drawn")


def refused_on_every_rank() -> str:
    callbacks = [GradientClipping(1.0), FailsOn(1)]
    trainer = L.Trainer(**QUIET, callbacks=callbacks, max_steps=2, strategy="ddp", devices=2)
    try:
        trainer.fit(NetInInit(batch_size=4))
    except ValueError as error:
        return f"{trainer.global_step} {error}"
    return "trained"


def test_a_check_that_fails_on_one_rank_ends_all(ranks) -> None:
    assert ranks(refused_on_every_rank, 2) == ["0 on rank 1: cannot be drawn", "0 cannot be drawn"]


class Order0(L.Callback):
    """Records the order of its calls."""

    def __init__(self):
        self.calls = []

    def check(self, trainer, module, batch):
        self.calls.append(("check", module.net[0].weight.sum().item(), trainer.global_step))

    def on_sanity_check_start(self, trainer, module):
        self.calls.append(("sanity",))

    def on_train_batch_start(self, trainer, module, batch, index):
        self.calls.append(("step",))


@pytest.mark.parametrize("kind", [L.Trainer, Trainer])
def test_a_check_sees_the_restored_weights_before_sanity_check_and_step(tmp_path, kind) -> None:
    module = NetInInit()
    trainer = kind(**QUIET, max_epochs=1, callbacks=[GradientClipping(1.0)])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    order = Order0()
    again = kind(**QUIET, max_steps=3, num_sanity_val_steps=1,
                 callbacks=[order, GradientClipping(1.0)])  # fmt: skip
    fresh = NetInInit()
    again.fit(fresh)
    assert [call[0] for call in order.calls] == ["check", "sanity", "step", "step", "step"]
    order.calls.clear()
    again = kind(**QUIET, max_epochs=2, callbacks=[order, GradientClipping(1.0)])
    again.fit(NetInInit(), ckpt_path=tmp_path / "two.ckpt")
    assert order.calls[0] == ("check", module.net[0].weight.sum().item(), 4)


def test_a_method_called_check_with_other_parameters_is_not_called() -> None:
    class Own(NetInInit):
        def check(self, number=3):
            raise AssertionError("not ours to call")

    L.Trainer(**QUIET, max_steps=1, callbacks=[GradientClipping(1.0)]).fit(Own())


def test_reading_a_batch_for_the_checks_changes_neither_the_loader_nor_its_generators() -> None:
    rows = TensorDataset(torch.arange(8.0))
    plain = DataLoader(rows, 2, shuffle=True, generator=torch.Generator().manual_seed(1))
    get_first_batch(plain)
    torch_loader = DataLoader(rows, 2, shuffle=True, generator=torch.Generator().manual_seed(1))
    assert [b[0].tolist() for b in plain] == [b[0].tolist() for b in torch_loader]
    loader = ResumableLoader(EpochSampler(0, 8), lambda items: items, 8, 2)
    loader.load_state_dict({"epoch": 0, "num_consumed": 4, "trainer_epoch": 0})
    assert get_first_batch(loader).shape == (2,)
    assert len(list(loader)) == 2
    once = iter([1, 2])
    assert get_first_batch(once) is None
    assert next(once) == 1


LINE = "the quick brown fox jumps over the lazy dog and " * 20
TEXTS = {"context_length": 8, "batch_size": 4}


def language(callbacks: list, kind: type = Trainer, **arguments) -> L.Trainer:
    Path("line.txt").write_text(LINE)
    trainer = kind(
        **QUIET | {"enable_checkpointing": False},
        max_steps=4,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        callbacks=callbacks,
        **arguments,
    )
    model = LanguageModel(num_layers=1, d_model=8, num_heads=1)
    trainer.fit(model, datamodule=TextDataModule("line.txt", **TEXTS))
    return trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "ROMEO:"}, "character 'R'"),
        ({"prompt": "the", "top_k": 200}, "top_k=200 exceeds the vocabulary"),
        (
            {"prompt": "the", "temprature": 1.0},
            r"allowed: .*; use GenerateSamples\(\{'temperature': 1.0\}\)",
        ),
        (
            {"prompt": "the", "max_new_tokens": 90, "context_overflow": "error"},
            "exceed the context",
        ),
        ({"prompt": ""}, "a prompt is empty"),
        ({"stop": "#"}, "character '#'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is too small"),
        ({"temperature": -1}, "temperature=-1 is out of range"),
    ],
)
@pytest.mark.parametrize("kind", [Trainer, L.Trainer])
def test_samples_are_tried_before_the_first_step(arguments, message, kind) -> None:
    stopped: list[int] = []

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            stopped.append(trainer.global_step)

    with pytest.raises(ValueError, match=message):
        language([GenerateSamples(arguments), Stop()], kind)
    assert stopped == []


def test_the_default_prompt_has_characters_of_the_text() -> None:
    samples = GenerateSamples({"max_new_tokens": 3})
    language([samples])
    assert samples.last_text is not None
    assert len(samples.last_text) == 4
    assert samples.last_text[0] == " "  # the first known character, as there is no line break


class Kind(enum.Enum):
    A = "a"


class Number(enum.IntEnum):
    TWO = 2


class Odd(NetInInit):
    def __init__(self, value=None):
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("value", [Kind.A, partial(max, 1), {"a": [nn.ReLU]}])
def test_hyperparameters_that_cannot_be_saved_are_refused_at_the_start(value) -> None:
    trainer = Trainer(**QUIET | {"enable_checkpointing": True}, max_steps=2)
    with pytest.raises(
        ValueError,
        match=r"Odd: a checkpoint cannot hold the hyperparameter: value.*ignore=\['value'\]",
    ):
        trainer.fit(Odd(value))
    assert trainer.global_step == 0


class Unsavable(L.Callback):
    def __init__(self):
        self.saves = 0

    def state_dict(self):
        self.saves += 1
        return {"queue": Kind.A}


class AddsAnObject(L.Callback):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["mine"] = {"path": [Path("x")]}


class SavesAnObject(NetInInit):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["own"] = self


class OddScheduler(NetInInit):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scheduler.kind = Kind.A
        return [optimizer], [scheduler]


@pytest.mark.parametrize(
    ("module", "callback", "named"),
    [
        (NetInInit(), Unsavable(), "queue of Unsavable is a "),
        (NetInInit(), AddsAnObject(), "mine of AddsAnObject"),
        (SavesAnObject(), L.Callback(), "own of SavesAnObject is a "),
        (OddScheduler(), L.Callback(), "kind of StepLR is a "),
    ],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused_before_the_first_step(
    module, callback, named
) -> None:
    trainer = Trainer(**{**QUIET, "enable_checkpointing": True}, max_steps=2, callbacks=[callback])
    with pytest.raises(ValueError, match="a checkpoint cannot be written") as error:
        trainer.fit(module)
    assert named in str(error.value)
    assert trainer.global_step == 0
    assert getattr(callback, "saves", 0) == 0  # as it was before the trial


def test_harmless_hyperparameters_are_saved_as_plain_values() -> None:
    given = {
        "path": (1, Path("x")),
        "n": numpy.float64(3),
        "two": Number.TWO,
        "o": L.pytorch.utilities.parsing.AttributeDict(a=1),
    }
    trainer = Trainer(**QUIET | {"enable_checkpointing": True}, max_steps=2)
    trainer.fit(Odd(given))
    saved = torch.load(trainer.checkpoint_callback.last_model_path, weights_only=True)
    assert saved["hyper_parameters"]["value"] == {
        "path": (1, "x"),
        "n": 3.0,
        "two": 2,
        "o": {"a": 1},
    }
    assert type(saved["hyper_parameters"]["value"]["two"]) is int


@pytest.mark.parametrize("kind", [Trainer, L.Trainer])
@pytest.mark.parametrize(
    "monitor",
    [
        partial(EarlyStopping, "val/los"),
        partial(Checkpoint, monitor="val/los"),
        partial(ModelCheckpoint, monitor="val/los"),
        partial(MetricAlert, min_value={"val/los": 1.0}),
    ],
)
def test_a_metric_that_nothing_logs_is_refused_before_the_first_step(kind, monitor) -> None:
    steps = []

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            steps.append(trainer.global_step)

    trainer = kind(
        **QUIET | {"enable_checkpointing": True},
        max_epochs=1,
        callbacks=[monitor(), GradientClipping(1.0), Stop()],
        num_sanity_val_steps=0,
    )
    with pytest.raises(
        ValueError, match=r"monitors 'val/los', which .* does not log; logged: .*; use "
    ):
        trainer.fit(Noisy1(), **LOADERS())
    assert steps == []


class Noisy1(L.LightningModule):
    """Logs at the step, in a hook that needs all batches, and the epoch's mean of training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, index):
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log_dict({"val/loss": self.net(batch[0]).square().mean(), "val/b": 1.0})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def LOADERS():
    rows = TensorDataset(torch.rand(16, 4))
    return {"train_dataloaders": DataLoader(rows, 4), "val_dataloaders": DataLoader(rows, 4)}


class NoValidation(Noisy1):
    def validation_step(self, batch, index):
        raise KeyError("labels")


@pytest.mark.parametrize("kind", [L.Trainer, Trainer])
def test_a_validation_step_that_fails_ends_the_run_before_the_first_step(kind) -> None:
    clipping = GradientClipping(1.0)
    trainer = kind(**QUIET, max_steps=2, num_sanity_val_steps=0, callbacks=[clipping])
    with pytest.raises(KeyError, match="labels"):
        trainer.fit(NoValidation(), **LOADERS())
    assert trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0


class PreparesItsBatch(Noisy1):
    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.prepared = len(batch)

    def validation_step(self, batch, index):
        assert self.prepared
        return super().validation_step(batch, index)


class Prepares(L.Callback):
    def on_validation_epoch_start(self, trainer, module):
        module.prepared = 1


class IsPrepared(PreparesItsBatch):
    on_validation_batch_start = Noisy1.on_validation_batch_start


def test_a_validation_step_may_rely_on_the_hooks_before_it() -> None:
    for module, callbacks in ((PreparesItsBatch(), []), (IsPrepared(), [Prepares()])):
        trainer = Trainer(**QUIET, max_steps=4, callbacks=callbacks)
        trainer.fit(module, **LOADERS())
        assert trainer.global_step == 4


@pytest.mark.parametrize("name", ["val/loss", "val/b", "train/loss_epoch", "train/grad_norm"])
def test_metrics_that_are_logged_are_accepted(name) -> None:
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[EarlyStopping(name, check_on_train_epoch_end=True), GradientClipping(1.0)],
    )
    trainer.fit(Noisy1(), **LOADERS())
    assert trainer.global_step == 4


class LogsInAllForms(Noisy1):
    """Logs by positional options, and by the defaults of each hook."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("default", loss, on_epoch=True)  # on_step is True in a training step
        self.log("positional", loss, False, False, True, True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        value = torch.tensor(1.0)
        self.log("val_default", value, on_step=True)  # on_epoch is True in a validation step
        self.log("val_both", value, on_step=True, on_epoch=True)


@pytest.mark.parametrize(
    "name",
    [
        "default_epoch",
        "positional_epoch",
        "val_default_epoch/dataloader_idx_0",
        "val_both_epoch/dataloader_idx_1",
    ],
)
def test_each_form_of_a_logged_name_is_accepted(name) -> None:
    loaders = LOADERS()
    loaders["val_dataloaders"] = [loaders["val_dataloaders"]] * 2
    trainer = L.Trainer(
        **QUIET,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[EarlyStopping(name, check_on_train_epoch_end=True), GradientClipping(1.0)],
    )
    trainer.fit(LogsInAllForms(), **loaders)
    assert name in trainer.callback_metrics
    assert trainer.global_step == 4


def test_a_metric_that_another_callback_or_hook_logs_is_not_refused() -> None:
    class Late(Noisy1):
        def on_train_epoch_end(self):
            self.report()

        def report(self):
            self.log("late", 1.0)

    class Logs(L.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("theirs", 1.0)

    for module, more, name in ((Late(), [], "late"), (Noisy1(), [Logs()], "theirs")):
        stopping = EarlyStopping(name, check_on_train_epoch_end=True)
        callbacks = [stopping, GradientClipping(1.0), *more]
        trainer = L.Trainer(**QUIET, max_epochs=1, log_every_n_steps=1, callbacks=callbacks)
        trainer.fit(module, **LOADERS())
        assert trainer.global_step == 4


def test_a_scheduler_without_its_metric_is_refused() -> None:
    class Plateau(Noisy1):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val/los"}

    trainer = L.Trainer(
        **QUIET, max_epochs=1, log_every_n_steps=1, callbacks=[GradientClipping(1.0)]
    )
    with pytest.raises(ValueError, match="ReduceLROnPlateau monitors 'val/los'"):
        trainer.fit(Plateau(), **LOADERS())


class Mean(nn.Module):
    """Features of images: mean and deviation of each."""

    name = "mean"

    def forward(self, images):
        pixels = images.float().flatten(1)
        return torch.stack((pixels.mean(1), pixels.std(1)), 1)


class RandomImages(L.LightningDataModule):
    def __init__(self, train, test):
        super().__init__()
        self.parts = {"train": train, "test": test}

    def get_split(self, part):
        return self.parts[part], torch.zeros(len(self.parts[part]), dtype=torch.int64)

    def train_dataloader(self):
        return LOADERS()["train_dataloaders"]

    val_dataloader = train_dataloader


class Painter(Noisy1):
    size = (1, 4, 4)

    def generate_images(self, index, labels):
        g = torch.Generator().manual_seed(int(index[0]))
        return torch.randint(0, 256, (len(index), *self.size), dtype=torch.uint8, generator=g)


def measured(module: Painter, data: RandomImages, tmp_path: Path) -> L.Trainer:
    distance = FrechetDistance(Mean(), num_samples=4, cache_dir=str(tmp_path / "cache"))
    trainer = L.Trainer(**QUIET, max_epochs=1, log_every_n_steps=1, callbacks=[distance])
    trainer.fit(module, datamodule=data)
    return trainer


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8)


@pytest.mark.parametrize("sizes", [(8, 1), (1, 8), (8, 0)])
def test_a_distance_to_a_part_of_one_image_is_refused_in_setup(sizes, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"split has \d image"):
        measured(Painter(), RandomImages(images(sizes[0]), images(sizes[1])), tmp_path)


def test_samples_that_cannot_be_measured_are_refused_before_the_first_step(tmp_path) -> None:
    class Grey(Painter):
        def generate_images(self, index, labels):
            return super().generate_images(index, labels).float()

    module = Grey()
    with pytest.raises(ValueError, match="allowed: uint8 images"):
        measured(module, RandomImages(images(8), images(8)), tmp_path)
    assert module.trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:FrechetDistance")
def test_equal_real_images_give_no_infinite_ratio(tmp_path) -> None:
    same = torch.full((8, 1, 4, 4), 7, dtype=torch.uint8)
    metrics = measured(Painter(), RandomImages(same, same), tmp_path).callback_metrics
    assert metrics["val/fd_mean_real_baseline"] == 0
    assert "val/fd_mean_over_baseline" not in metrics


def test_a_base_of_another_size_is_refused_with_its_arguments(tmp_path) -> None:
    Path("line.txt").write_text(LINE)
    data = partial(TextDataModule, "line.txt", **TEXTS)
    small = Trainer(**QUIET, max_steps=1)
    small.fit(LanguageModel(num_layers=1, d_model=8, num_heads=1), datamodule=data())
    small.save_checkpoint(tmp_path / "small.ckpt")
    trainer = Trainer(**QUIET, max_steps=1, callbacks=[Pretrained(str(tmp_path / "small.ckpt"))])
    with pytest.raises(ValueError, match=r"other sizes.*use LanguageModel\(d_model=8\)"):
        trainer.fit(LanguageModel(num_layers=1, d_model=16, num_heads=1), datamodule=data())
    assert trainer.global_step == 0


def test_a_module_that_cannot_predict_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"Diffusion has no predict_step.*call Diffusion.generate"):
        Trainer(**QUIET).predict(
            Diffusion(base_channels=8), DataLoader(TensorDataset(torch.rand(2, 1)))
        )


def test_columns_and_rows_of_other_lengths_are_named() -> None:
    class Rows(Noisy1):
        prediction_columns = ("one", "two")

        def predict_step(self, batch, index):
            return [(1, 2, 3)]

    message = "a row of 3 values for 2 prediction_columns: one, two; return 2 values"
    with pytest.raises(ValueError, match=message):
        Trainer(**QUIET).predict(Rows(), LOADERS()["val_dataloaders"])


def test_a_plan_alone_adds_the_checks_to_a_stock_trainer() -> None:
    plan = OptimizerPlan(partial(torch.optim.SGD, lr=0.1))
    trainer = L.Trainer(**QUIET, max_epochs=1, callbacks=[plan, EarlyStopping("val/los")])
    with pytest.raises(ValueError, match="EarlyStopping monitors"):
        trainer.fit(Noisy1(), **LOADERS())
    assert trainer.global_step == 0
