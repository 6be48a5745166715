"""A run that is interrupted anywhere and resumed equals the uninterrupted run bit for bit."""

import copy
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from external_modules.net_in_configure_model import NetInConfigureModel
from external_modules.net_in_init import NetInInit
from external_modules.two_optimizers import TwoOptimizers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from ravine.callbacks import EMA, Checkpoint, GradientClipping, NaNGuard
from ravine.callbacks.checkpointing.exact_resume import (
    ExactResume,
    normalize_progress,
    renumber_params,
    seed_all,
)
from ravine.callbacks.checkpointing.run_comparison import compare_ranks_and_accumulation
from ravine.callbacks.stability.gradient_clipping import to_local
from ravine.datamodules.loaders import DataParallelInfo, EvalLoader, ResumableLoader
from ravine.datamodules.samplers import EpochSampler

CUTS = 40
STEPS, EPOCH, EVERY, BATCH = 46, 24, 6, 4  # optimizer steps; an epoch ends with a validation
SEED = 11


class Net(L.LightningModule):
    """Dropout, two parameter groups in another order than the parameters, a schedule."""

    def __init__(self, plateau: bool = False, ask: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1))
        self.plateau, self.ask = plateau, ask
        self.losses: list[tuple[int, Tensor]] = []
        self.values: list[tuple[int, Tensor]] = []
        self.epoch_ends: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x)[:, 0], y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append((self.trainer.fit_loop.total_batch_idx, loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(random.randint(1, 3))  # leaves no trace in training
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def on_validation_end(self) -> None:
        value = self.trainer.callback_metrics["val/loss"].clone()
        self.values.append((self.trainer.global_step, value))

    def on_train_epoch_end(self) -> None:
        self.epoch_ends.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        if self.ask:  # makes Lightning set up the loader early, and forget its position
            assert self.trainer.estimated_stepping_batches > 0
        flat = [p for p in self.parameters() if p.ndim < 2]
        matrices = [p for p in self.parameters() if p.ndim == 2]
        groups = [{"params": flat, "weight_decay": 0.0}, {"params": matrices}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        if self.plateau:
            schedule: Any = {
                "scheduler": ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
                "monitor": "val/loss",
                "interval": "epoch",
            }
        else:
            schedule = {"scheduler": StepLR(optimizer, 5, 0.9), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class SaveAt(Callback):
    """Write a file at every optimizer step, or in every call of another hook."""

    def __init__(self, folder: Path, *hooks: str) -> None:
        self.folder, self.files = folder, []
        for hook in hooks:
            setattr(self, hook, lambda trainer, *_, hook=hook: self.save(trainer, hook))

    def save(self, trainer: L.Trainer, hook: str) -> None:
        if trainer.global_step and not trainer.fit_loop._should_accumulate():
            path = self.folder / f"{len(self.files):03d}-{hook}-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            self.files.append((trainer.global_step, str(path)))


def data(samples: int) -> TensorDataset:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=g)
    return TensorDataset(x, x.sin().sum(1))


def loaders(kind: str, epoch: int) -> tuple[Any, Any]:
    """Micro-batches of two samples; `stateful` are the project's own, `plain` are torch's."""
    train, test = data(epoch * BATCH), data(7)
    if kind == "plain":
        return DataLoader(train, BATCH // 2, shuffle=True), DataLoader(test, 2)
    order = EpochSampler(SEED, len(train))
    share = DataParallelInfo(accumulate=2)
    fetch = train.__getitem__
    return ResumableLoader(order, fetch, len(train), BATCH, share), EvalLoader(
        test.__getitem__, 7, 2
    )


def fit(
    ckpt: str | None = None,
    *callbacks: Callback,
    kind: str = "stateful",
    epoch: int = EPOCH,
    exact: bool = True,
    module: dict[str, Any] | None = None,
    **limits: Any,
) -> tuple[Net, L.Trainer]:
    L.seed_everything(SEED, verbose=False)
    net = Net(**(module or {}))
    trainer = L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=2,
        callbacks=[ExactResume()] * exact + list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"devices": 1, "max_steps": STEPS, "val_check_interval": 2 * EVERY} | limits),
    )
    trainer.fit(net, *loaders(kind, epoch), ckpt_path=ckpt, weights_only=True)
    return net, trainer


def end(net: Net, trainer: L.Trainer) -> dict[str, Any]:
    """All there is at the end of a run."""
    return {
        "weights": {name: p.detach().clone() for name, p in net.named_parameters()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "losses": net.losses,
        "values": net.values,
        "epoch_ends": net.epoch_ends,
        "epoch": trainer.current_epoch,
        "logged": trainer.fit_loop.epoch_loop._batches_that_stepped,
    }


def differences(whole: Any, cut: Any, at: str = "") -> list[str]:
    """Where two ends differ by a single bit; of the streams, the part after the cut counts."""
    if isinstance(whole, Tensor):
        return [] if torch.equal(to_local(whole), to_local(cut)) else [at]
    if isinstance(whole, dict):
        if whole.keys() != cut.keys():
            return [f"{at}: {list(whole)} and {list(cut)}"]
        return [d for key in whole for d in differences(whole[key], cut[key], f"{at}/{key}")]
    if isinstance(whole, list | tuple):
        if len(whole) != len(cut):
            return [f"{at}: {len(whole)} and {len(cut)} entries"]
        return [d for i, w in enumerate(whole) for d in differences(w, cut[i], f"{at}/{i}")]
    return [] if whole == cut else [f"{at}: {whole} and {cut}"]


def after(whole: dict[str, Any], step: int, values: int, ends: int) -> dict[str, Any]:
    """What is left of a whole run behind a cut."""
    return whole | {
        "losses": [entry for entry in whole["losses"] if entry[0] >= 2 * step],
        "values": whole["values"][values:],
        "epoch_ends": whole["epoch_ends"][ends:],
    }


def forked(function: Any, *args: Any) -> Any:
    """The answer of a function, from a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(writer, "wb") as pipe:
            try:
                pickle.dump(function(*args), pipe)
            except BaseException as error:
                pickle.dump(repr(error), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pickle.load(pipe)
    os.waitpid(child, 0)
    return answer


def go_on(path: str, **settings: Any) -> dict[str, Any]:
    return end(*fit(path, **settings))


def cut_everywhere(folder: str) -> list[str]:
    """In a rank, which is a clean process: run once, then go on from each step in a fork."""
    save = SaveAt(Path(folder), "on_train_batch_end")
    whole = end(*fit(None, save))
    assert [step for step, _ in save.files] == list(range(1, STEPS + 1))
    assert whole["epoch_ends"] == [EPOCH, STEPS]
    assert [step for step, _ in whole["values"]] == list(range(EVERY, STEPS, EVERY))
    found = []
    for step, path in save.files[:CUTS]:
        cut = forked(go_on, path)
        assert isinstance(cut, dict), cut
        left = after(whole, step, (step - 1) // EVERY, step > EPOCH)
        found += [f"cut at {step}: {d}" for d in differences(left, cut)]
    return found


def test_a_run_resumed_in_another_process_at_any_of_forty_steps_equals_the_uninterrupted_run(
    ranks: Any, tmp_path: Path
) -> None:
    assert ranks(cut_everywhere, 1, str(tmp_path)) == [[]]


def test_without_the_callback_the_resumed_run_differs(tmp_path: Path) -> None:
    save = SaveAt(tmp_path, "on_train_batch_end")
    settings: dict[str, Any] = {"max_steps": 8, "exact": False}
    whole = end(*fit(None, save, **settings))
    cut = end(*fit(save.files[EVERY - 1][1], **settings))
    found = differences(after(whole, EVERY, 0, 0), cut)
    assert "/weights/net.0.weight" in found
    assert "/values: 1 and 0 entries" in found


HOOKS = {  # where a file is written: is the validation of that step still to come?
    "on_train_batch_end": True,
    "on_validation_start": True,
    "on_validation_batch_end": True,
    "on_validation_end": False,
    "on_train_epoch_end": False,
    "on_train_end": False,
}
CUT_AT = (2, 3, 6, 8, 12)  # a validation every third step, epochs of six or eight
RUNS = {
    "own loader, steps": {"max_steps": 18, "epoch": 8},
    "own loader, epochs": {"max_steps": -1, "max_epochs": 3, "module": {"ask": True}},
    "torch's loader, steps": {"kind": "plain", "max_steps": 18, "epoch": 8},
    "torch's loader, epochs": {"kind": "plain", "max_steps": -1, "max_epochs": 3},
    "plateau, epochs": {"max_steps": -1, "max_epochs": 3, "module": {"plateau": True}},
    "between epochs": {"max_steps": 18, "epoch": 8, "check_val_every_n_epoch": None},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_checkpoint_saved_in_any_hook_resumes_exactly(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"epoch": 6, "val_check_interval": 6} | settings
    hooks = list(HOOKS)
    save = SaveAt(tmp_path, *hooks)
    whole = end(*fit(None, save, **settings))
    last = whole["losses"][-1][0] // 2 + 1
    tried = set()
    for step, path in save.files:
        hook = Path(path).name.split("-")[1]
        if (hook, step) in tried or step not in CUT_AT or step == last:
            continue
        tried.add((hook, step))
        cut = end(*fit(path, **settings))
        left = after(whole, step, 0, 0)
        left["values"] = [v for v in whole["values"] if v[0] + HOOKS[hook] > step]
        ended = step + (hook == "on_train_epoch_end")
        left["epoch_ends"] = [at for at in whole["epoch_ends"] if at >= ended]
        assert differences(left, cut) == [], f"{hook} at step {step}"
    assert len(tried) > 8


@pytest.mark.parametrize("kind", ["stateful", "plain"])
def test_a_run_stopped_by_max_steps_within_an_epoch_resumes_within_it(
    kind: str, tmp_path: Path
) -> None:
    whole = end(*fit(None, kind=kind, epoch=8, max_steps=18))
    for stop in (3, 6, 8, 11):
        _, trainer = fit(None, kind=kind, epoch=8, max_steps=stop)
        path = str(tmp_path / f"{stop}.ckpt")
        trainer.save_checkpoint(path)
        cut = end(*fit(path, kind=kind, epoch=8, max_steps=18))
        left = after(whole, stop, stop // EVERY, stop // 8)
        assert differences(left, cut) == [], f"stopped at {stop}"


def test_a_validation_due_at_the_last_step_of_all_runs_when_the_same_command_is_given_again(
    tmp_path: Path,
) -> None:
    save = SaveAt(tmp_path, "on_train_batch_end")
    whole = end(*fit(None, save, max_steps=EVERY))
    cut = end(*fit(save.files[-1][1], max_steps=EVERY))
    assert len(cut["values"]) == 1
    assert differences(after(whole, EVERY, 0, 0), cut) == []


def cut_in_ranks(folder: str, strategy: str) -> list[str]:
    save = SaveAt(Path(folder), "on_train_batch_end")
    settings: dict[str, Any] = {"max_steps": 10, "epoch": 12, "val_check_interval": 6}
    settings |= {"kind": "plain", "devices": 2, "strategy": strategy}
    whole = end(*fit(None, save, **settings))
    found = []
    for step, path in save.files[2:8:2]:
        cut = end(*fit(path, **settings))
        found += differences(after(whole, step, (step - 1) // 3, step > 6), cut)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_resume_exactly(strategy: str, ranks: Any, tmp_path: Path) -> None:
    assert ranks(cut_in_ranks, 2, str(tmp_path), strategy) == [[], []]


@pytest.mark.parametrize("kind", [NetInInit, NetInConfigureModel, TwoOptimizers])
def test_external_modules_resume_exactly(kind: type[L.LightningModule], tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None, **limits: int) -> dict[str, Tensor]:
        L.seed_everything(SEED, verbose=False)
        module = kind()
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=[ExactResume(), Checkpoint(str(tmp_path / name), save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=2,
            max_epochs=3,
            **limits,
        )
        trainer.fit(module, ckpt_path=ckpt)
        return module.state_dict()

    whole = run("whole")
    for file in sorted((tmp_path / "whole").iterdir())[:-1]:
        assert differences(whole, run("cut", file)) == [], file.name


class Endless(IterableDataset):
    """Nobody knows its length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in count():
            yield torch.full((6,), math.sin(number)), torch.tensor(math.cos(number))


def test_endless_data_resume_exactly(tmp_path: Path) -> None:
    def run(name: str, steps: int, ckpt: Path | None = None) -> dict[str, Tensor]:
        L.seed_everything(SEED, verbose=False)
        kept = {"accelerator": "cpu", "logger": False, "enable_model_summary": False}
        shown = {"enable_progress_bar": False, "limit_val_batches": 0}
        callbacks = [ExactResume(), Checkpoint(str(tmp_path / name))]
        trainer = L.Trainer(max_steps=steps, callbacks=callbacks, **kept, **shown)  # type: ignore
        net = Net()
        data = DataLoader(Endless(), BATCH)
        trainer.fit(net, data, data, ckpt_path=ckpt)
        return net.state_dict()

    whole = run("whole", 6)
    run("part", 3)
    assert differences(whole, run("rest", 6, tmp_path / "part" / "step=000003.ckpt")) == []


def test_no_batch_of_an_iterator_is_lost() -> None:
    batches = iter([(torch.ones(2, 6), torch.ones(2))] * 5)
    kept = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = L.Trainer(max_epochs=1, callbacks=ExactResume(), **kept, **shown)  # type: ignore
    trainer.fit(Net(), batches, [0])
    assert trainer.global_step == 5


def test_optimizer_ids_in_a_file_are_positions_in_named_parameters(tmp_path: Path) -> None:
    save = SaveAt(tmp_path, "on_train_batch_end")
    net, trainer = fit(None, save, max_steps=2)
    saved = torch.load(save.files[-1][1], weights_only=True)["optimizer_states"][0]
    assert [group["params"] for group in saved["param_groups"]] == [[1, 3], [0, 2]]
    live = trainer.optimizers[0].state
    for place, parameter in enumerate(net.parameters()):
        assert torch.equal(saved["state"][place]["exp_avg"], live[parameter]["exp_avg"])


def test_optimizer_ids_that_are_names_or_absent_are_not_changed() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    for state in ({}, {"state": {"w": {}}, "param_groups": [{"params": ["w"]}]}):
        before = repr(state)
        renumber_params([weight], optimizer, state)
        assert repr(state) == before


class HalfOfTheWeights(torch.optim.SGD):
    """Each step moves a half of the weights that is drawn anew."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(torch.rand_like(p) < 0.5)
        super().step()
        return loss


def drawn_in_steps(devices: int, strategy: str = "auto") -> dict[str, Tensor]:
    L.seed_everything(0, verbose=False)
    module = NetInInit(batch_size=8 // devices)
    module.configure_optimizers = lambda: HalfOfTheWeights(module.parameters(), lr=0.1)
    rows = module.train_dataloader().dataset[:8]  # one batch: its order makes no difference
    module.train_dataloader = lambda: DataLoader(TensorDataset(*rows), 8 // devices)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", devices=devices, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[ExactResume()],
    )  # fmt: skip
    trainer.fit(module)
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_an_optimizer_with_random_numbers_gives_all_ranks_the_weights_of_one_process(
    ranks: Any,
) -> None:
    single = drawn_in_steps(1)
    first, second = ranks(drawn_in_steps, 2, 2, "ddp")
    for name, value in single.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps_first", [True, False])
def test_manual_optimization_does_not_change_the_random_numbers_of_the_module(
    steps_first: bool,
) -> None:
    class DrawsNumbers(NetInInit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization, self.random_values = False, []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            if steps_first:
                self.optimizers().step()
            self.random_values.append((torch.rand(()).item(), random.random(), numpy.random.rand()))
            if not steps_first:
                self.optimizers().step()

    module = DrawsNumbers()
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[ExactResume()],
    )  # fmt: skip
    L.seed_everything(0, verbose=False)
    trainer.fit(module)
    expected = []
    for index in range(2):
        seed_all(0, index, 0, torch.device("cpu"))
        expected.append((torch.rand(()).item(), random.random(), numpy.random.rand()))
    assert module.random_values == expected


def test_no_two_micro_batches_or_ranks_draw_the_same_numbers() -> None:
    cpu = torch.device("cpu")
    numbers = {seed_all(7, i, rank, cpu) for i in range(2000) for rank in range(4)}
    assert len(numbers) == 8000
    seed_all(7, 5, 1, cpu)
    random_values = (torch.rand(()).item(), random.random())
    seed_all(7, 6, 1, cpu)
    assert (torch.rand(()).item(), random.random()) != random_values
    seed_all(7, 5, 1, cpu)
    assert (torch.rand(()).item(), random.random()) == random_values


def test_the_progress_in_a_checkpoint_saved_within_a_step_is_not_changed(tmp_path: Path) -> None:
    save = SaveAt(tmp_path, "on_before_optimizer_step")
    fit(None, save, max_steps=3)
    loops = torch.load(save.files[-1][1], weights_only=True)["loops"]["fit_loop"]
    before = repr(loops)
    assert normalize_progress(loops) == "start"
    assert repr(loops) == before


DRAWS = {
    "random": random.random,
    "numpy": numpy.random.rand,
    "torch": lambda: torch.rand(()).item(),
    "a generator of its own": None,
}


class Noisy(Dataset):
    """Each read of a sample draws new noise."""

    def __init__(self, draw: str = "torch", samples: int = 22) -> None:
        self.draw, self.data = draw, data(samples)
        self.own = numpy.random.default_rng(5)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + (DRAWS[self.draw] or self.own.random)(), y


class NoisyStream(IterableDataset):
    """Draws as it begins, and for each sample."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data(22).tensors
        order = torch.randperm(22).tolist()
        worker = get_worker_info()
        each = order if worker is None else order[worker.id :: worker.num_workers]
        return ((x[i] + random.random(), y[i]) for i in each)


class OwnSampler(Sampler):
    """Draws as it begins, from one generator, and for each index, from another."""

    def __init__(self) -> None:
        self.rng = random.Random(3)

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        order = self.rng.sample(range(22), 22)
        return ((i + random.randrange(2)) % 22 for i in order)


class PlainIterable:
    """Not a DataLoader, and it draws."""

    def __len__(self) -> int:
        return 11

    def __iter__(self) -> Iterator[Any]:
        x, y = data(22).tensors
        for i in range(0, 22, 2):
            yield x[i : i + 2] + torch.rand(()), y[i : i + 2]


def batches_of(data: Any) -> DataLoader:
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, drop_last=False))


