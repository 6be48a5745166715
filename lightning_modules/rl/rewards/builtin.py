"""Built-in reward terms of lecture 7, from a letter penalty to a batch diversity term.

    v1  -CharacterFraction(eE)                    removes the letter, and the language with it
    v2  v1 + VocabularyFraction + UniqueWords     words, but no sentences
    v3  -4 e + 0.2 ReferenceLogprob + CharacterDiversity
    v4  -3 e + 0.2 ReferenceLogprob + WordUniqueness
    v5  v4 + 0.3 LineLength + 0.5 SpeakerDiversity
    v6  v5 + 1.5 BatchDistance                    the first setting without collapse

Each term is computed from the generated text without its prompt. All values but
ReferenceLogprob are in [0, 1]. A text without words, or shorter than n, scores 0.
"""

import math
import re
from collections.abc import Sequence

from torch import Tensor

from ..text_similarity import nearest_distance, pairwise_jaccard_distance, sequence_ngrams
from .base import Reward, RewardError, RewardInputs, score_all

# Each name is also one of ravine.lightning_modules.
__all__ = [
    "BatchDistance",
    "CharacterDiversity",
    "CharacterFraction",
    "LineLength",
    "ReferenceLogprob",
    "SpeakerDiversity",
    "Threshold",
    "UniqueWords",
    "VocabularyFraction",
    "WordUniqueness",
]


class CharacterFraction(Reward):
    """Fraction of a text's characters that are among `characters`."""

    def __init__(self, characters: str, weight: float = 1.0, name: str | None = None) -> None:
        """Set the characters; raise RewardError if there are none."""
        super().__init__(weight, name)
        if not characters:
            raise RewardError(
                f"the reward {self.name} has characters='', so that it counts nothing",
                ["one character or more"],
                "use characters='eE'",
                flag="--model.rewards.characters=eE",
            )
        self.characters = characters

    def score(self, inputs: RewardInputs) -> list[float]:
        """Return the fraction for each text."""
        return [
            sum(text.count(c) for c in self.characters) / max(len(text), 1) for text in inputs.texts
        ]


class VocabularyFraction(Reward):
    """Fraction of a text's words, including punctuation, that occur in the corpus."""

    needs_corpus = True

    def score(self, inputs: RewardInputs) -> list[float]:
        """Return the fraction for each text."""
        assert inputs.corpus_stats is not None
        vocabulary = inputs.corpus_stats.words
        if not vocabulary:
            raise _missing_in_corpus_error(self, "words")
        return [vocab_fraction(text, vocabulary) for text in inputs.texts]


class UniqueWords(Reward):
    """Fraction of distinct words among a text's words."""

    def score(self, inputs: RewardInputs) -> list[float]:
        """Return the fraction for each text."""
        return [_unique_fraction(text.split()) for text in inputs.texts]


class ReferenceLogprob(Reward):
    """Mean over tokens of the reference's logprob at temperature 1, in nats."""

    needs_reference = True

    def score(self, inputs: RewardInputs) -> Tensor:
        """Return the mean (b) of the reference's logprobs over each sample's tokens."""
        assert inputs.ref_logprobs is not None
        ref_logprobs = inputs.ref_logprobs.double().where(inputs.mask, 0.0)
        return ref_logprobs.sum(1) / inputs.mask.sum(1)


class CharacterDiversity(Reward):
    """Fraction of distinct character n-grams in a text."""

    def __init__(self, n: int = 2, weight: float = 1.0, name: str | None = None) -> None:
        """Set n."""
        super().__init__(weight, name)
        _check_at_least_1(self, n=n)
        self.n = n

    def score(self, inputs: RewardInputs) -> list[float]:
        """Return the fraction for each text."""
        return [_unique_fraction(sequence_ngrams(text, self.n)) for text in inputs.texts]


class WordUniqueness(Reward):
    """Fraction of distinct word n-grams in a text."""

    def __init__(self, n: int = 3, weight: float = 1.0, name: str | None = None) -> None:
        """Set n."""
        super().__init__(weight, name)
        _check_at_least_1(self, n=n)
        self.n = n

    def score(self, inputs: RewardInputs) -> list[float]:
        """Return the fraction for each text."""
        return [_unique_fraction(sequence_ngrams(text.split(), self.n)) for text in inputs.texts]


class LineLength(Reward):
    """Mean length of a text's non-empty lines, divided by `target_length`, at most 1."""

    def __init__(
        self, target_length: float = 40, weight: float = 1.0, name: str | None = None
    ) -> None:
        """Set `target_length`, the line length of the maximum reward."""
        super().__init__(weight, name)
        _check_at_least_1(self, target_length=target_length)
        self.target_length = target_length

    def score(self, inputs: RewardInputs) -> list[float]:
        """Return the clipped mean line length of each text."""
        lines = [[line for line in text.split("\n") if line.strip()] for text in inputs.texts]
        means = [sum(map(len, text_lines)) / max(len(text_lines), 1) for text_lines in lines]
        return [min(mean / self.target_length, 1.0) for mean in means]


