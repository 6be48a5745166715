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
import binascii
import functools
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ravine.errors import MissingFileError, UsageError, UsageTypeError

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

    @property
    def cache_key(self) -> str:
        """Return a key that identifies the tokenizer in names of token files."""
        return (
            self.tokenizer_type
            if self.special_tokens != "allow"
            else f"{self.tokenizer_type}-{self.special_tokens}"
        )

    def _set_special_tokens(self, special_ids: Mapping[str, int], special_tokens: str) -> None:
        """Set the special tokens and how they are read in a text."""
        if special_tokens not in get_args(SpecialTokenMode):
            raise UsageError(
                f"special_tokens is {special_tokens!r}; allowed: "
                f"{', '.join(get_args(SpecialTokenMode))}; "
                "type --data.special_tokens=as_text"
            )
        self.special_ids, self.special_tokens = dict(special_ids), special_tokens  # type: ignore[assignment]
        # longest first: the longest match at a position is used
        special_words = sorted(self.special_ids, key=len, reverse=True)
        self._pattern = (
            re.compile("|".join(map(re.escape, special_words))) if special_words else None
        )
        if special_tokens != "as_text" and not special_words:
            raise UsageError(
                f"special_tokens is {special_tokens!r}, and the tokenizer {self.tokenizer_type!r} "
                "has no special tokens; allowed: as_text; type --data.tokenizer=gpt2 for one that "
                "has"
            )
        self._set_unsplittable(special_words if special_tokens != "as_text" else [])

    def _set_unsplittable(self, units: Iterable[str]) -> None:
        """Set the words that no boundary may cut."""
        self._unsplittable = list(units)
        self.lookahead = max([1, *map(len, self._unsplittable)])

    def _split_at_special_tokens(self, text: str) -> Iterator[str]:
        """Split a text at its special tokens: every second part is a special token."""
        if self.special_tokens == "as_text" or self._pattern is None:
            yield text
            return
        start = 0
        for match in self._pattern.finditer(text):
            if self.special_tokens == "error":
                around = text[max(0, match.start() - 20) : match.end() + 20]
                raise UsageError(
                    f"the special token {match[0]!r} stands in the text, here: {around!r}; "
                    "type --data.special_tokens=allow to read it as one token, or as_text as "
                    "other text"
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


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of the characters, uint32 of shape (characters,)."""
    # shells pass undecodable bytes as lone surrogates: accept them, so that an error names them
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer(Tokenizer):
    """Character tokenizer; the vocabulary is the sorted set of the characters of a text.

    tokenizer = CharTokenizer("hello")
    tokenizer.decode(tokenizer.encode("hole"))  # "hole"
    """

    tokenizer_type = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        """Take the vocabulary from a text or any other collection of characters."""
        self._set_special_tokens({}, "as_text")
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UsageError("a tokenizer needs at least one character: give it a text")
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
            raise UsageError(self._describe_unknown(text, int(unknown[0])))
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

    def _describe_unknown(self, text: str, position: int) -> str:
        character = text[position]
        swapped = character.swapcase()
        case_hint = f"; {swapped!r} is" if swapped in self.characters else ""
        known_excerpt = self.characters[:100] + ("..." if self.vocab_size > 100 else "")
        return (
            f"character {character!r} (U+{ord(character):04X}) at position {position} of the text "
            "is "
            f"not among the {self.vocab_size} characters known from training, "
            f"{known_excerpt!r}{case_hint}; "
            "leave it out, or train on a text that has it"
        )


class ByteTokenizer(Tokenizer):
    """Byte tokenizer: one token per UTF-8 byte; byte 0, which no text contains, ends a text."""

    tokenizer_type = "bytes"
    eos_id = 0

    def __init__(self) -> None:
        """Set the fixed vocabulary of 256 bytes."""
        self._set_special_tokens({}, "as_text")
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
        """Take the byte sequences in the order of their ranks; one more token ends a text."""
        import tiktoken

        self.ranked_tokens, self.eos_id = list(ranked_tokens), len(ranked_tokens)
        if len(set(self.ranked_tokens)) < len(self.ranked_tokens) or SINGLE_BYTES - set(
            self.ranked_tokens
        ):
            raise UsageError(
                f"{len(self.ranked_tokens)} pieces of which {len(set(self.ranked_tokens))} are "
                "different; "
                "allowed: different pieces, and among them all 256 bytes; give the pieces of a "
                "byte pair encoding in the order of their ranks"
            )
        self._set_special_tokens({ENDOFTEXT: self.eos_id}, special_tokens)
        self.token_bytes = torch.tensor([*map(len, ranked_tokens), 0])
        self.mergeable_ranks = {piece: rank for rank, piece in enumerate(ranked_tokens)}
        self.encoding = tiktoken.Encoding(
            "pieces",
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
    """
    import tiktoken

    cache_dir = Path(os.environ.get("DATA_ROOT", "")).expanduser() / "tiktoken"
    if os.environ.get("DATA_ROOT") and cache_dir.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache_dir))
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network or folder; wrong checksum
        searched = os.environ.get("TIKTOKEN_CACHE_DIR", "TIKTOKEN_CACHE_DIR (not set)")
        raise DatasetNotFound(
            f"the pieces of GPT-2's tokenizer were not found; looked at: {searched}; {cache_dir}; "
            "the "
            f"network ({type(error).__name__}); ways out: run once with a network; or set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept them; or type "
            "--data.tokenizer=bytes"
        ) from error
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
                f"vocab_size is {vocab_size}; allowed: 1 to {1 << 24:,}; "
                "type --data.vocab_size=50257"
            )
        self._set_special_tokens({}, "as_text")
        self.token_bytes = torch.zeros(vocab_size, dtype=torch.int64)

    def encode_array(self, text: str) -> np.ndarray:
        """Parse the ids of a text."""
        token_texts = text.split()
        for word in token_texts:
            if not (word.isascii() and word.isdigit() and len(word) < 11):
                raise UsageError(
                    f"{word[:40]!r} is no token number, and this model knows no texts; allowed: "
                    f"numbers from 0 to {self.vocab_size - 1}, separated by spaces; type '17 4'"
                )
            if int(word) >= self.vocab_size:
                raise UsageError(
                    f"token {word} is outside the vocabulary of {self.vocab_size}; allowed: 0 to "
                    f"{self.vocab_size - 1}"
                )
        return np.array([int(word) for word in token_texts] or [0] * bool(text), dtype=np.int64)

    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Return the ids as text, each after a space."""
        return "".join(f" {number}" for number in token_ids)

    def next_boundary(self, text: str, start: int) -> int | None:
        """Return the next position between an id and a space."""
        return self._find_match_end(WORD_END, text, start)

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary size."""
        return {"tokenizer_type": self.tokenizer_type, "vocab_size": self.vocab_size}


