"""Objective: minimize a differentiable function of a few variables (lectures 1, 3 and 8).

    w_{k+1} = w_k - step(gradient of f at w_k, ...)       the step is that of any optimizer

Stop rules are checked at w_k, before its update, for each member by itself. A stopped member gets
no gradient, so that its optimizer leaves it where it is. The run ends when all members have
stopped.

Axes: m members, d variables, k points.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ravine.errors import UsageError, check_at_least_one, suggest_names

from .imported_function import FunctionKind, format_error, import_function
from .objectives.functions import (
    FunctionName,
    ObjectiveFunction,
    make_function,
    make_preconditioner,
)
from .optimization_problem import DtypeName, MemberParameters, OptimizationProblem, check_dtype

KIND = FunctionKind("objective", "f", "function", flag="--model.function")
BATCHES_PER_EPOCH = 1000  # of a run without max_steps


class Objective(OptimizationProblem):
    """Minimize a function of a few variables, by name or of the user's own file.

        Trainer(max_steps=200, callbacks=[OptimizerPlan(partial(SGD, lr=0.5))]).fit(
            Objective("quadratic", start=[5.0], gradient_tolerance=1e-10)
        )

    A function of your own takes a tensor (d) and returns a scalar tensor: `my_file.f`.

    Args:
        function: a name of `objectives/functions.py`, a function, or its import path.
        start: the start of every member (d).
        num_members: members of a sweep; `OptimizerSweep` sets their learning rates.
        dtype: float64 or float32.
        condition_number: largest eigenvalue of the quadratic; the smallest is 1.
        center: every coordinate of the minimizer of the quadratic.
        minimizer: the known minimizer of a function of your own (d).
        gradient_tolerance: a member stops where the norm of its gradient is at most this.
        objective_target: a member stops where its objective is at most this.
        max_objective: a member stops where its objective is above this, or NaN: it diverges.
        steps_per_batch: optimizer steps in one batch of the trainer.
        preconditioners: for each member, a rate for each coordinate (d), the name of rates that
            depend on the point (`objectives/functions.py`), or None. The gradient is multiplied by
            the rates before the step, so that SGD with lr=1 uses them as its rates.
    """

    def __init__(
        self,
        function: FunctionName | Callable[..., Any] | str = "quadratic",
        start: Sequence[float] = (5.0,),
        num_members: int = 1,
        dtype: DtypeName = "float64",
        condition_number: float = 1.0,
        center: float = 0.0,
        minimizer: Sequence[float] | None = None,
        gradient_tolerance: float | None = None,
        objective_target: float | None = None,
        max_objective: float | None = None,
        steps_per_batch: int = 1,
        preconditioners: Sequence[Sequence[float] | str | None] | None = None,
    ) -> None:
        """Check the function at the start.

        Raises:
            UsageError: the function is not differentiable or not scalar, or the start is not
                finite.
        """
        super().__init__(steps_per_batch)
        self.save_hyperparameters(ignore=["function"])
        check_at_least_one("Objective", flag_prefix="--model.", num_members=num_members)
        self.dtype_name, self.num_members = dtype, num_members
        self.start = _check_start(start, check_dtype("Objective", dtype))
        # an ObjectiveFunction: `value`, and its known minimizers and smallest value
        self.function = self._find_function(function, condition_number, center, minimizer)
        self.is_vmappable = _check_differentiable(self.function.value, self.start)
        self.gradient_tolerance, self.objective_target = gradient_tolerance, objective_target
        self.max_objective = max_objective
        # for each member, rates (d) as a function of the point (d), or None
        self.preconditioners = self._make_preconditioners(preconditioners)
        rules = (gradient_tolerance, objective_target, max_objective)
        self.has_stop_rules = any(rule is not None for rule in rules)
        # for each member, the number of steps before the point where it stopped; None: not stopped
        self.stop_steps: list[int | None] = [None] * num_members
        self._saved_stop_steps: list[int | None] | None = None  # of the checkpoint of this run
        self._values = torch.empty(0)  # objective of each member (m) in this step

    @property
    def num_variables(self) -> int:
        """The number of variables, d."""
        return len(self.start)

    def start_points(self) -> Tensor:
        """Return the start of each member (m d)."""
        return self.start.repeat(self.num_members, 1)

    def evaluate_points(self, points: Tensor) -> Tensor:
        """Return the objective (k m) of points (k m d)."""
        return self._evaluate(points.flatten(0, 1)).unflatten(0, points.shape[:2])

    def known_minimizers(self) -> Tensor | None:
        """Return the minimizers (m p d) of the function; None if they are unknown."""
        if not self.function.minimizers:
            return None
        minimizers = torch.tensor(self.function.minimizers, dtype=self.start.dtype)  # (p d)
        return minimizers.expand(self.num_members, -1, -1)

    def known_minimum(self) -> Tensor | None:
        """Return the smallest value (m) of the function; None if it is unknown."""
        if self.function.minimum is None:
            return None
        return torch.full((self.num_members,), self.function.minimum, dtype=self.start.dtype)

    def configure_from_data(self, datamodule: Any) -> None:
        """Refuse data, which an objective does not use."""
        raise UsageError(
            f"Objective uses no data, and {type(datamodule).__name__} is passed to the trainer",
            ["no datamodule"],
            "call trainer.fit without datamodule",
            flag="--data=null",
        )

    def train_dataloader(self) -> range:
        """Return the numbers of the batches of an epoch, which hold no data."""
        max_steps = self.trainer.max_steps
        return range(-(-max_steps // self.steps_per_batch) if max_steps > 0 else BATCHES_PER_EPOCH)

    def training_step(self, batch: int) -> Tensor:
        """Return the sum of the members' objectives."""
        values = self._evaluate(self.forward())
        self._values = values.detach()
        if self.step_in_batch == 0:  # once in a batch
            self.log("train/objective", self._values.mean())
        return values.sum()

    def on_after_backward(self) -> None:
        """Apply the stop rules to the points of this step, before their update."""
        if not self.has_stop_rules:
            return
        assert isinstance(self.net, MemberParameters)
        values = self._values.tolist()
        for member, parameter in enumerate(self.net.list_params()):
            if self.stop_steps[member] is None and self._should_stop(values[member], parameter):
                self.stop_steps[member] = self.trainer.global_step
            if self.stop_steps[member] is not None:
                parameter.grad = None  # optimizers skip it
        if None not in self.stop_steps:
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Multiply the gradients by the preconditioners."""
        assert isinstance(self.net, MemberParameters)
        for rates, parameter in zip(self.preconditioners, self.net.list_params(), strict=True):
            if rates is not None and parameter.grad is not None:
                parameter.grad = parameter.grad * rates(parameter.detach())

    def on_train_start(self) -> None:
        """Apply the stop rules anew, except to members that stopped before a resumption."""
        self.stop_steps = self._saved_stop_steps or [None] * self.num_members
        self._saved_stop_steps = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save where the members have stopped."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["stop_steps"] = list(self.stop_steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read where the members have stopped."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("stop_steps", [])
        self._saved_stop_steps = [*saved] if len(saved) == self.num_members else None

    def count_units(self, batch: Any) -> int:
        """Return the optimizer steps of a batch."""
        return self.steps_per_batch

    def _should_stop(self, value: float, parameter: Tensor) -> bool:
        if self.max_objective is not None and not value <= self.max_objective:  # also NaN
            return True
        if self.objective_target is not None and value <= self.objective_target:
            return True
        if self.gradient_tolerance is None or parameter.grad is None:
            return False
        return float(parameter.grad.norm()) <= self.gradient_tolerance

    def _evaluate(self, points: Tensor) -> Tensor:
        """Return the function's values (n) at points (n d)."""
        function = self.function.value
        if len(points) > 1 and self.is_vmappable:
            return torch.func.vmap(function)(points)
        return torch.stack([function(point).reshape(()) for point in points])

    def _make_preconditioners(
        self, preconditioners: Sequence[Sequence[float] | str | None] | None
    ) -> list[Callable[[Tensor], Tensor] | None]:
        """Return the preconditioner of each member; raise UsageError for another number of them."""
        if preconditioners is None:
            return [None] * self.num_members
        if len(preconditioners) != self.num_members:
            raise UsageError(
                f"Objective: there are {len(preconditioners)} preconditioners and "
                f"{self.num_members} members",
                ["one for each member; None for a member without one"],
                f"use num_members={len(preconditioners)}",
                flag=f"--model.num_members={len(preconditioners)}",
            )
        return [make_preconditioner(rates, self.num_variables) for rates in preconditioners]

    def _find_function(
        self,
        function: Callable[..., Any] | str,
        condition_number: float,
        center: float,
        minimizer: Sequence[float] | None,
    ) -> ObjectiveFunction:
        """Return the named, imported or passed function with its known minimizer.

        `hparams.function` is set to its name or import path, from which a checkpoint builds it.
        """
        if isinstance(function, str) and function in get_args(FunctionName):
            if minimizer is not None:
                raise UsageError(
                    f"Objective: the minimizers of {function} are known, and minimizer is "
                    f"{list(minimizer)}",
                    ["minimizer with a function of your own"],
                    "remove minimizer",
                    flag="--model.minimizer=null",
                )
            self.hparams["function"] = function
            return make_function(function, self.num_variables, condition_number, center)
        if isinstance(function, str) and "." not in function:
            names = list(get_args(FunctionName))
            nearest = suggest_names(function, names, least=0) or names
            raise UsageError(
                f"Objective: there is no function {function!r}",
                [*names, "my_file.f"],
                f"use function={nearest[0]!r}",
                flag=f"--model.function={nearest[0]}",
            )
        if isinstance(function, str):
            function = import_function(function, KIND)  # KIND: words for the errors
        if condition_number != 1 or center != 0:
            raise UsageError(
                "Objective: condition_number and center belong to the quadratic, and the function "
                "is your own",
                ["quadratic"],
                "use function='quadratic'",
                flag="--model.function=quadratic",
            )
        name = getattr(function, "__qualname__", "")
        if name.isidentifier():  # no lambda and no function within another one
            self.hparams["function"] = f"{function.__module__}.{name}"
        if minimizer is None:
            return ObjectiveFunction(function)
        if len(minimizer) != self.num_variables:
            raise UsageError(
                f"Objective: minimizer has {len(minimizer)} variables, and start has "
                f"{self.num_variables}",
                [f"{self.num_variables} numbers"],
                f"use minimizer={[0.0] * self.num_variables}",
            )
        point = torch.tensor(minimizer, dtype=self.start.dtype)
        return ObjectiveFunction(function, [tuple(minimizer)], float(function(point)))


