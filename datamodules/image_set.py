"""Images with their labels, and the checks that all sources of images share.

Axes: n images, c channels, y rows, x columns.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError

LIMIT = 2**34  # bytes: a set is kept whole in memory


class ImageSet(NamedTuple):
    """Images uint8 (n c y x), labels int64 (n), the names of the classes and of the files (n)."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    files: tuple[str, ...] = ()  # empty where the images have no files of their own

    def take(self, mask: Tensor) -> "ImageSet":
        """The images for which a mask, bool (n), is true."""
        files = tuple(f for f, keep in zip(self.files, mask.tolist(), strict=True) if keep
                      ) if self.files else ()  # fmt: skip
        return self._replace(images=self.images[mask], labels=self.labels[mask], files=files)

    def checked(self, name: str) -> "ImageSet":
        """Refuse labels without an image or without a class, and classes without an image."""
        self.check_fit(name)
        if empty := self.empty_classes():
            raise UsageError(
                f"{name}: no image of class {', '.join(empty)}; give each class at least one, or "
                "remove the class"
            )
        return self

    def check_fit(self, name: str) -> None:
        """Refuse labels without an image or without a class."""
        self.check_counts(name)
        check_labels(self.labels, len(self.names), name)

    def check_counts(self, name: str) -> None:
        """Refuse labels without an image, and images without a label."""
        if len(self.images) != len(self.labels):
            raise UsageError(
                f"{name} has {len(self.images):,} images and {len(self.labels):,} labels; they "
                "must be as many: fetch both files again"
            )

    def empty_classes(self) -> list[str]:
        """The names of the classes without an image."""
        counts = torch.bincount(self.labels, minlength=len(self.names))
        return [self.names[k] for k in (counts == 0).nonzero()[:, 0].tolist()]


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """Refuse labels (n) that are no class: -1, for example, means an absent label to some nets."""
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise UsageError(
            f"{name}: the label of image {place} is {int(labels[place])}; allowed are 0 to "
            f"{classes - 1}, the {classes} classes: mend the labels"
        )


def class_numbers(words: Iterable[int | str] | str, names: Sequence[str], flag: str) -> list[int]:
    """Class numbers of "cat,dog", "0-4,7" or [3, "cat"]: by name, or by number from 0.

    A word that is a name means that class, even if it is a number. A range between two names of
    digits covers the classes from one to the other.

    Args:
        words: what was given.
        names: of all classes, in the order of their numbers.
        flag: that takes them, for the text of an error, e.g. --labels.

    Raises:
        ValueError: a word is neither.
    """
    asked = (words if words in names else words.split(",")) if isinstance(words, str) else words
    asked = [asked] if isinstance(asked, str) else [str(word).strip() for word in asked]
    place = {name: number for number, name in enumerate(names)}
    fix = f"type {flag}=0-{len(names) - 1}"
    given = words if isinstance(words, str) else ",".join(asked)
    found: list[int] = []
    for word in asked:
        if word in place:
            found.append(place[word])
            continue
        first, _, last = word.partition("-")
        ends = first.strip(), (last or first).strip()
        if not all(end.isascii() and end.isdecimal() and len(end) < 20 for end in ends):
            raise UsageError(f"{word!r} is no class; allowed: {describe_classes(names)}; {fix}")
        named = all(end in place for end in ends)
        begin, end = (place[end] for end in ends) if named else map(int, ends)
        if not begin <= end < len(names):
            raise UsageError(f"{flag[2:]} are {given}; allowed: {describe_classes(names)}; {fix}")
        found += range(begin, end + 1)
    if not found:
        raise UsageError(f"{flag[2:]} are {given}, none at all; {fix}")
    return found


def describe_classes(names: Sequence[str], most: int = 12) -> str:
    """The numbers and names of classes in a line: 0 to 9, or 0 cat, 1 dog."""
    if list(names) == [str(number) for number in range(len(names))]:
        return f"0 to {len(names) - 1}"
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:most]))
    return shown + (f", ... {len(names) - 1} {names[-1]}" if len(names) > most else "")
