"""The idx format of MNIST: 0 0 8 dimensions, their sizes in four bytes each, then the bytes.

A user's own set in this form (KMNIST, EMNIST, one of his own) is a folder of such files, gzipped or
not, under the names they are published by:

    train-images-idx3-ubyte.gz    train-labels-idx1-ubyte.gz    with t10k- or test- to test
    emnist-letters-train-images-idx3-ubyte ...                  several sets in one folder

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

from .image_set import LIMIT, ImageSet

NAME = re.compile(
    r"((?P<set>.+?)[-_.])?(?P<side>train|test|t10k|val|valid|validation)[-_.]"
    r"(?P<content>images|labels)[-_.]idx[0-9]([-_.][a-z0-9]+)?(\.gz)?",
    re.IGNORECASE,
)
SIDES = {"train": "train", "val": "val", "valid": "val", "validation": "val"}  # the rest is test
TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
SPARE = 2**29  # bytes; a gzip may hold this and four times its own size
Files = dict[tuple[str, str], Path]  # by (side, content)


def read_idx(path: Path, *ranks: int) -> Tensor:
    """The array of an idx file of bytes, gzipped or not: uint8, with the dimensions of its header.

    Args:
        path: the file.
        ranks: numbers of dimensions that are allowed; by default all.

    Raises:
        ValueError: the file is no idx file of bytes, or is longer or shorter than it says.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            array = _array(file, path, zipped)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}; fetch the file again") from None
    if ranks and array.dim() not in ranks:
        allowed = " or ".join(map(str, ranks))
        raise UsageError(f"{path} has {array.dim()} dimensions, not {allowed}; fetch it again")
    return array


def _array(file: gzip.GzipFile | object, path: Path, zipped: bool) -> Tensor:
    read, readinto = file.read, file.readinto  # type: ignore[attr-defined]
    head = read(4)
    sizes = [int.from_bytes(read(4), "big") for _ in range(head[3] if len(head) == 4 else 0)]
    if head[:2] != b"\0\0" or not sizes or head[2] not in TYPES:
        raise UsageError(
            f"{path} is not an idx file of bytes: it begins with {head.hex(' ')}; expected 00 00 "
            "08 and the number of dimensions; fetch the file again"
        )
    if head[2] != 8:
        raise UsageError(
            f"{path} holds {TYPES[head[2]]}; allowed is an idx file of bytes, 0 to 255 (it begins "
            "with 00 00 08): convert it"
        )
    start, length = 4 + 4 * len(sizes), math.prod(sizes)
    form, size = " x ".join(map(str, sizes)), path.stat().st_size
    if zipped and length > 4 * size + SPARE:
        raise UsageError(
            f"{path} says that it unfolds to {form} bytes, out of {size:,}; if that is meant, type "
            f"gunzip {path}"
        )
    if length > LIMIT or (not zipped and start + length != size):
        raise UsageError(
            f"{path} is not an idx file of bytes: it has {size:,} bytes, and {form} after a head "
            f"of {start} are {start + length:,}; fetch the file again"
        )
    content, done = bytearray(length), 0
    view = memoryview(content)
    while done < length and (count := readinto(view[done:])):
        done += count
    if done < length or read(1):
        raise UsageError(
            f"{path} is not an idx file of bytes: it has {'fewer' if done < length else 'more'} "
            f"than the {form} that it says; fetch the file again"
        )
    if not length:
        raise UsageError(f"{path} holds {form} bytes, which is no image and no label")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)


def find_idx(source: Path) -> Files | None:
    """The idx files that a path means: a folder, one with a folder raw, or FOLDER/PREFIX of files.

    None if there are none.

    Raises:
        ValueError: a folder holds several sets.
    """
    if source.is_file() and (found := NAME.fullmatch(source.name)):  # one of the files
        source = source.parent / (found["set"] or "")
    folders = [source, source / "raw"] if source.is_dir() else [source.parent]
    for folder in folders:
        sets = _sets(folder)
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


def _sets(folder: Path) -> dict[str, Files]:
    sets: dict[str, Files] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = NAME.fullmatch(path.name)
        if found and path.is_file():
            side = SIDES.get(found["side"].lower(), "test")
            # sorted: of x and x.gz, which torchvision keeps side by side, x is taken
            sets.setdefault(found["set"] or "", {}).setdefault(
                (side, found["content"].lower()), path
            )
    return sets


def read_own_idx(files: Files) -> tuple[dict[str, ImageSet], list[str]]:
    """A user's own set, by side (train, val, test), and notes; classes are the labels there are.

    Without any labels the images are of one class.
    """
    sides = [side for side in ("train", "val", "test") if (side, "images") in files]
    if alone := [str(path) for (side, _), path in files.items() if side not in sides]:
        raise UsageError(f"{alone[0]} has no images beside it; put both files into one folder")
    if "train" not in sides:
        path = next(iter(files.values()))
        raise UsageError(f"{path.parent} has no images to train: expected train-images-idx3-ubyte")
    images = {side: _images(files[side, "images"]) for side in sides}
    labelled = [side for side in sides if (side, "labels") in files]
    if labelled and labelled != sides:
        side = next(side for side in sides if side not in labelled)
        raise UsageError(f"{files[side, 'images']} has no labels, and others have; add the labels")
    shapes = {tuple(array.shape[1:]) for array in images.values()}
    if len(shapes) > 1:
        raise UsageError(
            f"the images of {' and '.join(sides)} are of different sizes: {sorted(shapes)}"
        )
    if not labelled:
        name = files["train", "images"].parent.name
        return {
            side: ImageSet(array, torch.zeros(len(array), dtype=torch.int64), (name,))
            for side, array in images.items()
        }, []
    labels = {side: read_idx(files[side, "labels"], 1) for side in sides}
    for side in sides:
        one = ImageSet(images[side], labels[side], ())
        one.check_counts(str(files[side, "images"]))
    counts = torch.stack([torch.bincount(each, minlength=256) for each in labels.values()])
    there = counts.sum(0).nonzero()[:, 0].to(torch.uint8)
    names = tuple(str(label) for label in there.tolist())
    sets, notes = {}, []
    for side in sides:
        numbers = torch.searchsorted(there, labels[side])
        one = ImageSet(images[side], numbers, names)
        if side == "train":
            one.checked(str(files[side, "images"]))
        else:
            one.check_fit(str(files[side, "images"]))
            if absent := one.empty_classes():
                notes.append(f"no image of class {', '.join(absent)} in {side}")
        sets[side] = one
    return sets, notes


def _images(path: Path) -> Tensor:
    """Images, uint8 (n c y x); in four dimensions the channels stand last or second."""
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
