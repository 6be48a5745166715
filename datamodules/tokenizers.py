"""Tokenizers turn text into token numbers and back; their state is plain, to travel in checkpoints.

    kind         vocabulary          a token is
    characters   those of the text   one character
    bytes        256                 one byte of UTF-8: any text in any language
    gpt2         50,257              a piece of a word: about four characters of English
    file         of the file         what a file of the tokenizers library says
    numbers      given               a number: of files of tokens whose text is not known

Nats per token and perplexity depend on the kind; bits per byte = nats / ln 2 * tokens / bytes do
not, and are what different kinds are compared by.

Special tokens, like <|endoftext|>, are words that stand for one token. `specials` says how they are
read in a text: `plain`, as other words are; `allowed`, as their token; or `refuse`.
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

from .downloads import SourceMissing

Specials = Literal["plain", "allowed", "refuse"]

# Unicode's White_Space. Python's \s has four characters more, which are signs to GPT-2's pattern
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Signs of the categories P and S, without the apostrophe, which begins a contraction
SIGNS = (
    "!-&(-/:-@\\[-^`{-~\xa1\xa7\xab\xb6\xb7\xbb\xbf\u0589\u05be\u060c\u061b\u061f\u06d4\u0964\u0965"
    "\u104a\u104b\u1362-\u1368\u17d4\u17d5\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011"
    "\u3014-\u301f\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
# Every known pattern of words ends one there: GPT-2's, and those of later vocabularies
WORD_END = re.compile(rf"[^\W_](?=[{WHITE}{SIGNS}])")
# GPT-2's has one more place: between any sign and white space
GPT2_END = re.compile(rf"[^\W_](?=[{SIGNS}])|[^{WHITE}](?=[{WHITE}])")
LONG_SPACE = re.compile(rf"(?<![{WHITE}])[{WHITE}]{{100000,}}")
SURROGATE = re.compile("[\ud800-\udfff]")
LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # halves of characters that no shell makes
END = "<|endoftext|>"
SINGLE = {bytes([n]) for n in range(256)}


class Tokenizer(ABC):
    """One interface for all kinds, which differ in `numbers` and `text`."""

    kind: str
    end: int | None = None  # the token that ends a text, where there is one
    token_bytes: Tensor  # UTF-8 bytes of each token, int64 of shape (vocabulary,)
    sized: bool = True  # whether token_bytes are known
    special: dict[str, int]  # words that stand for one token
    specials: Specials = "plain"
    reach = 1  # characters after a border that decide whether it is one
    _whole: Sequence[str] = ()
    _pattern: re.Pattern[str] | None = None

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

    def border(self, text: str, start: int) -> int | None:
        """The first place at or after `start` > 0 where a cut changes no token.

        None if there is none that has `reach` characters after it.
        """
        return start if start + self.reach <= len(text) else None

    def alike(self, other: "Tokenizer") -> bool:
        """Whether the same numbers stand for the same texts."""
        mine, theirs = dict(self.state()), dict(other.state())
        for state in (mine, theirs):
            state.pop("specials", None)
        return mine == theirs

    @property
    def name(self) -> str:
        """What distinguishes the tokens of a text from those of other tokenizers."""
        return self.kind if self.specials != "allowed" else f"{self.kind}-{self.specials}"

    def _set_specials(self, special: Mapping[str, int], specials: str) -> None:
        """Keep the words that stand for one token, and how they are read."""
        if specials not in get_args(Specials):
            raise UsageError(
                f"specials is {specials!r}; allowed: {', '.join(get_args(Specials))}; "
                "type --data.specials=plain"
            )
        self.special, self.specials = dict(special), specials  # type: ignore[assignment]
        # the longest of those that begin at one place
        words = sorted(self.special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else None
        if specials != "plain" and not words:
            raise UsageError(
                f"specials is {specials!r}, and the tokenizer {self.kind!r} has no special "
                "tokens; allowed: plain; type --data.tokenizer=gpt2 for one that has"
            )
        self._keep_whole(words if specials != "plain" else [])

    def _keep_whole(self, words: Iterable[str]) -> None:
        """Let no border be inside of one of these words."""
        self._whole = list(words)
        self.reach = max([1, *map(len, self._whole)])

    def _parts(self, text: str) -> Iterator[str]:
        """The text in parts: every second one is a special token."""
        if self.specials == "plain" or self._pattern is None:
            yield text
            return
        start = 0
        for found in self._pattern.finditer(text):
            if self.specials == "refuse":
                around = text[max(0, found.start() - 20) : found.end() + 20]
                raise UsageError(
                    f"the special token {found[0]!r} stands in the text, here: {around!r}; "
                    "type --data.specials=allowed to read it as one token, or plain as other text"
                )
            yield text[start : found.start()]
            yield found[0]
            start = found.end()
        yield text[start:]

    def _within_word(self, text: str, place: int) -> bool:
        """Whether a word that has to stay whole stands on both sides of a place."""
        if not self._whole:
            return False
        before = text[max(0, place - self.reach) : place]
        after = text[place : place + self.reach]
        return any(
            before.endswith(word[:size]) and after.startswith(word[size:])
            for word in self._whole
            for size in range(1, len(word))
        )

    def _first(self, pattern: re.Pattern[str], text: str, start: int) -> int | None:
        """The end of the first match of a pattern that ends at or after `start`."""
        for found in pattern.finditer(text, start - 1):
            place = found.end()
            if place + self.reach > len(text):
                return None
            if not self._within_word(text, place):
                return place
        return None

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
        self._set_specials({}, "plain")
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UsageError("a tokenizer needs at least one character: give it a text")
        self.codes = code_points(self.characters)  # ascending, since Python sorts by code point
        sizes = [len(c.encode("utf-8", "surrogatepass")) for c in self.characters]
        self.token_bytes = torch.tensor(sizes)

    def numbers(self, text: str) -> np.ndarray:
        """Places among the characters known."""
        points = code_points(text)
        places = np.searchsorted(self.codes, points).clip(max=self.vocabulary - 1)
        unknown = np.flatnonzero(self.codes[places] != points)
        if len(unknown):
            raise UsageError(self._unknown(text, int(unknown[0])))
        return places

    def text(self, numbers: Sequence[int]) -> str:
        """The characters in a row."""
        table = self.characters  # of the whole vocabulary: -1 is not the last
        text = "".join(table[n] if n >= 0 else "\ufffd" for n in numbers)
        return SURROGATE.sub(
            "\ufffd", text
        )  # of checkpoints of texts that had halves of characters

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
        self._set_specials({}, "plain")
        self.token_bytes = torch.ones(256, dtype=torch.int64)

    def numbers(self, text: str) -> np.ndarray:
        """The bytes; what a shell could not decode becomes again what it was."""
        whole = LONE.sub("\ufffd", text)
        return np.frombuffer(whole.encode("utf-8", "surrogateescape"), np.uint8)

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

    def __init__(self, pieces: Sequence[bytes], specials: Specials = "plain") -> None:
        """Take the pieces in the order of their ranks; one more token ends a text."""
        import tiktoken

        self.pieces, self.end = list(pieces), len(pieces)
        if len(set(self.pieces)) < len(self.pieces) or SINGLE - set(self.pieces):
            raise UsageError(
                f"{len(self.pieces)} pieces of which {len(set(self.pieces))} are different; "
                "allowed: different pieces, and among them all 256 bytes; give the pieces of a "
                "byte pair encoding in the order of their ranks"
            )
        self._set_specials({END: self.end}, specials)
        self.token_bytes = torch.tensor([*map(len, pieces), 0])
        self.ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.encoding = tiktoken.Encoding(
            "pieces",
            pat_str=self.words,
            mergeable_ranks=self.ranks,
            special_tokens=self.special,
        )

    def numbers(self, text: str) -> np.ndarray:
        """Ranks of the pieces, and special tokens where they are allowed."""
        text = text.encode("utf-8", "replace").decode()
        found = []
        for number, part in enumerate(self._parts(text)):
            found += (
                [np.array([self.special[part]], np.uint32)] if number % 2 else self._ranks(part)
            )
        return np.concatenate(found)

    def border(self, text: str, start: int) -> int | None:
        """Behind a word or a sign, before white space; or between a word and a sign."""
        return self._first(GPT2_END, text, start)

    def _ranks(self, text: str) -> Iterator[np.ndarray]:
        """Ranks of the pieces of a text, whatever words are in it."""
        start = 0
        for run in LONG_SPACE.finditer(text):
            # the words' pattern tries a run of white space from each end, and gives up at a million
            end = run.end() - (run.end() < len(text))  # the last belongs to what follows
            yield self.encoding.encode_to_numpy(text[start : run.start()], disallowed_special=())
            yield self._one_word.encode_to_numpy(text[run.start() : end], disallowed_special=())
            start = end
        yield self.encoding.encode_to_numpy(text[start:], disallowed_special=())

    @functools.cached_property
    def _one_word(self) -> Any:
        """An encoding that takes a whole text for one word."""
        import tiktoken

        return tiktoken.Encoding(
            "one word", pat_str=r"[\s\S]+", mergeable_ranks=self.ranks, special_tokens={}
        )

    def text(self, numbers: Sequence[int]) -> str:
        """The characters that the pieces make."""
        return self.encoding.decode(list(numbers))

    def state(self) -> dict[str, str]:
        """All pieces: a checkpoint needs no file beside it to be used."""
        state = {
            "kind": self.kind,
            "pieces": " ".join(base64.b64encode(p).decode() for p in self.pieces),
        }
        return state if self.specials == "plain" else state | {"specials": self.specials}


def gpt2(specials: Specials = "plain") -> BPETokenizer:
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
    pieces = [encoding.decode_single_token_bytes(n) for n in range(encoding.eot_token)]
    return BPETokenizer(pieces, specials)


class NumberTokenizer(Tokenizer):
    """Tokens without a text, for files of tokens that another program has made.

    A text is the numbers, separated by white space: "17 4 4095". White space alone is token 0, so
    that a default prompt of a line break can be continued.
    """

    kind = "numbers"
    sized = False

    def __init__(self, vocabulary: int) -> None:
        """Take the number of different tokens."""
        if not 1 <= vocabulary <= 1 << 24:
            raise UsageError(
                f"vocabulary is {vocabulary}; allowed: 1 to {1 << 24:,}; "
                "type --data.vocabulary=50257"
            )
        self._set_specials({}, "plain")
        self.token_bytes = torch.zeros(vocabulary, dtype=torch.int64)

    def numbers(self, text: str) -> np.ndarray:
        """The numbers of a text."""
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and len(word) < 11):
                raise UsageError(
                    f"{word[:40]!r} is no token number, and this model knows no texts; allowed: "
                    f"numbers from 0 to {self.vocabulary - 1}, separated by spaces; type '17 4'"
                )
            if int(word) >= self.vocabulary:
                raise UsageError(
                    f"token {word} is outside the vocabulary of {self.vocabulary}; allowed: 0 to "
                    f"{self.vocabulary - 1}"
                )
        return np.array([int(word) for word in words] or [0] * bool(text), dtype=np.int64)

    def text(self, numbers: Sequence[int]) -> str:
        """A space and the number, of each."""
        return "".join(f" {number}" for number in numbers)

    def border(self, text: str, start: int) -> int | None:
        """Between a number and a space."""
        return self._first(WORD_END, text, start)

    def state(self) -> dict[str, Any]:
        """The size."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class FileTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, from the text of its tokenizer.json.

    tokenizer = FileTokenizer.of_file("my/tokenizer.json")
    tokenizer = FileTokenizer.of_merges(vocabulary, merges, ["<|endoftext|>"])

    Args:
        content: the JSON text; what it says of truncation and padding is not used.
        end: the special token that ends a text, by name.
        specials: how special tokens in a text are read.
    """

    kind = "file"
    ends = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")

    def __init__(self, content: str, end: str | None = None, specials: Specials = "plain") -> None:
        """Read the text, and see which tokens are special and how many bytes each has."""
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_str(content)
            said = json.loads(content)
        except Exception as error:  # the library raises no other type
            raise UsageError(
                f"not a file of the tokenizers library: {str(error)[:200]}; allowed: a "
                "tokenizer.json, as Hugging Face's models have; type --data.tokenizer=gpt2 for "
                "GPT-2's"
            ) from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.content = content
        added = self.inner.get_added_tokens_decoder()
        special = {token.content: n for n, token in added.items() if token.special}
        self._set_specials(special, specials)
        self.inner.encode_special_tokens = specials != "allowed"
        if end is not None and not isinstance(end, str):
            raise UsageTypeError(
                f"end is of type {type(end).__name__}; allowed: the token as a text"
            )
        names = [end] if end else [name for name in self.ends if name in special]
        if end and end not in special:
            raise UsageError(f"end {end!r} is no special token; known: {', '.join(special)}")
        self.end = special[names[0]] if names else None
        others = [token.content for token in added.values() if not token.special]  # always read
        self._keep_whole([*others, *(special if specials != "plain" else ())])
        self._measure(said, added)

    def _measure(self, said: dict[str, Any], added: Mapping[int, Any]) -> None:
        """Bytes of each token, and whether a text may be cut."""
        table = self.inner.get_vocab(with_added_tokens=True)
        size = 1 + max(table.values(), default=-1)
        if size > max(4096, 4 * len(table)):  # one large number would allocate any amount of memory
            raise UsageError(
                f"the largest token is {size - 1:,} among {len(table):,}; allowed: numbers without "
                "large gaps; make the file again"
            )
        steps = _steps(said.get("pre_tokenizer"))
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        whole = said.get("normalizer") is None and said["model"].get("type") == "BPE"
        around = any(t.lstrip or t.rstrip or t.single_word for t in added.values())
        prefix = any(step.get("add_prefix_space", True) for step in byte_level)
        self.sized = bool(byte_level) and whole
        # every byte of a text is in one of its tokens, and a text may be cut behind words
        self.exact = self.sized and not (around or prefix)
        self.written = torch.zeros(size, dtype=torch.int64)  # bytes, those of special words too
        for word, number in table.items():
            # of the alphabet of ByteLevel a character is a byte; other tokens are written out
            self.written[number] = len(word.encode()) if number in added else len(word)
        self.token_bytes = self.written.clone()
        self.token_bytes[list(self.special.values())] = 0

    def numbers(self, text: str) -> np.ndarray:
        """The numbers that the library gives, without what it would put around a text."""
        text = text.encode("utf-8", "replace").decode()
        if self.specials == "refuse":
            list(self._parts(text))
        found = self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
        numbers = np.array(found, dtype=np.int64)
        if self.exact:
            there, kept = len(text.encode()), int(self.written[numbers].sum())
            if there != kept:
                raise UsageError(
                    f"{there - kept} of {there} bytes of a text are in no token of this "
                    "vocabulary; allowed: a vocabulary with all 256 bytes; type "
                    "--data.tokenizer=bytes, or train the tokenizer with its initial alphabet"
                )
        return numbers

    def text(self, numbers: Sequence[int]) -> str:
        """The text that the library decodes."""
        return self.inner.decode(list(numbers), skip_special_tokens=False)

    def border(self, text: str, start: int) -> int | None:
        """Behind a word; nowhere, if the library may put something before each text."""
        return self._first(WORD_END, text, start) if self.exact else None

    @property
    def name(self) -> str:
        """The kind and the content."""
        import hashlib

        return f"{super().name}-{hashlib.sha256(self.content.encode()).hexdigest()[:16]}"

    def state(self) -> dict[str, str]:
        """The whole file, so that a checkpoint needs no other file."""
        end = next((word for word, n in self.special.items() if n == self.end), "")
        state = {"kind": self.kind, "content": self.content, "end": end}
        return state if self.specials == "plain" else state | {"specials": self.specials}

    @classmethod
    def of_file(cls, path: str | Path, specials: Specials = "plain") -> "FileTokenizer":
        """Read a tokenizer.json; or a folder with one, or with vocab.json and merges.txt.

        The token that ends a text is the eos_token of a tokenizer_config.json beside it, or the
        special token of a usual name.
        """
        place = Path(path).expanduser()
        folder = place if place.is_dir() else place.parent
        file = place / "tokenizer.json" if place.is_dir() else place
        pair = folder / "vocab.json", folder / "merges.txt"
        if place.is_dir() and not file.is_file() and all(part.is_file() for part in pair):
            return cls(_merged(*pair), _eos(folder), specials)
        if not file.is_file():
            raise MissingFileError(
                f"no tokenizer at {place}; allowed: characters, bytes, gpt2, a tokenizer.json, or "
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
            return cls(content, _eos(folder), specials)
        except ValueError as error:
            raise UsageError(f"{file}: {error}") from None

    @classmethod
    def of_merges(
        cls,
        vocabulary: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special: Sequence[str] = (),
        specials: Specials = "allowed",
    ) -> "FileTokenizer":
        """Make a byte pair encoding of GPT-2's kind.

        Args:
            vocabulary: the bytes of each token.
            merges: the pairs that are joined, the first first.
            special: words that stand for one token; what the vocabulary lacks gets a number behind.
            specials: how they are read in a text.
        """
        known = {word.encode(): word for word in special}
        table = {known.get(piece) or _written(piece): n for n, piece in vocabulary.items()}
        for word in special:
            table.setdefault(word, 1 + max(table.values(), default=-1))
        pairs = [(_written(a), _written(b)) for a, b in merges]
        return cls(_bpe(table, pairs, special), None, specials)


def _steps(said: Any) -> list[dict[str, Any]]:
    """The pre-tokenizers of a tokenizer.json, one after the other."""
    if not isinstance(said, dict):
        return []
    inner = said.get("pretokenizers")
    return [step for part in inner for step in _steps(part)] if inner else [said]


@functools.cache
def _alphabet() -> dict[int, str]:
    """The character by which ByteLevel writes each byte (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [n for n in range(256) if n not in shown]
    return {n: chr(n) for n in shown} | {n: chr(256 + i) for i, n in enumerate(others)}


def _written(piece: bytes) -> str:
    return "".join(_alphabet()[n] for n in piece)


def _bpe(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Iterable[str]
) -> str:
    """The tokenizer.json of a byte pair encoding over GPT-2's words."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    said = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary[word], "content": word, "special": True} | added for word in special
        ],
        "pre_tokenizer": level | {"use_regex": True},
        "decoder": level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return json.dumps(said, ensure_ascii=False)


def _merged(vocabulary: Path, merges: Path) -> str:
    """The tokenizer.json of a vocab.json and a merges.txt, GPT-2's older files."""
    try:
        table = json.loads(vocabulary.read_text(encoding="utf-8-sig"))
        lines = merges.read_text(encoding="utf-8-sig").split("\n")
        lines = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
        pairs = [(a, b) for a, b in (line.split(" ") for line in lines)]
        special = [name for name in FileTokenizer.ends if name in table]
        return _bpe({str(word): int(n) for word, n in table.items()}, pairs, special)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{vocabulary} and {merges.name} are no byte pair encoding: {error!r}; allowed: "
            "GPT-2's files; type --data.tokenizer=FOLDER"
        ) from None


