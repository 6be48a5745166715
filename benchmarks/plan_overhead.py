"""What a plan costs a step: python benchmarks/plan_overhead.py

200 tensors in 10 groups under AdamW and a linear schedule. Bare: one AdamW of 10 groups and torch's
LambdaLR. Plan: ten rules, hence ten AdamW in one composite, with the plan's schedule. They take
turns, and the bare one runs twice (the A/A control). One raw row a size,
in rows/plan_overhead.jsonl.
"""

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from versus import compare, rounds

from ravine.callbacks import LRSchedule, OptimizerPlan, ParamRule

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
    rules = [ParamRule(pattern=f"group{group}.*", optimizer=AdamW) for group in range(GROUPS)]
    plan = OptimizerPlan(rules=rules, decay="all", schedule=LRSchedule("linear"))
    plan._total_steps = 1e6
    made = plan._build_optimizer(L.Trainer(logger=False, enable_checkpointing=False), Net(width))
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def step(optimizer: Any, scheduler: Any) -> None:
    optimizer.step()
    scheduler.step()


def main() -> None:
    """Small tensors show the machinery, larger ones what it matters."""
    torch.set_num_threads(1)
    for width in (16, 128):
        kept = partial(step, *bare(width))
        ways = {"ours": partial(step, *planned(width)), "bare": kept, "bare again": kept}
        what = f"a step of a plan of ten rules, {GROUPS * EACH} tensors of {width} x {width}"
        compare("plan_overhead", what, rounds(ways, ROUNDS, STEPS), [])


if __name__ == "__main__":
    main()