def _check_start(start: Sequence[float], dtype: torch.dtype) -> Tensor:
    numbers = [float(number) for number in start]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UsageError(
            f"Objective: start={numbers} is not a point",
            ["one finite number or more"],
            "use start=[5.0]",
            flag="--model.start=[5]",
        )
    return torch.tensor(numbers, dtype=dtype)


def _check_differentiable(function: Callable[[Tensor], Any], start: Tensor) -> bool:
    """Raise UsageError for a function without a scalar value or a gradient at the start.

    Returns:
        Whether `torch.func.vmap` can apply the function to several points.
    """
    name = getattr(function, "__name__", "function")
    point = start.clone().requires_grad_()
    try:
        value = function(point)
    except Exception as error:  # of the user's code
        raise UsageError(
            f"Objective: {name} fails at start={start.tolist()}: {format_error(error)}",
            [f"a function of a tensor with {len(start)} numbers, in operations of torch"],
            "correct the function, or use another start",
            flag="--model.start=[3,2]",
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"Objective: {name} returns {shape} instead of a scalar tensor",
            ["a tensor with one number"],
            "return a sum, such as (w ** 2).sum()",
        )
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), point, allow_unused=True)
    if gradient is None:
        raise UsageError(
            f"Objective: {name} is not differentiable: its value has no gradient with respect to "
            "its argument",
            ["operations of torch, without item(), detach() or round trips through numpy"],
            "compute the value from the argument by torch",
        )
    if not (bool(value.isfinite().all()) and bool(gradient.isfinite().all())):
        raise UsageError(
            f"Objective: {name} is {value.item():g} at start={start.tolist()}, with the gradient "
            f"{gradient.tolist()}",
            ["a start with a finite value and gradient"],
            "use another start",
            flag="--model.start=[3,2]",
        )
    try:
        batched = torch.func.vmap(function)(torch.stack((start, start)))
    except Exception:  # a function with branches on values, or an operation without a batch rule
        return False
    return batched.shape == (2,)
