"""Idx file reader (MNIST): 0 0 8 dimensions, their sizes in four bytes each, then the bytes.

A custom dataset in this format (KMNIST, EMNIST, or another) is a folder of such files, gzipped or
not, under their published names:

    train-images-idx3-ubyte.gz    train-labels-idx1-ubyte.gz    t10k- or test-: the test split
    emnist-letters-train-images-idx3-ubyte ...                  several datasets in one folder

Axes: n images, c channels, y rows, x columns.
"""

import gzip
import math
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ravine.errors import UsageError

from .image_set import MAX_BYTES, ImageSet

FILE_PATTERN = re.compile(
    r"((?P<set>.+?)[-_.])?(?P<side>train|test|t10k|val|valid|validation)[-_.]"
    r"(?P<content>images|labels)[-_.]idx[0-9]([-_.][a-z0-9]+)?(\.gz)?",
    re.IGNORECASE,
)
SPLIT_ALIASES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
}  # any other prefix is the test split
ELEMENT_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
GZIP_ALLOWANCE = 2**29  # bytes; a gzip may decompress to this plus four times its size
IdxFiles = dict[tuple[str, str], Path]  # by (split, content)


def read_idx(path: Path, *allowed_dims: int) -> Tensor:
    """Read an idx file of bytes, gzipped or not, as a uint8 tensor with its header's dimensions.

    Args:
        path: the file.
        allowed_dims: allowed numbers of dimensions; by default any.

    Raises:
        UsageError: the file is no idx file of bytes, or its length differs from its header.
    """
    try:
        with path.open("rb") as raw:
            is_gzipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzipped else path.open("rb") as file:
            array = _parse_idx(file, path, is_gzipped)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}; fetch the file again") from None
    if allowed_dims and array.dim() not in allowed_dims:
        allowed = " or ".join(map(str, allowed_dims))
        raise UsageError(f"{path} has {array.dim()} dimensions, not {allowed}; fetch it again")
    return array


def _parse_idx(file: gzip.GzipFile | object, path: Path, is_gzipped: bool) -> Tensor:
    read_bytes, readinto = file.read, file.readinto  # type: ignore[attr-defined]
    header = read_bytes(4)
    sizes = [
        int.from_bytes(read_bytes(4), "big") for _ in range(header[3] if len(header) == 4 else 0)
    ]
    if header[:2] != b"\0\0" or not sizes or header[2] not in ELEMENT_TYPES:
        raise UsageError(
            f"{path} is not an idx file of bytes: it begins with {header.hex(' ')}; expected 00 00 "
            "08 and the number of dimensions; fetch the file again"
        )
    if header[2] != 8:
        raise UsageError(
            f"{path} holds {ELEMENT_TYPES[header[2]]}; allowed is an idx file of bytes, 0 to 255 "
            "(it begins "
            "with 00 00 08): convert it"
        )
    start, length = 4 + 4 * len(sizes), math.prod(sizes)
    dimensions, size = " x ".join(map(str, sizes)), path.stat().st_size
    if is_gzipped and length > 4 * size + GZIP_ALLOWANCE:
        raise UsageError(
            f"{path} says that it unfolds to {dimensions} bytes, out of {size:,}; if that is "
            "meant, type "
            f"gunzip {path}"
        )
    if length > MAX_BYTES or (not is_gzipped and start + length != size):
        raise UsageError(
            f"{path} is not an idx file of bytes: it has {size:,} bytes, and {dimensions} after a "
            "head "
            f"of {start} are {start + length:,}; fetch the file again"
        )
    content, num_read = bytearray(length), 0
    view = memoryview(content)
    while num_read < length and (count := readinto(view[num_read:])):
        num_read += count
    if num_read < length or read_bytes(1):
        raise UsageError(
            f"{path} is not an idx file of bytes: it has "
            f"{'fewer' if num_read < length else 'more'} "
            f"than the {dimensions} that it says; fetch the file again"
        )
    if not length:
        raise UsageError(f"{path} holds {dimensions} bytes, which is no image and no label")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)


