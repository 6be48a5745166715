"""Objective functions of a few variables, by name, with their minimizers (lectures 1, 3 and 8).

    quadratic        (1/2) sum_i lambda_i (w_i - center)^2       eigenvalues from 1 to the condition
                                                                 number, in a geometric series
    double_well      (1/2) sum_i (w_i^2 - 1)^2                   minima at +1 and -1, maximum at 0
    ravine           x^2 + y^4                                   flat along y
    coupled_ravine   (x - y)^2 + (x + y)^4                       flat along no axis
    rosenbrock       (1 - x)^2 + 100 (y - x^2)^2
    beale            (1.5 - x + x y)^2 + (2.25 - x + x y^2)^2 + (2.625 - x + x y^3)^2
    saddle           x^2 - y^2                                   no minimum

A function maps a point w (d) to a scalar tensor, and works under `torch.func.vmap`.

A diagonal preconditioner is a rate for each coordinate that may depend on the point (lecture 8):

    ravine           (0.4, min(0.2 / (4 y^2), 0.1))              figure 5.1: a step multiplies x
                                                                 and, where 4 y^2 > 2, y by a factor
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from ravine.errors import UsageError

FunctionName = Literal[
    "quadratic", "double_well", "ravine", "coupled_ravine", "rosenbrock", "beale", "saddle"
]
ScalarFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ObjectiveFunction:
    """A function of d variables with its known minimizers.

    Args:
        value: maps a point (d) to a scalar.
        minimizers: all points with the smallest value, each with d coordinates; empty if unknown.
        minimum: the smallest value; None if it is unknown or if there is none.
    """

    value: ScalarFunction
    minimizers: Sequence[Sequence[float]] = ()
    minimum: float | None = None


def quadratic_eigenvalues(num_variables: int, condition_number: float) -> Tensor:
    """Return the eigenvalues (d) of the quadratic: a geometric series from 1 to the last one."""
    exponents = torch.linspace(0, 1, num_variables, dtype=torch.float64)
    return torch.tensor(condition_number, dtype=torch.float64) ** exponents


def _quadratic(w: Tensor, eigenvalues: Tensor, center: float) -> Tensor:
    return (eigenvalues.to(w) * (w - center) ** 2).sum() / 2


def _double_well(w: Tensor) -> Tensor:
    return ((w**2 - 1) ** 2).sum() / 2


def _ravine(w: Tensor) -> Tensor:
    return w[0] ** 2 + w[1] ** 4


def _coupled_ravine(w: Tensor) -> Tensor:
    return (w[0] - w[1]) ** 2 + (w[0] + w[1]) ** 4


def _rosenbrock(w: Tensor) -> Tensor:
    return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def _beale(w: Tensor) -> Tensor:
    x, y = w[0], w[1]
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _saddle(w: Tensor) -> Tensor:
    return w[0] ** 2 - w[1] ** 2


# functions of two variables: value, minimizer, minimum
PLANE_FUNCTIONS: dict[str, ObjectiveFunction] = {
    "ravine": ObjectiveFunction(_ravine, [(0.0, 0.0)], 0.0),
    "coupled_ravine": ObjectiveFunction(_coupled_ravine, [(0.0, 0.0)], 0.0),
    "rosenbrock": ObjectiveFunction(_rosenbrock, [(1.0, 1.0)], 0.0),
    "beale": ObjectiveFunction(_beale, [(3.0, 0.5)], 0.0),
    "saddle": ObjectiveFunction(_saddle),
}


def _ravine_rates(w: Tensor) -> Tensor:
    y = w[1]
    return torch.stack((torch.full_like(y, 0.4), (0.2 / (4 * y**2)).clamp(max=0.1)))


# rates (d) of the coordinates at a point (d), by name; each is for points of two variables
PRECONDITIONERS: dict[str, Callable[[Tensor], Tensor]] = {"ravine": _ravine_rates}


def make_preconditioner(
    preconditioner: str | Sequence[float] | None, num_variables: int
) -> Callable[[Tensor], Tensor] | None:
    """Return the rates (d) of the coordinates as a function of the point (d); None for None.

    Args:
        preconditioner: a name of `PRECONDITIONERS`, or a constant rate for each coordinate.
        num_variables: d, the number of coordinates of a point.

    Raises:
        UsageError: the name is unknown, or the number of coordinates differs.
    """
    if preconditioner is None:
        return None
    numbers = ", ".join(["0.001", *["0.0005"] * (num_variables - 1)])
    hint, flag = f"use preconditioners=[[{numbers}]]", f"--model.preconditioners='[[{numbers}]]'"
    allowed = [*PRECONDITIONERS, f"{num_variables} numbers above 0"]
    if isinstance(preconditioner, str):
        if preconditioner not in PRECONDITIONERS or num_variables != 2:
            raise UsageError(
                f"Objective: there is no preconditioner {preconditioner!r} of {num_variables} "
                "variables",
                allowed if num_variables == 2 else allowed[-1:],
                hint,
                flag=flag,
            )
        return PRECONDITIONERS[preconditioner]
    rates = torch.tensor([float(rate) for rate in preconditioner], dtype=torch.float64)
    if len(rates) != num_variables or not bool(((rates > 0) & rates.isfinite()).all()):
        raise UsageError(
            f"Objective: preconditioner {rates.tolist()} is not a rate for each of "
            f"{num_variables} variables",
            allowed if num_variables == 2 else allowed[-1:],
            hint,
            flag=flag,
        )
    return lambda w: rates.to(w)


def make_function(
    name: str, num_variables: int, condition_number: float = 1.0, center: float = 0.0
) -> ObjectiveFunction:
    """Return the function with a name, for points with this number of variables.

    Args:
        name: one of `FunctionName`.
        num_variables: d, the number of coordinates of a point.
        condition_number: largest eigenvalue of the quadratic; the smallest is 1.
        center: every coordinate of the minimizer of the quadratic.

    Raises:
        UsageError: the function needs another number of variables, or an argument has no effect.
    """
    if name == "quadratic":
        return _make_quadratic(num_variables, condition_number, center)
    if condition_number != 1 or center != 0:
        raise UsageError(
            f"Objective: condition_number and center belong to the quadratic, and the function is "
            f"{name}",
            ["quadratic"],
            "use function='quadratic'",
            flag="--model.function=quadratic",
        )
    if name == "double_well":
        # every combination of signs; beyond ten variables only the first, as there are 2^d
        wells = list(product((1.0, -1.0), repeat=num_variables)) if num_variables <= 10 else ()
        return ObjectiveFunction(_double_well, wells, 0.0)
    if num_variables != 2:
        start = [3.0, 2.0]
        raise UsageError(
            f"Objective: {name} is a function of 2 variables, and start has {num_variables}",
            ["2 numbers"],
            f"use start={start}",
            flag="--model.start=[3,2]",
        )
    return PLANE_FUNCTIONS[name]


def _make_quadratic(
    num_variables: int, condition_number: float, center: float
) -> ObjectiveFunction:
    if not 1 <= condition_number < float("inf"):
        raise UsageError(
            f"Objective: condition_number={condition_number} is not the ratio of the largest to "
            "the smallest eigenvalue",
            ["1 or more"],
            "use condition_number=100",
            flag="--model.condition_number=100",
        )
    if num_variables == 1 and condition_number != 1:
        raise UsageError(
            f"Objective: a quadratic of one variable has one eigenvalue, and condition_number is "
            f"{condition_number:g}",
            ["start with 2 numbers or more"],
            "use start=[5.0, 5.0]",
            flag="--model.start=[5,5]",
        )
    eigenvalues = quadratic_eigenvalues(num_variables, condition_number)
    value = partial(_quadratic, eigenvalues=eigenvalues, center=center)
    return ObjectiveFunction(value, [(center,) * num_variables], 0.0)
