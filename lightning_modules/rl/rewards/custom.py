"""A reward of the user's: a function in a file of theirs, found by its name."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ravine.errors import sort_by_similarity

from .base import Reward, RewardError, Samples, in_line, shortened


class RewardFunction(Reward):
    """A function of yours: it gets what it asks for by name.

    # my_file.py
    def reward(texts, answer):                    # answer: a column of the data
        return [float(a in text) for text, a in zip(texts, answer)]

    Known are texts, prompts, tokens, mask, log_probabilities and the columns of the data; `**rest`
    takes all of them. A function written for TRL, `def reward(completions, **kwargs)`, gets the
    texts as `completions` and lists of token ids as `completion_ids`. It returns a list with a
    number for each text, or None for one that cannot be scored.

    Args:
        function: the function, or where to find it: my_file.reward.
        weight: what it is multiplied by in the sum.
        name: under which it is logged; by default the function's, or its file's.
    """

    def __init__(
        self, function: Callable[..., Any] | str, weight: float = 1.0, name: str | None = None
    ) -> None:
        """Look at what the function wants."""
        if isinstance(function, str):
            function = named(function)
        own = getattr(function, "__name__", type(function).__name__)
        if own == "reward":  # the sum's name; the file has one, too
            own = function.__module__.rpartition(".")[2]
        super().__init__(weight, name or own)
        self.function = function
        self.wants = inspect.signature(function).parameters

    def score(self, samples: Samples) -> Any:
        """Call it."""
        known = {
            "texts": samples.texts,
            "prompts": samples.prompts,
            "tokens": samples.tokens,
            "mask": samples.mask,
            "log_probabilities": samples.log_probabilities,
        }
        kinds = {name: p.kind for name, p in self.wants.items()}
        takes_all = inspect.Parameter.VAR_KEYWORD in kinds.values()
        rows = zip(samples.tokens.tolist(), samples.mask.tolist(), strict=True)
        ids = [[n for n, kept in zip(*row, strict=True) if kept] for row in rows]
        for name, value in (("completions", samples.texts), ("completion_ids", ids)):  # TRL's
            if name in kinds or (takes_all and name not in samples.columns):
                known[name] = value
        for name in samples.columns.keys() & known.keys():
            raise RewardError(
                f"the data have a column {name!r}, by which the reward {self.name} would get what "
                "was written; give the column another name"
            )
        known |= samples.columns
        rest = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        for name, parameter in self.wants.items():
            needed = parameter.default is inspect.Parameter.empty and parameter.kind not in rest
            if name not in known and needed:
                raise RewardError(
                    f"the reward {self.name} asks for {name!r}; there are {', '.join(known)}; "
                    "rename the argument, or give the data a column of that name"
                )
        first = [n for n, k in kinds.items() if k is inspect.Parameter.POSITIONAL_ONLY]
        if takes_all:
            others = [name for name in known if name not in first]
        else:
            others = [
                n for n, k in kinds.items() if n in known and n not in first and k not in rest
            ]
        placed = [known[name] for name in first if name in known]
        return self.function(*placed, **{name: known[name] for name in others})


def named(path: str) -> Callable[..., Any]:
    """The function at my_file.reward; if there is none, an error that says which there are."""
    file, _, name = path.rpartition(".")
    if not file:
        form = "a file and a function in it are named, with a dot between"
        raise _none(path, form, path.strip("."), [])
    module = _module(path, file, name)
    function = getattr(module, name, None)
    if callable(function):
        return function
    known = sort_by_similarity(name, [k for k, v in vars(module).items() if inspect.isfunction(v)])
    there = f"functions in {file} are {', '.join(known[:9]) or 'none'}"
    if function is not None:
        there = f"that is {shortened(repr(function))}, and {there}"
    raise _none(path, there, file, known)


def _module(path: str, file: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(file)
    except Exception as error:  # whatever a file of the user's does when it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{file}.".startswith(f"{missing}."):
            files = sort_by_similarity(file, [each.stem for each in Path().glob("[!._]*.py")])
            there = f"{', '.join(files[:9])}" if files else "none"
            what = f"no file is called {missing}.py; files of Python in this folder are {there}"
            raise _none(path, what, files[0] if files else file, [name]) from error
        raise RewardError(
            f"no reward function {path}: importing {file} ends in {in_line(error)}; "
            f'correct it, and type python -c "import {file}" to see'
        ) from error


def _none(path: str, what: str, file: str, names: Sequence[str]) -> RewardError:
    right = f"{file}.{names[0] if names else 'reward'}"
    fix = f"type --model.rewards.function={right}"
    return RewardError(f"no reward function {path}: {what}; {fix}")
