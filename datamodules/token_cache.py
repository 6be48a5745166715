"""Tokens on disk and in memory: a text is tokenized once, on all cores, and found again by content.

A long text becomes a file of tokens of two or four bytes in the cache folder, named by the checksum
of the text and the tokenizer, memory-mapped, of which only the parts in use are read. nanoGPT's
train.bin and val.bin are such files, and are read as they are, with the type and the vocabulary
that a meta.pkl or meta.json beside them, or the caller, says.
"""

import hashlib
import json
import os
import reprlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ravine.errors import RunError, UsageError
from ravine.strategies.checkpoint import safe_pickle as plain_pickle

from .downloads import cache_folder, whole
from .tokenizers import CharTokenizer, FileTokenizer, NumberTokenizer, Tokenizer, make_tokenizer

PIECE = 1 << 20  # characters tokenized at once by one core
SCANNED = 1 << 24  # tokens looked at once
REMEMBERED = 1 << 27  # bytes of a file whose extent is kept, not to read it at each start
META = 1 << 24  # bytes of a meta file at most
TokenType = Literal["uint8", "uint16", "int32", "uint32", "int64", "uint64"]


def tokenized(
    tokenizer: Tokenizer, text: Callable[[], Iterator[str]], sha256: str, mapped: bool
) -> Tensor:
    """The tokens (n) of a text: in memory, uint8 if that is enough, or mapped from a file."""
    if mapped:
        return read_tokens(write_tokens(tokenizer, text, sha256, mapped), tokenizer, mapped)
    kind = _type_for(tokenizer, mapped)
    return as_tensor(np.concatenate([part.astype(kind) for part in encoded(tokenizer, text())]))


def write_tokens(
    tokenizer: Tokenizer, text: Callable[[], Iterator[str]], sha256: str, mapped: bool
) -> Path:
    """The file with the tokens of a text, written unless it is there.

    Two jobs may write the same file at the same time: it is renamed to its name when it
    is whole.

    Args:
        tokenizer: makes the tokens.
        text: gives the text in pieces.
        sha256: the checksum of the text.
        mapped: whether the tokens stay a file, or are held in memory.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    kind = _type_for(tokenizer, mapped)
    # a tokenizer that refuses special tokens has to read the text even if a file of it exists
    name = tokenizer.name + ("-refuse" if tokenizer.specials == "refuse" else "")
    path = cache_folder() / "tokens" / f"{sha256}-{name}.{kind}"
    if path.is_file():
        return path
    try:
        with whole(path) as part, part.open("wb") as file:
            for numbers in encoded(tokenizer, text()):
                file.write(numbers.astype(kind).data)
    except OSError as error:
        at = path.parent if error.filename is None else Path(error.filename)
        if not (path.is_relative_to(at) or at.is_relative_to(path.parent)):
            raise  # the text itself cannot be read
        raise TokensUnwritable(
            error.errno,
            f"{error.strerror or error}: the tokens cannot be written to {path.parent}; allowed: a "
            "folder with room for two to four bytes a token; set XDG_CACHE_HOME=FOLDER",
        ) from error
    return path


class TokensUnwritable(OSError, RunError):
    """The cache folder has no room for tokens or may not be written."""

    def __str__(self) -> str:
        """The text without the number of the error."""
        return str(self.args[1])


def read_tokens(path: Path, tokenizer: Tokenizer, mapped: bool) -> Tensor:
    """The tokens (n) of a file of `write_tokens`, whose pages all processes share."""
    return as_tensor(mapping(path, _type_for(tokenizer, mapped)))


def _type_for(tokenizer: Tokenizer, mapped: bool) -> np.dtype:
    """The dtype of a token: two or four bytes in a file, one byte in memory if that is enough."""
    if not mapped and tokenizer.vocabulary <= 256:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32)


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory as a tensor; uint32 as int32, which torch gathers on every device."""
    signed = {"uint32": np.int32, "uint64": np.int64}.get(str(array.dtype))
    return torch.from_numpy(array if signed is None else array.view(signed))


def mapping(path: Path, kind: np.dtype) -> np.ndarray:
    """A file of tokens as an array (n); nothing is read yet."""
    size = path.stat().st_size
    if size % kind.itemsize or not size:
        raise UsageError(
            f"{path} has {size} bytes and should hold {NUMBERS[kind.itemsize]} for each token: "
            "it is cut short or of another kind; make it again, or type --data.dtype="
            f"{'uint8' if size % 2 else 'uint16'} if that is its type"
        )
    return np.memmap(path, kind, "c")  # on write copied: the file stays


NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight"}


