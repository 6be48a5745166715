"""Output paths of callbacks: a resume removes them, so that a run writes in its own folder.

A checkpoint of another author could otherwise name any place to write to.
"""

import os
import re
from pathlib import Path
from typing import Any

OUTPUT_PATH_ARGS = (
    "dirpath",
    "exclude_batches_path",
    "cache_dir",
)  # callback arguments with output paths
FORMAT_FIELD = re.compile(
    r"\{[\w./ -]+(:0?\d{0,2}(\.\d{1,2})?[defg%]?)?\}"
)  # a field of a file name template: {val/loss:.2f}


def without_output_paths(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a callback of a checkpoint without output paths: a run writes below its own folder."""
    cleaned = dict(spec)
    for section in spec.keys() & {"init_args", "dict_kwargs"}:
        arguments = spec[section] or {}
        cleaned[section] = {
            k: v
            for k, v in arguments.items()
            if k not in OUTPUT_PATH_ARGS and not _may_leave_folder(k, v)
        }
    return cleaned


def _may_leave_folder(key: str, value: Any) -> bool:
    """Return whether a file name or template may become a path outside of its folder."""
    if key != "filename" or value is None:
        return False
    literal = FORMAT_FIELD.sub("0", str(value))
    field_names = [field[0].strip("{}") for field in FORMAT_FIELD.finditer(str(value))]
    is_malformed = "{" in literal or "}" in literal  # such as {step:c}, which can be any character
    return is_malformed or any(
        os.path.isabs(n) or ".." in Path(n).parts for n in (literal, *field_names)
    )
