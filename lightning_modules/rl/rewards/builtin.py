"""The terms of lecture 7, from the letter e to a batch in which no text is another's copy.

    v1  -CharacterFraction(eE)                    the letter goes, and the language with it
    v2  v1 + VocabularyFraction + UniqueWords     words, but no sentences
    v3  -4 e + 0.2 ReferenceLogProbability + CharacterDiversity
    v4  -3 e + 0.2 ReferenceLogProbability + WordUniqueness
    v5  v4 + 0.3 LineLength + 0.5 SpeakerDiversity
    v6  v5 + 1.5 BatchDistance                    the first that lives

Each is computed from the text that was written, without its prompt, and lies in [0, 1] (but the
reference's log-probability). A text without words, or shorter than n, scores 0.
"""

import math
import re
from collections.abc import Sequence

from torch import Tensor

from ..text_similarity import distances, ngrams, to_nearest
from .base import Reward, RewardError, Samples, evaluate

# Each name is also one of ravine.lightning_modules.
__all__ = [
    "BatchDistance",
    "Binary",
    "CharacterDiversity",
    "CharacterFraction",
    "LineLength",
    "ReferenceLogProbability",
    "SpeakerDiversity",
    "UniqueWords",
    "VocabularyFraction",
    "WordUniqueness",
]


class CharacterFraction(Reward):
    """Share of a text's characters that are among `characters`."""

    def __init__(self, characters: str, weight: float = 1.0, name: str | None = None) -> None:
        """Choose the characters; without one there is nothing to count."""
        super().__init__(weight, name)
        if not characters:
            raise RewardError(
                f"the reward {self.name} counts no character; type --model.rewards.characters=eE"
            )
        self.characters = characters

    def score(self, samples: Samples) -> list[float]:
        """Count."""
        return [
            sum(text.count(c) for c in self.characters) / max(len(text), 1)
            for text in samples.texts
        ]


class VocabularyFraction(Reward):
    """Share of a text's words, punctuation included, that occur in the corpus."""

    needs_corpus = True

    def score(self, samples: Samples) -> list[float]:
        """Look each word up."""
        assert samples.corpus is not None
        known = samples.corpus.words
        if not known:
            raise _unknown(self, "words")
        return [vocabulary_share(text, known) for text in samples.texts]


class UniqueWords(Reward):
    """Share of a text's words that are different."""

    def score(self, samples: Samples) -> list[float]:
        """Count."""
        return [_distinct(text.split()) for text in samples.texts]


class ReferenceLogProbability(Reward):
    """Mean over tokens of the reference's log-probability at temperature 1, in nats."""

    needs_reference = True

    def score(self, samples: Samples) -> Tensor:
        """Average what the reference said."""
        assert samples.reference is not None
        said = samples.reference.double().where(samples.mask, 0.0)
        return said.sum(1) / samples.mask.sum(1)


class CharacterDiversity(Reward):
    """Share of a text's runs of n characters that are different."""

    def __init__(self, n: int = 2, weight: float = 1.0, name: str | None = None) -> None:
        """Choose n."""
        super().__init__(weight, name)
        _at_least_1(self, n=n)
        self.n = n

    def score(self, samples: Samples) -> list[float]:
        """Count."""
        return [_distinct(ngrams(text, self.n)) for text in samples.texts]


class WordUniqueness(Reward):
    """Share of a text's runs of n words that are different."""

    def __init__(self, n: int = 3, weight: float = 1.0, name: str | None = None) -> None:
        """Choose n."""
        super().__init__(weight, name)
        _at_least_1(self, n=n)
        self.n = n

    def score(self, samples: Samples) -> list[float]:
        """Count."""
        return [_distinct(ngrams(text.split(), self.n)) for text in samples.texts]


class LineLength(Reward):
    """Mean length of a text's lines that are not empty, divided by `scale`, at most 1."""

    def __init__(self, scale: float = 40, weight: float = 1.0, name: str | None = None) -> None:
        """Choose the length that is long enough."""
        super().__init__(weight, name)
        _at_least_1(self, scale=scale)
        self.scale = scale

    def score(self, samples: Samples) -> list[float]:
        """Measure."""
        lines = [[line for line in text.split("\n") if line.strip()] for text in samples.texts]
        means = [sum(map(len, each)) / max(len(each), 1) for each in lines]
        return [min(mean / self.scale, 1.0) for mean in means]


