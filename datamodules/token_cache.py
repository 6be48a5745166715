"""Token cache: tokenize a text once, on all cores, and store the tokens in a memory-mapped file.

A long text becomes a file of two-byte or four-byte tokens in the cache folder, named by the SHA-256
of the text and the tokenizer. Memory mapping reads only the used parts.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ravine.errors import RunError, UsageError
from ravine.files import atomic_write, cache_folder

from .tokenizers import Tokenizer

CHUNK_CHARS = 1 << 20  # characters per encoding task
SCAN_CHUNK = 1 << 24  # tokens per scan step


def tokenize_corpus(
    tokenizer: Tokenizer, text: Callable[[], Iterator[str]], sha256: str, is_memmap: bool
) -> Tensor:
    """Return the tokens (n) of a text: in memory, as uint8 if that is enough, or memory-mapped."""
    if is_memmap:
        return read_token_file(
            write_token_file(tokenizer, text, sha256, is_memmap), tokenizer, is_memmap
        )
    token_dtype = _token_dtype(tokenizer, is_memmap)
    return as_tensor(
        np.concatenate([chunk.astype(token_dtype) for chunk in encode_parallel(tokenizer, text())])
    )


def write_token_file(
    tokenizer: Tokenizer, text: Callable[[], Iterator[str]], sha256: str, is_memmap: bool
) -> Path:
    """Write the tokens of a text to a file in the cache, unless it exists; return its path.

    Two jobs may write the same file at the same time: the file gets its name only when it is
    complete.

    Args:
        tokenizer: the tokenizer.
        text: returns an iterator over the chunks of the text.
        sha256: the SHA-256 of the text.
        is_memmap: whether the tokens stay memory-mapped or are held in memory.

    Raises:
        TokenCacheError: the cache folder cannot be written.
    """
    # the integer type in which this vocabulary is stored
    token_dtype = _token_dtype(tokenizer, is_memmap)
    # In the mode "error" a special token in the text is an error. Tokens that another mode has
    # cached are not used, because the text would not be searched.
    # `cache_key` differs for tokenizers that give different tokens.
    name = tokenizer.cache_key + ("-error" if tokenizer.special_tokens == "error" else "")
    path = cache_folder() / "tokens" / f"{sha256}-{name}.{token_dtype}"
    if path.is_file():
        return path
    try:
        with atomic_write(path) as file:
            # arrays of ids, in the order of the text
            for numbers in encode_parallel(tokenizer, text()):
                file.write(numbers.astype(token_dtype).data)
    except OSError as error:
        failed_path = path.parent if error.filename is None else Path(error.filename)
        # either a folder that contains the token file, or a file in its folder
        if not (path.is_relative_to(failed_path) or failed_path.is_relative_to(path.parent)):
            raise  # the error comes from reading the text
        raise TokenCacheError(path.parent, error) from error
    return path


class TokenCacheError(OSError, RunError):
    """The cache folder is full or not writable."""

    def __init__(self, folder: Path, error: OSError) -> None:
        """Describe the error of a write to `folder`."""
        RunError.__init__(
            self,
            f"the tokens cannot be written to {folder}: {error.strerror or error}",
            ["a folder with room for two to four bytes per token"],
            "set the environment variable XDG_CACHE_HOME to such a folder",
        )
        self.errno = error.errno


def read_token_file(path: Path, tokenizer: Tokenizer, is_memmap: bool) -> Tensor:
    """Map the tokens (n) of a file of `write_token_file`; all processes share its pages."""
    return as_tensor(memmap_tokens(path, _token_dtype(tokenizer, is_memmap)))


def _token_dtype(tokenizer: Tokenizer, is_memmap: bool) -> np.dtype:
    """Return the dtype of a token: two or four bytes in a file, one byte in memory if enough."""
    if not is_memmap and tokenizer.vocab_size <= 256:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor on the same memory; unsigned 32 and 64 bit integers become signed.

    torch gathers signed integers on every device.
    """
    signed = {"uint32": np.int32, "uint64": np.int64}.get(str(array.dtype))
    return torch.from_numpy(array if signed is None else array.view(signed))


