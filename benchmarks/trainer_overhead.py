"""What a training step costs under a trainer, beside the same step in a bare loop.

python benchmarks/trainer_overhead.py             bare, stock and ours in turns: a row for each net
python benchmarks/trainer_overhead.py --parts     ours, and ours without each of its parts

Each way runs in a process of its own, and only one runs at a time: some steps of one way, then as
many steps of the next, in an order drawn anew each round. One process for all would share a memory
allocator: its state, which depends on the other ways, changes a step by up to 20 %. `bare again` is
the A/A control. A row holds processor seconds a step of the whole process, with its threads.

`ours` has everything on: bar, CSV, TensorBoard, checkpoints, and every 50 steps a log line with
learning rates, gradient norm and throughput. `stock` is
Lightning's Trainer with its own bar, its checkpoints and the same two loggers.
"""

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
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
    GracefulStop,
    GradientClipping,
    LossPlot,
    LRSchedule,
    OptimizerPlan,
    PredictionTable,
    TrainingMonitor,
)
from ravine.callbacks.monitoring import progress
from ravine.cli.lightning_noise import silence_lightning
from ravine.cli.trainer import Trainer, default_precision
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel

WARM = 50  # steps of each before the first turn


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
        self.precision: Any = default_precision("cpu")
        self.schedule = LRSchedule("linear", warmup=50)

    def parts(self) -> tuple[LanguageModel, TextDataModule]:
        return LanguageModel(), TextDataModule(source="embedded", context_length=64, batch_size=32)

    def bare(self) -> Iterator[None]:
        model, data = self.parts()
        data.setup("fit")
        model.configure_from_data(data)
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


class Screen(io.StringIO):
    """A terminal for the progress bar; its output is discarded."""


class Turn(Callback):
    """Lets the steps of one way run in turns, as the other end of the connection asks for them.

    After each turn it sends the seconds of a step, None after the steps to warm up.
    """

    def __init__(self, steps: int, connection: Connection) -> None:
        self.steps, self.connection = steps, connection
        self.done, self.is_warm, self.start_s = 0, False, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.step():
            trainer.should_stop = True

    def step(self) -> bool:
        """Count a step; at the end of a turn wait for the next. Returns whether all is done."""
        self.done += 1
        if self.done < (self.steps if self.is_warm else WARM):
            return False
        seconds = (time.process_time() - self.start_s) / self.steps
        self.connection.send(seconds if self.is_warm else None)
        goes_on = self.connection.recv()
        self.done, self.is_warm, self.start_s = 0, True, time.process_time()
        return not goes_on


def run_way(way: Callable[[Turn], None], steps: int, connection: Connection) -> None:
    """Run a way in this process when its first turn comes; send the text of an error."""
    connection.recv()
    try:
        with contextlib.redirect_stdout(Screen()), contextlib.redirect_stderr(Screen()):
            way(Turn(steps, connection))
    except Exception:
        connection.send(traceback.format_exc())


def in_turns(ways: dict[str, Callable[[Turn], None]], steps: int, turns: int) -> Times:
    """Seconds a step of each way, by turn."""
    fork = multiprocessing.get_context("fork")
    connections, processes = {}, []
    for name, way in ways.items():
        connections[name], other_end = fork.Pipe()
        processes.append(fork.Process(target=run_way, args=(way, steps, other_end), daemon=True))
        processes[-1].start()
    times: Times = {name: [] for name in ways}
    order = random.Random(0)
    for _ in range(turns + 1):
        for name in order.sample(list(ways), len(ways)):
            connections[name].send(True)
            answer = connections[name].recv()
            if isinstance(answer, str):
                raise RuntimeError(f"{name}: {answer}")
            if answer is not None:
                times[name].append(answer)
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(False)
        process.join()
    return times


def bare(net: Any, turn: Turn) -> None:
    for _ in net.bare():
        if turn.step():
            return


OTHERS = {
    "exact resume": ExactResume,
    "graceful stop": GracefulStop,
    "loss plot": LossPlot,
    "training monitor": TrainingMonitor,
}
FAST_LOOP = "fast loop"
PARTS = ("bar", "loggers", "checkpoint", *OTHERS, FAST_LOOP)


def settings(net: Any, turns: Callback, folder: str) -> dict[str, Any]:
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


def run_ravine(net: Any, turns: Callback, without: str = "") -> None:
    """A run under our Trainer, with everything on but the part that is named."""
    os.environ["RAVINE_FAST_LOOP"] = "0" if without == FAST_LOOP else "1"
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            **settings(net, turns, folder),
            logger=without != "loggers",
            enable_checkpointing=without != "checkpoint",
            enable_progress_bar=without != "bar",
        )
        gone = (OTHERS.get(without, PredictionTable), PredictionTable)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, gone)]
        net.under(trainer)


def stock(net: Any, turns: Callback) -> None:
    """A run under Lightning's Trainer with its own bar, checkpoint and the same two loggers."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings(net, turns, folder)
        chosen["callbacks"].append(ModelCheckpoint(folder))
        trainer = L.Trainer(**chosen, logger=[CSVLogger(folder), TensorBoardLogger(folder)])
        net.under(trainer)


WAYS: dict[str, Callable[[Any, Turn], None]] = {
    "bare": bare,
    "bare again": bare,
    "stock": stock,
    "ours": run_ravine,
    f"ours without {FAST_LOOP}": partial(run_ravine, without=FAST_LOOP),
}
PART_WAYS = {name: WAYS[name] for name in ("bare", "bare again", "ours")} | {
    f"ours without {part}": partial(run_ravine, without=part) for part in PARTS
}


def main(turns: int, net: str, parts: bool) -> None:
    silence_lightning()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    progress.Console = lambda: Console(file=Screen(), force_terminal=True)  # type: ignore
    nets = {
        "quick transformer": Transformers(turn=10),
        "MLP 784-512-10, batch 128": Mlps((784, 512, 10), 128, turn=50),
        "MLP 64-128-10, batch 64": Mlps((64, 128, 10), 64, turn=50),
    }
    for name, made in ((name, made) for name, made in nets.items() if net in name):
        chosen = PART_WAYS if parts else WAYS
        times = in_turns(
            {label: partial(way, made) for label, way in chosen.items()}, made.turn, turns
        )
        what = f"a training step of the {name}" + ", by parts" * parts
        compare("trainer_overhead", what, times, ["lightning"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--net", default="", help="a part of its name; all if not given")
    parser.add_argument("--parts", action="store_true", help="what each part of ours costs")
    main(**vars(parser.parse_args()))
