"""OptimizerPlan: any torch optimizer on any LightningModule, as a callback.

Lightning builds optimizers by calling the module's `configure_optimizers`, after the model has
been rewritten and sharded. The plan takes that one method over; everything after it (accumulation,
mixed precision, clipping, checkpoints) goes the usual way.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from ravine.errors import UsageError
from ravine.lightning_compat import attached_trainer, stops_after_search
from ravine.strategies.shards import whole_net

from ..checks.run_checks import before_training
from ..hooks import patch, unpatch
from ..stock_callbacks.gradient_accumulation import optimizer_steps
from .composite import Composite, Group, Part, needs_closure
from .lr_finder import check_one_rate, finders, found_rate, use_rate
from .lr_schedules import Schedule, ScheduleLR
from .param_groups import Share, compose, later, table
from .rules import (
    Decay,
    OptimizerFactory,
    Rule,
    assign,
    choose,
    optimizer_class,
)
from .schedule_free import TwoSets, has_two_sets

NAME = "configure_optimizers"


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

    acts_on_training = True  # a resume without it is another run

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
                raise UsageError(
                    f"rule {number} ({rule.label}) names no optimizer and neither does the plan; "
                    "set `optimizer` in the rule or beside `rules`"
                )
        if optimizer is None and not rules:
            raise UsageError(
                f"{type(self).__name__} needs an optimizer; type "
                "--trainer.callbacks.optimizer=AdamW, or give rules"
            )
        self.rules = [replace(r, optimizer=r.optimizer or optimizer) for r in rules or (Rule(),)]
        self.decay: Decay = decay
        self.schedule = schedule
        self.print_groups = print_groups
        self._length = float("inf")  # optimizer steps of the run, once known
        self._saved_length: float | None = None  # of the run that wrote the checkpoint
        self._members: list[str] = []
        self._saved_members: list[str] = []
        self._sets = TwoSets()
        self._log: Any = None
        self._found: float | None = None  # learning rate, by a search in a fit before this one
        self._base: tuple[Composite, ScheduleLR | None, dict[str, float]] | None = None

    def __str__(self) -> str:
        """The plan in a line, for messages."""
        made = (optimizer_class(rule.optimizer) for rule in self.rules)
        return f"{type(self).__name__}({', '.join(c.__name__ for c in made if c)})"

    @property
    def log(self) -> Any:
        """The module's `log`, which Lightning hands to every callback."""
        return self._log

    @log.setter
    def log(self, log: Any) -> None:
        """Let Lightning find a `configure_optimizers` in a module that has none.

        It asks for one right after it has handed this out, and before any hook of a callback.
        """
        self._log = log
        module = getattr(log, "__self__", None)
        if not isinstance(module, L.LightningModule) or is_overridden(NAME, module):
            return
        trainer = attached_trainer(module)
        if trainer is not None and trainer.state.fn == "fit" and self is plans(trainer)[-1]:
            patch(trainer, module, NAME, lambda module: self._configure(trainer, module), self)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over `configure_optimizers` for one fit, unless a later plan does.

        A flag on the command line comes after the callbacks of a config, and means what it says.
        """
        before_training(trainer, pl_module, stage)
        if stage != "fit" or self is not plans(trainer)[-1]:
            return
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"{type(pl_module).__name__} steps its own optimizers (manual optimization), so "
                f"{type(self).__name__} has nothing to replace; leave it out of the callbacks"
            )
        self._length = float("inf")
        if trainer.max_steps >= 0 or trainer.max_epochs == -1:  # else the loaders will tell
            steps = trainer.max_steps
            self._know_length(trainer, steps if steps >= 0 else float("inf"))

        def configure_optimizers(module: L.LightningModule) -> dict[str, Any]:
            return self._configure(trainer, module)

        patch(trainer, pl_module, NAME, configure_optimizers, self)
        if self.schedule is None:
            name, owner = type(pl_module).__name__, type(self).__name__
            patch(trainer, pl_module, "lr_schedulers", lambda _: Rates(trainer, name, owner), self)

    def optimizers_with_two_sets(self) -> list[str]:
        """Names of optimizers whose class shows that they keep separate weights for evaluation."""
        kinds = (optimizer_class(rule.optimizer) for rule in self.rules)
        return [kind.__name__ for kind in kinds if kind and has_two_sets(kind)]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give `configure_optimizers` back."""
        if stage == "fit":
            unpatch(pl_module, NAME, self)
            unpatch(pl_module, "lr_schedulers", self)
            if any(stops_after_search(finder) for finder in finders(trainer)):
                self._found = found_rate(trainer)  # a Tuner searches in a fit of its own

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the run's length from the loaders, which exist only now."""
        if trainer.max_epochs != -1 and self is plans(trainer)[-1]:
            self._know_length(trainer, optimizer_steps(trainer))
        if trainer.global_step == 0 and (rate := found_rate(trainer)) and self._base is not None:
            use_rate(rate, *self._base)
        self._say_what_is_rescaled(trainer)
        self._sets.train(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the weights that a schedule-free optimizer means."""
        self._sets.evaluate(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train on with the others; until now a sample or a file could still be made."""
        self._sets.resume(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the weights that are meant."""
        self._sets.evaluate(pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say which optimizers there are, to refuse a resume that would misread their state."""
        if self is plans(trainer)[-1]:
            checkpoint["optimizer_plan"] = list(self._members)
            checkpoint["schedule_length"] = self._length
            self._sets.save(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare at once where optimizers exist already (sharded), else when they are built."""
        if trainer.state.fn == "fit" and self is plans(trainer)[-1]:
            self._saved_members = [str(each) for each in checkpoint.get("optimizer_plan", [])]
            begun = checkpoint.get("global_step")  # else it is the file of a search
            self._saved_length = checkpoint.get("schedule_length") if begun else None
            self._sets.load(checkpoint)
            self._compare()

    def _know_length(self, trainer: L.Trainer, length: float) -> None:
        trial = getattr(trainer, "fast_dev_run", 0)  # a step or two
        if self.schedule is not None and not trial:
            self.schedule.check(length)
        self._length = length

    def _configure(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        with whole_net(trainer):  # a stage of a pipeline is none
            shares = self._shares(module)
        composite = compose(shares, self.decay)
        self._refuse(trainer, composite)
        self._sets.use(composite)
        if isinstance(trainer.strategy, DDPStrategy):
            for member in composite.members:
                if hasattr(member, "replicas"):  # all ranks have all weights and can share work
                    member.replicas = dist.group.WORLD  # pyright: ignore[reportAttributeAccessIssue]
        parts = composite.by_label()
        self._members = [
            f"{type(parts[share.label][0]).__name__} of {len(share.named)} tensors"
            for share in shares
        ]
        self._compare()
        if trainer.is_global_zero:
            Console().print(table(shares, composite, self.print_groups))
            self._say_what_it_replaces(trainer, module)
        composite.let_go()
        start = {id(p) for p in module.parameters() if p.requires_grad}
        rates: list[ScheduleLR] = []

        def route(parameters: list[Tensor], given: Group) -> list[Part]:
            if isinstance(trainer.strategy, DDPStrategy):
                _refuse_unreduced(module, parameters, start)
            factor = rates[0].factor_now() if rates else None
            return self._route(module, shares, composite, parameters, given, factor)

        composite.route = route
        scales = {share.label: share.rule.lr_scale for share in shares}
        check_one_rate(trainer, composite, scales)
        if self._found is not None and not finders(trainer):
            use_rate(self._found, composite, None, scales)
        self._base = (composite, None, scales)
        if self.schedule is None:
            return {"optimizer": composite}
        schedule = self.schedule
        rates += [ScheduleLR(composite, lambda step: schedule.factor(step, self._length))]
        self._base = (composite, rates[0], scales)
        return {
            "optimizer": composite,
            "lr_scheduler": {"scheduler": rates[0], "interval": "step"},
        }

    def _route(
        self,
        module: L.LightningModule,
        shares: list[Share],
        composite: Composite,
        parameters: list[Tensor],
        given: Group,
        factor: float | None,
    ) -> list[Part]:
        """The optimizers that take parameters trained from now on, by the same rules."""
        parts = []
        members = composite.by_label()
        for rule, named in choose(module, self.rules, parameters):
            share = next((s for s in shares if s.rule is rule), None)
            if share is None:  # it had nothing to train until now
                taken = [s.label for s in shares]
                number = self.rules.index(rule) + 1
                label = rule.label if rule.label not in taken else f"{rule.label} {number}"
                share = Share(rule, label, [])
                shares.append(share)
            member = members[share.label][0] if share.label in members else None
            parts.append(later(share._replace(named=named), member, self.decay, given, factor))
        return parts

    def _shares(self, module: L.LightningModule) -> list[Share]:
        taken = zip(self.rules, assign(module, self.rules), strict=True)
        taken = [(rule, named) for rule, named in taken if named]
        if not taken:
            raise UsageError(f"{type(module).__name__} has no trainable parameter: nothing to do")
        labels = [rule.label for rule, _ in taken]
        return [
            Share(rule, label if labels.count(label) == 1 else f"{label} {number}", named)
            for number, (label, (rule, named)) in enumerate(zip(labels, taken, strict=True), 1)
        ]

    def _say_what_it_replaces(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        name, console = str(self), Console()
        for other in plans(trainer)[:-1]:
            console.print(f"{other} is not used: {name} stands after it", soft_wrap=True)
        own = type(module).configure_optimizers
        if not own.__module__.startswith(("ravine.", "lightning.")):
            console.print(
                f"{own.__qualname__} is not called: {name} takes its place", soft_wrap=True
            )

    def _say_what_is_rescaled(self, trainer: L.Trainer) -> None:
        """A resume with another length goes on at another place of the schedule's shape."""
        before, self._saved_length = self._saved_length, None
        if self.schedule is None or not self.schedule.needs_length or before is None:
            return
        if before != self._length and trainer.is_global_zero:
            step = trainer.global_step
            was, now = (self.schedule.factor(step, n) for n in (before, self._length))
            text = (
                f"schedule {self.schedule.kind!r}: from {before:g} optimizer steps in the "
                f"checkpoint to {self._length:g} here; at step {step} the learning rate goes "
                f"from {was:.3g} to {now:.3g} of its peak"
            )
            Console().print(text, soft_wrap=True, highlight=False)

    def _compare(self) -> None:
        if self._saved_members and self._members and self._saved_members != self._members:
            raise UsageError(
                f"the checkpoint was trained with {' + '.join(self._saved_members)}, this run "
                f"uses {' + '.join(self._members)}, whose state is another; resume with the "
                "former, or start a new run from the weights alone"
            )
        if self._members:
            self._saved_members = []

    def _refuse(self, trainer: L.Trainer, composite: Composite) -> None:
        """What an optimizer cannot do, in words, before the first step."""
        acts_on_lr = self.schedule is not None or any(rule.lr_scale != 1 for rule in self.rules)
        for member in composite.members:
            name = type(member).__name__
            rates = [group.get("lr") for group in member.param_groups]
            if acts_on_lr and not all(isinstance(lr, int | float | Tensor) for lr in rates):
                raise UsageError(
                    f"{name} keeps no number 'lr' in its param_groups, which lr_scale and schedule "
                    "act on; leave both out, or give it one"
                )
            _refuse_small_eps(member)
            if needs_closure(member):
                self._refuse_closure(trainer, name, composite)

    def _refuse_closure(self, trainer: L.Trainer, name: str, composite: Composite) -> None:
        obstacles = {
            "other optimizers beside it": len(composite.members) > 1,
            "gradient accumulation": trainer.accumulate_grad_batches > 1,
            "a gradient scaler": getattr(trainer.precision_plugin, "scaler", None) is not None,
            "several ranks": trainer.world_size > 1 and not composite.gathers,
            "a pipeline": getattr(trainer.strategy, "pipeline", None) is not None,
        }
        if found := [obstacle for obstacle, there in obstacles.items() if there]:
            raise UsageError(
                f"{name} computes the loss several times a step, which is not possible with "
                f"{', '.join(found)}; leave that out, or take an optimizer such as AdamW"
            )


def _refuse_unreduced(module: L.LightningModule, parameters: list[Tensor], start: set[int]) -> None:
    """DDP averages the gradients of what was trainable when it was set up, and no others."""
    names = {id(p): name for name, p in module.named_parameters()}
    if late := [names.get(id(p), "one of no module") for p in parameters if id(p) not in start]:
        raise UsageError(
            f"parameters that are trained from now on ({', '.join(late[:3])}): with ddp their "
            "gradients would differ from rank to rank, since they were frozen at the start; train "
            "on one process, or leave them trainable at the start with a learning rate of 0"
        )


class Rates:
    """The result of `self.lr_schedulers()` where a plan has no schedule: read-only rates.

    rates = Rates(trainer, "MyModule", "OptimizerPlan")
    rates.get_last_lr()     # [0.001], of each group
    rates.step()            # AttributeError: the module's own schedulers do not exist
    """

    def __init__(self, trainer: L.Trainer, module: str, owner: str) -> None:
        """Store the names of the module and of the callback that replaces its schedulers."""
        self._trainer, self._module, self._owner = trainer, module, owner

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group."""
        groups = (g for optimizer in self._trainer.optimizers for g in optimizer.param_groups)
        return [float(group["lr"]) for group in groups if "lr" in group]

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError, which names the plan."""
        raise AttributeError(name if name.startswith("__") else self._absent(f".{name}"))

    def __getitem__(self, index: Any) -> Any:
        """Raise TypeError, which names the plan."""
        raise TypeError(self._absent(f"[{index}]"))

    def __iter__(self) -> Any:
        """Raise TypeError, which names the plan."""
        raise TypeError(self._absent(" in a loop"))

    def _absent(self, use: str) -> str:
        return (
            f"{self._module} uses self.lr_schedulers(){use}, and {self._owner} has replaced its "
            "optimizers and schedulers; allowed: get_last_lr(); leave the use out, or give the "
            f"schedule to {self._owner}: schedule=Schedule('cosine')"
        )


def _refuse_small_eps(optimizer: Optimizer) -> None:
    """Refuse an eps of torch's and our optimizers that float16 rounds to 0: NaN of 0 / 0."""
    if not type(optimizer).__module__.startswith(("torch.optim", "ravine.")):
        return  # others may compute in float32
    for group in optimizer.param_groups:
        eps = group.get("eps")
        half = any(p.dtype == torch.float16 for p in group["params"])
        if half and isinstance(eps, float) and eps and not float(torch.tensor(eps).half()):
            raise UsageError(
                f"{type(optimizer).__name__}: eps={eps:g} is 0 in float16, so that weights turn to "
                "NaN (0 / 0); allowed: 6e-8 or more; type --trainer.callbacks.optimizer.eps=1e-4, "
                "of AdaGrad --trainer.callbacks.eps=1e-4, or --trainer.precision=16-mixed"
            )


def plans(trainer: L.Trainer) -> list[OptimizerPlan]:
    """The trainer's plans; the last one counts."""
    return [c for c in trainer.callbacks if isinstance(c, OptimizerPlan)]  # pyright: ignore[reportAttributeAccessIssue]
