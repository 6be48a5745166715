"""Tokens on disk and in memory: a text is tokenized once, on all cores, and found again by content.

A long text becomes a file of two-byte tokens in the cache folder, named by the checksum of the text
and the kind of tokenizer, memory-mapped, of which only the parts in use are read. nanoGPT's
train.bin and val.bin are such files, and are read as they are.
"""

import os
import pickle
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sources import cache_folder, whole
from .tokenizers import CharTokenizer, Tokenizer, gpt2

PIECE = 1 << 20  # characters tokenized at once by one core
WORD_END = re.compile(r"[A-Za-z0-9](?=[ \n])")


def tokenized(
    tokenizer: Tokenizer, text: Callable[[], Iterator[str]], sha256: str, mapped: bool
) -> Tensor:
    """The tokens (n) of a text: in memory, uint8 if that is enough, or mapped from a file."""
    if not mapped:
        kind = np.uint8 if tokenizer.vocabulary <= 256 else np.uint16
        parts = [part.astype(kind) for part in encoded(tokenizer, text())]
        return torch.from_numpy(np.concatenate(parts))
    path = cache_folder() / "tokens" / f"{sha256}-{tokenizer.kind}.uint16"
    if not path.is_file():
        with whole(path) as part, part.open("wb") as file:
            for numbers in encoded(tokenizer, text()):
                numbers.astype(np.uint16).tofile(file)
    return mapping(path)


def mapping(path: Path) -> Tensor:
    """A file of two-byte tokens as a tensor (n); nothing is read yet."""
    if path.stat().st_size % 2 or not path.stat().st_size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes and should hold two for each token: "
            "it is cut short or of another kind; make it again"
        )
    return torch.from_numpy(np.memmap(path, np.uint16, "c"))  # on write copied: the file stays


def encoded(tokenizer: Tokenizer, text: Iterable[str]) -> Iterator[np.ndarray]:
    """Token numbers piece by piece, in order, some pieces ahead on every core."""
    cores = os.cpu_count() or 1
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(cores) as pool:  # tiktoken and numpy let other threads run
        for piece in at_words(text):
            waiting.append(pool.submit(tokenizer.numbers, piece))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def at_words(text: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Cut between a word and the space after it: no kind of tokenizer joins the two."""
    rest = ""
    for part in text:
        rest, start = rest + part, 0
        while len(rest) - start > size:
            ends = [end.end() for end in WORD_END.finditer(rest, start + size // 2, start + size)]
            beyond = None if ends else WORD_END.search(rest, start + size)  # one very long word
            if not ends and beyond is None:
                break
            cut = ends[-1] if ends else beyond.end()  # type: ignore[union-attr]
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


class Plain(pickle.Unpickler):
    """Reads dictionaries, texts and numbers; anything that would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_bins(folder: Path) -> tuple[Tensor, Tensor, Tokenizer] | None:
    """Training tokens, validation tokens and tokenizer of a folder made by nanoGPT, if it is one.

    A meta.pkl beside them names the characters; without it the tokens are GPT-2's.
    """
    train, val, meta = (folder / name for name in ("train.bin", "val.bin", "meta.pkl"))
    if not (train.is_file() and val.is_file()):
        return None
    if not meta.is_file():
        return mapping(train), mapping(val), gpt2()
    try:
        with meta.open("rb") as file:
            numbered = Plain(file).load()["itos"]
        characters = [numbered[number] for number in range(len(numbered))]
        tokenizer = CharTokenizer(characters)
    except (pickle.UnpicklingError, LookupError, TypeError, EOFError) as error:
        raise ValueError(
            f"{meta} does not name characters as nanoGPT's does: {error}; remove it if the tokens "
            "are GPT-2's, or give the text itself: --data.path=FILE"
        ) from error
    if list(tokenizer.characters) != characters:
        raise ValueError(f"{meta} does not sort its characters; give the text: --data.path=FILE")
    return mapping(train), mapping(val), tokenizer
