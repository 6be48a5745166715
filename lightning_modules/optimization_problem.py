"""OptimizationProblem: base of the tasks that train a few variables, several members at once.

A member is one run of a sweep: a parameter of its own, `net.members.3`, in the param group of its
settings. Replicas are members with the same settings and other random draws, `net.members.3_0`,
`net.members.3_1`, ...; they share a param group. The members are stacked for the forward pass. The
loss is the sum over members, so that the gradient of a member is that of its own objective:

    loss = sum_m f_m(w_m),   d loss / d w_m = grad f_m(w_m)

A batch may hold several optimizer steps (`steps_per_batch`): the trainer's work for a batch, such
as logging, is then done once for all of them. Schedules and `trainer.global_step` count every step.

Axes: m members, d variables of a member, k points.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ravine.errors import UsageError, check_at_least_one
from ravine.lightning_compat import count_optimizer_step

from .task_module import TaskModule

DtypeName = Literal["float32", "float64"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}


class MemberParameters(nn.Module):
    """One parameter (d) for each member; `forward` stacks them: () to (m d)."""

    def __init__(self, starts: Tensor, num_replicas: int = 1) -> None:
        """Create the parameters at their starts (m d); replicas of a setting are neighbours."""
        super().__init__()
        self.members = nn.Module()
        for index, start in enumerate(starts):
            setting, replica = divmod(index, num_replicas)
            name = f"{setting}_{replica}" if num_replicas > 1 else str(setting)
            self.members.register_parameter(name, nn.Parameter(start.clone()))

    def list_params(self) -> list[nn.Parameter]:
        """Return the parameter of each member."""
        return list(self.members.parameters())

    def forward(self) -> Tensor:
        """Stack the members (m d)."""
        # the dict itself: a search for parameters takes as long as the rest of a small step
        return torch.stack(list(self.members._parameters.values()))  # type: ignore[arg-type]


class OptimizationProblem(TaskModule):
    """Base of `Objective` and `Regression`: members, their values, and several steps per batch.

    A subclass defines `start_points`, `evaluate_points` and `training_step`.

    Args:
        steps_per_batch: optimizer steps in one batch of the trainer.
    """

    progress_metrics = ("train/objective",)

    def __init__(self, steps_per_batch: int = 1) -> None:
        """Store the number of steps; the net is built later."""
        super().__init__()
        check_at_least_one(
            type(self).__name__, flag_prefix="--model.", steps_per_batch=steps_per_batch
        )
        self.steps_per_batch = steps_per_batch
        self.step_in_batch = 0  # the optimizer step within the batch, from 0

    @property
    def num_replicas(self) -> int:
        """The number of neighbouring members with the same settings."""
        return 1

    @abstractmethod
    def start_points(self) -> Tensor:
        """Return the start of each member (m d)."""

    @abstractmethod
    def evaluate_points(self, points: Tensor) -> Tensor:
        """Return the objective (k m) of points (k m d), member by member."""

    def known_minimizers(self) -> Tensor | None:
        """Return the minimizers (m p d), p of them for each member; None if unknown."""
        return None

    def known_minimum(self) -> Tensor | None:
        """Return the smallest value of each member's objective (m); None if unknown."""
        return None

    def predicted_gap(self, lrs: Tensor) -> Tensor | None:
        """Return the expected gap (m) in which each member ends at these constant rates (m).

        None if no closed form is known.
        """
        return None

    def samples_per_step(self) -> Tensor | None:
        """Return the samples of one optimizer step of each member (m); None if there are none."""
        return None

    def build_net(self) -> MemberParameters:
        """Create the parameters at their starts."""
        return MemberParameters(self.start_points(), self.num_replicas)

    def configure_model(self) -> None:
        """Build the net with its values: the starts are data, and not drawn at random."""
        if self.net is None:
            self.net = self.build_net()

    def configure_optimizers(self) -> Any:
        """Create the default optimizer: gradient descent."""
        return SGD(self.parameters(), lr=self.lr)

    def member_parameters(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each member."""
        assert isinstance(self.net, MemberParameters)
        return [[parameter] for parameter in self.net.list_params()]

    def member_points(self) -> Tensor:
        """Return a copy of the members' current points (m d)."""
        with torch.no_grad():
            return self.forward()

    def compute_gradients(self, points: Tensor) -> Tensor:
        """Return the gradients (k m d) of the objective at points (k m d)."""
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            (gradients,) = torch.autograd.grad(self.evaluate_points(leaf).sum(), leaf)
        return gradients

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take the optimizer steps of a batch; `training_step` reads `step_in_batch`."""
        for step in range(self.steps_per_batch):
            self.step_in_batch = step
            if step:  # Lightning counts one step of a batch, and advances the schedules after it
                count_optimizer_step(self.trainer)
                for config in self.trainer.lr_scheduler_configs:
                    if config.interval == "step":
                        cast(LRScheduler, config.scheduler).step()
            optimizer.step(closure=optimizer_closure)
            self.after_optimizer_step(optimizer)
            if self.trainer.should_stop:
                return

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Act after each optimizer step, also within a batch."""


def check_dtype(owner: str, dtype: str) -> torch.dtype:
    """Return the dtype with a name; raise UsageError for an unknown name."""
    if dtype not in DTYPES:
        raise UsageError(
            f"{owner}: dtype={dtype!r} is not supported",
            list(DTYPES),
            "use dtype='float64'",
            flag="--model.dtype=float64",
        )
    return DTYPES[dtype]
