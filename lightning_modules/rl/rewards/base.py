"""Rewards as a sum of terms: what a term sees, what it may answer, and how the terms are added up.

    reward of sample i = Σ_terms  weight · term_i         a term of weight 0 is watched only

A term answers a number for each of this rank's samples, or None for one that it cannot score: such
a sample gets no reward and weighs nothing. A term that fails, or answers NaN, or too few numbers,
stops the run with its name and the sample's.
"""

import copy
import math
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ravine.errors import UsageError

LARGEST = float(torch.finfo(torch.float32).max)  # in which weights of samples are multiplied
CANCELLED = 1e-12  # of the summands' absolute values: a smaller sum is the rounding of terms
SHOWN = 40  # characters of a text in a message
RESERVED = frozenset({  # what is logged beside the terms, or stands beside them in a sample
    "reward", "surrogate", "entropy", "kl", "kl_k3", "distinct", "jaccard", "nearest_jaccard",
    "vocabulary", "distinct_words", "tokens", "tokens_per_second", "zero_advantages", "drift",
    "prompt", "text",
})  # fmt: skip


class RewardError(UsageError):
    """A term that cannot be used, or failed; the text names it and the sample."""


class Facts:
    """What is known of the corpus: its words and its speakers."""

    def __init__(self, text: str) -> None:
        """Take them from the text."""
        self.text = text

    @cached_property
    def words(self) -> frozenset[str]:
        """Between blanks, with their punctuation."""
        return frozenset(self.text.split())

    @cached_property
    def speakers(self) -> frozenset[str]:
        """Names that begin a speech of a play: a line that ends in a colon, after an empty one."""
        return frozenset(re.findall(r"(?:\A|\n\n)([^\n:]+):\n", self.text))


@dataclass
class Samples:
    """This rank's samples, and the texts of all ranks; tensors (b n) on the CPU."""

    prompts: list[str]
    texts: list[str]  # what was written after each
    tokens: Tensor
    mask: Tensor
    log_probabilities: Tensor  # of the sampler
    reference: Tensor | None = None  # log-probabilities under the reference, at temperature 1
    columns: dict[str, list[Any]] = field(default_factory=dict)  # of the data
    corpus: Facts | None = None
    everyone: list[str] = field(default_factory=list)  # texts of all ranks, in the batch's order
    first: int = 0  # place of our first text among them

    def copied(self, first: int = 0, last: int | None = None) -> "Samples":
        """Samples first .. last-1, for a term to do with what it likes: others read the same."""
        rows = slice(first, last)
        own = {
            name: None if (x := getattr(self, name)) is None else copy.deepcopy(x[rows])
            for name in ("prompts", "texts", "tokens", "mask", "log_probabilities", "reference")
        }
        return Samples(
            **own,  # type: ignore[arg-type]
            columns={k: copy.deepcopy(values[rows]) for k, values in self.columns.items()},
            corpus=self.corpus,
            everyone=list(self.everyone),
            first=self.first + first,
        )


class Reward(ABC):
    """A term of the reward: write `score`.

    class Length(Reward):
        def score(self, samples): return [len(text) / 256 for text in samples.texts]

    Args:
        weight: what it is multiplied by in the sum; 0 to watch it only.
        name: under which it is logged; by default the class's.
    """

    needs_corpus = False
    needs_reference = False

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        """Choose the weight."""
        self.weight = weight
        own = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        self.name = name or own

    @abstractmethod
    def score(self, samples: Samples) -> Sequence[float | None] | Tensor:
        """A number for each of the samples, or None for one that has none."""


def check_terms(terms: Sequence[Reward], corpus: bool, reference: bool) -> None:
    """Refuse, before the first step, terms that lack what they need or have one name for two."""
    if not terms:
        raise RewardError(
            "Reinforce has no rewards; allowed: CharacterFraction, Binary, RewardFunction and "
            "others; type --model.rewards+=CharacterFraction --model.rewards.characters=eE, or "
            "use a config: --config reinforce/avoid_e_v1"
        )
    names = [term.name for term in terms]
    for term in terms:
        if not math.isfinite(term.weight):
            raise RewardError(
                f"the weight of the reward {term.name} is {term.weight}; allowed: a finite number; "
                "type --model.rewards.weight=1"
            )
        taken = term.name in RESERVED or re.match(r"seconds_|.*_spread$", term.name)
        if taken or names.count(term.name) > 1:
            raise RewardError(f"two metrics are called {term.name!r}: give each term a `name`")
        if term.needs_corpus and not corpus:
            raise RewardError(
                f"the reward {term.name} compares with a text, and the data have none; "
                "type --data.corpus=FILE"
            )
        if term.needs_reference and not reference:
            raise RewardError(
                f"the reward {term.name} asks the reference, and there is none; "
                "type --model.reference=copy"
            )


