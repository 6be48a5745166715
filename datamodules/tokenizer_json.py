"""Tokenizer of a tokenizer.json (Hugging Face's tokenizers library), or of vocab.json, merges.txt.

The library defines the tokens. This file finds the special tokens, the bytes per token, and whether
a text may be cut into chunks.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ravine.errors import MissingFileError, UsageError, UsageTypeError

from .tokenizers import ENDOFTEXT, WORD_END, SpecialTokenMode, Tokenizer


class FileTokenizer(Tokenizer):
    """Hugging Face tokenizer of the tokenizers library, from the text of its tokenizer.json.

    Example:

        tokenizer = FileTokenizer.from_file("my/tokenizer.json")
        tokenizer = FileTokenizer.from_merges(vocab, merges, ["<|endoftext|>"])
    """

    tokenizer_type = "file"
    EOS_CANDIDATES = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")

    def __init__(
        self,
        json_text: str,
        eos_token: str | None = None,
        special_tokens: SpecialTokenMode = "as_text",
    ) -> None:
        """Parse the text, and find the special tokens and the bytes per token.

        Args:
            json_text: the JSON text; its truncation and padding are not used.
            eos_token: the special token that ends a text, by name; by default the first of
                EOS_CANDIDATES that the tokenizer has.
            special_tokens: how special tokens in a text are read.
        """
        import tokenizers

        try:
            self.hf_tokenizer = tokenizers.Tokenizer.from_str(json_text)
            parsed = json.loads(json_text)
        except Exception as error:  # the library raises only Exception
            raise UsageError(
                f"the text is not a file of the tokenizers library: {str(error)[:200]}",
                ["a tokenizer.json of Hugging Face"],
                "use tokenizer='FILE', or tokenizer='gpt2' for GPT-2's",
                flag="--data.tokenizer=FILE, or --data.tokenizer=gpt2",
            ) from None
        self.hf_tokenizer.no_truncation()
        self.hf_tokenizer.no_padding()
        self.json_text = json_text
        added = self.hf_tokenizer.get_added_tokens_decoder()  # by id: tokens outside of the merges
        special_ids = {token.content: n for n, token in added.items() if token.special}
        # stores how they are read; an error if the mode is not known
        self.set_special_tokens(special_ids, special_tokens)
        # The library's flag means: encode their text as ordinary text.
        self.hf_tokenizer.encode_special_tokens = special_tokens != "allow"
        if eos_token is not None and not isinstance(eos_token, str):
            raise UsageTypeError(
                f"eos_token is of type {type(eos_token).__name__}",
                ["the token as a str"],
                "use eos_token='<|endoftext|>'",
            )
        if eos_token and eos_token not in special_ids:
            raise UsageError(
                f"eos_token={eos_token!r} is not a special token",
                special_ids,
                f"use eos_token={next(iter(special_ids), None)!r}",
            )
        # EOS_CANDIDATES: usual names of the token that ends a text, such as <|endoftext|>
        candidates = (name for name in self.EOS_CANDIDATES if name in special_ids)
        eos_name = eos_token or next(candidates, None)
        self.eos_id = None if eos_name is None else special_ids[eos_name]
        # Texts that a cut into chunks must not divide: added tokens are matched as a whole.
        unsplittable = [token.content for token in added.values() if not token.special]
        if special_tokens != "as_text":
            unsplittable += special_ids
        self._set_unsplittable(unsplittable)
        self._compute_token_bytes(parsed, added)

    def _compute_token_bytes(self, parsed: dict[str, Any], added: Mapping[int, Any]) -> None:
        """Set the bytes per token, and whether a text may be cut into chunks.

        Args:
            parsed: the content of the tokenizer.json.
            added: the added tokens by id, with the library's attributes.
        """
        vocab = self.hf_tokenizer.get_vocab(with_added_tokens=True)
        size = 1 + max(vocab.values(), default=-1)
        if size > max(4096, 4 * len(vocab)):  # one large id would allocate too much memory
            raise UsageError(
                f"the largest token id is {size - 1:,}, but there are {len(vocab):,} tokens",
                ["token ids without large gaps"],
                "write the tokenizer file again",
            )
        # the steps that divide a text before the merges, as mappings with a type
        steps = _pretokenizer_steps(parsed.get("pre_tokenizer"))
        byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
        is_plain_bpe = parsed.get("normalizer") is None and parsed["model"].get("type") == "BPE"
        strips_or_joins = any(t.lstrip or t.rstrip or t.single_word for t in added.values())
        adds_prefix_space = any(step.get("add_prefix_space", True) for step in byte_level)
        # ByteLevel writes each byte as one character, so bytes can be counted
        self.has_token_bytes = bool(byte_level) and is_plain_bpe
        # lossless: every byte of a text is in one of its tokens, so a text may be cut after words
        self.is_lossless = self.has_token_bytes and not (strips_or_joins or adds_prefix_space)
        self.written_bytes = torch.zeros(size, dtype=torch.int64)  # including special tokens
        for word, number in vocab.items():
            # in ByteLevel's alphabet a character is one byte; added tokens are stored as plain text
            self.written_bytes[number] = len(word.encode()) if number in added else len(word)
        self.token_bytes = self.written_bytes.clone()
        # a special token stands for no byte of the text
        self.token_bytes[list(self.special_ids.values())] = 0

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids (n) of a text, without the tokens that the library can add around it.

        Raises:
            UsageError: the text holds a special token in the mode `error`, or bytes that are in no
                token.
        """
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate becomes "?"
        if self.special_tokens == "error":
            list(self._split_at_special_tokens(text))  # raises an error if the text holds one
        ids = self.hf_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        numbers = np.array(ids, dtype=np.int64)
        # lossless: every byte of a text is in one of its tokens, unless the vocabulary lacks a byte
        if self.is_lossless:
            num_text_bytes = len(text.encode())
            num_token_bytes = int(self.written_bytes[numbers].sum())
            if num_text_bytes != num_token_bytes:
                raise UsageError(
                    f"{num_text_bytes - num_token_bytes} of the {num_text_bytes} bytes of a text "
                    "are in no token of the vocabulary",
                    ["a vocabulary with all 256 bytes"],
                    "use tokenizer='bytes', or train the tokenizer with its initial alphabet",
                    flag="--data.tokenizer=bytes",
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

        Args:
            path: the file or the folder.
            special_tokens: how special tokens are read in a text: as_text, allow or error.

        Raises:
            MissingFileError: there is no such file.
            UsageError: the file is not a tokenizer.
        """
        resolved_path = Path(path).expanduser()
        is_folder = resolved_path.is_dir()
        folder = resolved_path if is_folder else resolved_path.parent
        file = resolved_path / "tokenizer.json" if is_folder else resolved_path
        # `_read_eos_token`: the eos_token of the folder's tokenizer_config.json, or None
        older_files = folder / "vocab.json", folder / "merges.txt"  # GPT-2's
        if is_folder and not file.is_file() and all(path.is_file() for path in older_files):
            # makes the text of a tokenizer.json from both files
            return cls(_read_bpe_files(*older_files), _read_eos_token(folder), special_tokens)
        if not file.is_file():
            raise MissingFileError(
                f"there is no tokenizer at {resolved_path}",
                [
                    "characters",
                    "bytes",
                    "gpt2",
                    "a tokenizer.json, or a folder with one or with vocab.json and merges.txt",
                ],
                "use tokenizer='characters'",
                flag="--data.tokenizer=characters",
            )
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{file} is not UTF-8 at byte {error.start}",
                ["a tokenizer.json"],
                "use tokenizer='FILE'",
                flag="--data.tokenizer=FILE",
            ) from None
        try:
            return cls(content, _read_eos_token(folder), special_tokens)
        except UsageError as error:
            raise UsageError(
                f"{file}: {error.problem}", error.allowed, error.hint, flag=error.flag
            ) from None

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
        # a special token is written as plain text, another in ByteLevel's alphabet
        word_by_bytes = {word.encode(): word for word in special_words}
        ids = {word_by_bytes.get(piece) or _bytes_to_chars(piece): n for n, piece in vocab.items()}
        for word in special_words:
            ids.setdefault(word, 1 + max(ids.values(), default=-1))
        # `_bytes_to_chars`: each byte as one printable character, GPT-2's alphabet
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
    """Return the text of a tokenizer.json for a byte pair encoding with GPT-2's word pattern.

    Args:
        vocab: the ids by token; a token's bytes are written in ByteLevel's alphabet.
        merges: the pairs of tokens to merge, in order.
        special_words: the tokens of `vocab` that are special.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    # use_regex: words are found by GPT-2's pattern
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


def _read_bpe_files(vocab_file: Path, merges_file: Path) -> str:
    """Return the tokenizer.json for a vocab.json and a merges.txt, GPT-2's older files."""
    try:
        vocab = json.loads(vocab_file.read_text(encoding="utf-8-sig"))
        lines = merges_file.read_text(encoding="utf-8-sig").split("\n")
        lines = [line.rstrip("\r") for line in lines if line and not line.startswith("#version")]
        pairs = [(a, b) for a, b in (line.split(" ") for line in lines)]  # two words per line
        # these files do not say which tokens are special: known names are looked for
        special = [name for name in FileTokenizer.EOS_CANDIDATES if name in vocab]
        return _make_bpe_json({str(word): int(n) for word, n in vocab.items()}, pairs, special)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{vocab_file} and {merges_file.name} are not a byte pair encoding: {error!r}",
            ["GPT-2's vocab.json and merges.txt"],
            "use tokenizer='FOLDER' with these files",
            flag="--data.tokenizer=FOLDER",
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
