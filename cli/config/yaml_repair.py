"""YAML repair: the corrected line for a file that is not YAML, found by trying small changes.

A change is suggested only if the file can be read with it, or if the first error is then further
down. So a tab, a missing comma, a missing space after a colon and an open bracket each get the line
to type.
"""

import re
from collections.abc import Iterator

import yaml

PAIRS = {"[": "]", "{": "}", '"': '"', "'": "'"}


def repaired_line(text: str, error: yaml.YAMLError) -> tuple[int, str] | None:
    """Return the number of a wrong line, from 1, and the corrected line; None if none is found.

    Args:
        text: the file.
        error: the error of its parser.
    """
    mark = getattr(error, "problem_mark", None)
    context = getattr(error, "context_mark", None)
    lines = text.splitlines()
    if mark is None or not lines:
        return None
    # a bracket that is not closed is reported at the next line or at the end of the file
    suspects = [mark.line, *([context.line] if context else []), mark.line - 1]
    numbers = [n for n in dict.fromkeys(suspects) if 0 <= n < len(lines)]
    for find_candidates in (candidate_lines, reindented_lines):
        for number in numbers:
            for candidate in find_candidates(lines[number], lines[number - 1] if number else ""):
                changed = "\n".join([*lines[:number], candidate, *lines[number + 1 :]])
                # the line of the first error that remains; a repaired line is not reported again
                if _error_line(changed) > max(mark.line, number):
                    return number + 1, candidate
    return None


def candidate_lines(line: str, line_before: str) -> Iterator[str]:
    """Yield corrections of a line, the most likely first.

    Args:
        line: the line with the error.
        line_before: the line above it.
    """
    if "\t" in line:
        yield line.replace("\t", "  ")
        indent = re.match(r" *", line_before)
        yield (indent[0] if indent else "") + line.strip().replace("\t", " ")
    # key:value, which is one text
    yield re.sub(r"^(\s*(?:- )?\w+):(?=[^\s:])", r"\1: ", line)
    # a bracket or a quotation mark that is not closed
    for opening, closing in PAIRS.items():
        missing = line.count(opening) - line.count(closing)
        if opening == closing:
            missing = line.count(opening) % 2
        if missing > 0:
            yield line + closing * missing
    # a comma between two entries of a list or a mapping in one line
    for match in re.finditer(r"(?<=[\w.\]}\"'])\s+(?=[\w\"'\[{-])", line):
        yield f"{line[: match.start()]}, {line[match.end() :]}"
    # a value with a colon in it
    if match := re.fullmatch(r"(\s*(?:- )?\w+: )(.*: .*)", line):
        yield f'{match[1]}"{match[2]}"'


def reindented_lines(line: str, line_before: str) -> Iterator[str]:
    """Yield a line with the indentation of the line before it, and with smaller ones."""
    body = line.lstrip()
    indent = re.match(r"[\s-]*", line_before)
    own_width = len(line) - len(body)
    for width in dict.fromkeys((len(indent[0]) if indent else 0, *range(own_width, -1, -1))):
        yield " " * width + body


def _error_line(text: str) -> float:
    """Return the line of the first error in YAML, from 0; infinity for none."""
    try:
        for _ in yaml.parse(text, yaml.SafeLoader):
            pass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return mark.line if mark else -1
    return float("inf")
