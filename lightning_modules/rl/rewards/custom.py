"""Custom reward functions: a user's function, imported by its dotted path."""

import inspect
from collections.abc import Callable
from typing import Any

from ...imported_function import FunctionKind, import_function
from .base import Reward, RewardError, RewardInputs

KIND = FunctionKind(
    "reward", "reward", "function", flag="--model.rewards.function", error=RewardError
)
VARIADIC_KINDS = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class RewardFunction(Reward):
    """Reward term from a function; its arguments are passed by name.

        # my_file.py
        def reward(texts, answer):                    # answer: a column of the data
            return [float(a in text) for text, a in zip(texts, answer)]

    Available are texts, prompts, tokens, mask, logprobs and the columns of the data;
    `**rest` receives all of them. A function written for TRL, `def reward(completions, **kwargs)`,
    receives the texts as `completions` and lists of token ids as `completion_ids`. The function
    returns a list with a number for each text, or None for a text that cannot be scored.

    Args:
        function: the function, or its import path: my_file.reward.
        weight: weight of the term in the sum.
        name: name of the logged metric; by default the name of the function, or of its file.
    """

    def __init__(
        self, function: Callable[..., Any] | str, weight: float = 1.0, name: str | None = None
    ) -> None:
        """Import the function if needed, and read its signature."""
        if isinstance(function, str):
            function = import_function(function, KIND)
        default_name = getattr(function, "__name__", type(function).__name__)
        if default_name == "reward":  # the name of the sum; the file's name is used instead
            default_name = function.__module__.rpartition(".")[2]
        super().__init__(weight, name or default_name)
        self.function = function
        self.parameters = inspect.signature(function).parameters

    def score(self, inputs: RewardInputs) -> Any:
        """Call the function with the arguments of its signature; return its result.

        `self.parameters` has the parameters of the function by name, `_accepts_all` is true for
        `**kwargs`. Variadic parameters are `*args` and `**kwargs`.

        Raises:
            RewardError: the function needs an argument that does not exist.
        """
        available = self._collect_arguments(inputs)
        for name, parameter in self.parameters.items():
            is_required = (
                parameter.default is inspect.Parameter.empty
                and parameter.kind not in VARIADIC_KINDS
            )
            if name not in available and is_required:
                raise RewardError(
                    f"the function of the reward {self.name} has the argument {name!r}, which "
                    "does not exist",
                    available,
                    "rename the argument, or add a column of that name to the data",
                )
        positional_names = [
            name
            for name, parameter in self.parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        ]
        if self._accepts_all:
            keyword_names = [name for name in available if name not in positional_names]
        else:
            keyword_names = [
                name
                for name, parameter in self.parameters.items()
                if name in available
                and name not in positional_names
                and parameter.kind not in VARIADIC_KINDS
            ]
        positional = [available[name] for name in positional_names if name in available]
        return self.function(*positional, **{name: available[name] for name in keyword_names})

    @property
    def _accepts_all(self) -> bool:
        """Whether the function has an argument `**rest`, which receives all that is available."""
        kinds = [parameter.kind for parameter in self.parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _collect_arguments(self, inputs: RewardInputs) -> dict[str, Any]:
        """Return all values that the function can receive, by name: samples and data columns.

        Raises:
            RewardError: a column of the data has the name of a value of the samples.
        """
        available = {
            "texts": inputs.texts,
            "prompts": inputs.prompts,
            "tokens": inputs.tokens,
            "mask": inputs.mask,
            "logprobs": inputs.logprobs,
        }
        rows = zip(inputs.tokens.tolist(), inputs.mask.tolist(), strict=True)
        # token ids of each text, without those after its end
        ids = [[n for n, is_kept in zip(*row, strict=True) if is_kept] for row in rows]
        # TRL, a library for policy gradients, passes these names to a reward function
        trl_arguments = {"completions": inputs.texts, "completion_ids": ids}
        for name, value in trl_arguments.items():
            # a column of the same name takes precedence, unless the function asks for the name
            if name in self.parameters or (self._accepts_all and name not in inputs.columns):
                available[name] = value
        for name in inputs.columns.keys() & available.keys():
            raise RewardError(
                f"the data have a column {name!r}, which is also the name under which the reward "
                f"{self.name} gets the samples",
                hint="rename the column of the data",
            )
        return available | inputs.columns
