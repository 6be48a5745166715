"""A corpus: any text file or folder as one tensor of token numbers, read in pieces of bounded size.

Up to 256 different characters a token is one byte; a text above `memory_limit` becomes a file of
two-byte tokens in the cache folder, memory-mapped, of which only the parts in use are read.
"""

import codecs
import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sources import cache_folder, whole
from .tokenizers import CharTokenizer

PIECE = 1 << 24  # bytes read at once


class Corpus(NamedTuple):
    """The tokens (n), uint8 or uint16, what made them, and the checksum of the text."""

    tokens: Tensor
    tokenizer: CharTokenizer
    sha256: str
    mapped: bool  # the tokens are a file


def files_of(path: Path, flag: str = "--data.path") -> list[Path]:
    """The file itself, or all files of a folder but the hidden ones, in the order of names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, beside, 3) or sorted(beside)[:3]
        there = f"nearest there: {', '.join(nearest)}" if nearest else "its folder is missing, too"
        raise FileNotFoundError(f"no file or folder {path}; {there}; type {flag}=FILE")
    files = sorted(p for p in path.rglob("*") if p.is_file())
    files = [p for p in files if not any(q.startswith(".") for q in p.relative_to(path).parts)]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no files; type {flag}=FOLDER")
    return files


def read(files: Iterable[Path], flag: str = "--data.path") -> Iterator[str]:
    """The text of the files in pieces, a line break between two files."""
    for number, file in enumerate(files):
        if number:
            yield "\n"
        yield from _read(file, flag)


def _read(path: Path, flag: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    place = 0  # of the first byte not yet decoded
    with path.open("rb") as file:
        while True:
            piece = file.read(PIECE)
            if b"\0" in piece:
                raise ValueError(
                    f"{path} is no text: byte 0x00 at position {file.tell() - len(piece)} or "
                    "after; if it is UTF-16, type "
                    f"iconv -f utf-16 -t utf-8 '{path}' > text.txt and {flag}=text.txt"
                )
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                    f"{place + error.start}; if it is Latin-1, type "
                    f"iconv -f latin1 -t utf-8 '{path}' > text.txt and {flag}=text.txt"
                ) from None
            place = file.tell() - len(decoder.getstate()[0])
            if not piece:
                return


def load(pieces: Callable[[], Iterator[str]], name: str, memory_limit: int) -> Corpus:
    """Read the text twice: for its characters and checksum, then for its tokens."""
    digest, characters, count = hashlib.sha256(), set[str](), 0
    for piece in pieces():
        digest.update(piece.encode())
        characters.update(piece)
        count += len(piece)
    if not count:
        raise ValueError(f"{name} is empty: give a text of at least one window, --data.path=FILE")
    tokenizer = CharTokenizer(characters)
    if tokenizer.vocabulary > 1 << 16:
        raise ValueError(f"{name} has {tokenizer.vocabulary:,} different characters, over 65,536")
    encoded = (tokenizer.numbers(piece) for piece in pieces())
    if count <= memory_limit:
        tokens = np.empty(count, np.uint8 if tokenizer.vocabulary <= 256 else np.uint16)
        _fill(tokens, encoded)
    else:
        path = cache_folder() / "tokens" / f"{digest.hexdigest()}-{tokenizer.kind}.uint16"
        if not path.is_file():
            with whole(path) as part:
                file = np.memmap(part, np.uint16, "w+", shape=(count,))
                _fill(file, encoded)
                file.flush()
        tokens = np.memmap(path, np.uint16, "c")  # copy on write: the file can never change
    return Corpus(torch.from_numpy(tokens), tokenizer, digest.hexdigest(), count > memory_limit)


def _fill(tokens: np.ndarray, pieces: Iterable[np.ndarray]) -> None:
    place = 0
    for piece in pieces:
        tokens[place : place + len(piece)] = piece
        place += len(piece)
