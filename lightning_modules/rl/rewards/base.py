"""Rewards for policy gradients: base class, inputs, validation and weighted sum.

    reward of sample i = Σ_terms  weight · term_i         a term of weight 0 is only logged

A term returns a number for each of this rank's samples, or None for a sample that it cannot score.
Such a sample gets no reward and its advantage is 0. A term that raises, returns NaN or returns too
few numbers stops the run; the error names the term and the sample.
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

from ...imported_function import format_error

MAX_FLOAT32 = float(torch.finfo(torch.float32).max)  # advantages are multiplied in fp32
CANCELLATION_TOLERANCE = (
    1e-12  # relative to the sum of absolute values; a smaller sum is rounding error
)
MAX_CHARS_SHOWN = 40  # characters of a text in a message
RESERVED_NAMES = frozenset({  # other logged metrics and sample columns
    "reward", "policy_loss", "entropy", "kl", "kl_k3", "frac_unique_texts", "num_unique_words",
    "jaccard_distance_mean", "jaccard_distance_nearest", "frac_in_vocab", "num_tokens",
    "tokens_per_second", "frac_zero_advantage", "logprob_gap", "prompt", "text",
})  # fmt: skip


class RewardError(UsageError):
    """Error of an invalid or failed reward term; the message names the term and the sample."""


class CorpusStats:
    """Statistics of the corpus: its words and its speakers."""

    def __init__(self, text: str) -> None:
        """Store the text; the statistics are computed on first use."""
        self.text = text

    @cached_property
    def words(self) -> frozenset[str]:
        """Words of the corpus, split at whitespace, including punctuation."""
        return frozenset(self.text.split())

    @cached_property
    def speakers(self) -> frozenset[str]:
        """Speakers of a play: names on a line that ends in a colon, after an empty line."""
        return frozenset(re.findall(r"(?:\A|\n\n)([^\n:]+):\n", self.text))


@dataclass
class RewardInputs:
    """This rank's samples, and the texts of all ranks; tensors (b n) on the CPU."""

    prompts: list[str]
    texts: list[str]  # the text after each prompt
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor  # logprobs of the sampler
    ref_logprobs: Tensor | None = None  # logprobs under the reference, at temperature 1
    columns: dict[str, list[Any]] = field(default_factory=dict)  # columns of the data
    corpus_stats: CorpusStats | None = None
    all_texts: list[str] = field(default_factory=list)  # of all ranks, in the order of the batch
    rank_offset: int = 0  # index of this rank's first text in `all_texts`

    def copy_slice(self, first: int = 0, last: int | None = None) -> "RewardInputs":
        """Copy samples first .. last-1; a term may modify the copy without side effects."""
        rows = slice(first, last)
        fields = {
            name: None if (x := getattr(self, name)) is None else copy.deepcopy(x[rows])
            for name in ("prompts", "texts", "tokens", "mask", "logprobs", "ref_logprobs")
        }
        return RewardInputs(
            **fields,  # type: ignore[arg-type]
            columns={k: copy.deepcopy(values[rows]) for k, values in self.columns.items()},
            corpus_stats=self.corpus_stats,
            all_texts=list(self.all_texts),
            rank_offset=self.rank_offset + first,
        )


class Reward(ABC):
    """Base class of a reward term; a subclass implements `score`.

        class Length(Reward):
            def score(self, inputs): return [len(text) / 256 for text in inputs.texts]

    Args:
        weight: weight of the term in the sum; 0 logs it only.
        name: name of the logged metric; by default the class's name in snake case.
    """

    needs_corpus = False
    needs_reference = False

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        """Set weight and name."""
        self.weight = weight
        default_name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        self.name = name or default_name

    @abstractmethod
    def score(self, inputs: RewardInputs) -> Sequence[float | None] | Tensor:
        """Return a number for each sample, or None for a sample that cannot be scored."""