class SpeakerDiversity(Reward):
    """Different speakers of the corpus who say something, divided by `enough`, at most 1.

    Args:
        enough: speakers that earn the whole reward.
        least: characters of a speech that counts.
        weight: what it is multiplied by in the sum.
        name: under which it is logged.
    """

    needs_corpus = True

    def __init__(
        self, enough: int = 3, least: int = 20, weight: float = 1.0, name: str | None = None
    ) -> None:
        """Choose how many and how much."""
        super().__init__(weight, name)
        _at_least_1(self, enough=enough)
        self.enough, self.least = enough, least

    def score(self, samples: Samples) -> list[float]:
        """Cut each text at its speakers."""
        assert samples.corpus is not None
        known = samples.corpus.speakers
        if not known:
            raise _unknown(self, "speakers: lines that end in a colon, after an empty one")
        counts = []
        for text in samples.texts:
            _, *parts = re.split(r"(?:\A|\n)([^\n:]+):\n", text)
            speeches = zip(parts[::2], parts[1::2], strict=True)
            valid = {who for who, said in speeches if who in known and len(said) >= self.least}
            counts.append(min(len(valid) / self.enough, 1.0))
        return counts


class BatchDistance(Reward):
    """Jaccard distance of a text's word n-grams to those of its nearest neighbour in the batch.

    The batch is that of all ranks.
    """

    def __init__(self, n: int = 4, weight: float = 1.0, name: str | None = None) -> None:
        """Choose n."""
        super().__init__(weight, name)
        _at_least_1(self, n=n)
        self.n = n

    def score(self, samples: Samples) -> list[float]:
        """Compare all, answer for ours."""
        if len(samples.everyone) < 2:
            raise RewardError(
                f"the reward {self.name} compares the texts of a batch, and there is one; "
                "type --data.batch_size=64"
            )
        nearest = to_nearest(distances(samples.everyone, self.n))
        return nearest[samples.first : samples.first + len(samples.texts)].tolist()


class Binary(Reward):
    """1 where another term lies between `least` and `most`, else 0.

    Binary(CharacterFraction("eE"), most=0)               # not a single e

    Args:
        term: what is judged; its own weight does not matter.
        least: bound from below.
        most: bound from above.
        weight: what it is multiplied by in the sum.
        name: under which it is logged.
    """

    def __init__(
        self,
        term: Reward,
        least: float | None = None,
        most: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        """Refuse a judgement without a bound."""
        super().__init__(weight, name)
        if least is None and most is None:
            raise RewardError("Binary has no bound; give `least`, or `most`, or both")
        if least is not None and most is not None and least > most:
            raise RewardError(f"Binary: nothing lies between least={least} and most={most}")
        self.term, self.least, self.most = term, least, most
        self.needs_corpus, self.needs_reference = term.needs_corpus, term.needs_reference

    def score(self, samples: Samples) -> list[float | None]:
        """Judge."""
        low = -float("inf") if self.least is None else self.least
        high = float("inf") if self.most is None else self.most
        found = evaluate([self.term], samples)[0]  # names a NaN, and gives one only for None
        return [None if math.isnan(x) else float(low <= x <= high) for x in found.tolist()]


def vocabulary_share(text: str, known: frozenset[str]) -> float:
    """Share of a text's words that are known; 0 of a text without words."""
    words = text.split()
    return sum(word in known for word in words) / max(len(words), 1)


def _at_least_1(term: Reward, **sizes: float) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise RewardError(
                f"{name} of the reward {term.name} is {size}; allowed: 1 or more; "
                f"type --model.rewards.{name}=3"
            )


def _unknown(term: Reward, what: str) -> RewardError:
    return RewardError(
        f"the reward {term.name} is 0 for every text, since the corpus has no {what}; "
        "type --data.corpus=FILE of another one, or leave the term out"
    )


def _distinct(items: Sequence) -> float:
    return len(set(items)) / max(len(items), 1)
