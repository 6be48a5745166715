"""Labeled image set (`ImageSet`), and the label and class checks of all image sources.

Axes: n images, c channels, y rows, x columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ravine.errors import UsageError

MAX_BYTES = 2**34  # bytes; an image set is held in memory


class ImageSet(NamedTuple):
    """Images uint8 (n c y x), labels int64 (n), class names, and file names (n)."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    files: tuple[str, ...] = ()  # empty if the images do not come from separate files

    def select(self, mask: Tensor) -> "ImageSet":
        """Return the images where a bool mask (n) is true."""
        files = tuple(f for f, keep in zip(self.files, mask.tolist(), strict=True) if keep
                      ) if self.files else ()  # fmt: skip
        return self._replace(images=self.images[mask], labels=self.labels[mask], files=files)

    def validated(self, name: str) -> "ImageSet":
        """Return the set; raise an error on invalid labels and on classes without images."""
        self.check_label_range(name)
        if empty := self.empty_classes():
            raise UsageError(
                f"{name}: the class {', '.join(empty)} has no image",
                ["at least one image per class"],
                "add an image, or remove the class",
            )
        return self

    def check_label_range(self, name: str) -> None:
        """Raise an error if labels and images differ in number, or a label is not a class index."""
        self.check_counts(name)
        check_labels(self.labels, len(self.class_names), name)

    def check_counts(self, name: str) -> None:
        """Raise an error if the numbers of images and labels differ."""
        if len(self.images) != len(self.labels):
            raise UsageError(
                f"{name} has {len(self.images):,} images and {len(self.labels):,} labels",
                ["one label per image"],
                "download both files again",
            )

    def empty_classes(self) -> list[str]:
        """Return the names of the classes without images."""
        counts = torch.bincount(self.labels, minlength=len(self.class_names))
        return [self.class_names[k] for k in (counts == 0).nonzero()[:, 0].tolist()]


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    """Raise an error if a label (n) is not in 0..num_classes - 1.

    For example, some networks read -1 as "no label".
    """
    is_invalid = (labels < 0) | (labels >= num_classes)
    if is_invalid.any():
        index = int(is_invalid.nonzero()[0])
        raise UsageError(
            f"{name}: the label of image {index} is {int(labels[index])}",
            [f"0 to {num_classes - 1}, the indices of the {num_classes} classes"],
            "correct the labels",
        )


def parse_class_indices(
    classes: Iterable[int | str] | str, class_names: Sequence[str], flag: str
) -> list[int]:
    """Parse class indices from "cat,dog", "0-4,7" or [3, "cat"]: by name, or by index from 0.

    A word that is a class name means that class, even if it is a number. A range between two class
    names that are digits covers the classes from one to the other.

    Args:
        classes: the classes as given by the user.
        class_names: names of all classes, in the order of their indices.
        flag: the flag of the option, for error messages, e.g. --labels.

    Raises:
        UsageError: a word is neither a class name nor an index.
    """
    if isinstance(classes, str) and classes in class_names:
        entries = [classes]  # the name of a class may contain a comma
    else:
        words = classes.split(",") if isinstance(classes, str) else classes
        entries = [str(word).strip() for word in words]
    index_by_name = {name: number for number, name in enumerate(class_names)}
    # for the errors: the argument's name, its value, and one that is valid
    argument = flag.lstrip("-").rpartition(".")[2]
    classes_text = classes if isinstance(classes, str) else ",".join(entries)
    all_classes = f"0-{len(class_names) - 1}"
    # a text that lists the class names, shortened if there are many
    allowed = [describe_classes(class_names)]
    hint, suggested_flag = f"use {argument}={all_classes!r}", f"{flag}={all_classes}"
    indices: list[int] = []
    for entry in entries:
        if entry in index_by_name:
            indices.append(index_by_name[entry])
            continue
        # a single index is a range of one; "3-" counts as 3
        first, _, last = entry.partition("-")
        bounds = first.strip(), (last or first).strip()
        # fewer than 20 digits: Python refuses to convert very long numbers
        if not all(bound.isascii() and bound.isdecimal() and len(bound) < 20 for bound in bounds):
            raise UsageError(f"{entry!r} is not a class", allowed, hint, flag=suggested_flag)
        if all(bound in index_by_name for bound in bounds):
            begin, end = (index_by_name[bound] for bound in bounds)
        else:
            begin, end = map(int, bounds)
        if not begin <= end < len(class_names):
            raise UsageError(
                f"{argument}={classes_text!r} is not in the classes",
                allowed,
                hint,
                flag=suggested_flag,
            )
        indices += range(begin, end + 1)
    if not indices:
        raise UsageError(
            f"{argument}={classes_text!r} selects no class", allowed, hint, flag=suggested_flag
        )
    return indices


def group_classes(images: ImageSet, groups: Mapping[str, str]) -> ImageSet:
    """Replace the classes by groups of them, and leave out images of classes in no group.

    Args:
        images: the labeled images.
        groups: the classes of each group, as `parse_class_indices` reads them; the order of the
            groups is that of their indices.

    Raises:
        UsageError: there is one group or none, or a class is unknown or in two groups.
    """
    group_of_class = torch.full((len(images.class_names),), -1)
    for number, (name, classes) in enumerate(groups.items()):
        flag = f"--data.class_groups.{name}"
        indices = parse_class_indices(classes, images.class_names, flag)
        if repeated := [images.class_names[k] for k in indices if group_of_class[k] >= 0]:
            raise UsageError(
                f"class_groups: the class {', '.join(repeated)} is in {name} and in another group",
                ["each class in one group"],
                f"remove it from {name}",
            )
        group_of_class[indices] = number
    if len(groups) < 2:
        raise UsageError(
            f"class_groups={dict(groups)} has {len(groups)} group"
            + ("s" if len(groups) != 1 else ""),
            ["two groups or more"],
            'use class_groups={"even": "0,2,4,6,8", "odd": "1,3,5,7,9"}',
            flag="--data.class_groups.even=0,2,4,6,8 --data.class_groups.odd=1,3,5,7,9",
        )
    labels = group_of_class[images.labels]  # (n)
    grouped = images._replace(labels=labels, class_names=tuple(groups))
    return grouped.select(labels >= 0)


def describe_classes(class_names: Sequence[str], max_shown: int = 12) -> str:
    """Return the indices and names of classes as one line: "0 to 9", or "0 cat, 1 dog"."""
    if list(class_names) == [str(number) for number in range(len(class_names))]:
        return f"0 to {len(class_names) - 1}"
    description = ", ".join(
        f"{number} {name}" for number, name in enumerate(class_names[:max_shown])
    )
    return description + (
        f", ... {len(class_names) - 1} {class_names[-1]}" if len(class_names) > max_shown else ""
    )
