"""JSON Lines reader: objects from .jsonl or .ndjson files, one per line, or from a .json list.

    {"prompt": "Capital of France? ", "answer": "Paris"}

Each object comes with its location, "FILE, line 3", for error messages. Lines are read one at a
time, so a long file needs no more memory than its rows.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ravine.errors import UsageError

from .text_files import list_files

LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*LINE_SUFFIXES, ".json")
BOM = b"\xef\xbb\xbf"
INVALID_CHARACTERS = re.compile("[\0\ud800-\udfff]")


class JsonRow(NamedTuple):
    """A JSON object and its location in the file."""

    location: str  # "FILE, line 3"
    fields: dict[str, Any]


def holds_json_rows(path: Path) -> bool:
    """Return whether a path holds JSON rows, by suffix: a file, or a folder of JSON files only."""
    if not path.is_dir():
        return path.suffix.lower() in JSON_SUFFIXES
    files = list_files(path)
    json_files = [file for file in files if file.suffix.lower() in JSON_SUFFIXES]
    if json_files and len(json_files) < len(files):
        other = next(file for file in files if file not in json_files)
        raise UsageError(
            f"{path} holds JSON files ({json_files[0].name}) and other files ({other.name})",
            ["a folder of JSON files only", "a folder of text files only"],
            "move the other files to another folder",
        )
    return bool(json_files)


def read_json_rows(path: Path, example: str, argument: str = "path") -> Iterator[JsonRow]:
    """Yield the objects of a file, or of all files of a folder in the order of their names.

    Args:
        path: a file or a folder.
        example: a valid object, shown in error messages.
        argument: the datamodule's argument for the path, shown in error messages.
    """
    for file in list_files(path, argument):
        if file.suffix.lower() == ".json":
            yield from _iter_list(file, example)
        else:
            yield from _iter_lines(file, example)


def check_text_characters(text: str, location: str, field: str) -> str:
    """Return the text; raise an error on U+0000 and lone surrogates, which are not valid text."""
    if match := INVALID_CHARACTERS.search(text):
        problem = "the character" if match[0] == "\0" else "half of a character,"
        raise UsageError(
            f"{location}: the field {field!r} holds {problem} U+{ord(match[0]):04X} at position "
            f"{match.start()}",
            ["complete Unicode characters other than U+0000"],
            "remove the character from the file",
        )
    return text


def _iter_lines(file: Path, example: str) -> Iterator[JsonRow]:
    number = 0
    with file.open("rb") as opened:
        for chunk in opened:
            for line in chunk.rstrip(b"\r\n").split(b"\r"):  # JSON strings hold no raw line breaks
                number += 1
                line = line.removeprefix(BOM) if number == 1 else line
                if not line.strip():
                    continue
                location = f"{file}, line {number}"
                parsed = _parse(_decode(line, location, file), location, example)
                yield JsonRow(location, _check_object(parsed, location, example))


def _iter_list(file: Path, example: str) -> Iterator[JsonRow]:
    text = _decode(file.read_bytes().removeprefix(BOM), str(file), file)
    if _is_json_lines(text):
        yield from _iter_lines(file, example)
        return
    parsed = _parse(text, str(file), example)
    if not isinstance(parsed, list):
        parsed = [parsed]
    for number, row in enumerate(parsed, 1):
        location = f"{file}, object {number}"
        yield JsonRow(location, _check_object(row, location, example))


def _is_json_lines(text: str) -> bool:
    """Return whether a first object is followed by more text: JSON lines with the suffix .json."""
    text = text.strip(" \t\r\n")
    if not text.startswith("{"):
        return False
    try:
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except (ValueError, RecursionError):
        return False


def _decode(text: bytes, location: str, file: Path) -> str:
    """Decode a line or a whole file as UTF-8.

    Args:
        text: the bytes.
        location: the file and line for errors; the file alone if `text` is the whole file.
        file: the path of the file.

    Raises:
        UsageError: a byte is 0 or no UTF-8; the message names its line and position.
    """
    # a zero byte is valid UTF-8, but no text has one
    bad_offset = text.find(b"\0")
    if bad_offset < 0:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            bad_offset = error.start
    bad_byte = text[bad_offset]
    line_start = text.rfind(b"\n", 0, bad_offset) + 1
    if location == str(file):
        line_number = 1 + text[:line_start].count(b"\n")
        location = f"{file}, line {line_number}"
    # the bytes at the start of a UTF-16 file
    has_byte_order_mark = text[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "utf-16" if bad_byte == 0 or has_byte_order_mark else "latin1"
    command = f"iconv -f {encoding} -t utf-8 '{file}' > rows{file.suffix}"
    raise UsageError(
        f"{location}: {'not a text' if bad_byte == 0 else 'not UTF-8'}: byte "
        f"0x{bad_byte:02x} at position {bad_offset - line_start}",
        ["UTF-8"],
        f"if the file is {encoding}, convert it: {command}",
        flag=command,
    )


def _parse(text: str, location: str, example: str) -> Any:
    """Parse a JSON text; an error names its `location` (file and line) and shows an `example`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if ", line " not in location else ""
        raise UsageError(
            f"{location}{line}: not valid JSON: {error.msg} at column {error.colno}",
            [f"an object like {example}"],
            "correct the line",
        ) from None
    except RecursionError:
        raise UsageError(
            f"{location}: not a row: the brackets are nested too deeply",
            [f"an object like {example}"],
            "correct the line",
        ) from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise UsageError(
            f"{location}: not a row: {error}", [f"an object like {example}"], "correct the line"
        ) from None


def _check_object(value: Any, location: str, example: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(
            f"{location}: a value of type {type(value).__name__} is not an object",
            [f"an object like {example}"],
            "correct the line",
        )
    return value