class SpeakerDiversity(Reward):
    """Number of different corpus speakers with a speech, divided by `target_count`, at most
    1.

    Args:
        target_count: number of speakers for the maximum reward.
        min_chars: minimum length of a counted speech, in characters.
        weight: weight of the term in the sum.
        name: name of the logged metric.
    """

    needs_corpus = True

    def __init__(
        self,
        target_count: int = 3,
        min_chars: int = 20,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        """Set the number of speakers and the minimum length."""
        super().__init__(weight, name)
        _check_at_least_1(self, target_count=target_count)
        self.target_count, self.min_chars = target_count, min_chars

    def score(self, inputs: RewardInputs) -> list[float]:
        """Split each text at its speakers and count the speakers with a long enough speech.

        The value is the number of different speakers of the corpus, relative to the target, up to
        1. A text is a play: a line with a name and a colon, then a speech.
        """
        assert inputs.corpus_stats is not None  # check_rewards raises before training
        speakers = inputs.corpus_stats.speakers
        if not speakers:
            raise _missing_in_corpus_error(
                self, "speakers: lines that end in a colon, after an empty one"
            )
        scores = []
        for text in inputs.texts:
            # the text before the first speaker, then speaker and speech in turn
            _, *segments = re.split(r"(?:\A|\n)([^\n:]+):\n", text)
            speeches = zip(segments[::2], segments[1::2], strict=True)
            counted_speakers = {
                speaker
                for speaker, speech in speeches
                if speaker in speakers and len(speech) >= self.min_chars
            }
            scores.append(min(len(counted_speakers) / self.target_count, 1.0))
        return scores


class BatchDistance(Reward):
    """Jaccard distance of a text's word n-grams to those of its nearest neighbor in the batch.

    The batch contains the texts of all ranks.
    """

    def __init__(self, n: int = 4, weight: float = 1.0, name: str | None = None) -> None:
        """Set n."""
        super().__init__(weight, name)
        _check_at_least_1(self, n=n)
        self.n = n

    def score(self, inputs: RewardInputs) -> list[float]:
        """Compare the texts of all ranks; return the distances of this rank's texts."""
        if len(inputs.all_texts) < 2:
            raise RewardError(
                f"the reward {self.name} compares the texts of a batch, which has only one",
                ["2 texts or more in a batch"],
                "use PromptDataModule(batch_size=64)",
                flag="--data.batch_size=64",
            )
        nearest = nearest_distance(pairwise_jaccard_distance(inputs.all_texts, self.n))
        return nearest[inputs.rank_offset : inputs.rank_offset + len(inputs.texts)].tolist()


class Threshold(Reward):
    """1 if another term's value is between `min_value` and `max_value`, else 0.

        Threshold(CharacterFraction("eE"), max_value=0)       # 1 for a text without e

    Args:
        reward: the other term; its own weight is ignored.
        min_value: lower bound.
        max_value: upper bound.
        weight: weight of the term in the sum.
        name: name of the logged metric.
    """

    def __init__(
        self,
        reward: Reward,
        min_value: float | None = None,  # of the other term; the value of this term is 0 or 1
        max_value: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        """Set the other term and its bounds; raise RewardError for no bound, or an empty range."""
        super().__init__(weight, name)
        if min_value is None and max_value is None:
            raise RewardError(
                "Threshold: min_value and max_value are both None",
                ["min_value", "max_value", "both"],
                "pass min_value, max_value or both",
                flag="--model.rewards.max_value=0",
            )
        if min_value is not None and max_value is not None and min_value > max_value:
            raise RewardError(
                f"Threshold: min_value={min_value} is larger than max_value={max_value}",
                ["min_value up to max_value"],
                "swap them",
                flag=f"--model.rewards.min_value={max_value} --model.rewards.max_value={min_value}",
            )
        self.reward, self.min_value, self.max_value = reward, min_value, max_value
        # it needs what the other term needs; these flags are checked before the first step
        self.needs_corpus, self.needs_reference = reward.needs_corpus, reward.needs_reference

    def score(self, inputs: RewardInputs) -> list[float | None]:
        """Return 1 or 0 for each text, or None where the other term returned None."""
        low = -float("inf") if self.min_value is None else self.min_value
        high = float("inf") if self.max_value is None else self.max_value
        values = score_all([self.reward], inputs)[0]  # raises for a NaN, and uses NaN only for None
        return [None if math.isnan(x) else float(low <= x <= high) for x in values.tolist()]


def vocab_fraction(text: str, vocabulary: frozenset[str]) -> float:
    """Fraction of a text's words in the vocabulary; 0 for a text without words."""
    words = text.split()
    return sum(word in vocabulary for word in words) / max(len(words), 1)


def _check_at_least_1(reward: Reward, **sizes: float) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise RewardError(
                f"the reward {reward.name} has {name}={size}, which is too small",
                ["1 or more"],
                f"use {name}=3",
                flag=f"--model.rewards.{name}=3",
            )


def _missing_in_corpus_error(reward: Reward, missing: str) -> RewardError:
    return RewardError(
        f"the reward {reward.name} is 0 for every text, because the corpus has no {missing}",
        [f"a corpus with {missing}"],
        "use PromptDataModule(corpus_path=FILE) with another file, or remove the reward",
        flag="--data.corpus_path=FILE",
    )


def _unique_fraction(items: Sequence) -> float:
    return len(set(items)) / max(len(items), 1)
