"""OptimizerSweep: train each member of a sweep with its own learning rate (lectures 1 and 2).

    lrs 0.5 0.1 0.05       members.0, members.1, members.2: a param group for each
    with two replicas      members.0_0 and members.0_1 share the group of 0.5, and so on

The members are separate parameters of one module (`member_parameters`), so one run trains all of
them. All groups belong to one optimizer, whose state is kept for each parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import numpy

from ravine.errors import UsageError

from .lr_schedules import LRSchedule
from .parameter_rules import OptimizerFactory, ParamRule
from .plan import OptimizerPlan

__all__ = ["LinearGrid", "OptimizerSweep"]


@dataclass(frozen=True)
class LinearGrid:
    """Equally spaced numbers from `start` to `stop`, both included.

    Args:
        start: the first number.
        stop: the last number.
        num: how many numbers.
    """

    start: float
    stop: float
    num: int

    def to_list(self) -> list[float]:
        """Return the numbers."""
        return numpy.linspace(self.start, self.stop, self.num).tolist()


class OptimizerSweep(OptimizerPlan):
    """Train the members of setting i with the learning rate lrs[i].

    Example: `OptimizerSweep(torch.optim.SGD, lrs=[0.5, 0.1])` for `Objective(num_members=2)`.

    Args:
        optimizer: an optimizer class, or a function that builds one from the parameters.
        lrs: learning rates, or a grid of them.
        num_replicas: number of neighbouring members with the same learning rate.
        schedule: the learning-rate schedule of all members.
    """

    def __init__(
        self,
        optimizer: OptimizerFactory,
        lrs: Sequence[float] | LinearGrid,
        num_replicas: int = 1,
        schedule: LRSchedule | None = None,
    ) -> None:
        """Create a rule for each member."""
        values = lrs.to_list() if isinstance(lrs, LinearGrid) else [float(lr) for lr in lrs]
        if not values or num_replicas < 1:
            raise UsageError(
                f"OptimizerSweep: lrs={values} with num_replicas={num_replicas} makes no member",
                ["one learning rate or more, and num_replicas of 1 or more"],
                hint="use lrs=[0.5, 0.1]",
                flag=f"--trainer.callbacks.{type(self).__name__}.lrs=[0.5,0.1]",
            )
        self.lrs = values
        suffix = "_*" if num_replicas > 1 else ""  # members.3_0, members.3_1, ...
        # lr_scale multiplies the rate 1, so that the rates are exact and one optimizer has them all
        make_optimizer: Any = optimizer  # its keywords are those of the class
        unit_rate = partial(make_optimizer, lr=1.0)
        rules = [
            ParamRule(pattern=f"*members.{index}{suffix}", optimizer=unit_rate, lr_scale=lr)
            for index, lr in enumerate(values)
        ]
        super().__init__(rules=rules, schedule=schedule)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module without members; `assign_params` refuses another number of them."""
        if stage == "fit" and not callable(getattr(pl_module, "member_parameters", None)):
            raise UsageError(
                f"OptimizerSweep: {type(pl_module).__name__} has no members of a sweep",
                ["Objective", "Regression", "a module with member_parameters()"],
                hint="use OptimizerPlan for one learning rate",
                flag="--trainer.callbacks+=OptimizerPlan --trainer.callbacks.optimizer=SGD",
            )
        super().setup(trainer, pl_module, stage)
