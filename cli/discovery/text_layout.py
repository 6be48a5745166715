"""Text layout of lists and pages: two columns, wrapped to the width of the terminal."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence

MIN_WIDTH, DEFAULT_WIDTH, MAX_WIDTH = 60, 100, 120
MAX_NAME_WIDTH = 30  # a longer name stands on a line of its own


def page_width() -> int:
    """Return the number of columns of a page; 100 if the output is no terminal."""
    columns = shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    return max(MIN_WIDTH, min(columns, MAX_WIDTH))


def two_columns(rows: Sequence[tuple[str, Iterable[str]]], indent: int = 2) -> list[str]:
    """Return lines with names on the left, and texts on the right that are wrapped.

    Args:
        rows: the name, and texts that each begin a new line; empty texts are left out.
        indent: spaces before the names.
    """
    names = [len(name) for name, _ in rows if len(name) <= MAX_NAME_WIDTH]
    # start of the texts; longer names than MAX_NAME_WIDTH do not widen it
    column = indent + max(names, default=MAX_NAME_WIDTH) + 2
    lines = []
    for name, texts in rows:
        wrapped = [
            line
            for text in texts
            if text
            for line in textwrap.wrap(
                text, page_width() - column, break_long_words=False, break_on_hyphens=False
            )
        ]
        head = " " * indent + name
        # a long name has a line of its own
        if len(head) + 2 > column or not wrapped:
            lines.append(head)
        else:
            lines.append(f"{head:<{column}}{wrapped.pop(0)}")
        lines += [" " * column + line for line in wrapped]
    return lines


def fit_words(words: Sequence[str], width: int) -> str:
    """Return the words that fit into one line, and "..." for those that do not."""
    line = "  ".join(words)
    if len(line) <= width:
        return line
    kept: list[str] = []
    for word in words:
        if len("  ".join([*kept, word, "..."])) > width:
            break
        kept.append(word)
    return "  ".join([*kept, "..."])
