"""A CSV or TSV file by columns: texts, and for training their labels, with the lines they stand in.

    v1,v2                      columns by name; the known ones need not be named
    ham,"See you, at 8"
    spam,WIN 100 now

Axes: none.
"""

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ravine.errors import UsageError, suggest_names

LABEL_NAMES = ("label", "labels", "v1", "category", "class", "target", "type", "spam", "is_spam")
TEXT_NAMES = ("text", "v2", "message", "messages", "sms", "content", "body", "email", "msg")
DELIMITERS = ",;\t|"


class Entry(NamedTuple):
    """A row: the line of the file in which it begins, from 1, its text and its label."""

    line: int
    text: str
    label: str


class Table(NamedTuple):
    """The rows of a file, the columns used, and how many rows have text in unnamed columns."""

    entries: list[Entry]
    columns: tuple[str, ...]
    beside: int


def read_table(
    content: str,
    name: str,
    text_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> Table:
    """Read a table with a header, or without one if its first row has a label already.

    Args:
        content: the file's text.
        name: the file, for errors.
        text_column: by name, or by position from 0; by default the one with a known name.
        label_column: the same.
        labelled: whether labels are wanted.

    Raises:
        ValueError: a column is not there, a row is too short, or a quote is never closed.
    """
    lines = list(io.StringIO(content, newline=""))
    wanted = {text_column, label_column} - {None}
    rows = _rows(lines, name, "\t" if name.lower().endswith((".tsv", ".tab")) else min(
        DELIMITERS, key=lambda delimiter: _delimiter_rank(lines, delimiter, wanted)
    ))  # fmt: skip
    if not rows:
        raise UsageError(f"{name} is empty: write a header and one message a row")
    first = [cell.strip() for cell in rows[0][1]]
    words = {cell.casefold() for cell in first}
    header = not words & {"ham", "spam"} or bool(words & set(TEXT_NAMES) or wanted & set(first))
    columns = first if header else [str(place) for place in range(len(first))]
    if not header and not wanted and len(first) == 2:  # label and text, in this order
        text_column, label_column = "1", "0"
    places = [_place(columns, text_column, TEXT_NAMES, name, "text")]
    if labelled:
        places.append(_place(columns, label_column, LABEL_NAMES, name, "label"))
    entries, beside = [], 0
    for line, row in rows[header:]:
        if len(row) <= max(places):
            raise UsageError(
                f"{name}, line {line}: the row has {len(row)} columns, and {columns[max(places)]} "
                f"is number {max(places) + 1}; mend the row, or remove it"
            )
        entries.append(Entry(line, row[places[0]], row[places[1]] if labelled else ""))
        unnamed = [row[k] for k in range(len(row)) if k >= len(columns) or not columns[k]]
        beside += any(cell.strip() for cell in unnamed)
    return Table(entries, tuple(columns[place] for place in places), beside)


def has_known_header(line: str) -> bool:
    """Whether a line, divided by tabs, names a column of texts and one of labels."""
    cells = {cell.strip().strip('"').casefold() for cell in line.split("\t")}
    return bool(cells & set(TEXT_NAMES)) and bool(cells & set(LABEL_NAMES))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a cell be as long as its file: Python's limit of 131,072 is for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows(lines: list[str], name: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its first line, from 1."""
    found: list[tuple[int, list[str]]] = []
    with _long_fields():
        reader = csv.reader(lines, delimiter=delimiter)
        start = 0
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    found.append((start + 1, row))
                last, start = start, reader.line_num
        except csv.Error as error:
            raise UsageError(f"{name}, line {reader.line_num}: {error}; mend the line") from None
        if found:  # a quote that is never closed takes all that follows into one cell
            try:
                list(csv.reader(lines[last:], delimiter=delimiter, strict=True))
            except csv.Error as error:
                if "end of data" in str(error):
                    raise UsageError(
                        f"{name}, line {last + 1}: a quote is opened and never closed; close it, "
                        "or write two for one that belongs to the text"
                    ) from None
    return found


def _delimiter_rank(lines: list[str], delimiter: str, wanted: set[str | None]) -> tuple[int, int]:
    """Smaller where the first row has more of the columns that are wanted, then more columns."""
    head = next((line for line in lines if line.strip()), "")
    with _long_fields():
        first = [cell.strip() for cell in next(csv.reader([head], delimiter=delimiter), [])]
    known = {*TEXT_NAMES, *LABEL_NAMES, "ham", "spam"}
    named = len(wanted & set(first)) + sum(cell.casefold() in known for cell in first)
    return -named, -len(first)


def _place(
    columns: list[str], wanted: str | None, known: tuple[str, ...], name: str, kind: str
) -> int:
    """The position of a column, from 0."""
    there = ", ".join(column for column in columns if column)
    flag = f"--data.{kind}_column"
    if wanted is not None:
        places = [place for place, column in enumerate(columns) if column == wanted]
        if not places and wanted.isdecimal() and len(wanted) < 6 and int(wanted) < len(columns):
            return int(wanted)
        near = suggest_names(wanted, columns, 1) or [c for c in columns if c][:1]
        if not places:
            raise UsageError(
                f"{name} has no column {wanted!r}; allowed: {there}; type {flag}={near[0]}"
            )
    else:
        places = [k for k, column in enumerate(columns) if column.casefold() in known]
        if not places:
            raise UsageError(
                f"{name} has the columns {there}; which of them holds the {kind}s? type "
                f"{flag}={next((c for c in columns if c), '0')}"
            )
    if len(places) > 1:
        raise UsageError(
            f"{name} has {len(places)} columns that may hold the {kind}s, number "
            f"{', '.join(map(str, places))} from 0; type {flag}={places[0]}"
        )
    return places[0]
