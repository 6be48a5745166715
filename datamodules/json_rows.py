"""Objects of JSON files: one a line (.jsonl, .ndjson), or a list of them (.json).

    {"prompt": "Capital of France? ", "answer": "Paris"}

Each object comes with its place, "FILE, line 3", which an error repeats. Lines are read one at a
time, so a long file takes no more memory than its rows.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ravine.errors import UsageError

from .corpus import files_of

LINES = (".jsonl", ".ndjson")
SUFFIXES = (*LINES, ".json")
BOM = b"\xef\xbb\xbf"
UNWRITABLE = re.compile("[\0\ud800-\udfff]")


class Row(NamedTuple):
    """An object, and where it stands."""

    place: str  # "FILE, line 3"
    fields: dict[str, Any]


def is_json(path: Path) -> bool:
    """Whether a path holds JSON rows, by the suffix: a file, or a folder of nothing else."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    files = files_of(path)
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if found and len(found) < len(files):
        other = next(file for file in files if file not in found)
        raise UsageError(
            f"{path} holds JSON ({found[0].name}) and other files ({other.name}); allowed: a "
            "folder of one kind; move the others to a folder of their own"
        )
    return bool(found)


def rows(path: Path, example: str, flag: str = "--data.path") -> Iterator[Row]:
    """The objects of a file, or of all files of a folder in the order of their names.

    Args:
        path: a file or a folder.
        example: an object as it should be, shown by an error.
        flag: what to type for another path.
    """
    for file in files_of(path, flag):
        if file.suffix.lower() == ".json":
            yield from _list(file, example)
        else:
            yield from _lines(file, example)


def check_text(text: str, place: str, field: str) -> str:
    """Return a text; refuse U+0000 and halves of characters, which no UTF-8 text holds."""
    if found := UNWRITABLE.search(text):
        what = "the character" if found[0] == "\0" else "half of a character,"
        raise UsageError(
            f"{place}: field {field!r} holds {what} U+{ord(found[0]):04X} at position "
            f"{found.start()}; allowed: whole characters of a text; remove it from the file"
        )
    return text


def _lines(file: Path, example: str) -> Iterator[Row]:
    number = 0
    with file.open("rb") as opened:
        for piece in opened:
            for line in piece.rstrip(b"\r\n").split(b"\r"):  # a string of JSON holds no raw break
                number += 1
                line = line.removeprefix(BOM) if number == 1 else line
                if not line.strip():
                    continue
                place = f"{file}, line {number}"
                found = _parsed(_decoded(line, place, file), place, example)
                yield Row(place, _object(found, place, example))


def _list(file: Path, example: str) -> Iterator[Row]:
    text = _decoded(file.read_bytes().removeprefix(BOM), str(file), file)
    try:
        found = _parsed(text, str(file), example)
    except ValueError as error:
        if "Extra data" in str(error) and text.lstrip().startswith("{"):
            yield from _lines(file, example)  # an object a line, under the other suffix
            return
        raise
    if not isinstance(found, list):
        found = [found]
    for number, row in enumerate(found, 1):
        place = f"{file}, object {number}"
        yield Row(place, _object(row, place, example))


def _decoded(text: bytes, place: str, file: Path) -> str:
    """Decode a line, or a whole file, whose bad byte is then named by its line."""
    try:
        bad, found = text.find(0), ""
        if bad < 0:
            found = text.decode()
    except UnicodeDecodeError as error:
        bad = error.start
    if bad < 0:
        return found
    start = text.rfind(b"\n", 0, bad) + 1  # of its line
    where = f"{file}, line {1 + text[:start].count(10)}" if place == str(file) else place
    wide = not text[bad] or text[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if wide else "latin1"
    raise UsageError(
        f"{where}: {'no text' if not text[bad] else 'not UTF-8'}: byte 0x{text[bad]:02x} at "
        f"position {bad - start}; if it is {encoding}, type "
        f"iconv -f {encoding} -t utf-8 '{file}' > rows{file.suffix}"
    )


def _parsed(text: str, place: str, example: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if ", line " not in place else ""
        raise UsageError(
            f"{place}{line}: not JSON: {error.msg} at column {error.colno}; write {example}"
        ) from None
    except RecursionError:
        raise UsageError(f"{place}: not a row: too many brackets in one another; write {example}"
                         ) from None  # fmt: skip
    except ValueError as error:  # a number of more than 4,300 digits
        raise UsageError(f"{place}: not a row: {error}; write {example}") from None


def _object(found: Any, place: str, example: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UsageError(f"{place}: {_kind(found)}, not an object; write {example}")
    return found


def _kind(found: Any) -> str:
    return type(found).__name__


def checksum(files: Iterable[Path]) -> str:
    """SHA-256 of the content of files, one after the other; of one file that of the file."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