def _eos(folder: Path) -> str | None:
    """The eos_token that a tokenizer_config.json names."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
        named = said.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        return named if isinstance(named, str) else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def make_tokenizer(
    name: str, characters: Iterable[str] = (), specials: Specials = "plain"
) -> Tokenizer:
    """The tokenizer that `--data.tokenizer` names: a kind, or a file.

    Args:
        name: characters, bytes, gpt2, or the path of a file that `FileTokenizer.of_file` reads.
        characters: those of the text, for the first kind.
        specials: how special tokens in a text are read.
    """
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "characters": lambda: CharTokenizer(characters),
        "bytes": ByteTokenizer,
        "gpt2": lambda: gpt2(specials),
    }
    if name not in kinds:
        return FileTokenizer.of_file(name, specials)
    made = kinds[name]()
    if specials != made.specials:
        made._set_specials(made.special, specials)  # refuses
    return made


def from_state(state: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from what its `state()` gave."""
    specials = state.get("specials", "plain")
    try:
        match state.get("kind"):
            case CharTokenizer.kind:
                return CharTokenizer(state["characters"])
            case ByteTokenizer.kind:
                return ByteTokenizer()
            case BPETokenizer.kind:
                pieces = [
                    base64.b64decode(piece.encode(), validate=True)
                    for piece in state["pieces"].split(" ")
                ]
                return BPETokenizer(pieces, specials)
            case NumberTokenizer.kind:
                return NumberTokenizer(state["vocabulary"])
            case FileTokenizer.kind:
                return FileTokenizer(state["content"], state["end"] or None, specials)
    except (LookupError, TypeError, AttributeError, binascii.Error) as error:
        raise UsageError(
            f"the state of the tokenizer {state.get('kind')!r} is damaged: {error!r}; use another "
            "checkpoint"
        ) from None
    raise UsageError(
        f"unknown kind of tokenizer {state.get('kind')!r}; known are characters, bytes, gpt2, "
        "file, numbers; the checkpoint was written by another version: install that one"
    )