def check_rewards(reward_fns: Sequence[Reward], has_corpus: bool, has_reference: bool) -> None:
    """Raise RewardError before the first step for missing inputs, wrong weights and equal names.

    Args:
        reward_fns: all reward terms of the model.
        has_corpus: whether the data have a corpus.
        has_reference: whether a reference model computes logprobs.
    """
    if not reward_fns:
        raise RewardError(
            "Reinforce: rewards is empty",
            [
                "CharacterFraction",
                "Threshold",
                "RewardFunction",
                "other rewards of ravine.lightning_modules",
            ],
            "use rewards=[CharacterFraction('eE', weight=-1)]",
            flag=(
                "--model.rewards+=CharacterFraction --model.rewards.characters=eE, or --config "
                "reinforce/avoid_e_v1"
            ),
        )
    # a RewardError is a UsageError: problem, allowed values, and a fix as Python and as a flag
    names = [reward_fn.name for reward_fn in reward_fns]
    for reward_fn in reward_fns:
        if not math.isfinite(reward_fn.weight):
            raise RewardError(
                f"the reward {reward_fn.name} has weight={reward_fn.weight}",
                ["a finite number"],
                "use weight=1",
                flag="--model.rewards.weight=1",
            )
        # a reward is logged under its name, and its standard deviation as NAME_std
        is_taken = reward_fn.name in RESERVED_NAMES or reward_fn.name.endswith("_std")
        if is_taken or names.count(reward_fn.name) > 1:
            raise RewardError(
                f"the name of the reward {reward_fn.name!r} is already the name of another metric",
                hint="pass a different name to the reward",
                flag="--model.rewards.name=NAME",
            )
        if reward_fn.needs_corpus and not has_corpus:
            raise RewardError(
                f"the reward {reward_fn.name} needs a corpus, but the data contain none",
                ["data with a corpus"],
                "use PromptDataModule(corpus_path=FILE)",
                flag="--data.corpus_path=FILE",
            )
        if reward_fn.needs_reference and not has_reference:
            raise RewardError(
                f"the reward {reward_fn.name} needs the logprobs of a reference, but "
                "reference='none'",
                ["frozen_copy", "lora"],
                "use reference='frozen_copy'",
                flag="--model.reference=frozen_copy",
            )


def score_all(reward_fns: Sequence[Reward], inputs: RewardInputs) -> Tensor:
    """Values of all terms, float64 (terms, b), NaN where a term returned None."""
    return torch.stack([_score_checked(reward_fn, inputs) for reward_fn in reward_fns])


def weighted_sum(reward_fns: Sequence[Reward], values: Tensor) -> Tensor:
    """Weighted sum (b) of the values (terms, b); NaN where a term of nonzero weight has none.

    A sum whose terms cancel up to rounding (0.1 + 0.2 - 0.3) is 0.

    Raises:
        RewardError: a sum exceeds the largest float32.
    """
    # terms of weight 0 are only logged: a NaN of theirs does not count
    counted_indices = [i for i, reward_fn in enumerate(reward_fns) if reward_fn.weight]
    weights = values.new_tensor([reward_fns[i].weight for i in counted_indices])
    weighted_values = weights[:, None] * values[counted_indices]  # (terms, b)
    total = weighted_values.sum(0)
    is_too_large = total.abs() > MAX_FLOAT32
    if is_too_large.any():
        sample = int(is_too_large.nonzero()[0])  # the first one
        largest_term = int(weighted_values[:, sample].abs().argmax())
        reward_fn = reward_fns[counted_indices[largest_term]]
        raise RewardError(
            f"the reward of sample {sample} is {total[sample]:.4g}, mainly from {reward_fn.name} "
            f"with weight {reward_fn.weight:g}, which exceeds the largest float32",
            [f"up to {MAX_FLOAT32:.2g}"],
            "give this reward a smaller weight",
        )
    # a sum that is tiny against its terms is the rounding error of a sum of 0
    is_rounding = total.abs() <= CANCELLATION_TOLERANCE * weighted_values.abs().sum(0)
    return total.where(~is_rounding, 0.0 * total)  # a NaN stays NaN


