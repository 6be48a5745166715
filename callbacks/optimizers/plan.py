"""OptimizerPlan: train any LightningModule with any torch optimizer, through a callback.

Lightning calls the module's `configure_optimizers` after the model is transformed and sharded. The
plan overrides this one method. Gradient accumulation, mixed precision, clipping and checkpoints
work as usual.
"""

from collections.abc import Callable, Sequence
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
from ravine.strategies.data_parallel import DataParallelInfo
from ravine.strategies.pipeline_parallel import full_module

from ..base import find_callbacks
from ..checks.run_checks import add_run_checks
from ..hook_overrides import override_hook, restore_hook
from ..stock_callbacks.gradient_accumulation import count_optimizer_steps
from .composite import CompositeOptimizer, ParamGroup, RuleGroups, needs_closure
from .lr_finder import check_single_lr, find_lr_finders, get_suggested_lr, set_base_lr
from .lr_schedules import LRSchedule, ScheduleLR
from .param_groups import (
    RuleParams,
    build_optimizer,
    describe_factory,
    make_added_groups,
    make_plan_table,
)
from .parameter_rules import (
    DecayFilter,
    OptimizerFactory,
    ParamRule,
    assign_added_params,
    assign_params,
    get_optimizer_class,
)
from .schedule_free import ScheduleFreeWeights, has_train_eval_modes
from .schedule_units import count_schedule_units

HOOK_NAME = "configure_optimizers"