def encoded(tokenizer: Tokenizer, text: Iterable[str]) -> Iterator[np.ndarray]:
    """Token numbers piece by piece, in order, some pieces ahead on every core."""
    cores = os.cpu_count() or 1
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(cores) as pool:  # tiktoken and numpy let other threads run
        for piece in at_borders(text, tokenizer):
            waiting.append(pool.submit(tokenizer.numbers, piece))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def at_borders(text: Iterable[str], tokenizer: Tokenizer, size: int = PIECE) -> Iterator[str]:
    """Cut a text into pieces of at most `size` at borders, where the tokenizer changes no token.

    A piece is longer only where there is no border: of one word of a million letters, say. What
    has been searched for a border is neither searched nor copied again.
    """
    held: list[str] = []  # the beginning of a piece, without a border that is far enough
    length, buffer = 0, ""
    for part in text:
        buffer, place = buffer + part, 0
        while True:
            least = tokenizer.reach if held else 1  # those before were looked at
            border = tokenizer.border(buffer, place + max(least, size // 2 - length))
            if border is None:
                break
            yield "".join([*held, buffer[place:border]])
            held, length, place = [], 0, border
        # a border may yet come behind the last ones, and is judged by those before it
        split = max(place, len(buffer) - 2 * tokenizer.reach)
        if split > place:
            held.append(buffer[place:split])
            length += split - place
        buffer = buffer[split:]
    if held or buffer:
        yield "".join([*held, buffer])


class Bins(NamedTuple):
    """Training tokens, validation tokens, both (n), their tokenizer, and a note for the user."""

    train: Tensor
    val: Tensor
    tokenizer: Tokenizer
    sha256: str  # of the sizes and the two ends of the files
    note: str = ""


def is_bins(folder: Path) -> bool:
    """Whether a folder holds tokens, in train.bin and val.bin."""
    return all((folder / name).is_file() for name in ("train.bin", "val.bin"))


def read_bins(
    folder: Path,
    tokenizer: str = "characters",
    vocabulary: int | None = None,
    dtype: TokenType | None = None,
) -> Bins | None:
    """Read a folder with train.bin and val.bin, if it is one: arrays of tokens without a header.

    What a token is, is said by the caller, or else by a meta.pkl or meta.json (`itos`,
    `vocab_size`, `dtype`) or a tokenizer.json in the folder. Tokens must be below the vocabulary.

    Args:
        folder: the folder.
        tokenizer: gpt2, bytes, or a file; `characters` means that nothing was said.
        vocabulary: how many different tokens there are, of tokens whose text is not known.
        dtype: of the numbers, by default that of the meta file, or uint16.
    """
    files = folder / "train.bin", folder / "val.bin"
    if not is_bins(folder):
        return None
    meta, place = _meta(folder)
    kind = np.dtype(dtype or _type_of(meta, place))
    arrays = [mapping(file, kind) for file in files]
    for file, array in zip(files, arrays, strict=True):
        _refuse_other_type(file, array)
    said = dtype is not None or "dtype" in meta
    extents = [_extent(file, array) for file, array in zip(files, arrays, strict=True)]
    largest = max(extent[1] for extent in extents)
    what = _what(folder, meta, place, tokenizer, vocabulary, largest)
    if not said and what.vocabulary > 1 << 16:
        raise UsageError(
            f"{files[0]} is read as uint16, which cannot hold the {what.vocabulary:,} tokens of "
            "the vocabulary; allowed: int32, uint32, or uint16 if it is that all the same; type "
            "--data.dtype=uint32"
        )
    for file, array, found in zip(files, arrays, extents, strict=True):
        check_tokens(str(file), array, found, what)
    note = ""
    if what.kind == "gpt2" and largest < what.vocabulary // 2:
        note = (
            f"no token is above {largest:,} of GPT-2's {what.vocabulary:,}: if they are another "
            f"tokenizer's, type --data.vocabulary={largest + 1} or more"
        )
    train, val = map(as_tensor, arrays)
    return Bins(train, val, what, _fingerprint(files), note)


def check_tokens(
    name: str, array: np.ndarray, found: tuple[int, int], tokenizer: Tokenizer
) -> None:
    """Refuse tokens outside of the vocabulary; `found` is their smallest and their largest."""
    low, high = found
    if low >= 0 and high < tokenizer.vocabulary:
        return
    wrong = low if low < 0 else high
    fix = f"--data.vocabulary={high + 1} or more" if low >= 0 else "--data.dtype=uint32"
    raise UsageError(
        f"{name} holds the token {wrong:,} at place {int(np.argmax(array == wrong)):,}, and the "
        f"vocabulary has {tokenizer.vocabulary:,}; allowed: 0 to {tokenizer.vocabulary - 1:,}; "
        f"type {fix}"
    )


def _what(
    folder: Path, meta: dict[str, Any], place: Path, name: str, vocabulary: int | None, largest: int
) -> Tokenizer:
    """The tokenizer of a folder of tokens: from the arguments, else from its files."""
    if name != "characters":
        known = make_tokenizer(name)
        if vocabulary in (None, known.vocabulary):
            return known
    if vocabulary is not None:
        return NumberTokenizer(vocabulary)
    if "itos" in meta:
        return _characters(meta["itos"], place)
    beside = folder / "tokenizer.json"
    if beside.is_file():
        return FileTokenizer.of_file(beside)
    size = meta.get("vocab_size")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool):
            raise UsageError(
                f"{place} says that vocab_size is {reprlib.repr(size)[:80]}; allowed: a number; "
                f"type --data.vocabulary={largest + 1}"
            )
        return NumberTokenizer(size)
    raise UsageError(
        f"{folder} says nowhere what its tokens are, of which the largest is {largest:,}; allowed: "
        "a meta.pkl or meta.json with vocab_size, a tokenizer.json; type --data.tokenizer=gpt2 if "
        f"they are GPT-2's, or else --data.vocabulary={largest + 1} or more"
    )


def _meta(folder: Path) -> tuple[dict[str, Any], Path]:
    """The content of meta.pkl or meta.json, and the path of the file."""
    for name in ("meta.pkl", "meta.json"):
        place = folder / name
        if not place.is_file():
            continue
        try:
            if place.stat().st_size > META:
                raise UsageError(f"it has more than {META:,} bytes")
            content = place.read_bytes()
            said = json.loads(content) if name == "meta.json" else _unpickled(place)
            if not isinstance(said, dict):
                raise TypeError(f"{type(said).__name__}, not a dictionary")
            if not {"itos", "vocab_size", "dtype"} & said.keys():
                raise LookupError("it has neither 'itos' nor 'vocab_size' nor 'dtype'")
            return said, place
        except RecursionError:
            told: object = "it is nested too deep"
        except (ValueError, TypeError, LookupError, plain_pickle.UnsafePickle) as error:
            told = error.args[0] if error.args else type(error).__name__
        raise UsageError(
            f"{place} does not describe tokens as nanoGPT's does: {told}; remove it, and type "
            "--data.tokenizer=gpt2 if the tokens are GPT-2's, or --data.vocabulary=NUMBER"
        )
    return {}, folder / "meta.pkl"


def _unpickled(place: Path) -> Any:
    """The plain values of a pickle; of classes only NumPy's number types, as names."""
    kinds = get_args(TokenType)
    return plain_pickle.load(
        place.read_bytes(), lambda name: name.module == "numpy" and name.name in kinds
    )


def _type_of(meta: dict[str, Any], place: Path) -> str:
    said = meta.get("dtype", "uint16")
    # shared lists of a pickle may unfold to millions of words: shortened, not written out
    plain = isinstance(said, str | plain_pickle.Name)
    name = str(said).removeprefix("numpy.") if plain else reprlib.repr(said)
    if name not in get_args(TokenType):
        raise UsageError(
            f"{place} says that dtype is {name[:40]!r}; allowed: {', '.join(get_args(TokenType))}; "
            "type --data.dtype=uint16"
        )
    return name


def _characters(numbered: Any, place: Path) -> CharTokenizer:
    """The characters that nanoGPT's meta.pkl names."""
    try:
        characters = [numbered[number] for number in range(len(numbered))]
        tokenizer = CharTokenizer(characters)
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{place} does not name characters as nanoGPT's does: {error}; remove it if the tokens "
            "are GPT-2's, or give the text itself: --data.path=FILE"
        ) from error
    if list(tokenizer.characters) != characters:
        raise UsageError(
            f"{place} does not sort its characters, or has longer words; give the text: "
            f"--data.path=FILE, or type --data.vocabulary={len(characters)}"
        )
    return tokenizer


