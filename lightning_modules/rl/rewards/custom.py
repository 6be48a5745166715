"""Custom reward functions: a user's function, imported by its dotted path."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ravine.errors import sort_by_similarity

from .base import Reward, RewardError, RewardInputs, format_error, shorten


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
            function = import_reward_function(function)
        default_name = getattr(function, "__name__", type(function).__name__)
        if default_name == "reward":  # the name of the sum; the file's name is used instead
            default_name = function.__module__.rpartition(".")[2]
        super().__init__(weight, name or default_name)
        self.function = function
        self.parameters = inspect.signature(function).parameters

    def score(self, inputs: RewardInputs) -> Any:
        """Call the function with the arguments of its signature."""
        available = {
            "texts": inputs.texts,
            "prompts": inputs.prompts,
            "tokens": inputs.tokens,
            "mask": inputs.mask,
            "logprobs": inputs.logprobs,
        }
        param_kinds = {name: p.kind for name, p in self.parameters.items()}
        accepts_all = inspect.Parameter.VAR_KEYWORD in param_kinds.values()
        rows = zip(inputs.tokens.tolist(), inputs.mask.tolist(), strict=True)
        ids = [[n for n, is_kept in zip(*row, strict=True) if is_kept] for row in rows]
        for name, value in (("completions", inputs.texts), ("completion_ids", ids)):  # names of TRL
            if name in param_kinds or (accepts_all and name not in inputs.columns):
                available[name] = value
        for name in inputs.columns.keys() & available.keys():
            raise RewardError(
                f"the data have a column {name!r}, by which the reward {self.name} would get what "
                "was written; give the column another name"
            )
        available |= inputs.columns
        variadic_kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        for name, parameter in self.parameters.items():
            is_required = (
                parameter.default is inspect.Parameter.empty
                and parameter.kind not in variadic_kinds
            )
            if name not in available and is_required:
                raise RewardError(
                    f"the reward {self.name} asks for {name!r}; there are {', '.join(available)}; "
                    "rename the argument, or give the data a column of that name"
                )
        positional_names = [
            n for n, k in param_kinds.items() if k is inspect.Parameter.POSITIONAL_ONLY
        ]
        if accepts_all:
            keyword_names = [name for name in available if name not in positional_names]
        else:
            keyword_names = [
                n
                for n, k in param_kinds.items()
                if n in available and n not in positional_names and k not in variadic_kinds
            ]
        positional = [available[name] for name in positional_names if name in available]
        return self.function(*positional, **{name: available[name] for name in keyword_names})


def import_reward_function(path: str) -> Callable[..., Any]:
    """Import the function at a path such as my_file.reward.

    Raises:
        RewardError: there is no such function; the message lists similar names.
    """
    file, _, name = path.rpartition(".")
    if not file:
        message = "a file and a function in it are named, with a dot between"
        raise _not_found_error(path, message, path.strip("."), [])
    module = _import_module(path, file, name)
    function = getattr(module, name, None)
    if callable(function):
        return function
    similar_names = sort_by_similarity(
        name, [k for k, v in vars(module).items() if inspect.isfunction(v)]
    )
    alternatives = f"functions in {file} are {', '.join(similar_names[:9]) or 'none'}"
    if function is not None:
        alternatives = f"that is {shorten(repr(function))}, and {alternatives}"
    raise _not_found_error(path, alternatives, file, similar_names)


def _import_module(path: str, file: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(file)
    except Exception as error:  # importing a user's file can raise any error
        missing_module = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing_module and f"{file}.".startswith(f"{missing_module}."):
            files = sort_by_similarity(
                file, [file_path.stem for file_path in Path().glob("[!._]*.py")]
            )
            alternatives = f"{', '.join(files[:9])}" if files else "none"
            problem = (
                f"no file is called {missing_module}.py; "
                f"files of Python in this folder are {alternatives}"
            )
            raise _not_found_error(path, problem, files[0] if files else file, [name]) from error
        raise RewardError(
            f"no reward function {path}: importing {file} ends in {format_error(error)}; "
            f'correct it, and type python -c "import {file}" to see'
        ) from error


def _not_found_error(path: str, problem: str, file: str, names: Sequence[str]) -> RewardError:
    suggestion = f"{file}.{names[0] if names else 'reward'}"
    hint = f"type --model.rewards.function={suggestion}"
    return RewardError(f"no reward function {path}: {problem}; {hint}")
