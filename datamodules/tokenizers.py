"""Tokenizers turn text into token numbers and back; their state is plain, to travel in checkpoints.

    kind         vocabulary          a token is
    characters   those of the text   one character
    bytes        256                 one byte of UTF-8: any text in any language
    gpt2         50,257              a piece of a word: about four characters of English

Nats per token and perplexity depend on the kind; bits per byte = nats / ln 2 * tokens / bytes do
not, and are what different kinds are compared by.
"""

import base64
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sources import SourceMissing


class Tokenizer(ABC):
    """One interface for all kinds, which differ in `numbers` and `text`."""

    kind: str
    end: int | None = None  # the token that ends a text, where there is one
    token_bytes: Tensor  # UTF-8 bytes of each token, int64 of shape (vocabulary,)

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.token_bytes)

    def encode(self, text: str) -> Tensor:
        """Token numbers, int64 of shape (tokens,)."""
        return torch.from_numpy(self.numbers(text).astype(np.int64))

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """The text of token numbers."""
        return self.text(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    @abstractmethod
    def numbers(self, text: str) -> np.ndarray:
        """Token numbers as an array."""

    @abstractmethod
    def text(self, numbers: Sequence[int]) -> str:
        """The text of token numbers; bytes that make no character become U+FFFD."""

    @abstractmethod
    def state(self) -> dict[str, str]:
        """Everything `from_state` needs."""


def code_points(text: str) -> np.ndarray:
    """The Unicode numbers of the characters, uint32 of shape (characters,)."""
    # a shell hands undecodable bytes over as lone surrogates: let them through to be named
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer(Tokenizer):
    """One token a character; the vocabulary is the sorted set of those seen.

    tokenizer = CharTokenizer("hello")
    tokenizer.decode(tokenizer.encode("hole"))  # "hole"
    """

    kind = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        """Take the vocabulary from a text or any other collection of characters."""
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("a tokenizer needs at least one character: give it a text")
        self.codes = code_points(self.characters)  # ascending, since Python sorts by code point
        sizes = [len(c.encode("utf-8", "surrogatepass")) for c in self.characters]
        self.token_bytes = torch.tensor(sizes)

    def numbers(self, text: str) -> np.ndarray:
        """Places among the characters known."""
        points = code_points(text)
        places = np.searchsorted(self.codes, points).clip(max=self.vocabulary - 1)
        unknown = np.flatnonzero(self.codes[places] != points)
        if len(unknown):
            raise ValueError(self._unknown(text, int(unknown[0])))
        return places

    def text(self, numbers: Sequence[int]) -> str:
        """The characters in a row."""
        return "".join(self.characters[number] for number in numbers)

    def state(self) -> dict[str, str]:
        """The characters."""
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


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8; the byte 0, which no text has, ends one."""

    kind = "bytes"
    end = 0

    def __init__(self) -> None:
        """Nothing is learned from a text."""
        self.token_bytes = torch.ones(256, dtype=torch.int64)

    def numbers(self, text: str) -> np.ndarray:
        """The bytes; what a shell could not decode becomes again what it was."""
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def text(self, numbers: Sequence[int]) -> str:
        """The characters that the bytes make."""
        return bytes(numbers).decode("utf-8", "replace")

    def state(self) -> dict[str, str]:
        """The kind says it all."""
        return {"kind": self.kind}


class BPETokenizer(Tokenizer):
    """GPT-2's byte pair encoding: a text is cut into words, the words into the pieces known.

    Among the pieces are all 256 bytes, so there is no unknown text. A piece's place is its rank:
    neighbours that make the piece of lowest rank are merged first.
    """

    kind = "gpt2"
    words = (  # contractions, words and numbers with the space before them, signs, spaces
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """Take the pieces in the order of their ranks; one more token ends a text."""
        import tiktoken

        self.pieces, self.end = list(pieces), len(pieces)
        self.token_bytes = torch.tensor([*map(len, pieces), 0])
        self.encoding = tiktoken.Encoding(
            "pieces",
            pat_str=self.words,
            mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
            special_tokens={"<|endoftext|>": self.end},
        )

    def numbers(self, text: str) -> np.ndarray:
        """Ranks of the pieces; the word <|endoftext|> in a text is a word like others."""
        text = text.encode("utf-8", "replace").decode()
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def text(self, numbers: Sequence[int]) -> str:
        """The characters that the pieces make."""
        return self.encoding.decode(list(numbers))

    def state(self) -> dict[str, str]:
        """All pieces: a checkpoint needs no file beside it to be used."""
        return {
            "kind": self.kind,
            "pieces": " ".join(base64.b64encode(p).decode() for p in self.pieces),
        }


def gpt2() -> BPETokenizer:
    """GPT-2's pieces through tiktoken, which keeps its files in TIKTOKEN_CACHE_DIR.

    Without the variable, in the folder tiktoken of DATA_ROOT if there is one.
    """
    import tiktoken

    beside = Path(os.environ.get("DATA_ROOT", "")).expanduser() / "tiktoken"
    if os.environ.get("DATA_ROOT") and beside.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(beside))
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, no such folder; a wrong checksum
        looked = os.environ.get("TIKTOKEN_CACHE_DIR", "TIKTOKEN_CACHE_DIR (not set)")
        raise SourceMissing(
            f"the pieces of GPT-2's tokenizer were not found; looked at: {looked}; {beside}; the "
            f"network ({type(error).__name__}); ways out: run once with a network; or set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept them; or type "
            "--data.tokenizer=bytes"
        ) from error
    return BPETokenizer([encoding.decode_single_token_bytes(n) for n in range(encoding.eot_token)])


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from what its `state()` gave."""
    match state.get("kind"):
        case CharTokenizer.kind:
            return CharTokenizer(state["characters"])
        case ByteTokenizer.kind:
            return ByteTokenizer()
        case BPETokenizer.kind:
            return BPETokenizer([base64.b64decode(piece) for piece in state["pieces"].split(" ")])
    raise ValueError(
        f"unknown kind of tokenizer {state.get('kind')!r}; known are characters, bytes, gpt2; "
        "the checkpoint was written by another version: install that one"
    )
