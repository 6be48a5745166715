"""What a training step costs under a trainer, beside the same step in a bare loop.

python benchmarks/trainer_overhead.py             bare, stock and ours in turns: a row for each net
python benchmarks/trainer_overhead.py --parts     ours without one of its parts: a row for each part

All ways take turns in one process: some steps of one way, the clock stops, as many steps of the
next, in an order drawn anew each round. Each way has a thread of its own, and only one runs at a
time. `bare again` is the A/A control. A row holds seconds on the wall a step: processor seconds
would count a thread that waits for another.

`ours` has everything on: bar, CSV, TensorBoard, checkpoints, a log line every 50 steps. `stock` is
Lightning's Trainer with its own bar, its checkpoints and the same two loggers.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import tempfile
import threading
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
    GracefulStop,
    GradientClipping,
    LossPlot,
    LRSchedule,
    OptimizerPlan,
    PredictionTable,
)
from ravine.callbacks.monitoring import progress
from ravine.cli.lightning_noise import silence_lightning
from ravine.cli.trainer import Trainer, default_precision
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel

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
            self.times["ours"].append((time.perf_counter() - self.start_s) / self.turn)
        for name, loop in list(self.loops.items())[:: 1 if done // self.turn % 2 else -1]:
            start_s = time.perf_counter()
            for _ in range(self.turn if done else WARM):
                next(loop)
            if done:
                self.times[name].append((time.perf_counter() - start_s) / self.turn)
        trainer.should_stop = len(self.times["ours"]) == self.turns
        self.start_s = time.perf_counter()


class Screen(io.StringIO):
    """A terminal for the progress bar; its output is discarded."""


class Turn(Callback):
    """Lets the steps of one way run in turns; each way runs in a thread of its own."""

    def __init__(self, steps: int) -> None:
        self.steps, self.is_warm = steps, True
        self.seconds: list[float] = []
        self.may_run, self.has_run = threading.Semaphore(0), threading.Semaphore(0)
        self.done, self.ended = 0, False
        self.error: BaseException | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if self.step():
            trainer.should_stop = True

    def step(self) -> bool:
        """Count a step; at the end of a turn wait for the next. Returns whether all is done."""
        self.done += 1
        if self.done < (WARM if self.is_warm else self.steps):
            return False
        if not self.is_warm:
            self.seconds.append((time.perf_counter() - self.start_s) / self.steps)
        if not self.ended:
            self.has_run.release()
            self.may_run.acquire()
        self.done, self.is_warm, self.start_s = 0, False, time.perf_counter()
        return self.ended

    def start(self, run: Callable[[], None]) -> threading.Thread:
        """Run a way in a thread, which waits for its first turn."""

        def wait_and_run() -> None:
            self.may_run.acquire()
            try:
                run()
            except BaseException as error:
                self.error = error
            finally:
                self.has_run.release()

        thread = threading.Thread(target=wait_and_run)
        thread.start()
        return thread

    def take(self) -> None:
        """Let the way run for one turn, or to its end."""
        self.may_run.release()
        self.has_run.acquire()
        if self.error is not None:
            raise self.error


def in_turns(ways: dict[str, Callable[[Turn], None]], steps: int, turns: int) -> Times:
    """Seconds a step of each way, by turn; the first turn of each is lost."""
    turn_of = {name: Turn(steps) for name in ways}
    threads = [turn_of[name].start(partial(way, turn_of[name])) for name, way in ways.items()]
    order = random.Random(0)
    try:
        for _ in range(turns + 1):
            for name in order.sample(list(ways), len(ways)):
                turn_of[name].take()
    finally:
        for turn, thread in zip(turn_of.values(), threads, strict=True):
            turn.ended = True
            turn.may_run.release()
            thread.join()
    return {name: turn.seconds for name, turn in turn_of.items()}


def bare(net: Any, turn: Turn) -> None:
    for _ in net.bare():
        if turn.step():
            return


OTHERS = {"exact resume": ExactResume, "graceful stop": GracefulStop, "loss plot": LossPlot}
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


CASES: dict[str, Callable[[Any, Turns], None]] = {"ours": run_ravine}
CASES |= {f"ours without {part}": partial(run_ravine, without=part) for part in PARTS}
WAYS: dict[str, Callable[[Any, Turn], None]] = {
    "bare": bare,
    "bare again": bare,
    "stock": stock,
    "ours": run_ravine,
    f"ours without {FAST_LOOP}": partial(run_ravine, without=FAST_LOOP),
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
        if not parts:
            ways = {label: partial(way, made) for label, way in WAYS.items()}
            with contextlib.redirect_stdout(Screen()), contextlib.redirect_stderr(Screen()):
                times = in_turns(ways, made.turn, turns)
            what = f"a training step of the {name}"
            compare("trainer_overhead", what, times, ["lightning"])
            continue
        for label in CASES:
            clock = Turns([made.bare(), made.bare()], made.turn, turns)
            with contextlib.redirect_stdout(Screen()):
                CASES[label](made, clock)
            what = f"a training step of the {name} under the trainer, {label}"
            compare("trainer_overhead", what, clock.times, ["lightning"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--net", default="", help="a part of its name; all if not given")
    parser.add_argument("--parts", action="store_true", help="what each part of ours costs")
    main(**vars(parser.parse_args()))