class OptimizerPlan(Callback):
    """Train with these optimizers instead of the module's own.

    Example, in a script: `OptimizerPlan(partial(torch.optim.AdamW, lr=5e-3), decay="matrices")`;
    on the command line: `--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=AdamW
    --trainer.callbacks.optimizer.lr=5e-3`.

    Args:
        optimizer: an optimizer class, or a function that builds one from the parameters; it trains
            all parameters, or those of rules without an optimizer.
        decay: which tensors get the optimizer's weight decay; a matrix has two axes or more.
        schedule: the learning-rate schedule, applied at each optimizer step.
        rules: which optimizer trains which parameters; the first rule that matches applies.
        print_groups: list the parameters of each rule below the table of rules.
    """

    acts_on_training = True  # a resumed run needs it

    def __init__(
        self,
        optimizer: OptimizerFactory | None = None,
        decay: DecayFilter = "matrices",
        schedule: LRSchedule | None = None,
        rules: Sequence[ParamRule] = (),
        print_groups: bool = False,
    ) -> None:
        """Check and store the arguments; optimizers are built later, when parameters exist.

        Args:
            optimizer: class, or function of the parameters, of rules without an optimizer.
            decay: which tensors get the optimizer's weight decay.
            schedule: the learning-rate schedule; None for a constant rate.
            rules: which optimizer trains which parameters; none for one rule that takes all.
            print_groups: list the parameters of each rule below the table of rules.
        """
        for number, rule in enumerate(rules, 1):
            if rule.optimizer is None and optimizer is None:
                raise UsageError(
                    f"OptimizerPlan: rule {number} ({rule.label}) has no optimizer, and neither "
                    "has the plan",
                    hint="pass optimizer=AdamW to the ParamRule or to OptimizerPlan",
                    flag=f"--trainer.callbacks.{type(self).__name__}.optimizer=AdamW",
                )
        if optimizer is None and not rules:
            raise UsageError(
                f"{type(self).__name__} needs an optimizer or rules",
                hint="pass optimizer=torch.optim.AdamW",
                flag="--optimizer=AdamW",
            )
        self.rules = [
            replace(r, optimizer=r.optimizer or optimizer) for r in rules or (ParamRule(),)
        ]
        self.decay: DecayFilter = decay
        self.schedule = schedule
        self.print_groups = print_groups
        self._total_steps = float("inf")  # optimizer steps of the run, inf while unknown
        self._saved_total_steps: float | None = None  # total steps in the checkpoint
        # of schedules in samples or tokens: the schedule in steps, known from the first batch on
        self._schedules_in_steps: dict[LRSchedule, LRSchedule] = {}
        # samples and tokens of a batch of a rank, and the number of batches in an optimizer step
        self._unit_counts: dict[str, int] = {}
        self._saved_unit_counts: dict[str, int] = {}  # those in the checkpoint
        self._optimizer_names: list[str] = []  # of this run, with their numbers of tensors
        self._saved_optimizer_names: list[str] = []  # those in the checkpoint
        # switches optimizers that have separate weights for evaluation
        self._schedule_free = ScheduleFreeWeights()
        self._log: Any = None  # the module's `log`, see the property `log`
        self._suggested_lr: float | None = None  # learning rate found in an earlier fit by a Tuner
        # arguments of `set_base_lr`: optimizer, scheduler, lr_scale by label of a rule
        self._lr_context: tuple[CompositeOptimizer, ScheduleLR | None, dict[str, float]] | None = (
            None
        )

    def __str__(self) -> str:
        """Return the plan with its optimizer classes, for messages."""
        classes = (get_optimizer_class(rule.optimizer) for rule in self.rules)
        return f"{type(self).__name__}({', '.join(c.__name__ for c in classes if c)})"

    @property
    def log(self) -> Any:
        """The module's `log`, which Lightning sets on every callback."""
        return self._log

    @log.setter
    def log(self, log: Any) -> None:
        """Store `log`, and override `configure_optimizers` of a module that does not define it.

        Lightning requires the method right after it sets `log`, before any hook of a callback. So
        this setter is the only place for such a module; `setup` does it for all other modules.
        """
        self._log = log
        # the module whose bound method `log` is; HOOK_NAME is configure_optimizers
        module = getattr(log, "__self__", None)
        if not isinstance(module, L.LightningModule) or is_overridden(HOOK_NAME, module):
            return
        trainer = attached_trainer(module)
        if (
            trainer is not None
            and trainer.state.fn == "fit"
            and self is attached_plans(trainer)[-1]  # only the trainer's last plan applies
        ):
            # the module keeps this method until the end of the fit
            override_hook(
                trainer,
                module,
                HOOK_NAME,
                lambda module: self._build_optimizer(trainer, module),
                self,
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Override `configure_optimizers` for one fit, unless a later plan does.

        The last plan applies, so a plan on the command line replaces one in a config.
        """
        # adds the callback that tries validation and checkpointing before the first step
        add_run_checks(trainer, pl_module, stage)
        if stage != "fit" or self is not attached_plans(trainer)[-1]:
            return
        if not pl_module.automatic_optimization:
            name = type(self).__name__
            raise UsageError(
                f"{name}: {type(pl_module).__name__} steps its own optimizers (manual "
                "optimization), which a plan cannot replace",
                hint=f"remove {name}() from Trainer(callbacks=...)",
            )
        self._total_steps = float("inf")  # unknown
        self._unit_counts = {}  # of another fit
        self._schedules_in_steps.clear()
        if trainer.max_steps >= 0 or trainer.max_epochs == -1:  # else the loaders determine it
            steps = trainer.max_steps
            # also checks that the schedule fits this number of steps
            self._set_total_steps(trainer, steps if steps >= 0 else float("inf"))

        def configure_optimizers(module: L.LightningModule) -> dict[str, Any]:
            return self._build_optimizer(trainer, module)

        # HOOK_NAME is configure_optimizers; `teardown` restores the module's own method
        override_hook(trainer, pl_module, HOOK_NAME, configure_optimizers, self)
        if not self._schedules():  # a module that reads its schedulers gets the rates only
            rates = ReadOnlyLRs(trainer, type(pl_module).__name__, type(self).__name__)
            override_hook(trainer, pl_module, "lr_schedulers", lambda module: rates, self)

    def schedule_free_optimizers(self) -> list[str]:
        """Return the class names of optimizers with separate evaluation weights."""
        classes = (get_optimizer_class(rule.optimizer) for rule in self.rules)
        return [cls.__name__ for cls in classes if cls and has_train_eval_modes(cls)]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore `configure_optimizers`."""
        if stage == "fit":
            restore_hook(pl_module, HOOK_NAME, self)
            restore_hook(pl_module, "lr_schedulers", self)
            if any(stops_after_search(finder) for finder in find_lr_finders(trainer)):
                self._suggested_lr = get_suggested_lr(trainer)  # a Tuner searches in a separate fit

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore `configure_optimizers`: Lightning skips `teardown` after an exception."""
        restore_hook(pl_module, HOOK_NAME, self)
        restore_hook(pl_module, "lr_schedulers", self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the total number of steps from the loaders, which now exist."""
        scheduler = self._lr_context[1] if self._lr_context is not None else None
        first_factors = scheduler.current_factors() if scheduler is not None else []
        if trainer.max_epochs != -1 and self is attached_plans(trainer)[-1]:
            self._set_total_steps(trainer, count_optimizer_steps(trainer))
        # The rates of the first step were set before the length of the run was known, or are those
        # of a checkpoint whose run had another length.
        is_first = trainer.global_step == 0
        has_new_length = self._saved_total_steps not in (None, self._total_steps)
        if scheduler is not None and (
            has_new_length or (is_first and scheduler.current_factors() != first_factors)
        ):
            scheduler.set_current_lrs()
        if (
            trainer.global_step == 0
            and (rate := get_suggested_lr(trainer))
            and self._lr_context is not None
        ):
            set_base_lr(rate, *self._lr_context)
        self._log_schedule_changes(trainer)
        self._schedule_free.use_train_weights(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch to the evaluation weights of a schedule-free optimizer."""
        self._schedule_free.use_eval_weights(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch back to training weights.

        This is deferred so that callbacks after a validation see the evaluation weights.
        """
        self._schedule_free.resume_training(pl_module)
        if not self._unit_counts and any(s.units != "steps" for s in self._schedules()):
            self._count_schedule_units(trainer, pl_module, batch)

    def _count_schedule_units(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any
    ) -> None:
        """Convert schedules in samples or tokens to steps, by the first batch of the fit.

        A resumed run keeps the counts of the checkpoint if a step has as many batches, because its
        first batch may be the short last one of an epoch.
        """
        info = DataParallelInfo.from_trainer(trainer)
        self._unit_counts = {"batches": info.accumulate * info.dp_size}
        is_same_run = self._saved_unit_counts.get("batches") == self._unit_counts["batches"]
        saved_counts = self._saved_unit_counts if is_same_run else {}
        for schedule in self._schedules():
            if schedule.units == "steps":
                continue
            count = saved_counts.get(schedule.units) or count_schedule_units(
                module, batch, schedule.units
            )
            self._unit_counts[schedule.units] = count
            in_steps = schedule.in_steps(count * self._unit_counts["batches"])
            if not getattr(trainer, "fast_dev_run", 0):
                in_steps.validate(self._total_steps)
            self._schedules_in_steps[schedule] = in_steps
            message = in_steps.shortened_warmup_message(self._total_steps)
            if message and trainer.is_global_zero:
                Console().print(message, soft_wrap=True, highlight=False)
        scheduler = self._lr_context[1] if self._lr_context is not None else None
        if scheduler is not None:
            scheduler.set_current_lrs()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the evaluation weights in the module."""
        self._schedule_free.use_eval_weights(pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the optimizer names, so that a resume with other optimizers can be refused."""
        if self is attached_plans(trainer)[-1]:
            checkpoint["optimizer_plan"] = list(self._optimizer_names)
            checkpoint["schedule_length"] = self._total_steps
            if self._unit_counts:
                checkpoint["schedule_units"] = dict(self._unit_counts)
            self._schedule_free.add_to_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Compare optimizer names now if they exist (sharded runs), else when they are built."""
        if trainer.state.fn == "fit" and self is attached_plans(trainer)[-1]:
            self._saved_optimizer_names = [
                str(name) for name in checkpoint.get("optimizer_plan", [])
            ]
            saved_step = checkpoint.get("global_step")  # else a learning-rate search wrote the file
            self._saved_total_steps = checkpoint.get("schedule_length") if saved_step else None
            self._saved_unit_counts = checkpoint.get("schedule_units", {})
            self._schedule_free.load_from_checkpoint(checkpoint)
            self._check_same_optimizers()

    def _set_total_steps(self, trainer: L.Trainer, total_steps: float) -> None:
        is_trial = getattr(trainer, "fast_dev_run", 0)  # a dry run of a few steps
        for schedule in self._schedules() if not is_trial else ():
            # one in samples or tokens is checked at the first batch, which gives their number
            is_known = schedule.units == "steps"
            (schedule if is_known else LRSchedule(units=schedule.units)).validate(total_steps)
        self._total_steps = total_steps

    def _schedules(self) -> list[LRSchedule]:
        """Return the schedules of the plan and of its rules."""
        schedules = (self.schedule, *(rule.schedule for rule in self.rules))
        return [schedule for schedule in schedules if schedule is not None]

    def _factor_of_rule(self, rule: ParamRule) -> Callable[[int], float]:
        """Return the factor of a rule's schedule as a function of the optimizer step.

        The total is read at each step, because it is known only at the start of training.
        """
        schedule = rule.schedule or self.schedule or LRSchedule("constant")
        in_steps = self._schedules_in_steps  # empty until the first batch
        return lambda k: in_steps.get(schedule, schedule).factor(k, self._total_steps)

    def _build_optimizer(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """Build the plan's optimizers; Lightning calls this as the module's configure_optimizers.

        It also prints the table of rules, and refuses a checkpoint with other optimizers.

        Returns:
            Lightning's dict with the composite optimizer, and its scheduler if there is a schedule.
        """
        with full_module(trainer):  # a pipeline stage lacks parameters
            rule_params = self._assign_rule_params(module)  # each rule, its label and parameters
        composite = build_optimizer(rule_params, self.decay)  # joins the optimizers of all rules
        self._validate(trainer, composite)
        # switches an optimizer with separate evaluation weights, if there is one
        self._schedule_free.attach_optimizer(composite)
        if isinstance(trainer.strategy, DDPStrategy):
            for member in composite.optimizers:
                if hasattr(member, "replica_group"):  # all ranks have all weights: divide the work
                    member.replica_group = dist.group.WORLD  # pyright: ignore[reportAttributeAccessIssue]
        groups_by_label = composite.groups_by_label()  # (optimizer, param groups) of each rule
        self._optimizer_names = [
            f"{type(groups_by_label[one_rule.label][0]).__name__} of {len(one_rule.named_params)} "
            "tensors"
            for one_rule in rule_params
        ]
        self._check_same_optimizers()  # as in the checkpoint
        if trainer.is_global_zero:
            Console().print(make_plan_table(rule_params, composite, self.print_groups))
            self._log_replaced_optimizers(trainer, module)
        initially_trainable = {id(p) for p in module.parameters() if p.requires_grad}
        scheduler: ScheduleLR | None = None

        # The composite calls it in `add_param_group`, when layers are unfrozen during the run.
        # `settings` are those passed with the parameters.
        def route(parameters: list[Tensor], settings: ParamGroup) -> list[RuleGroups]:
            if isinstance(trainer.strategy, DDPStrategy):
                _check_gradients_reduced(module, parameters, initially_trainable)
            step = None if scheduler is None else scheduler.last_epoch
            return self._route_params(module, rule_params, composite, parameters, settings, step)

        composite.router = route
        lr_scales = {one_rule.label: one_rule.rule.lr_scale for one_rule in rule_params}
        check_single_lr(trainer, composite, lr_scales)  # if Lightning's LearningRateFinder is used
        if self._suggested_lr is not None and not find_lr_finders(trainer):
            # found in an earlier fit by a Tuner
            set_base_lr(self._suggested_lr, composite, scheduler=None, lr_scales=lr_scales)
        if self._schedules():

            def factor_of_group(index: int) -> Callable[[int], float]:
                label = composite.labels[index]
                rule = next(one_rule.rule for one_rule in rule_params if one_rule.label == label)
                return self._factor_of_rule(rule)

            scheduler = ScheduleLR(composite, factor_of_group)
        self._lr_context = (composite, scheduler, lr_scales)
        if scheduler is None:
            return {"optimizer": composite}
        return {
            "optimizer": composite,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _route_params(
        self,
        module: L.LightningModule,
        rule_params: list[RuleParams],
        composite: CompositeOptimizer,
        parameters: list[Tensor],
        settings: ParamGroup,
        step: int | None,
    ) -> list[RuleGroups]:
        """Return the optimizers and groups, by the same rules, of newly trained parameters.

        Args:
            module: the module of the parameters.
            rule_params: the rules with parameters so far; a rule without any is added to the list.
            composite: the plan's optimizer.
            parameters: those of `add_param_group`.
            settings: settings passed with them, which take precedence.
            step: the next optimizer step; None without a schedule.
        """
        added_groups = []
        groups_by_label = composite.groups_by_label()
        for rule, named_params in assign_added_params(module, self.rules, parameters):
            one_rule = next((other for other in rule_params if other.rule is rule), None)
            if one_rule is None:  # the rule had no trainable parameter until now
                used_labels = [other.label for other in rule_params]
                number = self.rules.index(rule) + 1
                label = rule.label if rule.label not in used_labels else f"{rule.label} {number}"
                one_rule = RuleParams(rule, label, [])
                rule_params.append(one_rule)
            member, _ = groups_by_label.get(one_rule.label, (None, []))
            # `member` is None if the rule's optimizer does not exist yet; it is then built
            added_rule = one_rule._replace(named_params=named_params)
            factor = None if step is None else self._factor_of_rule(rule)(step)
            added_groups.append(make_added_groups(added_rule, member, self.decay, settings, factor))
        return added_groups

    def _assign_rule_params(self, module: L.LightningModule) -> list[RuleParams]:
        assigned = zip(self.rules, assign_params(module, self.rules), strict=True)
        assigned = [(rule, named) for rule, named in assigned if named]
        if not assigned:
            raise UsageError(
                f"{type(self).__name__}: {type(module).__name__} has no trainable parameter",
                hint="call requires_grad_(True) on the parameters to train",
            )
        labels = [rule.label for rule, _ in assigned]
        return [
            RuleParams(rule, label if labels.count(label) == 1 else f"{label} {number}", named)
            for number, (label, (rule, named)) in enumerate(zip(labels, assigned, strict=True), 1)
        ]

    def _log_replaced_optimizers(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Print which plans and which method of the module are not used, with what is lost."""
        name, console = str(self), Console()
        for other in attached_plans(trainer)[:-1]:
            text = (
                f"{other} is not used, because {name} comes after it. Not used: "
                f"{other.describe_settings()}. Used: {self.describe_settings()}"
            )
            console.print(text, soft_wrap=True, highlight=False, markup=False)
        module_hook = type(module).configure_optimizers
        if not module_hook.__module__.startswith(("ravine.", "lightning.")):
            console.print(
                f"{module_hook.__qualname__} is not called, because {name} replaces it",
                soft_wrap=True,
            )

    def describe_settings(self) -> str:
        """Return the optimizers with their arguments, and the schedule, in one line."""
        rules = [
            (rule.label, describe_factory(rule.optimizer), rule.lr_scale, rule.schedule)
            for rule in self.rules
        ]
        texts = [
            f"{label + ': ' if len(rules) > 1 else ''}{text}"
            f"{f' with lr_scale={scale:g}' if scale != 1 else ''}"
            f"{f' with {schedule}' if schedule is not None else ''}"
            for label, text, scale, schedule in rules
        ]
        if self.decay != "matrices":
            texts.append(f"decay={self.decay}")
        return f"{', '.join(texts)}, {'no schedule' if self.schedule is None else self.schedule}"

    def _log_schedule_changes(self, trainer: L.Trainer) -> None:
        """Print a shortened warmup, and the change of rates if a resumed run has another length.

        `_saved_total_steps` is the length of the checkpoint's run, and None if it is not resumed.
        """
        saved_total_steps = self._saved_total_steps
        self._saved_total_steps = None  # print once
        if not trainer.is_global_zero:
            return
        for schedule in dict.fromkeys(self._schedules()):  # each of them once
            if schedule.units != "steps":
                continue  # its steps are known from the first batch on
            # None if the warmup fits into the run
            if message := schedule.shortened_warmup_message(self._total_steps):
                Console().print(message, soft_wrap=True, highlight=False)
            if saved_total_steps is None or saved_total_steps == self._total_steps:
                continue
            warmups = {schedule.warmup_steps(n) for n in (saved_total_steps, self._total_steps)}
            if schedule.needs_total_steps or len(warmups) > 1:
                step = trainer.global_step
                # factors of the peak learning rate, at this step of a run with that many steps
                old_factor = schedule.factor(step, saved_total_steps)
                new_factor = schedule.factor(step, self._total_steps)
                text = (
                    f"LRSchedule({schedule.kind!r}): the run of the checkpoint has "
                    f"{saved_total_steps:g} optimizer steps, and this run has "
                    f"{self._total_steps:g}; at step {step} the learning rate changes from "
                    f"{old_factor:.3g} to {new_factor:.3g} of its peak"
                )
                Console().print(text, soft_wrap=True, highlight=False)

    def _check_same_optimizers(self) -> None:
        if (
            self._saved_optimizer_names
            and self._optimizer_names
            and self._saved_optimizer_names != self._optimizer_names
        ):
            raise UsageError(
                f"the checkpoint has the optimizers {' + '.join(self._saved_optimizer_names)}, and "
                f"this run has {' + '.join(self._optimizer_names)}",
                hint="use the optimizers of the checkpoint, or start a new run from its weights "
                "with Pretrained(path)",
            )
        if self._optimizer_names:
            self._saved_optimizer_names = []

    def _validate(self, trainer: L.Trainer, composite: CompositeOptimizer) -> None:
        """Raise UsageError before the first step for settings that an optimizer lacks."""
        acts_on_lr = bool(self._schedules()) or any(rule.lr_scale != 1 for rule in self.rules)
        for member in composite.optimizers:
            name = type(member).__name__
            lrs = [group.get("lr") for group in member.param_groups]
            if acts_on_lr and not all(isinstance(lr, int | float | Tensor) for lr in lrs):
                raise UsageError(
                    f"{name} has no number 'lr' in its param_groups, which lr_scale and schedule "
                    "change",
                    hint="remove lr_scale and schedule",
                )
            _check_eps(member)
            if needs_closure(member):
                self._check_closure_allowed(trainer, name, composite)

    def _check_closure_allowed(
        self, trainer: L.Trainer, name: str, composite: CompositeOptimizer
    ) -> None:
        """Raise UsageError if the optimizer `name` cannot compute the loss several times in a step.

        Each call of its closure must compute the loss of the whole step again.
        """
        obstacles = {
            "other optimizers": len(composite.optimizers) > 1,
            "gradient accumulation": trainer.accumulate_grad_batches > 1,
            "a gradient scaler": getattr(trainer.precision_plugin, "scaler", None) is not None,
            # `needs_full_gradient`: such as Newton's method, whose full step every rank takes
            "several ranks": trainer.world_size > 1 and not composite.needs_full_gradient,
            "a pipeline": getattr(trainer.strategy, "pipeline", None) is not None,
        }
        if conflicts := [obstacle for obstacle, is_present in obstacles.items() if is_present]:
            raise UsageError(
                f"{name} computes the loss several times in a step, which is not possible with "
                f"{', '.join(conflicts)}",
                hint="use an optimizer such as AdamW",
                flag="--optimizer=AdamW",
            )


def _check_gradients_reduced(
    module: L.LightningModule, parameters: list[Tensor], initially_trainable: set[int]
) -> None:
    """Raise UsageError for parameters frozen at DDP setup: DDP does not reduce their gradients."""
    names = {id(p): name for name, p in module.named_parameters()}
    if late := [
        names.get(id(p), "a parameter outside of the module")
        for p in parameters
        if id(p) not in initially_trainable
    ]:
        raise UsageError(
            f"add_param_group: {', '.join(late[:3])} had requires_grad=False at the start of the "
            "run, so ddp does not reduce these gradients over the ranks",
            hint="train in one process, or keep them trainable from the start with lr=0",
        )


class ReadOnlyLRs:
    """The result of `self.lr_schedulers()` under a plan without a schedule: read-only rates.

    For example:

        rates = ReadOnlyLRs(trainer, "MyModule", "OptimizerPlan")
        rates.get_last_lr()     # [0.001], one rate for each param group
        rates.step()            # AttributeError: the module's own schedulers do not exist
    """

    def __init__(self, trainer: L.Trainer, module: str, owner: str) -> None:
        """Store the names of the module and of the callback that replaces its schedulers."""
        self._trainer, self._module, self._owner = trainer, module, owner

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each param group."""
        groups = (g for optimizer in self._trainer.optimizers for g in optimizer.param_groups)
        return [float(group["lr"]) for group in groups if "lr" in group]

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError with the name of the plan."""
        raise AttributeError(
            name if name.startswith("__") else self._unavailable_message(f".{name}")
        )

    def __getitem__(self, index: Any) -> Any:
        """Raise TypeError with the name of the plan."""
        raise TypeError(self._unavailable_message(f"[{index}]"))

    def __iter__(self) -> Any:
        """Raise TypeError with the name of the plan."""
        raise TypeError(self._unavailable_message(" in a loop"))

    def _unavailable_message(self, use: str) -> str:
        return (
            f"{self._module} uses self.lr_schedulers(){use}, and {self._owner} replaces its "
            "optimizers and schedulers; allowed: get_last_lr(); pass "
            f"schedule=LRSchedule('cosine') to {self._owner}"
        )


def _check_eps(optimizer: Optimizer) -> None:
    """Raise UsageError if float16 rounds the eps of an optimizer of torch or Ravine to 0."""
    if not type(optimizer).__module__.startswith(("torch.optim", "ravine.")):
        return  # other packages may compute in float32
    for group in optimizer.param_groups:
        eps = group.get("eps")
        half = any(p.dtype == torch.float16 for p in group["params"])
        if half and isinstance(eps, float) and eps and not float(torch.tensor(eps).half()):
            raise UsageError(
                f"{type(optimizer).__name__}: eps={eps:g} is 0 in float16, so weights become NaN "
                "(0 / 0)",
                ["6e-8 or more"],
                hint="use eps=1e-4, or Trainer(precision='16-mixed')",
                flag="--trainer.precision=16-mixed, or --optimizer.eps=1e-4",
            )


def attached_plans(trainer: L.Trainer) -> list[OptimizerPlan]:
    """Return the plans of the trainer; only the last one is used."""
    return find_callbacks(trainer, OptimizerPlan)