def memmap_tokens(path: Path, token_dtype: np.dtype) -> np.ndarray:
    """Memory-map a file of tokens as an array (n), without reading it."""
    size = path.stat().st_size
    if size % token_dtype.itemsize or not size:
        other_dtype = "uint8" if size % 2 else "uint16"
        raise UsageError(
            f"{path} has {size} bytes, which is not a whole number of tokens of {token_dtype}",
            [f"one or more tokens of {token_dtype.itemsize} bytes each"],
            f"write the file again, or use dtype={other_dtype!r} if that is its type",
            flag=f"--data.dtype={other_dtype}",
        )
    return np.memmap(path, token_dtype, "c")  # copy-on-write: the file does not change


def encode_parallel(tokenizer: Tokenizer, text: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of a text chunk by chunk, in order, encoded ahead on all cores."""
    cores = os.cpu_count() or 1
    pending: deque[Any] = deque()
    with ThreadPoolExecutor(cores) as pool:  # tiktoken and numpy release the GIL
        for chunk in split_at_word_boundaries(text, tokenizer):
            pending.append(pool.submit(tokenizer.encode_array, chunk))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def split_at_word_boundaries(
    text: Iterable[str], tokenizer: Tokenizer, max_chars: int = CHUNK_CHARS
) -> Iterator[str]:
    """Split a text into chunks of at most `max_chars` at boundaries where a cut changes no token.

    A chunk is longer only if it has no such boundary, for example a word of a million letters. Text
    that was searched for a boundary is neither searched nor copied again.

    Args:
        text: the text in pieces of any length.
        tokenizer: finds the boundaries; a check of one reads `lookahead` characters after it.
        max_chars: the largest length of a chunk; boundaries are searched from half of it.
    """
    held_chunks: list[str] = []  # start of the next chunk, without a usable boundary
    length = 0  # characters in `held_chunks`
    buffer = ""  # text that follows `held_chunks`
    for piece in text:
        buffer += piece
        position = 0  # characters of the buffer that are already in yielded chunks
        while True:
            # The end of `held_chunks` is searched already, except its last characters.
            min_offset = tokenizer.lookahead if held_chunks else 1
            # the first position from there on at which a cut changes no token; None in this buffer
            boundary = tokenizer.next_boundary(
                buffer, position + max(min_offset, max_chars // 2 - length)
            )
            if boundary is None:
                break
            yield "".join([*held_chunks, buffer[position:boundary]])
            held_chunks, length, position = [], 0, boundary
        # keep the end: a boundary may follow it, and its check needs the characters before it
        split = max(position, len(buffer) - 2 * tokenizer.lookahead)
        if split > position:
            held_chunks.append(buffer[position:split])
            length += split - position
        buffer = buffer[split:]
    if held_chunks or buffer:
        yield "".join([*held_chunks, buffer])


def check_token_range(
    name: str, array: np.ndarray, token_range: tuple[int, int], tokenizer: Tokenizer
) -> None:
    """Raise an error if tokens are outside of the vocabulary.

    Args:
        name: the file or the array, for errors.
        array: the tokens (n), searched for the position of a wrong one.
        token_range: the smallest and the largest token of the array.
        tokenizer: the tokenizer with the vocabulary.
    """
    low, high = token_range
    if low >= 0 and high < tokenizer.vocab_size:
        return
    # a negative token usually is a large one that was read with a signed type
    invalid_token = low if low < 0 else high
    raise UsageError(
        f"{name} holds the token {invalid_token:,} at position "
        f"{int(np.argmax(array == invalid_token)):,}, which is not in the vocabulary of "
        f"{tokenizer.vocab_size:,} tokens",
        [f"0 to {tokenizer.vocab_size - 1:,}"],
        f"use vocab_size={high + 1} or more" if low >= 0 else "use dtype='uint32'",
        flag=f"--data.vocab_size={high + 1}" if low >= 0 else "--data.dtype=uint32",
    )


def compute_token_range(array: np.ndarray) -> tuple[int, int]:
    """Return the smallest and the largest number of an array (n), which may be memory-mapped."""
    chunks = [array[n : n + SCAN_CHUNK] for n in range(0, len(array), SCAN_CHUNK)]
    return min(int(p.min()) for p in chunks), max(int(p.max()) for p in chunks)
