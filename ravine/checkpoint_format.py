"""Format of Ravine's checkpoints: a number that changes when keys of a checkpoint change.

A file of an older format is refused in one line that names the version of Ravine that reads it.
Checkpoints of other programs have no format and are not refused here.
"""

from typing import Any

from ravine.errors import UsageError

FORMAT_VERSION = 2  # checkpoint["ravine"]["format_version"]
READ_BY = {1: "0.1.0"}  # the version of Ravine that reads an older format
SECTIONS_OF_FORMAT_1 = ("task", "exact_resume", "ravine")  # it did not record its number in all


def record_format(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Record the format in a checkpoint, and return the section in which it is recorded."""
    section = checkpoint.setdefault("ravine", {})
    section["format_version"] = FORMAT_VERSION
    return section


def check_format(checkpoint: dict[str, Any], name: str = "the checkpoint") -> None:
    """Raise UsageError if the checkpoint has another format than this version reads.

    Args:
        checkpoint: the content of a checkpoint.
        name: its path or a description, for the error.
    """
    # SECTIONS_OF_FORMAT_1: sections that only Ravine writes, also before formats had a number
    if not any(section in checkpoint for section in SECTIONS_OF_FORMAT_1):
        return  # not written by ravine
    section = checkpoint.get("ravine")
    version = section.get("format_version", 1) if isinstance(section, dict) else 1
    if version == FORMAT_VERSION:
        return
    # the release that reads an older format; None for a format of the future
    reader = READ_BY.get(version) if isinstance(version, int) else None
    hint = f"pip install ravine=={reader}" if reader else "install a newer version of ravine"
    raise UsageError(
        f"{name} has format {version!r}",
        [f"format {FORMAT_VERSION}"],
        f"to read it, {hint}" if reader else hint,
    )
