"""What a plan costs a step: python benchmarks/plan_overhead.py

200 tensors in 10 groups under AdamW and a linear schedule. Bare: one AdamW of 10 groups and torch's
LambdaLR. Plan: ten rules, hence ten AdamW in one composite, with the plan's schedule. They take
turns, and the bare one runs twice (the A/A control); seconds are of the processor, so that a busy
machine counts less. One raw row a size, in rows/plan_overhead.jsonl.
"""

import os
import statistics
import time
from typing import Any

import lightning as L
import torch
from record import append, processor
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ravine.callbacks import OptimizerPlan, Rule, Schedule

GROUPS, EACH, STEPS, ROUNDS = 10, 20, 20, 15


class Net(L.LightningModule):
    """Ten groups of twenty square matrices, with gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for group in range(GROUPS):
            tensors = [nn.Parameter(torch.randn(width, width)) for _ in range(EACH)]
            self.add_module(f"group{group}", nn.ParameterList(tensors))
        for p in self.parameters():
            p.grad = torch.randn_like(p)


def bare(width: int) -> tuple[Any, Any]:
    """The optimizer and the scheduler without us."""
    groups = [{"params": list(part.parameters())} for part in Net(width).children()]
    optimizer = AdamW(groups, lr=1e-3)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 1e6)


def planned(width: int) -> tuple[Any, Any]:
    """The same from a plan of ten rules."""
    rules = [Rule(name=f"group{group}.*", optimizer=AdamW) for group in range(GROUPS)]
    plan = OptimizerPlan(rules=rules, decay="all", schedule=Schedule("linear"))
    plan._length = 1e6
    made = plan._configure(L.Trainer(logger=False, enable_checkpointing=False), Net(width))
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def seconds(optimizer: Any, scheduler: Any) -> float:
    """Of one step, on average over some."""
    begun = time.process_time()
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
    return (time.process_time() - begun) / STEPS


def main() -> None:
    """Small tensors show the machinery, larger ones what it matters."""
    torch.set_num_threads(1)
    for width in (16, 128):
        ways = {"bare": bare(width), "plan": planned(width)}
        times: dict[str, list[float]] = {"bare": [], "plan": [], "bare_again": []}
        for number in range(ROUNDS + 1):
            for label in times if number % 2 else reversed(times):
                spent = seconds(*ways[label.removesuffix("_again")])
                if number:
                    times[label].append(spent)
        median = {label: statistics.median(spent) for label, spent in times.items()}
        row = {
            "tensors": f"{GROUPS * EACH} of {width} x {width}",
            "machine": f"{processor()}, one thread",
            "load": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "microseconds": {k: [round(1e6 * s, 1) for s in v] for k, v in times.items()},
            "ratio": round(median["plan"] / median["bare"], 3),
            "control": round(median["bare_again"] / median["bare"], 3),
        }
        append("plan_overhead", row)


if __name__ == "__main__":
    main()
