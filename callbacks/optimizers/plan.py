"""OptimizerPlan: any torch optimizer on any LightningModule, as a callback.

Lightning builds optimizers by calling the module's `configure_optimizers`, after the model has
been rewritten and sharded. The plan takes that one method over; everything after it (accumulation,
mixed precision, clipping, checkpoints) goes the usual way.
"""

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor
from torch.optim import Adafactor, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..patching import patch, unpatch
from .composite import Composite, needs_closure
from .rules import (
    Decay,
    Named,
    OptimizerFactory,
    Rule,
    assign,
    optimizer_class,
)
from .schedules import Schedule


class OptimizerPlan(Callback):
    """Train with these optimizers instead of the module's own.

    Example, in a script: `OptimizerPlan(partial(torch.optim.AdamW, lr=5e-3), decay="matrices")`;
    on the command line: `--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=AdamW
    --trainer.callbacks.optimizer.lr=5e-3`.

    Args:
        optimizer: an optimizer class, or a function of the parameters that makes one; it trains
            everything, or what the rules leave to it.
        decay: which tensors get the optimizer's weight decay; a matrix has two axes or more.
        schedule: what multiplies every learning rate at each optimizer step.
        rules: who trains what, in order; the first rule that matches a parameter takes it.
        print_groups: list the parameters of each rule below the table of rules.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        decay: Decay = "matrices",
        schedule: Schedule | None = None,
        rules: Sequence[Rule] = (),
        print_groups: bool = False,
    ) -> None:
        """Choose; optimizers are built when the parameters exist."""
        for number, rule in enumerate(rules, 1):
            if rule.optimizer is None and optimizer is None:
                raise ValueError(
                    f"rule {number} ({rule.label}) names no optimizer and neither does the plan; "
                    "set `optimizer` in the rule or beside `rules`"
                )
        if optimizer is None and not rules:
            raise ValueError(
                f"{type(self).__name__} needs an optimizer; type "
                "--trainer.callbacks.optimizer=AdamW, or give rules"
            )
        self.rules = [replace(r, optimizer=r.optimizer or optimizer) for r in rules or (Rule(),)]
        self.decay: Decay = decay
        self.schedule = schedule
        self.print_groups = print_groups
        self._length = float("inf")  # optimizer steps of the run, once known
        self._members: list[str] = []
        self._saved_members: list[str] = []

    def __str__(self) -> str:
        """The plan in a line, for messages."""
        made = (optimizer_class(rule.optimizer) for rule in self.rules)
        return f"{type(self).__name__}({', '.join(c.__name__ for c in made if c)})"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over `configure_optimizers` for one fit, unless a later plan does.

        A flag on the command line comes after the callbacks of a config, and means what it says.
        """
        if stage != "fit" or self is not plans(trainer)[-1]:
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{type(pl_module).__name__} steps its own optimizers (manual optimization), so "
                f"{type(self).__name__} has nothing to replace; leave it out of the callbacks"
            )
        self._length = float("inf")
        if trainer.max_steps >= 0:
            self._know_length(trainer, trainer.max_steps)

        def configure_optimizers(module: L.LightningModule) -> dict[str, Any]:
            return self._configure(trainer, module)

        patch(trainer, pl_module, "configure_optimizers", configure_optimizers, self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give `configure_optimizers` back."""
        if stage == "fit":
            unpatch(pl_module, "configure_optimizers", self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the run's length from the loaders, which exist only now."""
        if trainer.max_steps < 0 and self is plans(trainer)[-1]:
            self._know_length(trainer, trainer.estimated_stepping_batches)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say which optimizers there are, to refuse a resume that would misread their state."""
        if self is plans(trainer)[-1]:
            checkpoint["optimizer_plan"] = list(self._members)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare at once where optimizers exist already (sharded), else when they are built."""
        self._saved_members = checkpoint.get("optimizer_plan", [])
        self._compare()

    def _know_length(self, trainer: L.Trainer, length: float) -> None:
        trial = getattr(trainer, "fast_dev_run", 0)  # a step or two
        if self.schedule is not None and not trial:
            self.schedule.check(length)
        self._length = length

    def _configure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        shares = [(r, s) for r, s in zip(self.rules, assign(module, self.rules), strict=True) if s]
        if not shares:
            raise ValueError(f"{type(module).__name__} has no trainable parameter: nothing to do")
        members = [self._member(rule, share) for rule, share in shares]
        labels = [rule.label for rule, _ in shares]
        labels = [k if labels.count(k) == 1 else f"{k} {i}" for i, k in enumerate(labels, 1)]
        composite = Composite(members, labels)
        if isinstance(trainer.strategy, DDPStrategy):
            for member in composite.members:
                if hasattr(member, "replicas"):  # all ranks have all weights and can share work
                    member.replicas = dist.group.WORLD  # pyright: ignore[reportAttributeAccessIssue]
        self._refuse_closure(trainer, composite)
        for member, (_, share) in zip(composite.members, shares, strict=True):
            if isinstance(member, Adafactor) and any(isinstance(p, DTensor) for _, p in share):
                raise ValueError(
                    "torch's Adafactor cannot step sharded parameters; take AdamW, or "
                    "--trainer.strategy ddp"
                )
        self._members = [
            f"{type(member).__name__} of {len(share)} tensors"
            for member, (_, share) in zip(composite.members, shares, strict=True)
        ]
        self._compare()
        if trainer.is_global_zero:
            self._print(shares, composite)
            self._say_what_it_replaces(trainer, module)
        if self.schedule is None:
            return {"optimizer": composite}
        schedule = self.schedule
        scheduler = LambdaLR(composite, lambda step: schedule.factor(step, self._length))
        return {
            "optimizer": composite,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _member(self, rule: Rule, share: list[Named]) -> Optimizer:
        assert rule.optimizer is not None  # checked in __init__
        member = make(rule.optimizer, [p for _, p in share])
        split_decay(member, rule.decay or self.decay)
        for group in member.param_groups:
            if "lr" in group:
                group["lr"] *= rule.lr_scale
            elif rule.lr_scale != 1 or self.schedule is not None:
                raise ValueError(
                    f"{type(member).__name__} keeps no 'lr' in its param_groups, which lr_scale "
                    "and schedule act on; leave both out, or give it one"
                )
        return member

    def _print(self, shares: list[tuple[Rule, list[Named]]], composite: Composite) -> None:
        """What runs, before it runs: a wrong grouping trains without complaint."""
        table = Table("rule", "tensors", "parameters", "lr", "decay", "optimizer")
        for (rule, share), member in zip(shares, composite.members, strict=True):
            for place, group in enumerate(member.param_groups):
                own = {id(p) for p in group["params"]}
                table.add_row(
                    rule.label.replace("+", " + ") if place == 0 else "",
                    str(len(own)),
                    f"{sum(p.numel() for p in group['params']):,}",
                    f"{group['lr']:g}" if "lr" in group else "",
                    f"{group['weight_decay']:g}" if "weight_decay" in group else "",
                    type(member).__name__,
                )
                if self.print_groups:
                    for name in (name for name, p in share if id(p) in own):
                        table.add_row(f"  {name}")
        Console().print(table)

    def _say_what_it_replaces(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        name, console = str(self), Console()
        for other in plans(trainer)[:-1]:
            console.print(f"{other} is not used: {name} stands after it", soft_wrap=True)
        own = type(module).configure_optimizers
        if not own.__module__.startswith(("ravine.", "lightning.")):
            console.print(
                f"{own.__qualname__} is not called: {name} takes its place", soft_wrap=True
            )

    def _compare(self) -> None:
        if self._saved_members and self._members and self._saved_members != self._members:
            raise ValueError(
                f"the checkpoint was trained with {' + '.join(self._saved_members)}, this run "
                f"uses {' + '.join(self._members)}, whose state is another; resume with the "
                "former, or start a new run from the weights alone"
            )
        if self._members:
            self._saved_members = []

    def _refuse_closure(self, trainer: L.Trainer, composite: Composite) -> None:
        name = next((type(m).__name__ for m in composite.members if needs_closure(m)), None)
        if name is None:
            return
        obstacles = {
            "other optimizers beside it": len(composite.members) > 1,
            "gradient accumulation": trainer.accumulate_grad_batches > 1,
            "a gradient scaler": getattr(trainer.precision_plugin, "scaler", None) is not None,
            "several ranks": trainer.world_size > 1,
        }
        if found := [obstacle for obstacle, there in obstacles.items() if there]:
            raise ValueError(
                f"{name} computes the loss several times a step, which is not possible with "
                f"{', '.join(found)}; leave that out, or take an optimizer such as AdamW"
            )


def plans(trainer: L.Trainer) -> list[OptimizerPlan]:
    """The trainer's plans; the last one counts."""
    return [c for c in trainer.callbacks if isinstance(c, OptimizerPlan)]  # pyright: ignore[reportAttributeAccessIssue]


def make(factory: OptimizerFactory, parameters: Sequence[Any]) -> Optimizer:
    """Call the factory; an argument that its class does not know ends in the nearest it does."""
    made = optimizer_class(factory)
    if made is not None:
        allowed = list(inspect.signature(made).parameters)[1:]
        for word in getattr(factory, "keywords", {}):
            if word not in allowed:
                nearest = difflib.get_close_matches(word, allowed, n=3, cutoff=0.3) or allowed
                raise ValueError(
                    f"{made.__name__} has no argument {word!r}; nearest: {', '.join(nearest)}"
                )
    return factory(parameters)


def split_decay(optimizer: Optimizer, decay: Decay) -> None:
    """Leave weight decay to the tensors that it is meant for; each group becomes at most two."""
    if "weight_decay" not in optimizer.defaults or decay == "all":
        return
    for group in list(optimizer.param_groups):
        if not group["weight_decay"]:
            continue
        spared = [p for p in group["params"] if decay == "none" or p.ndim < 2]
        if len(spared) == len(group["params"]):
            group["weight_decay"] = 0.0
        elif spared:
            group["params"] = [p for p in group["params"] if p.ndim >= 2]
            settings = {k: v for k, v in group.items() if k != "params"}
            optimizer.add_param_group({**settings, "params": spared, "weight_decay": 0.0})
