"""Tokenizers turn text into token numbers and back; their state is plain, to travel in checkpoints.

Every kind has `vocabulary` (how many tokens), `token_bytes` (UTF-8 bytes of each, for bits per byte
= nats / ln 2 * tokens / bytes), `encode`, `decode`, `state`, and a row in KINDS.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def code_points(text: str) -> np.ndarray:
    """The Unicode numbers of the characters, uint32 of shape (characters,)."""
    # a shell hands undecodable bytes over as lone surrogates: let them through to be named
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One token a character; the vocabulary is the sorted set of those seen.

    tokenizer = CharTokenizer("hello")
    tokenizer.decode(tokenizer.encode("hole"))  # "hole"
    """

    kind = "characters"
    end: int | None = None  # the token that ends a text, where there is one

    def __init__(self, characters: Iterable[str]) -> None:
        """Take the vocabulary from a text or any other collection of characters."""
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("a tokenizer needs at least one character: give it a text")
        self.codes = code_points(self.characters)  # ascending, since Python sorts by code point
        self.token_bytes = torch.tensor([len(_utf8(c)) for c in self.characters])

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Token numbers, int64 of shape (characters,)."""
        return torch.from_numpy(self.numbers(text))

    def numbers(self, text: str) -> np.ndarray:
        """The same as an array."""
        points = code_points(text)
        places = np.searchsorted(self.codes, points).clip(max=self.vocabulary - 1)
        unknown = np.flatnonzero(self.codes[places] != points)
        if len(unknown):
            raise ValueError(self._unknown(text, int(unknown[0])))
        return places

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """The text of token numbers."""
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        return "".join(self.characters[number] for number in numbers)

    def state(self) -> dict[str, str]:
        """Everything `from_state` needs."""
        return {"kind": self.kind, "characters": self.characters}

    def _unknown(self, text: str, place: int) -> str:
        character = text[place]
        swapped = character.swapcase()
        nearest = f"; {swapped!r} is" if swapped in self.characters else ""
        some = self.characters[:100] + ("..." if self.vocabulary > 100 else "")
        return (
            f"character {character!r} (U+{ord(character):04X}) at position {place} of the text is "
            f"not among the {self.vocabulary} characters known from training, {some!r}{nearest}; "
            "leave it out, or train on a text that has it"
        )


def _utf8(character: str) -> bytes:
    return character.encode("utf-8", "surrogatepass")


KINDS = {CharTokenizer.kind: CharTokenizer}


def from_state(state: dict[str, Any]) -> CharTokenizer:
    """Rebuild a tokenizer from what its `state()` gave."""
    if state.get("kind") not in KINDS:
        raise ValueError(
            f"unknown kind of tokenizer {state.get('kind')!r}; known are {', '.join(KINDS)}; "
            "the checkpoint was written by another version: install that one"
        )
    return KINDS[state["kind"]](state["characters"])
