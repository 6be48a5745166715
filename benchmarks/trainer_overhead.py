"""What a training step costs under the Trainer, beside the same step in a bare loop.

python benchmarks/trainer_overhead.py     appends a row a case to rows/trainer_overhead.jsonl

They take turns in one process: some steps under the Trainer, the clock stops, as many steps of a
bare loop, and of another (the A/A control), and so on; whatever else the machine does, it does to
all. A row holds seconds on the wall a step: processor seconds would count a thread that waits for
another. `ours` has everything on: bar, CSV, TensorBoard, checkpoints, a log line every 50 steps;
the other cases lack one part, or are stock Lightning.
"""

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from versus import Times, compare

from ravine.callbacks import (
    ExactResume,
    GradientClipping,
    LossPlot,
    OptimizerPlan,
    PredictionTable,
    Schedule,
    progress,
)
from ravine.cli.quiet import quiet
from ravine.cli.trainer import Trainer, automatic_precision
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel
from ravine.strategies import GracefulStop

WARM = 50  # steps of each before the first turn
BARE = ("bare", "bare again")


class Mlp(L.LightningModule):
    """A classifier with one hidden layer, as anybody would write it."""

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        first, hidden, last = sizes
        self.net = nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))

    def loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=1e-3)


class Mlps:
    """An MLP of given sizes on sixteen batches in turn, bare and under a trainer."""

    precision: Any = "32-true"

    def __init__(self, sizes: tuple[int, int, int], batch: int, turn: int) -> None:
        self.sizes, self.turn = sizes, turn
        made = torch.Generator().manual_seed(0)
        self.batches = [
            (
                torch.randn(batch, sizes[0], generator=made),
                torch.randint(sizes[2], (batch,), generator=made),
            )
            for _ in range(16)
        ]

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % 16] for i in range(10**9))

    def __len__(self) -> int:
        return 10**9

    def bare(self) -> Iterator[None]:
        module = Mlp(self.sizes)
        optimizer = AdamW(module.parameters(), lr=1e-3)
        for batch in self:
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            yield

    def under(self, trainer: L.Trainer) -> None:
        trainer.fit(Mlp(self.sizes), self)

    def callbacks(self) -> list[Callback]:
        return []


class Transformers:
    """The quick transformer with its plan, its clipping and its precision."""

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.precision: Any = automatic_precision("cpu")
        self.schedule = Schedule("linear", warmup=50)

    def parts(self) -> tuple[LanguageModel, TextDataModule]:
        return LanguageModel(), TextDataModule(source="embedded", context=64, batch_size=32)

    def bare(self) -> Iterator[None]:
        model, data = self.parts()
        data.setup("fit")
        model.adopt(data)
        model.configure_model()
        optimizer = AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = LambdaLR(optimizer, lambda step: self.schedule.factor(step, 10**9))
        half = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed")
        while True:
            for inputs, targets in data.train_dataloader():
                optimizer.zero_grad()
                with half:
                    logits = model(inputs)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                yield

    def under(self, trainer: L.Trainer) -> None:
        model, data = self.parts()
        trainer.fit(model, datamodule=data)

    def callbacks(self) -> list[Callback]:
        optimizer = partial(AdamW, lr=5e-3, betas=(0.9, 0.99), weight_decay=0.0)
        return [OptimizerPlan(optimizer, schedule=self.schedule), GradientClipping(1.0)]


class Turns(Callback):
    """After each turn of the trainer, one of each bare loop; keeps the seconds of a step of all."""

    def __init__(self, loops: list[Iterator[None]], turn: int, turns: int) -> None:
        self.loops, self.turn, self.turns = dict(zip(BARE, loops, strict=True)), turn, turns
        self.times: Times = {name: [] for name in ("ours", *BARE)}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        done = trainer.global_step - WARM
        if done < 0 or done % self.turn:
            return
        if done:
            self.times["ours"].append((time.perf_counter() - self.begun) / self.turn)
        for name, loop in list(self.loops.items())[:: 1 if done // self.turn % 2 else -1]:
            begun = time.perf_counter()
            for _ in range(self.turn if done else WARM):
                next(loop)
            if done:
                self.times[name].append((time.perf_counter() - begun) / self.turn)
        trainer.should_stop = len(self.times["ours"]) == self.turns
        self.begun = time.perf_counter()


class Screen(io.StringIO):
    """A terminal that nobody looks at: the bar is drawn, and thrown away."""


OTHERS = {"exact resume": ExactResume, "graceful stop": GracefulStop, "loss plot": LossPlot}
PARTS = ("bar", "loggers", "checkpoint", *OTHERS, "lean loop")


def settings(net: Any, turns: Turns, folder: str) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "max_steps": 10**9,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 50,
        "precision": net.precision,
        "callbacks": [*net.callbacks(), turns],
    }


def ours(net: Any, turns: Turns, without: str = "") -> None:
    """A run under our Trainer, with everything on but the part that is named."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            **settings(net, turns, folder),
            logger=without != "loggers",
            enable_checkpointing=without != "checkpoint",
            enable_progress_bar=without != "bar",
        )
        if without == "lean loop":
            loop = trainer.fit_loop.epoch_loop
            kind = type(loop).__base__
            trainer.fit_loop.epoch_loop = kind(trainer, loop.min_steps, loop.max_steps)
        gone = (OTHERS.get(without, PredictionTable), PredictionTable)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, gone)]
        net.under(trainer)


def stock(net: Any, turns: Turns) -> None:
    """A run under Lightning's Trainer with its own bar, checkpoint and the same two loggers."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings(net, turns, folder)
        chosen["callbacks"].append(ModelCheckpoint(folder))
        trainer = L.Trainer(**chosen, logger=[CSVLogger(folder), TensorBoardLogger(folder)])
        net.under(trainer)


CASES: dict[str, Callable[[Any, Turns], None]] = {"ours": ours, "stock": stock}
CASES |= {f"ours without {part}": partial(ours, without=part) for part in PARTS}


def main(turns: int, net: str, case: str) -> None:
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    progress.Console = lambda: Console(file=Screen(), force_terminal=True)  # type: ignore
    nets = {
        "quick transformer": Transformers(turn=10),
        "MLP 784-512-10, batch 128": Mlps((784, 512, 10), 128, turn=50),
        "MLP 64-128-10, batch 64": Mlps((64, 128, 10), 64, turn=50),
    }
    for name, made in ((name, made) for name, made in nets.items() if net in name):
        for label in [case] if case in CASES else CASES:
            clock = Turns([made.bare(), made.bare()], made.turn, turns)
            with contextlib.redirect_stdout(Screen()):
                CASES[label](made, clock)
            what = f"a training step of the {name} under the trainer, {label}"
            compare("trainer_overhead", what, clock.times, ["lightning"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--net", default="", help="a part of its name; all if not given")
    parser.add_argument("--case", default="", choices=["", *CASES], help="all if not given")
    main(**vars(parser.parse_args()))