def _refuse_other_type(file: Path, array: np.ndarray) -> None:
    """Refuse numbers that were read as half as wide as they are, and NumPy's own files."""
    with file.open("rb") as opened:
        if opened.read(6) == b"\x93NUMPY":
            raise UsageError(
                f"{file} is a .npy file; allowed: the numbers alone; write it again with "
                "numpy.load(FILE).tofile(FILE)"
            )
    some = array[: 1 << 20]
    if len(some) >= 8 and array.dtype.itemsize < 8 and some.any() and not some[1::2].any():
        wide = array.dtype.itemsize == 4 or not some[2::4].any()
        allowed = ("int64",) if wide else ("int32", "uint32")
        allowed = ("uint16",) if array.dtype.itemsize == 1 and some[2::4].any() else allowed
        raise UsageError(
            f"every second number of {file} is 0 where they are read as {array.dtype}: they are "
            "wider; "
            f"allowed: {', '.join(allowed)}; type --data.dtype={allowed[0]}"
        )


def _extent(file: Path, array: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest token of a file; of a long file it is read once."""
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {array.dtype}"
    name = f"extent-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    path = cache_folder() / "tokens" / name
    long = state.st_size > REMEMBERED
    if long and path.is_file():
        try:
            low, high = json.loads(path.read_text())
            return int(low), int(high)
        except (ValueError, TypeError):
            pass
    found = extent(array)
    if long:
        with whole(path) as part:
            part.write_text(json.dumps(found))
    return found


def extent(array: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest number of an array (n), a mapped one too."""
    pieces = [array[n : n + SCANNED] for n in range(0, len(array), SCANNED)]
    return min(int(p.min()) for p in pieces), max(int(p.max()) for p in pieces)


def _fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of the sizes and of the first and last million bytes."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(max(0, size - (1 << 20)))
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()
