"""A training step of the Diffusion task against a bare loop of the same: what the framework costs.

python benchmarks/diffusion_step.py

Both train the same U-Net (width 16, labels, 8x8 digits, batch 128) with the same loss, AdamW,
clipping and average, in fp32; the bare loop draws its times and noise with torch.randn and knows no
trainer. They take turns in blocks of steps, and the bare one runs twice a round: the A/A control.
One raw row in rows/diffusion_step.jsonl.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from versus import compare

from ravine.callbacks import EMA, GradientClipping, OptimizerPlan
from ravine.cli.trainer import Trainer
from ravine.datamodules import ImageDataModule
from ravine.lightning_modules import Diffusion
from ravine.lightning_modules.diffusion_core.noise_schedules import compute_alpha_bar
from ravine.lightning_modules.nn.unet import UNet

BLOCK, ROUNDS = 20, 9


class BlockTimer(L.Callback):
    """Pauses the run after each block of steps to time the other loops; records its own seconds."""

    def __init__(self, run_others: Callable[[], None]) -> None:
        self.run_others, self.blocks, self.start_s = run_others, [], 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start_s = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % BLOCK == 0:
            self.blocks.append((time.perf_counter() - self.start_s) / BLOCK)
            self.run_others()
            self.start_s = time.perf_counter()


class Bare:
    """The lecture's loop, with the labels, clipping and average that the task has."""

    def __init__(self, data: ImageDataModule) -> None:
        images, self.labels = data.get_split("train")
        self.images = images
        self.net = UNet(1, 16, num_classes=10).to(memory_format=torch.channels_last)  # pyright: ignore
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 2e-3)
        self.average = [p.detach().clone() for p in self.net.parameters()]
        kept = compute_alpha_bar("linear").float()
        self.alpha, self.sigma = kept.sqrt(), (1 - kept).sqrt()
        self.order = torch.randperm(len(images))

    def step(self) -> None:
        items, self.order = self.order[:128], self.order[128:]
        if len(self.order) < 128:
            self.order = torch.randperm(len(self.images))
        x0 = self.images[items].float() / 127.5 - 1
        y = self.labels[items].masked_fill(torch.rand(128) < 0.1, 10)
        t = torch.randint(1, 1001, (128,))
        eps = torch.randn_like(x0)
        x = self.alpha[t][:, None, None, None] * x0 + self.sigma[t][:, None, None, None] * eps
        x = x.contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(self.net(x, t, y), x0)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.net.parameters()), 0.005)

    def block(self) -> float:
        start_s = time.perf_counter()
        for _ in range(BLOCK):
            self.step()
        return (time.perf_counter() - start_s) / BLOCK


def main() -> None:
    L.seed_everything(0, verbose=False)
    data = ImageDataModule("digits", batch_size=128)
    data.setup("fit")
    bare, times = Bare(data), {"bare": [], "bare again": []}

    def run_others() -> None:
        for name in times if len(times["bare"]) % 2 else reversed(times):
            times[name].append(bare.block())

    clock = BlockTimer(run_others)
    plan = OptimizerPlan(partial(torch.optim.AdamW, lr=2e-3), decay="all")
    trainer = Trainer(
        max_steps=BLOCK * (ROUNDS + 1), accelerator="cpu", limit_val_batches=0, logger=False,
        callbacks=[plan, GradientClipping(1.0), EMA(0.995), clock], enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(
        Diffusion(class_conditional=True, base_channels=16, channels_last=True), datamodule=data
    )
    every = {name: spent[1:] for name, spent in ({"ours": clock.blocks} | times).items()}
    what = "a training step of diffusion/digits"
    compare("diffusion_step", what, every, [], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