LOADERS: dict[str, Callable[[], Any]] = {
    **{f"drawn by {how}": partial(lambda how: DataLoader(Noisy(how), 2), how) for how in DRAWS},
    "shuffled": lambda: DataLoader(Noisy(), 2, shuffle=True),
    "batch_sampler": lambda: batches_of(Noisy()),
    "no batches": lambda: DataLoader(Noisy("numpy"), None, shuffle=True),
    "a generator": lambda: DataLoader(
        Noisy(), 2, shuffle=True, generator=torch.Generator().manual_seed(9)
    ),
    "weighted": lambda: DataLoader(
        Noisy(), 2, sampler=WeightedRandomSampler([1.0, 2.0] * 11, 22, generator=torch.Generator())
    ),
    "own sampler": lambda: DataLoader(Noisy(), 2, sampler=OwnSampler()),
    "workers": lambda: DataLoader(Noisy("numpy"), 2, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Noisy("random"), 2, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "iterable": lambda: DataLoader(NoisyStream(), 2),
    "iterable, persistent workers": lambda: DataLoader(
        NoisyStream(), 2, num_workers=2, persistent_workers=True
    ),
    "plain iterable": PlainIterable,
    "two": lambda: {"a": batches_of(Noisy()), "b": DataLoader(Noisy(samples=6), 2, shuffle=True)},
    "own and torch's": lambda: {
        "a": ResumableLoader(EpochSampler(1, 22), data(22).__getitem__, 22, 2),
        "b": DataLoader(Noisy(), 2),
    },
}


class Fed(Net):
    """Accepts batches, single samples and dicts of batches; validates with noise."""

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return self.loss(batch["a"]) + self.loss(batch["b"])
        x, y = batch
        return F.mse_loss(self.net(x.reshape(-1, 6))[:, 0], y.reshape(-1))


def feed(kind: str, folder: Path, ckpt: Path | None = None, **settings: Any) -> dict[str, Any]:
    """An epoch and a half; a run that does not resume saves after each optimizer step."""
    L.seed_everything(SEED, verbose=False)
    every, net = 1 if ckpt is None else None, Fed()
    keep = Checkpoint(str(folder), every_n_train_steps=every, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=16,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[ExactResume(), keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    validation = DataLoader(Noisy("numpy", 6), 2)
    trainer.fit(net, LOADERS[kind](), validation, ckpt_path=ckpt)
    return end(net, trainer)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_run_with_any_common_loader_resumes_exactly(kind: str, tmp_path: Path) -> None:
    whole = feed(kind, tmp_path / "whole")
    for step in (14,) if "workers" in kind else (3, 11, 14):
        cut = feed(kind, tmp_path / "cut", tmp_path / "whole" / f"step={step:06d}.ckpt")
        left = whole | {
            "losses": [entry for entry in whole["losses"] if entry[0] >= step],
            "values": [v for v in whole["values"] if v[0] > step],
            "epoch_ends": cut["epoch_ends"],
        }
        assert differences(left, cut) == [], f"cut at {step}"
    assert len({loss.item() for _, loss in whole["losses"]}) == 16  # no two batches are equal


@pytest.mark.parametrize("kind", ["iterable", "plain iterable"])
def test_a_line_is_printed_where_data_are_read_again(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(kind, tmp_path)
    feed(kind, tmp_path / "cut", tmp_path / "step=000014.ckpt")
    text = "the data cannot be skipped: 3 batches are read again to reach the position\n"
    assert capsys.readouterr().out.count(text) == 1


class Read(Noisy):
    """Counts what is read."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read = getattr(self, "read", 0) + 1
        return super().__getitem__(index)


def test_a_map_style_loader_is_skipped_in_its_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Read()
    monkeypatch.setitem(LOADERS, "counted", lambda: DataLoader(read, 2, shuffle=True))
    feed("counted", tmp_path)
    assert read.read == 32
    feed("counted", tmp_path / "cut", tmp_path / "step=000014.ckpt")
    assert read.read == 32 + 4


def test_a_line_at_the_start_names_an_iterator(capsys: pytest.CaptureFixture[str]) -> None:
    test_no_batch_of_an_iterator_is_lost()
    assert "the training data are an iterator (list_iterator)" in capsys.readouterr().out


class OverAndOver(L.LightningDataModule):
    """The project's own loaders with `overfit_batches`."""

    def train_dataloader(self) -> ResumableLoader:
        kept = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return ResumableLoader(
            EpochSampler(1, 40), data(40).__getitem__, 40, 2, repeat_first_epoch=kept
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(data(4))


@pytest.mark.parametrize("own", [True, False])
def test_overfitting_a_few_batches_resumes_exactly(own: bool, tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None) -> dict[str, Any]:
        L.seed_everything(SEED, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=10,
            overfit_batches=3,
            num_sanity_val_steps=0,
            callbacks=[
                ExactResume(),
                Checkpoint(str(tmp_path / name), every_n_train_steps=1, save_top_k=-1),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = OverAndOver() if own else DataLoader(Noisy(), 2)
        trainer.fit(net := Net(), loader, None if own else DataLoader(data(4)), ckpt_path=ckpt)
        return end(net, trainer) | {"epoch_ends": None}

    whole = run("whole")
    for step in (1, 3, 5):
        cut = run("cut", tmp_path / "whole" / f"step={step:06d}.ckpt")
        left = whole | {"losses": whole["losses"][step:], "values": whole["values"][step // 3 :]}
        assert differences(left, cut) == [], f"cut at {step}"


class Teacher(Net):
    """Its own hooks change weights, after those of every callback."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 1).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + (self.teacher(batch[0])[:, 0] - batch[1]).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.teacher.weight.add_(0.01 * self.net[0].weight[:1])

    def on_validation_end(self) -> None:
        super().on_validation_end()
        with torch.no_grad():
            self.net[0].weight.mul_(0.99)


SAVERS: dict[str, Callable[[Path], Callback]] = {
    "ours": lambda folder: Checkpoint(str(folder), every_n_train_steps=1, save_top_k=-1),
    "Lightning's": lambda folder: ModelCheckpoint(
        folder,
        "step={step:06d}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
    ),
}


@pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory)")
@pytest.mark.parametrize("saver", SAVERS)
def test_a_checkpoint_is_saved_after_the_hooks_of_the_module(saver: str, tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None, steps: int = 8) -> dict[str, Any]:
        L.seed_everything(SEED, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            val_check_interval=3,
            callbacks=[ExactResume(), SAVERS[saver](tmp_path / name)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        net = Teacher()
        trainer.fit(net, DataLoader(data(22), 2), DataLoader(data(4), 2), ckpt_path=ckpt)
        assert "on_train_batch_end" not in net.__dict__  # the hooks are given back
        return end(net, trainer)["weights"]

    whole = run("whole")
    for step in (2, 3, 4):
        file = tmp_path / "whole" / f"step={step:06d}.ckpt"
        assert differences(whole, run("cut", file)) == [], f"cut at {step}"


def test_a_failed_fit_removes_its_saving_hooks(tmp_path: Path) -> None:
    class Failing(Teacher):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and batch_idx == 1:
                raise RuntimeError("once")
            return super().training_step(batch, batch_idx)

    keep = SAVERS["ours"](tmp_path)
    net = Failing()
    kept: dict[str, Any] = {"logger": False, "enable_model_summary": False, "max_steps": 3}
    kept |= {"accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0}
    loaders = DataLoader(data(22), 2), DataLoader(data(4))
    with pytest.raises(RuntimeError, match="once"):
        L.Trainer(**kept, callbacks=[keep]).fit(net, *loaders)
    net.fails = False
    L.Trainer(**kept, callbacks=[keep]).fit(net, *loaders)
    assert len(list(tmp_path.iterdir())) == 3
    copy.deepcopy(net)


def go_on_otherwise(folder: Path, *callbacks: Callback, **settings: Any) -> L.Trainer:
    """Four more steps after a run with the callbacks of `begun`, with others."""
    L.seed_everything(SEED, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=settings.pop("steps", 8),
        limit_val_batches=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = settings.pop("data", None) or Labelled()
    net = settings.pop("net", None) or Net()
    trainer.fit(net, data, ckpt_path=settings.pop("ckpt", folder / "step=000004.ckpt"))
    return trainer


class Labelled(L.LightningDataModule):
    """Has `resolved`, as the project's own data modules do."""

    def __init__(self, sha: str = "ab", samples: int = 22, classes: str = "cat dog") -> None:
        super().__init__()
        self.samples = samples
        self.provenance = {"file": "here", "sha256": sha, "class_names": classes.split()}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(data(self.samples), 2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(data(4), 2)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with EMA and clipping."""
    folder = tmp_path_factory.mktemp("begun")
    keep = Checkpoint(str(folder))
    go_on_otherwise(folder, EMA(0.5), GradientClipping(), ExactResume(), keep, steps=4, ckpt=None)
    return folder


KEPT = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@KEPT
def test_a_resume_without_ema_is_refused_or_starts_from_the_raw_weights(first_run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"EMA was in the run of the checkpoint and is missing.*accept=\['EMA'\]"
    ):
        go_on_otherwise(first_run, GradientClipping(), ExactResume())

    class First(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            self.__dict__.setdefault("weights", copy.deepcopy(dict(pl_module.named_parameters())))

    with_it, without = First(), First()
    go_on_otherwise(first_run, EMA(0.5), GradientClipping(), ExactResume(), with_it)
    go_on_otherwise(first_run, GradientClipping(), ExactResume(accept="EMA"), without)
    assert differences(with_it.weights, without.weights) == []
    with pytest.raises(
        ValueError,
        match=r"accept='ema' is not .*; allowed: EMA, data, optimizer; use accept=\['EMA'\]",
    ):
        ExactResume(accept=["ema"])


@KEPT
def test_a_line_names_each_removed_or_added_callback(
    first_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on_otherwise(first_run, EMA(0.5), NaNGuard(), ExactResume())
    lines = capsys.readouterr().out.splitlines()
    assert "GradientClipping was in the run of the checkpoint and is missing in this run" in lines
    assert "NaNGuard was not in the run of the checkpoint: it starts in this run" in lines
    go_on_otherwise(first_run, EMA(0.5), GradientClipping(), ExactResume())
    assert "of the checkpoint" not in capsys.readouterr().out


@KEPT
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Labelled("cd"), r"data sha256: ab in the checkpoint, cd in this run"),
        (Labelled(classes="dog cat"), r"data class_names: \['cat', 'dog'\] in"),
        (
            Labelled(samples=24),
            r"samples of the loaders: \[22\] in the checkpoint, \[24\] in this run",
        ),
    ],
)
def test_changed_data_are_refused_unless_accepted_by_an_argument(
    first_run: Path, data: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    same = EMA(0.5), GradientClipping()
    problem = rf"the training data have changed: here is not as it was when .* \({said}"
    with pytest.raises(ValueError, match=problem):
        go_on_otherwise(first_run, *same, ExactResume(), data=data)
    go_on_otherwise(first_run, *same, ExactResume(accept=["data"]), data=data)
    assert "the training data have changed, which is accepted" in capsys.readouterr().out


class OtherOptimizer(Net):
    """Adam's state would be taken for its momentum."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@KEPT
def test_the_state_of_another_optimizer_is_refused_or_ignored(first_run: Path) -> None:
    same = EMA(0.5), GradientClipping()
    with pytest.raises(ValueError, match=r"has the state of AdamW, and this run uses SGD"):
        go_on_otherwise(first_run, *same, ExactResume(), net=OtherOptimizer())
    accepting = ExactResume(accept=["optimizer"])
    trainer = go_on_otherwise(first_run, *same, accepting, net=OtherOptimizer())
    assert trainer.global_step == 8


def test_a_line_is_printed_where_the_number_of_ranks_differs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=2)
    compare_ranks_and_accumulation(trainer, {"ranks": 1, "accumulate": 2}, has_resumable_order=True)
    assert capsys.readouterr().out == ""
    compare_ranks_and_accumulation(
        trainer, {"ranks": 2, "accumulate": 2}, has_resumable_order=False
    )
    assert "the run of the checkpoint has 2 ranks x 2 micro-batches" in capsys.readouterr().out
