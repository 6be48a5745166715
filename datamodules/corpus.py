"""A corpus: any text file or folder as one tensor of token numbers, read in pieces of bounded size.

A text above `memory_limit` characters is not held in memory: its tokens are a mapped file.
"""

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ravine.errors import MissingFileError, UsageError, suggest_names

from .file_kinds import HEAD, SUFFIXES, refuse_binary
from .token_cache import (
    TokensUnwritable,
    TokenType,
    as_tensor,
    check_tokens,
    extent,
    read_bins,
    read_tokens,
    tokenized,
    write_tokens,
)
from .tokenizers import Specials, Tokenizer, make_tokenizer

PIECE = 1 << 24  # bytes read at once


class Corpus(NamedTuple):
    """The tokens (n) as uint8, uint16 or int32, what made them, and the checksum of the text."""

    tokens: Tensor
    tokenizer: Tokenizer
    sha256: str
    mapped: bool  # the tokens are a file
    rest: Tensor | None = None  # those for validation, where a file of its own holds them
    note: str = ""  # printed for the user


def files_of(path: Path, flag: str = "--data.path") -> list[Path]:
    """The file itself, or all files of a folder but the hidden ones, in the order of names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        beside = [p.name for p in path.parent.glob("[!.]*")] if path.parent.is_dir() else []
        nearest = suggest_names(path.name, beside) or sorted(beside)[:3]
        there = f"nearest there: {', '.join(nearest)}" if nearest else "its folder is missing, too"
        raise MissingFileError(f"no file or folder {path}; {there}; type {flag}=FILE")
    files = []
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if not file.is_file():
                continue
            if file.suffix.lower() in SUFFIXES:  # at once: a wrong folder may hold millions
                with file.open("rb") as opened:
                    refuse_binary(file, opened.read(HEAD), flag)
            files.append(file)
    if not files:
        raise MissingFileError(f"the folder {path} holds no files; type {flag}=FOLDER")
    return sorted(files)


def read(files: Iterable[Path], flag: str = "--data.path") -> Iterator[str]:
    """The text of the files in pieces, a line break between two files."""
    for number, file in enumerate(files):
        if number:
            yield "\n"
        yield from _read(file, flag)


def _read(path: Path, flag: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # Windows marks the start
    place = 0  # of the first byte not yet decoded
    with path.open("rb") as file:
        while True:
            piece = file.read(PIECE)
            if not place:
                refuse_binary(path, piece, flag)
            if b"\0" in piece:
                raise UsageError(
                    f"{path} is no text: byte 0x00 at position {file.tell() - len(piece)} or "
                    "after; if it is UTF-16, type "
                    f"iconv -f utf-16 -t utf-8 '{path}' > text.txt and {flag}=text.txt"
                )
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                    f"{place + error.start}; if it is Latin-1, type "
                    f"iconv -f latin1 -t utf-8 '{path}' > text.txt and {flag}=text.txt"
                ) from None
            place = file.tell() - len(decoder.getstate()[0])
            if not piece:
                return


class Outline(NamedTuple):
    """The result of one pass over a text, and the file of its tokens if `prepare` wrote one."""

    sha256: str
    characters: str  # the different ones, sorted
    count: int
    file: str = ""


def outline(pieces: Callable[[], Iterator[str]], name: str) -> Outline:
    """Read a text once for its checksum, its different characters and their number."""
    digest, characters, count = hashlib.sha256(), set[str](), 0
    for piece in pieces():
        digest.update(piece.encode())
        characters.update(piece)
        count += len(piece)
    if not count:
        raise UsageError(f"{name} is empty: give a text of at least one window, --data.path=FILE")
    return Outline(digest.hexdigest(), "".join(sorted(characters)), count)


def prepare(
    pieces: Callable[[], Iterator[str]],
    name: str,
    memory_limit: int,
    kind: str = "characters",
    specials: Specials = "plain",
) -> Outline:
    """Write the tokens of a text to a file, for all processes of a machine; see `load`.

    A text that is short enough for memory needs no file: if none can be written, each process
    makes its tokens.
    """
    found = outline(pieces, name)
    tokenizer = make_tokenizer(kind, found.characters, specials)
    mapped = found.count > memory_limit
    try:
        return found._replace(file=str(write_tokens(tokenizer, pieces, found.sha256, mapped)))
    except TokensUnwritable:
        if mapped:
            raise
        return found


def load(
    pieces: Callable[[], Iterator[str]],
    name: str,
    memory_limit: int,
    kind: str = "characters",
    specials: Specials = "plain",
    prepared: Outline | None = None,
) -> Corpus:
    """Read the text twice: for its characters and checksum, then for its tokens.

    With the result of `prepare` the text is not read, and the tokens are mapped from its file.
    """
    found = outline(pieces, name) if prepared is None else prepared
    tokenizer = make_tokenizer(kind, found.characters, specials)
    mapped = found.count > memory_limit
    if found.file and Path(found.file).is_file():
        tokens = read_tokens(Path(found.file), tokenizer, mapped)
    else:
        tokens = tokenized(tokenizer, pieces, found.sha256, mapped)
    return Corpus(tokens, tokenizer, found.sha256, mapped)


def bins(
    folder: Path,
    kind: str = "characters",
    vocabulary: int | None = None,
    dtype: TokenType | None = None,
) -> Corpus | None:
    """The tokens of a folder with train.bin and val.bin, if it is one."""
    found = read_bins(folder, kind, vocabulary, dtype)
    if found is None:
        return None
    return Corpus(found.train, found.tokenizer, found.sha256, True, found.val, found.note)


def of_array(tokens: np.ndarray | Tensor, tokenizer: Tokenizer) -> Corpus:
    """An array of tokens (n) as a corpus; every token must be in the vocabulary."""
    array = tokens.numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise UsageError(
            f"tokens are {array.dtype} of shape {array.shape}; allowed: whole numbers of shape "
            "(n,), one or more; give one long array"
        )
    check_tokens("tokens", array, extent(array), tokenizer)
    digest = hashlib.sha256(array.size.to_bytes(8, "little"))
    digest.update(array[: 1 << 17].tobytes() + array[-(1 << 17) :].tobytes())
    return Corpus(as_tensor(array), tokenizer, digest.hexdigest(), isinstance(array, np.memmap))
