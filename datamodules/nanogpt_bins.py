"""nanoGPT's train.bin and val.bin: tokens without a header, memory-mapped as they are.

Their dtype and vocabulary come from the caller, or from a meta.pkl or meta.json in the same folder.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ravine.errors import UsageError
from ravine.files import atomic_write, cache_folder
from ravine.strategies.checkpoint import safe_pickle

from .corpus import Corpus
from .token_cache import as_tensor, check_token_range, compute_token_range, memmap_tokens
from .tokenizer_factory import make_tokenizer
from .tokenizer_json import FileTokenizer
from .tokenizers import CharTokenizer, NumberTokenizer, Tokenizer

MIN_BYTES_TO_CACHE = 1 << 27  # bytes; the token range of larger files is cached
MAX_META_BYTES = 1 << 24  # maximum bytes of a meta file
TokenType = Literal["uint8", "uint16", "int32", "uint32", "int64", "uint64"]


def has_nanogpt_bins(folder: Path) -> bool:
    """Return whether a folder holds nanoGPT's train.bin and val.bin."""
    return all((folder / name).is_file() for name in ("train.bin", "val.bin"))


def read_nanogpt_bins(
    folder: Path,
    tokenizer_name: str = "characters",
    vocab_size: int | None = None,
    dtype: TokenType | None = None,
) -> Corpus | None:
    """Read nanoGPT's train.bin and val.bin, token arrays without a header; None if missing.

    The tokenizer is given by the arguments, or by a meta.pkl or meta.json (`itos`, `vocab_size`,
    `dtype`) or a tokenizer.json in the folder. Tokens must be below the vocabulary size.

    Args:
        folder: the folder.
        tokenizer_name: gpt2, bytes, or a file; `characters`, the default, means not given.
        vocab_size: vocabulary size of tokens whose tokenizer is not known.
        dtype: integer type of the tokens; by default that of the meta file, or uint16.
    """
    files = folder / "train.bin", folder / "val.bin"  # lists below have this order
    if not has_nanogpt_bins(folder):
        return None
    # the content of meta.pkl or meta.json ({} without one), and its path for errors
    meta, meta_path = _read_meta(folder)
    # that of the meta file is uint16 by default
    token_dtype = np.dtype(dtype or _meta_dtype(meta, meta_path))
    arrays = [memmap_tokens(file, token_dtype) for file in files]
    for file, array in zip(files, arrays, strict=True):
        # raises an error if every second number is 0, as for tokens read with half of their width
        _check_token_width(file, array)
    is_dtype_known = dtype is not None or "dtype" in meta
    # (smallest, largest) token of each file
    token_ranges = [
        _load_or_compute_token_range(file, array) for file, array in zip(files, arrays, strict=True)
    ]
    largest = max(high for _, high in token_ranges)
    known_tokenizer = _resolve_tokenizer(
        folder, meta, meta_path, tokenizer_name, vocab_size, largest
    )
    if not is_dtype_known and known_tokenizer.vocab_size > 1 << 16:
        raise UsageError(
            f"{files[0]} is read as uint16, which cannot hold the {known_tokenizer.vocab_size:,} "
            "tokens of the vocabulary",
            ["int32", "uint32", "an explicit dtype='uint16'"],
            "use dtype='uint32'",
            flag="--data.dtype=uint32",
        )
    for file, array, token_range in zip(files, arrays, token_ranges, strict=True):
        # raises an error for a token outside of the vocabulary
        check_token_range(str(file), array, token_range, known_tokenizer)
    note = ""  # for the log
    # any longer text in GPT-2's tokens has one of the upper half
    if known_tokenizer.tokenizer_type == "gpt2" and largest < known_tokenizer.vocab_size // 2:
        note = (
            f"no token is above {largest:,} of GPT-2's {known_tokenizer.vocab_size:,}: if they "
            f"are of another tokenizer, use vocab_size={largest + 1} or more"
        )
    # tensors of the memory-mapped arrays
    train, val = map(as_tensor, arrays)
    sha256 = _compute_fingerprint(files)
    return Corpus(train, known_tokenizer, sha256, is_memmap=True, val_tokens=val, note=note)