def find_idx_files(source: Path) -> IdxFiles | None:
    """Find the idx files of a path: a folder, a folder with a subfolder raw, or FOLDER/PREFIX.

    Returns None if there are none.

    Raises:
        UsageError: a folder holds several datasets.
    """
    if source.is_file() and (match := FILE_PATTERN.fullmatch(source.name)):  # one of the files
        source = source.parent / (match["set"] or "")
    folders = [source, source / "raw"] if source.is_dir() else [source.parent]
    for folder in folders:
        sets = _group_by_set(folder)
        if not source.is_dir():
            sets = {name: files for name, files in sets.items() if name == source.name}
        if len(sets) > 1:
            names = ", ".join(name or "without a prefix" for name in sorted(sets))
            first = folder / next(name for name in sorted(sets) if name)
            raise UsageError(
                f"{folder} holds several sets of idx files: {names}; give one of them: type "
                f"--data.source={first}"
            )
        if sets:
            return next(iter(sets.values()))
    return None


def _group_by_set(folder: Path) -> dict[str, IdxFiles]:
    sets: dict[str, IdxFiles] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = FILE_PATTERN.fullmatch(path.name)
        if match and path.is_file():
            split = SPLIT_ALIASES.get(match["side"].lower(), "test")
            # torchvision keeps both x and x.gz; in sorted order x comes first and is used
            sets.setdefault(match["set"] or "", {}).setdefault(
                (split, match["content"].lower()), path
            )
    return sets


def read_idx_files(files: IdxFiles) -> tuple[dict[str, ImageSet], list[str]]:
    """Read a custom idx dataset by split (train, val, test); also return notes for the log.

    The classes are the label values that occur. Without label files all images are of one class.
    """
    splits = [split for split in ("train", "val", "test") if (split, "images") in files]
    if unpaired := [str(path) for (split, _), path in files.items() if split not in splits]:
        raise UsageError(f"{unpaired[0]} has no images beside it; put both files into one folder")
    if "train" not in splits:
        path = next(iter(files.values()))
        raise UsageError(f"{path.parent} has no images to train: expected train-images-idx3-ubyte")
    images = {split: _read_idx_images(files[split, "images"]) for split in splits}
    labelled_splits = [split for split in splits if (split, "labels") in files]
    if labelled_splits and labelled_splits != splits:
        split = next(split for split in splits if split not in labelled_splits)
        raise UsageError(f"{files[split, 'images']} has no labels, and others have; add the labels")
    shapes = {tuple(array.shape[1:]) for array in images.values()}
    if len(shapes) > 1:
        raise UsageError(
            f"the images of {' and '.join(splits)} are of different sizes: {sorted(shapes)}"
        )
    if not labelled_splits:
        name = files["train", "images"].parent.name
        return {
            split: ImageSet(array, torch.zeros(len(array), dtype=torch.int64), (name,))
            for split, array in images.items()
        }, []
    labels = {split: read_idx(files[split, "labels"], 1) for split in splits}
    for split in splits:
        image_set = ImageSet(images[split], labels[split], ())
        image_set.check_counts(str(files[split, "images"]))
    counts = torch.stack(
        [torch.bincount(split_labels, minlength=256) for split_labels in labels.values()]
    )
    used_labels = counts.sum(0).nonzero()[:, 0].to(torch.uint8)
    names = tuple(str(label) for label in used_labels.tolist())
    sets, notes = {}, []
    for split in splits:
        class_indices = torch.searchsorted(used_labels, labels[split])
        image_set = ImageSet(images[split], class_indices, names)
        if split == "train":
            image_set.validated(str(files[split, "images"]))
        else:
            image_set.check_label_range(str(files[split, "images"]))
            if empty_classes := image_set.empty_classes():
                notes.append(f"no image of class {', '.join(empty_classes)} in {split}")
        sets[split] = image_set
    return sets, notes


def _read_idx_images(path: Path) -> Tensor:
    """Read images, uint8 (n c y x); in four dimensions the channel axis is last or second."""
    array = read_idx(path, 3, 4)
    if array.dim() == 3:
        return array[:, None]
    if array.shape[3] in (1, 3):
        return array.permute(0, 3, 1, 2)
    if array.shape[1] in (1, 3):
        return array
    raise UsageError(
        f"{path} holds images of {tuple(array.shape[1:])}; allowed are 1 or 3 channels"
    )