def evaluate(terms: Sequence[Reward], samples: Samples) -> Tensor:
    """The terms' answers, float64 (terms, b), NaN where a term gave None."""
    return torch.stack([_checked(term, samples) for term in terms])


def combine(terms: Sequence[Reward], answers: Tensor) -> Tensor:
    """Weighted sum (b) of the answers (terms, b); NaN where a term that counts gave none.

    A sum whose terms cancel but for rounding (0.1 + 0.2 - 0.3) is 0.
    """
    counted = [i for i, term in enumerate(terms) if term.weight]
    weights = answers.new_tensor([terms[i].weight for i in counted])
    parts = weights[:, None] * answers[counted]  # (terms, b)
    total = parts.sum(0)
    if (total.abs() > LARGEST).any():
        i = int((total.abs() > LARGEST).nonzero()[0])
        term = terms[counted[int(parts[:, i].abs().argmax())]]
        raise RewardError(
            f"the reward of sample {i} is {total[i]:.4g}, most of it of {term.name} with weight "
            f"{term.weight:g}; allowed: up to {LARGEST:.2g}, the largest number of float32; give "
            "the term a smaller weight"
        )
    return total.where(total.abs() > CANCELLED * parts.abs().sum(0), 0.0 * total)


def check_scored(terms: Sequence[Reward], answers: Tensor) -> None:
    """Refuse a batch (terms, b) of which a term that counts has scored nothing."""
    for term, row in zip(terms, answers, strict=True):
        if term.weight and row.isnan().all():
            raise RewardError(
                f"the reward {term.name} is None for all {len(row)} samples of the batch, so there "
                "is nothing to learn from; score some of them, or give the term weight 0"
            )


def _checked(term: Reward, samples: Samples) -> Tensor:
    """One term's answers (b), or an error that names it and the sample."""
    try:
        values, numbers = _answered(term, samples)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward {term.name} failed on {_culprit(term, samples)}: {in_line(error)}"
            f"{_line_of(error)}; correct it, or return None for such a sample"
        ) from error
    if len(numbers) != len(samples.texts):
        raise RewardError(
            f"the reward {term.name} gave {len(numbers)} numbers for {len(samples.texts)} samples, "
            f"0 to {len(samples.texts) - 1}; return one for each, None where there is none"
        )
    for i, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if value is not None and not math.isfinite(number):
            raise RewardError(
                f"the reward {term.name} is {number} for {_named(samples, i)}; return a number, or "
                "None for a sample that cannot be scored"
            )
        if abs(number) > LARGEST:
            raise RewardError(
                f"the reward {term.name} is {number:.4g} for {_named(samples, i)}; allowed: up to "
                f"{LARGEST:.2g}, the largest number of float32; scale it, or return None"
            )
    return torch.tensor(numbers, dtype=torch.float64)


def _answered(term: Reward, samples: Samples) -> tuple[list[Any], list[float]]:
    """What a term answers, and the same as numbers, NaN for None."""
    answers = term.score(samples.copied())
    if isinstance(answers, str | bytes | bytearray | Mapping | Set):
        raise RewardError(
            f"the reward {term.name} gave a {type(answers).__name__}; allowed: a list or a tensor "
            "with one number for each sample, in their order; return [... for text in texts]"
        )
    values = answers.tolist() if isinstance(answers, Tensor) else list(answers)
    return values, [math.nan if value is None else float(value) for value in values]


def _culprit(term: Reward, samples: Samples) -> str:
    """The first sample on which the term fails by itself, in words."""
    for i in range(len(samples.texts)):
        try:
            _answered(term, samples.copied(i, i + 1))
        except Exception:
            return _named(samples, i)
    return f"the batch of {len(samples.texts)} samples, and on none of them alone"


def _named(samples: Samples, i: int) -> str:
    return f"sample {samples.first + i} ({shortened(samples.texts[i])!r})"


def shortened(text: str) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def in_line(error: Exception) -> str:
    """An error's kind and what it says, in one line."""
    return ": ".join([type(error).__name__, *filter(None, [" ".join(str(error).split())])])


def _line_of(error: Exception) -> str:
    """Where it was raised, if that was not in this file: there an answer is only read."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "" if frame.filename == __file__ else f" ({Path(frame.filename).name}:{frame.lineno})"