def _resolve_tokenizer(
    folder: Path,
    meta: dict[str, Any],
    meta_path: Path,
    tokenizer_name: str,
    vocab_size: int | None,
    largest: int,
) -> Tokenizer:
    """Return the tokenizer of a folder of tokens: from the arguments, else from its files.

    Args:
        folder: the folder of tokens, maybe with a tokenizer.json.
        meta: the content of its meta.pkl or meta.json; empty without such a file.
        meta_path: the path of that file, for errors.
        tokenizer_name: gpt2, bytes, or a file; `characters`, the default, means not given.
        vocab_size: the given vocabulary size; one that differs from that of the named tokenizer
            takes precedence over it.
        largest: the largest token, for the suggested vocabulary size.

    Raises:
        UsageError: neither the arguments nor the files determine the tokenizer.
    """
    if tokenizer_name != "characters":
        named_tokenizer = make_tokenizer(tokenizer_name)
        if vocab_size in (None, named_tokenizer.vocab_size):
            return named_tokenizer
    if vocab_size is not None:
        # a tokenizer that knows only ids, and writes a text as "17 4"
        return NumberTokenizer(vocab_size)
    if "itos" in meta:
        # itos: the character of each id
        return _make_char_tokenizer(meta["itos"], meta_path)
    tokenizer_file = folder / "tokenizer.json"
    if tokenizer_file.is_file():
        return FileTokenizer.from_file(tokenizer_file)
    size = meta.get("vocab_size")
    if size is not None:
        if not isinstance(size, int) or isinstance(size, bool):
            raise UsageError(
                f"{meta_path} states vocab_size={reprlib.repr(size)[:80]}",
                ["an integer"],
                f"use vocab_size={largest + 1}",
                flag=f"--data.vocab_size={largest + 1}",
            )
        return NumberTokenizer(size)
    raise UsageError(
        f"the tokenizer of the tokens in {folder} is not known; the largest token is {largest:,}",
        ["a meta.pkl or meta.json with vocab_size", "a tokenizer.json", "tokenizer", "vocab_size"],
        f"use tokenizer='gpt2' for GPT-2's tokens, or vocab_size={largest + 1} or more",
        flag=f"--data.tokenizer=gpt2, or --data.vocab_size={largest + 1}",
    )


def _read_meta(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the content of meta.pkl or meta.json, {} without such a file, and the path of it."""
    for name in ("meta.pkl", "meta.json"):
        meta_path = folder / name
        if not meta_path.is_file():
            continue
        # the unpickler admits plain data only, so the file runs no code
        content, problem = _parse_meta(meta_path)
        if problem:
            raise UsageError(
                f"{meta_path} does not describe tokens in nanoGPT's format: {problem}",
                ["a dictionary with itos, vocab_size or dtype"],
                "remove the file and use tokenizer='gpt2' for GPT-2's tokens, or "
                "vocab_size=NUMBER for others",
                flag="--data.tokenizer=gpt2, or --data.vocab_size=NUMBER",
            )
        return content, meta_path
    return {}, folder / "meta.pkl"


def _parse_meta(meta_path: Path) -> tuple[Any, str]:
    """Return the content of a meta.pkl or meta.json and the problem that it has, or ""."""
    if meta_path.stat().st_size > MAX_META_BYTES:
        return None, f"it has more than {MAX_META_BYTES:,} bytes"
    try:
        content = (
            json.loads(meta_path.read_bytes())
            if meta_path.suffix == ".json"
            else _load_meta_pickle(meta_path)
        )
    except RecursionError:
        return None, "it is nested too deeply"
    except UnicodeDecodeError as error:
        return None, f"it is not UTF-8: {error}"
    except (ValueError, TypeError, LookupError, safe_pickle.UnsafePickle) as error:
        return None, str(error.args[0] if error.args else type(error).__name__)
    if not isinstance(content, dict):
        return None, f"it is a {type(content).__name__}, not a dictionary"
    if not {"itos", "vocab_size", "dtype"} & content.keys():
        return None, "it has neither 'itos' nor 'vocab_size' nor 'dtype'"
    return content, ""


def _load_meta_pickle(meta_path: Path) -> Any:
    """Load a pickle of plain values; NumPy's number types are the only classes allowed."""
    dtype_names = get_args(TokenType)
    return safe_pickle.load_plain(
        meta_path.read_bytes(), lambda name: name.module == "numpy" and name.name in dtype_names
    )


def _meta_dtype(meta: dict[str, Any], meta_path: Path) -> str:
    dtype_entry = meta.get("dtype", "uint16")
    # repr of shared lists of a pickle may have millions of words, so reprlib shortens it
    is_plain = isinstance(dtype_entry, str | safe_pickle.GlobalName)
    name = str(dtype_entry).removeprefix("numpy.") if is_plain else reprlib.repr(dtype_entry)
    if name not in get_args(TokenType):
        raise UsageError(
            f"{meta_path} states dtype={name[:40]!r}",
            get_args(TokenType),
            "use dtype='uint16'",
            flag="--data.dtype=uint16",
        )
    return name


def _make_char_tokenizer(itos: Any, meta_path: Path) -> CharTokenizer:
    """Build the character tokenizer of nanoGPT's meta.pkl, or of a meta.json.

    Args:
        itos: the character of each id, from 0: a dictionary or a list.
        meta_path: the path of the file, for errors.

    Raises:
        UsageError: `itos` is no such table, or its characters are not sorted.
    """
    try:
        if isinstance(itos, dict):  # the keys of a dictionary in JSON are texts
            itos = {int(number): character for number, character in itos.items()}
        characters = [itos[number] for number in range(len(itos))]
        tokenizer = CharTokenizer(characters)
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"itos in {meta_path} is not a table of characters: {getattr(error, 'problem', error)}",
            ["one character for each of the indices 0, 1, 2, ..."],
            "remove the file and use tokenizer='gpt2' for GPT-2's tokens, or use path='FILE' "
            "with the text",
            flag="--data.tokenizer=gpt2, or --data.path=FILE",
        ) from error
    # CharTokenizer sorts its characters, and other ids would mean other characters
    if list(tokenizer.characters) != characters:
        raise UsageError(
            f"itos in {meta_path} is not sorted, or has entries of several characters",
            ["sorted single characters"],
            f"use path='FILE' with the text, or vocab_size={len(characters)}",
            flag=f"--data.path=FILE, or --data.vocab_size={len(characters)}",
        )
    return tokenizer