def check_scored(reward_fns: Sequence[Reward], values: Tensor) -> None:
    """Raise RewardError if a term of nonzero weight scored no sample of the batch (terms, b)."""
    for reward_fn, row in zip(reward_fns, values, strict=True):
        if reward_fn.weight and row.isnan().all():
            raise RewardError(
                f"the reward {reward_fn.name} is None for all {len(row)} samples of the batch, so "
                "that there is no advantage to learn from",
                ["a number for one sample or more"],
                "return numbers for some samples, or use weight=0",
                flag="--model.rewards.weight=0",
            )


def _score_checked(reward_fn: Reward, inputs: RewardInputs) -> Tensor:
    """Return the values of one term, float64 (b), NaN for None.

    A reward may be a user's function, so it can raise any error and return anything.

    Raises:
        RewardError: the term raises or returns invalid values; it names the term and the sample.
    """
    try:
        # values as returned, and as numbers
        values, numbers = _call_reward(reward_fn, inputs)
    except RewardError:  # it names the term already
        raise
    except Exception as error:
        # the term is called again for each sample alone, to name the first one that fails
        raise RewardError(
            f"the reward {reward_fn.name} failed on {_describe_first_failure(reward_fn, inputs)}: "
            f"{format_error(error)}{_format_location(error)}",
            hint="correct the function, or return None for such a sample",
        ) from error
    if len(numbers) != len(inputs.texts):
        raise RewardError(
            f"the reward {reward_fn.name} returned {len(numbers)} numbers for {len(inputs.texts)} "
            "samples",
            ["one number, or None, for each sample"],
            "return one number for each sample, and None for a sample without a score",
        )
    for i, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if value is not None and not math.isfinite(number):
            raise RewardError(
                f"the reward {reward_fn.name} is {number} for {_describe_sample(inputs, i)}",
                ["a finite number", "None"],
                "return a number, or None for a sample without a score",
            )
        if abs(number) > MAX_FLOAT32:
            raise RewardError(
                f"the reward {reward_fn.name} is {number:.4g} for {_describe_sample(inputs, i)}, "
                "which exceeds the largest float32",
                [f"up to {MAX_FLOAT32:.2g}"],
                "scale the reward, or return None",
            )
    return torch.tensor(numbers, dtype=torch.float64)


def _call_reward(reward_fn: Reward, inputs: RewardInputs) -> tuple[list[Any], list[float]]:
    """Return a term's values as returned, and as numbers with NaN for None."""
    returned = reward_fn.score(inputs.copy_slice())
    if isinstance(returned, str | bytes | bytearray | Mapping | Set):
        raise RewardError(
            f"the reward {reward_fn.name} returned a {type(returned).__name__}",
            ["a list or a tensor with one number for each sample, in their order"],
            "return [... for text in texts]",
        )
    values = returned.tolist() if isinstance(returned, Tensor) else list(returned)
    return values, [math.nan if value is None else float(value) for value in values]


def _describe_first_failure(reward_fn: Reward, inputs: RewardInputs) -> str:
    """Describe the first sample on which the term fails when called with this sample only."""
    for i in range(len(inputs.texts)):
        try:
            _call_reward(reward_fn, inputs.copy_slice(i, i + 1))
        except Exception:
            return _describe_sample(inputs, i)
    return f"the batch of {len(inputs.texts)} samples, and on none of them alone"


def _describe_sample(inputs: RewardInputs, i: int) -> str:
    return f"sample {inputs.rank_offset + i} ({shorten(inputs.texts[i])!r})"


def shorten(text: str) -> str:
    """Shorten a text for a message."""
    return text if len(text) <= MAX_CHARS_SHOWN else text[: MAX_CHARS_SHOWN - 1] + "…"


def _format_location(error: Exception) -> str:
    """File and line where an error was raised, unless in this file, which only reads the values."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "" if frame.filename == __file__ else f" ({Path(frame.filename).name}:{frame.lineno})"