class FileTokenizer(Tokenizer):
    """Hugging Face tokenizer of the tokenizers library, from the text of its tokenizer.json.

        tokenizer = FileTokenizer.from_file("my/tokenizer.json")
        tokenizer = FileTokenizer.from_merges(vocab, merges, ["<|endoftext|>"])

    Args:
        json_text: the JSON text; its truncation and padding are not used.
        eos_token: the special token that ends a text, by name.
        special_tokens: how special tokens in a text are read.
    """

    tokenizer_type = "file"
    EOS_CANDIDATES = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")

    def __init__(
        self,
        json_text: str,
        eos_token: str | None = None,
        special_tokens: SpecialTokenMode = "as_text",
    ) -> None:
        """Parse the text, and find the special tokens and the bytes per token."""
        import tokenizers

        try:
            self.hf_tokenizer = tokenizers.Tokenizer.from_str(json_text)
            parsed = json.loads(json_text)
        except Exception as error:  # the library raises only Exception
            raise UsageError(
                f"not a file of the tokenizers library: {str(error)[:200]}; allowed: a "
                "tokenizer.json, as Hugging Face's models have; type --data.tokenizer=gpt2 for "
                "GPT-2's"
            ) from None
        self.hf_tokenizer.no_truncation()
        self.hf_tokenizer.no_padding()
        self.json_text = json_text
        added = self.hf_tokenizer.get_added_tokens_decoder()
        special_ids = {token.content: n for n, token in added.items() if token.special}
        self._set_special_tokens(special_ids, special_tokens)
        self.hf_tokenizer.encode_special_tokens = special_tokens != "allow"
        if eos_token is not None and not isinstance(eos_token, str):
            raise UsageTypeError(
                f"eos_token is of type {type(eos_token).__name__}; allowed: the token as a text"
            )
        eos_names = (
            [eos_token]
            if eos_token
            else [name for name in self.EOS_CANDIDATES if name in special_ids]
        )
        if eos_token and eos_token not in special_ids:
            raise UsageError(
                f"eos_token {eos_token!r} is no special token; known: {', '.join(special_ids)}"
            )
        self.eos_id = special_ids[eos_names[0]] if eos_names else None
        non_special = [
            token.content for token in added.values() if not token.special
        ]  # always matched
        self._set_unsplittable(
            [*non_special, *(special_ids if special_tokens != "as_text" else ())]
        )
        self._compute_token_bytes(parsed, added)

    def _compute_token_bytes(self, parsed: dict[str, Any], added: Mapping[int, Any]) -> None:
        """Set the bytes per token, and whether a text may be cut into chunks."""
        vocab = self.hf_tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocab.values(), default=-1)
        if size > max(4096, 4 * len(vocab)):  # one large id would allocate too much memory
            raise UsageError(
                f"the largest token is {size - 1:,} among {len(vocab):,}; allowed: numbers without "
                "large gaps; make the file again"
            )
        steps = _pretokenizer_steps(parsed.get("pre_tokenizer"))
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        is_plain_bpe = parsed.get("normalizer") is None and parsed["model"].get("type") == "BPE"
        strips_or_joins = any(t.lstrip or t.rstrip or t.single_word for t in added.values())
        adds_prefix_space = any(step.get("add_prefix_space", True) for step in byte_level)
        self.has_token_bytes = bool(byte_level) and is_plain_bpe
        # lossless: every byte of a text is in one of its tokens, so a text may be cut after words
        self.is_lossless = self.has_token_bytes and not (strips_or_joins or adds_prefix_space)
        self.written_bytes = torch.zeros(size, dtype=torch.int64)  # including special tokens
        for word, number in vocab.items():
            # in ByteLevel's alphabet a character is one byte; added tokens are stored as plain text
            self.written_bytes[number] = len(word.encode()) if number in added else len(word)
        self.token_bytes = self.written_bytes.clone()
        self.token_bytes[list(self.special_ids.values())] = 0

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids from the library, without the tokens that it can add around a text."""
        text = text.encode("utf-8", "replace").decode()
        if self.special_tokens == "error":
            list(self._split_at_special_tokens(text))
        ids = self.hf_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        numbers = np.array(ids, dtype=np.int64)
        if self.is_lossless:
            num_text_bytes, num_token_bytes = (
                len(text.encode()),
                int(self.written_bytes[numbers].sum()),
            )
            if num_text_bytes != num_token_bytes:
                raise UsageError(
                    f"{num_text_bytes - num_token_bytes} of {num_text_bytes} bytes of a text are "
                    "in no token of this "
                    "vocabulary; allowed: a vocabulary with all 256 bytes; type "
                    "--data.tokenizer=bytes, or train the tokenizer with its initial alphabet"
                )
        return numbers

    def decode_list(self, token_ids: Sequence[int]) -> str:
        """Decode the tokens with the library."""
        return self.hf_tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def next_boundary(self, text: str, start: int) -> int | None:
        """Return the end of the next word; None if the library may add a prefix to each text."""
        return self._find_match_end(WORD_END, text, start) if self.is_lossless else None

    @property
    def cache_key(self) -> str:
        """Return the tokenizer type and a hash of the content."""
        import hashlib

        return f"{super().cache_key}-{hashlib.sha256(self.json_text.encode()).hexdigest()[:16]}"

    def state_dict(self) -> dict[str, str]:
        """Return the whole file, so that a checkpoint needs no other file."""
        eos_token = next((word for word, n in self.special_ids.items() if n == self.eos_id), "")
        state = {
            "tokenizer_type": self.tokenizer_type,
            "json_text": self.json_text,
            "eos_token": eos_token,
        }
        return (
            state
            if self.special_tokens == "as_text"
            else state | {"special_tokens": self.special_tokens}
        )

    @classmethod
    def from_file(
        cls, path: str | Path, special_tokens: SpecialTokenMode = "as_text"
    ) -> "FileTokenizer":
        """Read a tokenizer.json, or a folder with one or with vocab.json and merges.txt.

        The end-of-text token is the eos_token of a tokenizer_config.json in the folder, or else the
        special token with one of the names in EOS_CANDIDATES.
        """
        resolved_path = Path(path).expanduser()
        folder = resolved_path if resolved_path.is_dir() else resolved_path.parent
        file = resolved_path / "tokenizer.json" if resolved_path.is_dir() else resolved_path
        merge_files = folder / "vocab.json", folder / "merges.txt"
        if (
            resolved_path.is_dir()
            and not file.is_file()
            and all(merge_file.is_file() for merge_file in merge_files)
        ):
            return cls(_bpe_json_from_files(*merge_files), _read_eos_token(folder), special_tokens)
        if not file.is_file():
            raise MissingFileError(
                f"no tokenizer at {resolved_path}; allowed: characters, bytes, gpt2, a "
                "tokenizer.json, or "
                "a folder with one or with vocab.json and merges.txt; type --data.tokenizer=FILE"
            )
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{file} is not UTF-8 at byte {error.start}; allowed: a tokenizer.json; "
                "type --data.tokenizer=FILE"
            ) from None
        try:
            return cls(content, _read_eos_token(folder), special_tokens)
        except ValueError as error:
            raise UsageError(f"{file}: {error}") from None

    @classmethod
    def from_merges(
        cls,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_words: Sequence[str] = (),
        special_tokens: SpecialTokenMode = "allow",
    ) -> "FileTokenizer":
        """Build a byte pair encoding of GPT-2's form from a vocabulary and merges.

        Args:
            vocab: the bytes of each token.
            merges: the pairs to merge, in order.
            special_words: the special tokens; those missing in the vocabulary get the next free
                ids.
            special_tokens: how special tokens in a text are read.
        """
        word_by_bytes = {word.encode(): word for word in special_words}
        ids = {word_by_bytes.get(piece) or _bytes_to_chars(piece): n for n, piece in vocab.items()}
        for word in special_words:
            ids.setdefault(word, 1 + max(ids.values(), default=-1))
        pairs = [(_bytes_to_chars(a), _bytes_to_chars(b)) for a, b in merges]
        return cls(_make_bpe_json(ids, pairs, special_words), None, special_tokens)


def _pretokenizer_steps(config: Any) -> list[dict[str, Any]]:
    """Return the pre-tokenizers of a tokenizer.json in order."""
    if not isinstance(config, dict):
        return []
    inner = config.get("pretokenizers")
    return [step for nested in inner for step in _pretokenizer_steps(nested)] if inner else [config]


@functools.cache
def _byte_to_char() -> dict[int, str]:
    """Return the character that ByteLevel uses for each byte (GPT-2's `bytes_to_unicode`)."""
    printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in printable_bytes]
    return {n: chr(n) for n in printable_bytes} | {n: chr(256 + i) for i, n in enumerate(others)}