def _check_token_width(file: Path, array: np.ndarray) -> None:
    """Raise an error if tokens were read with half of their width, or the file is a .npy file.

    Small little-endian numbers that are read with half of their width have a 0 at every second
    position; with a quarter of it, also at the positions 2, 6, 10, ...

    Args:
        file: the file of tokens.
        array: its tokens as read (n).
    """
    with file.open("rb") as opened:
        # the first bytes of every .npy file
        if opened.read(6) == b"\x93NUMPY":
            raise UsageError(
                f"{file} is a .npy file with a header",
                ["the numbers alone, without a header"],
                "write the file again with numpy.load(FILE).tofile(FILE)",
            )
    # a part is enough; the file may be large
    head_tokens = array[: 1 << 20]
    # of a few tokens every second one may be 0 by chance; no type is wider than 8 bytes
    if (
        len(head_tokens) >= 8
        and array.dtype.itemsize < 8
        and head_tokens.any()
        and not head_tokens[1::2].any()
    ):
        is_four_times_wider = not head_tokens[2::4].any()
        if array.dtype.itemsize == 1 and not is_four_times_wider:
            allowed = ("uint16",)
        elif array.dtype.itemsize == 4 or is_four_times_wider:
            allowed = ("int64",)
        else:
            allowed = ("int32", "uint32")
        raise UsageError(
            f"every second number of {file} is 0 if it is read as {array.dtype}, so its numbers "
            "are wider",
            allowed,
            f"use dtype={allowed[0]!r}",
            flag=f"--data.dtype={allowed[0]}",
        )


def _load_or_compute_token_range(file: Path, array: np.ndarray) -> tuple[int, int]:
    """Return the smallest and the largest token of a file; the range of a long file is cached.

    Args:
        file: the file of tokens.
        array: its tokens (n), memory-mapped.
    """
    state = file.stat()
    # a file that was written again has another time or size
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {array.dtype}"
    name = f"extent-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    path = cache_folder() / "tokens" / name
    is_long = state.st_size > MIN_BYTES_TO_CACHE
    if is_long and path.is_file():
        try:
            low, high = json.loads(path.read_text())
            return int(low), int(high)
        except (ValueError, TypeError):  # a damaged cache file is written again
            pass
    token_range = compute_token_range(array)
    if is_long:
        with atomic_write(path) as cache_file:
            cache_file.write(json.dumps(token_range).encode())
    return token_range


def _compute_fingerprint(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the file sizes and of the first and last 2^20 bytes."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(max(0, size - (1 << 20)))
            digest.update(opened.read(1 << 20))
    return digest.hexdigest()
