"""Text corpus: read a text in bounded chunks and return it as one token tensor.

A text longer than `max_chars_in_memory` characters is not held in memory: its tokens are
memory-mapped from a file.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ravine.errors import UsageError

from .token_cache import (
    TokenCacheError,
    as_tensor,
    check_token_range,
    compute_token_range,
    read_token_file,
    tokenize_corpus,
    write_token_file,
)
from .tokenizer_factory import make_tokenizer
from .tokenizers import SpecialTokenMode, Tokenizer


class Corpus(NamedTuple):
    """Token ids (n) as uint8, uint16 or int32, their tokenizer, and the SHA-256 of the text."""

    tokens: Tensor
    tokenizer: Tokenizer
    sha256: str
    is_memmap: bool  # whether the tokens are memory-mapped from a file
    val_tokens: Tensor | None = None  # validation tokens, if they come from a separate file
    note: str = ""  # added to the log line


class TextSummary(NamedTuple):
    """The result of one pass over a text, and its token file if `prepare_token_file` wrote one."""

    sha256: str
    characters: str  # the distinct characters, sorted
    num_chars: int
    token_file: str = ""


def summarize_text(iter_text: Callable[[], Iterator[str]], name: str) -> TextSummary:
    """Read a text once and return its SHA-256, its distinct characters and their count."""
    digest, characters, num_chars = hashlib.sha256(), set[str](), 0
    for chunk in iter_text():
        digest.update(chunk.encode())
        characters.update(chunk)
        num_chars += len(chunk)
    if not num_chars:
        raise UsageError(
            f"{name} is empty",
            ["a text of at least one window"],
            "use path='FILE'",
            flag="--data.path=FILE",
        )
    return TextSummary(digest.hexdigest(), "".join(sorted(characters)), num_chars)


def prepare_token_file(
    iter_text: Callable[[], Iterator[str]],
    name: str,
    max_chars_in_memory: int,
    tokenizer_name: str = "characters",
    special_tokens: SpecialTokenMode = "as_text",
) -> TextSummary:
    """Write the tokens of a text to a file, which all processes of a machine read.

    Without a writable cache folder, a text that fits into memory gets no file: each process
    tokenizes it.

    Args:
        iter_text: returns an iterator over the chunks of the text.
        name: name of the text, for errors.
        max_chars_in_memory: tokens of a longer text stay memory-mapped.
        tokenizer_name: the tokenizer, see `make_tokenizer`.
        special_tokens: how the tokenizer's special tokens are read in the text.

    Returns:
        The summary of the text, with `token_file` set if the file was written.

    Raises:
        TokenCacheError: the file of a text that is too long for memory cannot be written.
    """
    # reads the text once: SHA-256, distinct characters, and length
    summary = summarize_text(iter_text, name)
    tokenizer = make_tokenizer(tokenizer_name, summary.characters, special_tokens)
    is_memmap = summary.num_chars > max_chars_in_memory
    try:
        # writes the file unless it exists, and returns its path
        token_file = write_token_file(tokenizer, iter_text, summary.sha256, is_memmap)
        return summary._replace(token_file=str(token_file))
    except TokenCacheError:
        if is_memmap:
            raise
        return summary


def build_corpus(
    iter_text: Callable[[], Iterator[str]],
    name: str,
    max_chars_in_memory: int,
    tokenizer_name: str = "characters",
    special_tokens: SpecialTokenMode = "as_text",
    prepared_summary: TextSummary | None = None,
) -> Corpus:
    """Tokenize a text in two passes: first its characters and SHA-256, then its tokens.

    Args:
        iter_text: returns a new iterator over the chunks of the text, for each pass.
        name: name of the text, for errors.
        max_chars_in_memory: tokens of a longer text stay memory-mapped.
        tokenizer_name: the tokenizer, see `make_tokenizer`.
        special_tokens: how the tokenizer's special tokens are read in the text.
        prepared_summary: the result of `prepare_token_file`; its token file replaces both passes.
    """
    summary = summarize_text(iter_text, name) if prepared_summary is None else prepared_summary
    tokenizer = make_tokenizer(tokenizer_name, summary.characters, special_tokens)
    is_memmap = summary.num_chars > max_chars_in_memory
    if summary.token_file and Path(summary.token_file).is_file():
        # the tokens (n); memory-mapped if the text is long
        tokens = read_token_file(Path(summary.token_file), tokenizer, is_memmap)
    else:
        tokens = tokenize_corpus(tokenizer, iter_text, summary.sha256, is_memmap)
    # a corpus: token ids (n), tokenizer, checksum, and whether the ids stay memory-mapped
    return Corpus(tokens, tokenizer, summary.sha256, is_memmap)


def corpus_from_array(tokens: np.ndarray | Tensor, tokenizer: Tokenizer) -> Corpus:
    """Make a corpus from an array of token ids (n); every id must be in the vocabulary."""
    array = tokens.numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise UsageError(
            f"tokens of type {array.dtype} and shape {array.shape} are not a corpus",
            ["one or more integers of shape (n,)"],
            "give one long array of integers",
        )
    check_token_range("tokens", array, compute_token_range(array), tokenizer)
    digest = hashlib.sha256(array.size.to_bytes(8, "little"))
    digest.update(array[: 1 << 17].tobytes() + array[-(1 << 17) :].tobytes())
    return Corpus(as_tensor(array), tokenizer, digest.hexdigest(), isinstance(array, np.memmap))
