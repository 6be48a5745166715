"""CSV and TSV reader: texts and labels by column name, with line numbers for error messages.

v1,v2                      columns by name; known column names are found automatically
ham,"See you, at 8"
spam,WIN 100 now
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
    """A row: the line where it begins (from 1), its text and its label."""

    line: int
    text: str
    label: str


class Table(NamedTuple):
    """The rows of a file, the columns used, and the number of rows with text in unnamed columns."""

    entries: list[Entry]
    columns: tuple[str, ...]
    num_rows_outside_columns: int


def read_table(
    content: str,
    name: str,
    text_column: str | None = None,
    label_column: str | None = None,
    has_labels: bool = True,
) -> Table:
    """Read a table with a header, or without one if its first row has a label and no column name.

    Args:
        content: the text of the file.
        name: the file name for error messages.
        text_column: column of the texts, by name or by position from 0; by default a known name.
        label_column: column of the labels, in the same form.
        has_labels: whether labels are read.

    Raises:
        UsageError: a column is missing, a row is too short, or a quote is never closed.
    """
    lines = list(io.StringIO(content, newline=""))
    requested = {text_column, label_column} - {None}
    if name.lower().endswith((".tsv", ".tab")):
        delimiter = "\t"
    else:
        # the delimiter with which the first row has the most known columns
        delimiter = min(DELIMITERS, key=lambda d: _delimiter_rank(lines, d, requested))
    rows = _parse_rows(lines, name, delimiter)  # (line number, cells)
    if not rows:
        raise UsageError(
            f"{name} has no row", ["a header, and one message per row"], "add rows to the file"
        )
    first = [cell.strip() for cell in rows[0][1]]
    first_cells = {cell.casefold() for cell in first}
    # TEXT_NAMES: usual names of a column of texts, in lower case
    has_header = not first_cells & {"ham", "spam"} or bool(
        first_cells & set(TEXT_NAMES) or requested & set(first)
    )
    # without a header the names of the columns are their positions
    columns = first if has_header else [str(column_index) for column_index in range(len(first))]
    if not has_header and not requested and len(first) == 2:  # label first, then text
        text_column, label_column = "1", "0"
    # the position of the column; an error if none fits or several do
    column_indices = [_find_column(columns, text_column, TEXT_NAMES, name, "text")]
    if has_labels:
        column_indices.append(_find_column(columns, label_column, LABEL_NAMES, name, "label"))
    entries, num_rows_outside_columns = [], 0
    for line, row in rows[1:] if has_header else rows:
        if len(row) <= max(column_indices):
            raise UsageError(
                f"{name}, line {line}: the row has {len(row)} columns, but the column "
                f"{columns[max(column_indices)]} is number {max(column_indices) + 1}",
                [f"{max(column_indices) + 1} or more columns"],
                "correct the row, or remove it",
            )
        entries.append(
            Entry(line, row[column_indices[0]], row[column_indices[1]] if has_labels else "")
        )
        # text in such cells often means that a text has an unquoted delimiter
        unnamed = [row[k] for k in range(len(row)) if k >= len(columns) or not columns[k]]
        num_rows_outside_columns += any(cell.strip() for cell in unnamed)
    return Table(
        entries,
        tuple(columns[column_index] for column_index in column_indices),
        num_rows_outside_columns,
    )


def has_known_header(line: str) -> bool:
    """Return whether a tab-separated line names a text column and a label column."""
    cells = {cell.strip().strip('"').casefold() for cell in line.split("\t")}
    return bool(cells & set(TEXT_NAMES)) and bool(cells & set(LABEL_NAMES))


@contextmanager
def _allow_long_fields() -> Iterator[None]:
    """Raise the csv field size limit, which is 131,072 for the whole process by default."""
    previous_limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(previous_limit)


def _parse_rows(lines: list[str], name: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the non-empty rows, each with the number of its first line, from 1.

    A quoted cell may contain line ends, so a row may have several lines.

    Args:
        lines: the lines of the file, with their line ends.
        name: the file name for error messages.
        delimiter: the character between two cells.

    Raises:
        UsageError: a row cannot be parsed, or a quote is never closed.
    """
    rows: list[tuple[int, list[str]]] = []
    # a text may be longer than the 131,072 characters that the csv module allows
    with _allow_long_fields():
        reader = csv.reader(lines, delimiter=delimiter)
        start = 0  # lines before the next row
        last_start = 0  # lines before the last row that was read
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append((start + 1, row))
                last_start, start = start, reader.line_num
        except csv.Error as error:
            raise UsageError(
                f"{name}, line {reader.line_num}: {error}", ["a CSV row"], "correct the line"
            ) from None
        # An unclosed quote puts the rest of the file into one cell of the last row. Only this error
        # of the strict mode counts; quotes within a cell are accepted.
        if rows:
            try:
                list(csv.reader(lines[last_start:], delimiter=delimiter, strict=True))
            except csv.Error as error:
                if "end of data" in str(error):
                    raise UsageError(
                        f"{name}, line {last_start + 1}: a quote is opened and never closed",
                        ["quotes in pairs, and two quotes for one inside a text"],
                        "close the quote, or write it twice",
                    ) from None
    return rows


def _delimiter_rank(
    lines: list[str], delimiter: str, requested: set[str | None]
) -> tuple[int, int]:
    """Return a sort key: smaller for more known columns in the first row, then for more columns."""
    head = next((line for line in lines if line.strip()), "")
    with _allow_long_fields():
        first = [cell.strip() for cell in next(csv.reader([head], delimiter=delimiter), [])]
    known = {*TEXT_NAMES, *LABEL_NAMES, "ham", "spam"}
    num_known = len(requested & set(first)) + sum(cell.casefold() in known for cell in first)
    return -num_known, -len(first)


def _find_column(
    columns: list[str], requested: str | None, known_names: tuple[str, ...], name: str, role: str
) -> int:
    """Return the position of a column, from 0.

    Args:
        columns: the names in the header; "" for a column without a name.
        requested: the name or position that the user gave; None searches the known names.
        known_names: usual names of such a column, in lower case.
        name: the file name for error messages.
        role: text or label, the start of the argument that gives the column.

    Raises:
        UsageError: no column fits, or several do.
    """
    available = [column for column in columns if column]
    first = next(iter(available), "0")
    flag = f"--data.{role}_column"
    if requested is not None:
        matches = [index for index, column in enumerate(columns) if column == requested]
        # a name precedes a position, because a column may be called "0"
        is_number = requested.isdecimal() and len(requested) < 6
        if not matches and is_number and int(requested) < len(columns):
            return int(requested)
        # the most similar name, else the first column that has a name
        closest = suggest_names(requested, columns, 1) or [c for c in columns if c][:1]
        if not matches:
            raise UsageError(
                f"{name} has no column {requested!r}",
                available,
                f"use {role}_column={closest[0]!r}",
                flag=f"{flag}={closest[0]}",
            )
    else:
        matches = [k for k, column in enumerate(columns) if column.casefold() in known_names]
        if not matches:
            raise UsageError(
                f"{name} has no column with a known name for the {role}s",
                available,
                f"use {role}_column={first!r}",
                flag=f"{flag}={first}",
            )
    if len(matches) > 1:
        raise UsageError(
            f"{name} has {len(matches)} columns that may hold the {role}s",
            matches,
            f"use {role}_column='{matches[0]}', a position from 0",
            flag=f"{flag}={matches[0]}",
        )
    return matches[0]