def _bytes_to_chars(piece: bytes) -> str:
    return "".join(_byte_to_char()[n] for n in piece)


def _make_bpe_json(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special_words: Iterable[str]
) -> str:
    """Return the tokenizer.json of a byte pair encoding with GPT-2's word pattern."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[word], "content": word, "special": True} | added for word in special_words
        ],
        "pre_tokenizer": byte_level | {"use_regex": True},
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return json.dumps(content, ensure_ascii=False)


def _bpe_json_from_files(vocab_file: Path, merges_file: Path) -> str:
    """Return the tokenizer.json for a vocab.json and a merges.txt, GPT-2's older files."""
    try:
        vocab = json.loads(vocab_file.read_text(encoding="utf-8-sig"))
        lines = merges_file.read_text(encoding="utf-8-sig").split("\n")
        lines = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
        pairs = [(a, b) for a, b in (line.split(" ") for line in lines)]
        special = [name for name in FileTokenizer.EOS_CANDIDATES if name in vocab]
        return _make_bpe_json({str(word): int(n) for word, n in vocab.items()}, pairs, special)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{vocab_file} and {merges_file.name} are no byte pair encoding: {error!r}; allowed: "
            "GPT-2's files; type --data.tokenizer=FOLDER"
        ) from None


def _read_eos_token(folder: Path) -> str | None:
    """Return the eos_token of the folder's tokenizer_config.json, or None."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
        eos_token = config.get("eos_token")
        eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
        return eos_token if isinstance(eos_token, str) else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def make_tokenizer(
    name: str, characters: Iterable[str] = (), special_tokens: SpecialTokenMode = "as_text"
) -> Tokenizer:
    """Build the tokenizer that `--data.tokenizer` names: characters, bytes, gpt2, or a file.

    Args:
        name: characters, bytes, gpt2, or a path for `FileTokenizer.from_file`.
        characters: the characters of the text, for `characters`.
        special_tokens: how special tokens in a text are read.
    """
    factories: dict[str, Callable[[], Tokenizer]] = {
        "characters": lambda: CharTokenizer(characters),
        "bytes": ByteTokenizer,
        "gpt2": lambda: load_gpt2_tokenizer(special_tokens),
    }
    if name not in factories:
        return FileTokenizer.from_file(name, special_tokens)
    tokenizer = factories[name]()
    if special_tokens != tokenizer.special_tokens:
        tokenizer._set_special_tokens(tokenizer.special_ids, special_tokens)  # raises an error
    return tokenizer


def tokenizer_from_state_dict(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from the result of its `state_dict()`."""
    special_tokens = state.get("special_tokens", "as_text")
    try:
        match state.get("tokenizer_type"):
            case CharTokenizer.tokenizer_type:
                return CharTokenizer(state["characters"])
            case ByteTokenizer.tokenizer_type:
                return ByteTokenizer()
            case BPETokenizer.tokenizer_type:
                ranked_tokens = [
                    base64.b64decode(piece.encode(), validate=True)
                    for piece in state["ranked_tokens"].split(" ")
                ]
                return BPETokenizer(ranked_tokens, special_tokens)
            case NumberTokenizer.tokenizer_type:
                return NumberTokenizer(state["vocab_size"])
            case FileTokenizer.tokenizer_type:
                return FileTokenizer(state["json_text"], state["eos_token"] or None, special_tokens)
    except (LookupError, TypeError, AttributeError, binascii.Error) as error:
        raise UsageError(
            f"the state of the tokenizer {state.get('tokenizer_type')!r} is damaged: {error!r}; "
            "use another "
            "checkpoint"
        ) from None
    raise UsageError(
        f"unknown tokenizer_type {state.get('tokenizer_type')!r}; known are characters, bytes, "
        "gpt2, "
        "file, numbers; the checkpoint was written by another version: install that one"
    )
