"""Tokenizers: text to token ids and back (`encode`, `decode`), with a plain state for checkpoints.

    tokenizer_type  vocabulary          a token is
    characters      those of the text   one character
    bytes           256                 one byte of UTF-8: any text in any language
    gpt2            50,257              a part of a word (BPE): about four characters of English
    file            of the file         as a tokenizer.json of the tokenizers library defines
    numbers         given               an id: for files of tokens whose text is not known

Nats per token and perplexity depend on the tokenizer. Bits per byte = nats / ln 2 * tokens / bytes
do not, so they are used to compare models with different tokenizers.

Special tokens, like <|endoftext|>, are words that are encoded as one token. `special_tokens` sets
how they are read in a text: `as_text`, as ordinary text; `allow`, as their token; or `error`, as
an error.
"""

import base64
import functools
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ravine.errors import UsageError

from .downloads import DatasetNotFound

SpecialTokenMode = Literal["as_text", "allow", "error"]

# Unicode's White_Space. Python's \s has four more characters, which GPT-2's pattern treats as signs
WHITESPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Signs of the Unicode categories P and S, without the apostrophe, which begins a contraction
PUNCTUATION = (
    "!-&(-/:-@\\[-^`{-~\xa1\xa7\xab\xb6\xb7\xbb\xbf\u0589\u05be\u060c\u061b\u061f\u06d4\u0964\u0965"
    "\u104a\u104b\u1362-\u1368\u17d4\u17d5\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011"
    "\u3014-\u301f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
# A word ends here in every known split pattern: GPT-2's and those of later vocabularies
WORD_END = re.compile(rf"[^\W_](?=[{WHITESPACE}{PUNCTUATION}])")
# GPT-2's pattern has one more boundary: between any sign and white space
GPT2_WORD_END = re.compile(rf"[^\W_](?=[{PUNCTUATION}])|[^{WHITESPACE}](?=[{WHITESPACE}])")
LONG_WHITESPACE = re.compile(rf"(?<![{WHITESPACE}])[{WHITESPACE}]{{100000,}}")
SURROGATES = re.compile("[\ud800-\udfff]")
UNDECODABLE_SURROGATES = re.compile(
    "[\ud800-\udc7f\udd00-\udfff]"
)  # lone surrogates that surrogateescape does not produce
ENDOFTEXT = "<|endoftext|>"
SINGLE_BYTES = {bytes([n]) for n in range(256)}


class Tokenizer(ABC):
    """Interface of tokenizers; a subclass defines `encode_array`, `decode_list`, `state_dict`."""

    tokenizer_type: str
    eos_id: int | None = None  # the end-of-text token, if there is one
    token_bytes: Tensor  # UTF-8 bytes per token, int64 of shape (vocab_size,)
    has_token_bytes: bool = True  # whether `token_bytes` are known
    special_ids: dict[str, int]  # ids of the special tokens
    special_tokens: SpecialTokenMode = "as_text"
    lookahead = 1  # number of characters needed after a boundary to confirm it
    _unsplittable: Sequence[str] = ()
    _pattern: re.Pattern[str] | None = None

    @property
    def vocab_size(self) -> int:
        """Return the number of distinct tokens."""
        return len(self.token_bytes)

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, int64 of shape (tokens,)."""
        return torch.from_numpy(self.encode_array(text).astype(np.int64))

    def decode(self, tokens: Sequence[int] | Tensor) -> str:
        """Return the text of token ids."""
        return self.decode_list(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def next_boundary(self, text: str, start: int) -> int | None:
        """Return the first position at or after `start` > 0 where a cut changes no token.

        Returns None if there is no such position with `lookahead` characters after it.
        """
        return start if start + self.lookahead <= len(text) else None

    def is_equivalent(self, other: "Tokenizer") -> bool:
        """Return whether two tokenizers map the same ids to the same texts."""
        own_state, other_state = dict(self.state_dict()), dict(other.state_dict())
        for state in (own_state, other_state):
            state.pop("special_tokens", None)
        return own_state == other_state

    def fingerprint(self) -> str:
        """Return the SHA-256 of the vocabulary, in hex; equivalent tokenizers have the same."""
        state = {k: v for k, v in self.state_dict().items() if k != "special_tokens"}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @property
    def cache_key(self) -> str:
        """Return a key that identifies the tokenizer in names of token files."""
        return (
            self.tokenizer_type
            if self.special_tokens != "allow"
            else f"{self.tokenizer_type}-{self.special_tokens}"
        )

    def set_special_tokens(self, special_ids: Mapping[str, int], special_tokens: str) -> None:
        """Set the special tokens and how they are read in a text.

        Args:
            special_ids: the ids of the special tokens by their text.
            special_tokens: `as_text` reads them as ordinary text, `allow` as one token each, and
                `error` raises an error.

        Raises:
            UsageError: the mode is not known, or has no effect without special tokens.
        """
        if special_tokens not in get_args(SpecialTokenMode):
            raise UsageError(
                f"special_tokens={special_tokens!r} is not known",
                get_args(SpecialTokenMode),
                "use special_tokens='as_text'",
                flag="--data.special_tokens=as_text",
            )
        self.special_ids, self.special_tokens = dict(special_ids), special_tokens  # type: ignore[assignment]
        # longest first: the longest match at a position is used
        special_words = sorted(self.special_ids, key=len, reverse=True)
        self._pattern = (
            re.compile("|".join(map(re.escape, special_words))) if special_words else None
        )
        if special_tokens != "as_text" and not special_words:
            raise UsageError(
                f"special_tokens={special_tokens!r} has no effect: the tokenizer "
                f"{self.tokenizer_type!r} has no special tokens",
                ["as_text"],
                "remove special_tokens, or use tokenizer='gpt2'",
                flag="--data.tokenizer=gpt2",
            )
        # A cut of a text into chunks must not divide a special token, unless it is read as text.
        self._set_unsplittable(special_words if special_tokens != "as_text" else [])

    def _set_unsplittable(self, units: Iterable[str]) -> None:
        """Set the words that no boundary may cut."""
        self._unsplittable = list(units)
        self.lookahead = max([1, *map(len, self._unsplittable)])

    def _split_at_special_tokens(self, text: str) -> Iterator[str]:
        """Split a text at its special tokens: every second string is a special token.

        In the mode `as_text` the text is not split.

        Raises:
            UsageError: the mode is `error`, and the text holds a special token.
        """
        if self.special_tokens == "as_text" or self._pattern is None:
            yield text
            return
        start = 0
        # the pattern matches any special token
        for match in self._pattern.finditer(text):
            if self.special_tokens == "error":
                around = text[max(0, match.start() - 20) : match.end() + 20]
                raise UsageError(
                    f"the text holds the special token {match[0]!r}, here: {around!r}",
                    [
                        "allow, which reads it as one token",
                        "as_text, which reads it as ordinary text",
                    ],
                    "use special_tokens='allow'",
                    flag="--data.special_tokens=allow, or --data.special_tokens=as_text",
                )
            yield text[start : match.start()]
            yield match[0]
            start = match.end()
        yield text[start:]

    def _is_inside_unsplittable(self, text: str, position: int) -> bool:
        """Return whether a cut at `position` would split an unsplittable word."""
        if not self._unsplittable:
            return False
        before = text[max(0, position - self.lookahead) : position]
        after = text[position : position + self.lookahead]
        return any(
            before.endswith(word[:size]) and after.startswith(word[size:])
            for word in self._unsplittable
            for size in range(1, len(word))
        )

    def _find_match_end(self, pattern: re.Pattern[str], text: str, start: int) -> int | None:
        """Return the end of the first match of a pattern that ends at or after `start`."""
        for match in pattern.finditer(text, start - 1):
            position = match.end()
            if position + self.lookahead > len(text):
                return None
            if not self._is_inside_unsplittable(text, position):
                return position
        return None

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Return the token ids of a text as an array."""

    @abstractmethod
    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not valid UTF-8 become U+FFFD."""

    @abstractmethod
    def state_dict(self) -> dict[str, str]:
        """Return the state from which `tokenizer_from_state_dict` rebuilds the tokenizer."""


def tokenizer_provenance(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the entries of a datamodule's `provenance` that identify its tokenizer."""
    return {"tokenizer_sha256": tokenizer.fingerprint(), "vocab_size": tokenizer.vocab_size}


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of the characters, uint32 of shape (characters,)."""
    # shells pass undecodable bytes as lone surrogates: accept them, so that an error names them
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer(Tokenizer):
    """Character tokenizer; the vocabulary is the sorted set of the characters of a text.

    Example:

        tokenizer = CharTokenizer("hello")
        tokenizer.decode(tokenizer.encode("hole"))  # "hole"
    """

    tokenizer_type = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        """Take the vocabulary from a text or any other collection of characters."""
        self.set_special_tokens({}, "as_text")
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UsageError(
                "CharTokenizer: there are no characters",
                ["one or more characters"],
                "pass a text to CharTokenizer(...)",
            )
        self.char_codes = code_points(
            self.characters
        )  # ascending, since Python sorts by code point
        sizes = [len(c.encode("utf-8", "surrogatepass")) for c in self.characters]
        self.token_bytes = torch.tensor(sizes)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the positions of the characters in the vocabulary."""
        points = code_points(text)
        indices = np.searchsorted(self.char_codes, points).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self.char_codes[indices] != points)
        if len(unknown):
            raise self._unknown_character_error(text, int(unknown[0]))
        return indices

    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Return the concatenated characters."""
        characters = self.characters  # index -1 (no token) must not mean the last character
        decoded = "".join(characters[n] if n >= 0 else "\ufffd" for n in token_ids)
        return SURROGATES.sub(
            "\ufffd", decoded
        )  # the vocabulary of a checkpoint may have surrogates

    def state_dict(self) -> dict[str, str]:
        """Return the vocabulary."""
        return {"tokenizer_type": self.tokenizer_type, "characters": self.characters}

    def _unknown_character_error(self, text: str, position: int) -> UsageError:
        character = text[position]
        swapped = character.swapcase()
        case_hint = f"; {swapped!r} is" if swapped in self.characters else ""
        known_excerpt = self.characters[:100] + ("..." if self.vocab_size > 100 else "")
        return UsageError(
            f"the character {character!r} (U+{ord(character):04X}) at position {position} of the "
            f"text is not in the vocabulary{case_hint}",
            [f"the {self.vocab_size} characters {known_excerpt!r}"],
            "remove it from the text, or train on a text that has it",
        )


class ByteTokenizer(Tokenizer):
    """Byte tokenizer: one token per UTF-8 byte; byte 0, which no text contains, ends a text."""

    tokenizer_type = "bytes"
    eos_id = 0

    def __init__(self) -> None:
        """Set the fixed vocabulary of 256 bytes."""
        self.set_special_tokens({}, "as_text")
        self.token_bytes = torch.ones(256, dtype=torch.int64)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes; bytes that a shell passed as lone surrogates are restored."""
        valid_text = UNDECODABLE_SURROGATES.sub("\ufffd", text)
        return np.frombuffer(valid_text.encode("utf-8", "surrogateescape"), np.uint8)

    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Decode the bytes as UTF-8."""
        return bytes(token_ids).decode("utf-8", "replace")

    def state_dict(self) -> dict[str, str]:
        """Return the tokenizer type, which defines the tokenizer completely."""
        return {"tokenizer_type": self.tokenizer_type}


class BPETokenizer(Tokenizer):
    """GPT-2's byte pair encoding (BPE): split a text into words, then words into byte sequences.

    All 256 single bytes are in the vocabulary, so every text can be encoded. The position of a byte
    sequence is its rank: the adjacent pair with the lowest rank is merged first.
    """

    tokenizer_type = "gpt2"
    split_pattern = (  # contractions, words and numbers with the space before, signs, spaces
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(
        self, ranked_tokens: Sequence[bytes], special_tokens: SpecialTokenMode = "as_text"
    ) -> None:
        """Build the encoding; the token after the last one ends a text (`eos_id`).

        Args:
            ranked_tokens: the byte sequence of each token; its position is its id and its rank.
            special_tokens: how the end-of-text token is read in a text: as_text, allow or error.

        Raises:
            UsageError: two tokens are equal, or a single byte is missing.
        """
        import tiktoken

        self.ranked_tokens, self.eos_id = list(ranked_tokens), len(ranked_tokens)
        different_tokens = set(self.ranked_tokens)
        if len(different_tokens) < len(self.ranked_tokens) or SINGLE_BYTES - different_tokens:
            raise UsageError(
                f"BPETokenizer: {len(self.ranked_tokens)} tokens were given, "
                f"{len(different_tokens)} of them different",
                ["different tokens, among them all 256 single bytes"],
                "pass the tokens of a byte pair encoding in the order of their ranks",
            )
        # ENDOFTEXT: <|endoftext|>
        self.set_special_tokens({ENDOFTEXT: self.eos_id}, special_tokens)
        self.token_bytes = torch.tensor([*map(len, ranked_tokens), 0])  # bytes per id (vocab_size)
        self.mergeable_ranks = {piece: rank for rank, piece in enumerate(ranked_tokens)}
        self.encoding = tiktoken.Encoding(
            "pieces",
            # the regular expression that divides a text into words
            pat_str=self.split_pattern,
            mergeable_ranks=self.mergeable_ranks,
            special_tokens=self.special_ids,
        )

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ranks of the tokens, and special tokens where they are allowed."""
        text = text.encode("utf-8", "replace").decode()
        encoded = []
        for number, segment in enumerate(self._split_at_special_tokens(text)):
            encoded += (
                [np.array([self.special_ids[segment]], np.uint32)]
                if number % 2
                else self._encode_segment(segment)
            )
        return np.concatenate(encoded)

    def next_boundary(self, text: str, start: int) -> int | None:
        """Return the next position before white space, or between a word and a sign."""
        return self._find_match_end(GPT2_WORD_END, text, start)

    def _encode_segment(self, text: str) -> Iterator[np.ndarray]:
        """Encode a text without special tokens; long runs of white space are encoded separately."""
        start = 0
        for run in LONG_WHITESPACE.finditer(text):
            # the split pattern backtracks in runs of white space and fails at a million characters
            end = run.end() - (run.end() < len(text))  # the last space joins the next word
            yield self.encoding.encode_to_numpy(text[start : run.start()], disallowed_special=())
            yield self._single_word_encoding.encode_to_numpy(
                text[run.start() : end], disallowed_special=()
            )
            start = end
        yield self.encoding.encode_to_numpy(text[start:], disallowed_special=())

    @functools.cached_property
    def _single_word_encoding(self) -> Any:
        """Return an encoding that treats a whole text as one word."""
        import tiktoken

        return tiktoken.Encoding(
            "one word", pat_str=r"[\s\S]+", mergeable_ranks=self.mergeable_ranks, special_tokens={}
        )

    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Decode the tokens."""
        return self.encoding.decode(list(token_ids))

    def state_dict(self) -> dict[str, str]:
        """Return all byte sequences, so that a checkpoint needs no other file."""
        state = {
            "tokenizer_type": self.tokenizer_type,
            "ranked_tokens": " ".join(base64.b64encode(p).decode() for p in self.ranked_tokens),
        }
        return (
            state
            if self.special_tokens == "as_text"
            else state | {"special_tokens": self.special_tokens}
        )


def load_gpt2_tokenizer(special_tokens: SpecialTokenMode = "as_text") -> BPETokenizer:
    """Load GPT-2's byte pair encoding through tiktoken, which caches it in TIKTOKEN_CACHE_DIR.

    If the variable is not set, the folder tiktoken of DATA_ROOT is used if it exists.

    Args:
        special_tokens: how the end-of-text token is read in a text: as_text, allow or error.

    Raises:
        DatasetNotFound: the files are neither in a folder nor available from the network.
    """
    import tiktoken

    cache_dir = Path(os.environ.get("DATA_ROOT", "")).expanduser() / "tiktoken"
    if os.environ.get("DATA_ROOT") and cache_dir.is_dir():  # tiktoken reads only the variable
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_dir))
    try:
        # reads the files from the cache folder, or downloads them
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network or folder; wrong checksum
        searched = os.environ.get("TIKTOKEN_CACHE_DIR", "TIKTOKEN_CACHE_DIR (not set)")
        raise DatasetNotFound(
            f"the tokens of GPT-2 were not found; searched: {searched}; {cache_dir}; the network "
            f"({type(error).__name__})",
            [
                "a first run with a network",
                "TIKTOKEN_CACHE_DIR set to a folder with tiktoken's files",
            ],
            "run once with a network, or use tokenizer='bytes'",
            flag="--data.tokenizer=bytes",
        ) from error
    # the end-of-text token has the last id
    ranked_tokens = [encoding.decode_single_token_bytes(n) for n in range(encoding.eot_token)]
    return BPETokenizer(ranked_tokens, special_tokens)


class NumberTokenizer(Tokenizer):
    """Tokens without text, for token files from other programs whose tokenizer is not known.

    A text is a list of ids separated by white space: "17 4 4095". White space alone is token 0, so
    that a default prompt of a line break is valid.
    """

    tokenizer_type = "numbers"
    has_token_bytes = False

    def __init__(self, vocab_size: int) -> None:
        """Set the vocabulary size."""
        if not 1 <= vocab_size <= 1 << 24:
            raise UsageError(
                f"vocab_size={vocab_size} is not a vocabulary size",
                [f"1 to {1 << 24:,}"],
                "use vocab_size=50257",
                flag="--data.vocab_size=50257",
            )
        self.set_special_tokens({}, "as_text")
        self.token_bytes = torch.zeros(vocab_size, dtype=torch.int64)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids (n) that a text lists, such as "17 4"; a text of spaces gives the id 0.

        Raises:
            UsageError: a word is not an id of the vocabulary.
        """
        token_texts = text.split()
        for word in token_texts:
            # at most ten digits, as any id of a vocabulary has
            if not (word.isascii() and word.isdigit() and len(word) < 11):
                raise UsageError(
                    f"{word[:40]!r} is not a token id, and the text of the tokens is not known",
                    [f"ids from 0 to {self.vocab_size - 1}, separated by spaces"],
                    "write ids like '17 4'",
                )
            if int(word) >= self.vocab_size:
                raise UsageError(
                    f"token {word} is not in the vocabulary of {self.vocab_size} tokens",
                    [f"0 to {self.vocab_size - 1}"],
                    f"use an id from 0 to {self.vocab_size - 1}",
                )
        ids = [int(word) for word in token_texts]
        if text and not ids:  # a text that is not empty must have a token
            ids = [0]
        return np.array(ids, dtype=np.int64)

    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Return the ids as text, each after a space."""
        return "".join(f" {number}" for number in token_ids)

    def next_boundary(self, text: str, start: int) -> int | None:
        """Return the next position between an id and a space."""
        return self._find_match_end(WORD_END, text, start)

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary size."""
        return {"tokenizer_type": self.tokenizer_type, "vocab_size": self.vocab_size}
