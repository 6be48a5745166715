"""A folder of images as one tensor of bytes: FOLDER/<class>/**, or FOLDER/* without classes.

    FOLDER/cat/1.png  FOLDER/dog/more/2.jpg          classes cat and dog
    FOLDER/train/cat/1.png  FOLDER/test/cat/2.png    the same, split by the user
    FOLDER/1.png  FOLDER/2.webp                      one class: for models without labels

Class names that end in numbers stand in the order of the numbers: 2 before 10. Every file below
FOLDER is read, or counted and named.

Axes: n images, c channels, y rows, x columns.
"""

import math
import os
import re
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from ravine.errors import MissingFileError, UsageError

from .image_set import LIMIT, ImageSet

SUFFIXES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff"
}  # fmt: skip
# Pillow recognizes a file by its content. Of its other formats some start programs (EPS: gs).
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
PIXELS = 25_000_000  # of one image: decoded and converted it takes up to 13 bytes a pixel
OTHERS = 100_000  # files that are not images, after which a folder is taken for a wrong one
SIDES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
CHANNELS = {"L": 1, "RGB": 3}

Mode = Literal["auto", "gray", "rgb"]
Size = tuple[int, int]  # rows, columns


class SkippedFiles:
    """The files below a folder that are not read, by kind, with an example of each."""

    def __init__(self, root: Path) -> None:
        """Start without any; examples are named relative to `root`."""
        self.root = root
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, kind: str, path: str) -> None:
        """Count a file."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, printable(os.path.relpath(path, self.root)))
        if self.counts.total() > OTHERS:
            raise UsageError(
                f"{self.root} holds more than {OTHERS:,} files that are no images, e.g. "
                f"{self.examples[kind]}; give the folder of the images alone: type "
                "--data.source=FOLDER"
            )

    def words(self) -> str:
        """Everything left out in one line, or nothing."""
        kinds = (f"{n:,} {kind} ({self.examples[kind]})" for kind, n in self.counts.most_common())
        return ", ".join(kinds)


class Form(NamedTuple):
    """What an image is stored as: mode and size of Pillow, and what else the file states."""

    mode: str
    size: tuple[int, int]  # columns, rows
    note: str = ""

    def __str__(self) -> str:
        """E.g. 6x4 RGB, transparent."""
        return f"{self.size[0]}x{self.size[1]} {self.mode}{self.note}"


class Folder(NamedTuple):
    """The images of a folder, by side (all, or train, val, test), and notes for the user."""

    sides: dict[str, ImageSet]
    notes: list[str]


def read_folder(folder: Path, mode: Mode = "auto", resize: Size | None = None) -> Folder:
    """Read a user's own images.

    Args:
        folder: see the head of this file.
        mode: `auto` takes 8-bit gray or RGB as stored and refuses a mixture; `gray` and `rgb`
            convert: transparent pixels are blended with white, of 16 bits the upper 8 are kept.
        resize: rows and columns to which every image is scaled and cropped at its center.

    Raises:
        ValueError: an image cannot be read or does not fit the others, or a class has none.
        FileNotFoundError: no image is there.
    """
    left = SkippedFiles(folder)
    below = subfolders(folder)
    _refuse_both(folder, below, flat := images_below(folder, left, deep=False))
    if sides := _sides(below):
        found = {side: _classes(path, folder.name, left) for side, path in sides.items()}
    else:
        found = {"all": _deep(below, left) or {folder.name: flat}}
    if not any(paths for classes in found.values() for paths in classes.values()):
        raise MissingFileError(
            f"no image in {folder}: allowed are files {', '.join(sorted(SUFFIXES))}, in it or in "
            f"one folder a class{_skipped_note(left)}; type --data.source=FOLDER"
        )
    names = tuple(next(iter(found.values())))
    for side, classes in found.items():
        if tuple(classes) != names and len(found) > 1:
            apart = sorted(set(classes) ^ set(names))
            raise UsageError(
                f"{folder}: the classes of {side} and {next(iter(found))} differ: "
                f"{', '.join(apart[:5])}; allowed are the same in each: type "
                f"--data.source={sides['train']}, or give each the same folders"
            )
    reader = Reader(mode, resize)
    sets = {}
    for side, classes in found.items():
        paths = [path for some in classes.values() for path in some]
        labels = torch.tensor([k for k, some in enumerate(classes.values()) for _ in some])
        if empty := [name for name, some in classes.items() if not some]:
            raise UsageError(
                f"{folder}: no image of class {', '.join(empty)}; give each class at least one, "
                f"or remove the class{_skipped_note(left)}"
            )
        files = tuple(os.path.relpath(path, folder) for path in paths)
        sets[side] = ImageSet(reader.read(paths), labels, names, files)
    notes = reader.notes()
    if left.counts:
        notes.insert(0, f"not read: {left.words()}")
    return Folder(sets, notes)


def read_images(path: Path, mode: Mode, resize: Size | None) -> tuple[ImageSet, list[str]]:
    """An image file, or all images below a folder, in one class without a meaning; and notes."""
    left = SkippedFiles(path)
    if path.is_file():
        files, root = [path], path.parent
    elif path.is_dir():
        files, root = images_below(path, left), path
    else:
        raise MissingFileError(f"no file or folder {path}; type --data.predict_path=FOLDER")
    if not files:
        raise MissingFileError(
            f"no image in {path}: allowed are files {', '.join(sorted(SUFFIXES))}"
            f"{_skipped_note(left)}; type --data.predict_path=FOLDER"
        )
    files.sort(key=lambda file: by_number(str(file)))
    reader = Reader(mode, resize)
    names = tuple(os.path.relpath(file, root) for file in files)
    images = ImageSet(reader.read(files), torch.full((len(files),), -1), (), names)
    return images, ([f"not read: {left.words()}"] if left.counts else []) + reader.notes()


def by_number(name: str) -> tuple[Any, ...]:
    """A key that sorts digits as numbers: 2 before 10, img2 before img10."""
    parts = re.split(r"(\d+)", name)  # text and digits in turn
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder but the hidden ones, in the order of `by_number`."""
    found = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    return sorted(found, key=lambda p: by_number(p.name))


def images_below(folder: Path, left: SkippedFiles, deep: bool = True) -> list[Path]:
    """The image files in a folder, and with `deep` below it; links to folders are followed."""
    found, waiting, seen = [], [str(folder)], set()
    while waiting:
        here = waiting.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                match _kind(entry):
                    case "folder":
                        waiting += [entry.path] if deep else []
                    case "file" if (end := Path(entry.name).suffix.lower()) in SUFFIXES:
                        found.append(Path(entry.path))
                    case "file":
                        left.add(printable(end) or "without a suffix", entry.path)
                    case kind:
                        left.add(kind, entry.path)
    return sorted(found)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        pass
    return "broken link" if entry.is_symlink() else "no regular file"


def _sides(below: list[Path]) -> dict[str, Path]:
    """The folders train, val and test, if a folder holds these and no others."""
    sides = {SIDES.get(path.name.lower(), path.name): path for path in below}
    whole = len(sides) == len(below) > 1 and set(sides) <= {"train", "val", "test"}
    return {k: sides[k] for k in ("train", "val", "test") if k in sides} if whole else {}


def _classes(folder: Path, name: str, left: SkippedFiles) -> dict[str, list[Path]]:
    """The image files by class; those of a folder without folders are of one class, `name`."""
    below = subfolders(folder)
    _refuse_both(folder, below, flat := images_below(folder, left, deep=False))
    return _deep(below, left) or {name: flat}


def _deep(below: list[Path], left: SkippedFiles) -> dict[str, list[Path]]:
    for path in below:
        if path.name != printable(path.name):
            raise UsageError(
                f"the name of the folder {printable(str(path))} is not UTF-8; a class needs a name "
                "of text: rename the folder"
            )
    return {path.name: images_below(path, left) for path in below}


def _refuse_both(folder: Path, below: list[Path], flat: list[Path]) -> None:
    if below and flat:
        raise UsageError(
            f"{folder} holds both images ({flat[0].name}) and folders ({below[0].name}); allowed "
            "is one of the two: move the images into a folder of their class"
        )


def _skipped_note(left: SkippedFiles) -> str:
    return f"; not read: {left.words()}" if left.counts else ""


def printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class Reader:
    """Reads image files, all of one size and mode, and counts what it changed on the way."""

    def __init__(self, mode: Mode = "auto", resize: Size | None = None) -> None:
        """The first image determines the size and mode of all."""
        self.mode: Mode = mode
        self.resize = resize
        self.first: tuple[Path, Form] | None = None
        self.frames: list[str] = []  # files with several
        self.turned = 0

    def read(self, paths: list[Path]) -> Tensor:
        """The images of these files as bytes, uint8 (n c y x)."""
        images = torch.empty(0, dtype=torch.uint8)
        for number, path in enumerate(paths):
            pixels, form = self._image(path)  # (y x) or (y x c)
            if self.first is None:
                self.first = path, form
            one, wanted = self.first
            if (form.mode, form.size) != (wanted.mode, wanted.size):
                raise UsageError(
                    f"{path} is {form}, {one} is {wanted}; all images must be of one size and "
                    f"mode: type {self._fix(form, wanted)}"
                )
            if not number:
                images = allocate(len(paths), form)
            place = images[number].permute(1, 2, 0).numpy()  # y x c, the memory of images
            place[...] = pixels.reshape(place.shape)
        return images

    def notes(self) -> list[str]:
        """What was changed in reading, for the user."""
        notes = []
        if self.turned:
            notes.append(f"turned as their EXIF orientation says: {self.turned:,} images")
        if self.frames:
            count = len(self.frames)
            notes.append(f"only the first frame is read of {count:,} images ({self.frames[0]})")
        return notes

    def _fix(self, form: Form, wanted: Form) -> str:
        fix = []
        if form.mode != wanted.mode:
            fix.append("--data.mode=rgb (or gray) to convert them")
        if form.size != wanted.size:
            fix.append(f"--data.resize=[{wanted.size[1]},{wanted.size[0]}] (rows, columns)")
        return " and ".join(fix)

    def _image(self, path: Path) -> tuple[Any, Form]:
        """The pixels, uint8 (y x) or (y x 3), and their form."""
        if not path.is_file():  # opening a pipe would block
            raise UsageError(f"{path} is no file; remove it")
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of a file that it can read
                return self._decoded(file, path)
        except UnsupportedImage as error:
            raise UsageError(f"{path} {error}") from None
        except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
            why = str(error) or type(error).__name__
            raise UsageError(f"{path} is no image that can be read: {why}; remove it") from None

    def _decoded(self, file: Any, path: Path) -> tuple[Any, Form]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            picture: Any = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise UsageError(f"it is none of {', '.join(FORMATS)}") from None
        if self.resize and picture.format == "JPEG":
            picture.draft(None, (max(self.resize), max(self.resize)))  # decode it smaller
        if math.prod(picture.size) > PIXELS:
            raise UnsupportedImage(
                f"is {picture.size[0]}x{picture.size[1]}; allowed are {PIXELS:,} pixels an image: "
                "make it smaller"
            )
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # photo and preview
            self.frames.append(printable(path.name))
        deep = picture.format in ("PNG", "TIFF") and "16" in _raw_mode(picture)
        picture.load()
        with suppress(Exception):  # an EXIF block that cannot be read states no orientation
            orientation = picture.getexif().get(0x0112, 1)
            ImageOps.exif_transpose(picture, in_place=True)
            self.turned += orientation in range(2, 9)
        form = Form(picture.mode, picture.size, f"{', 16-bit' if deep else ''}"
                    f"{', transparent' if picture.has_transparency_data else ''}")  # fmt: skip
        picture = convert(picture, self.mode, form)
        if self.resize:
            rows, columns = self.resize
            picture = ImageOps.fit(picture, (columns, rows), Image.Resampling.LANCZOS)
        return numpy.asarray(picture), Form(picture.mode, picture.size)


def _raw_mode(picture: Any) -> str:
    """The layout of the pixels in the file, e.g. RGB;16B, of which Pillow keeps 8 bits."""
    arguments = picture.tile[0].args if picture.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


class UnsupportedImage(ValueError):
    """An image that can be read and is not taken; the text follows the file's name."""


def convert(picture: Any, mode: Mode, form: Form) -> Any:
    """A loaded image in mode L or RGB; with `auto` only where no pixel changes."""
    from PIL import Image

    target = {"gray": "L", "rgb": "RGB"}.get(mode)
    if target is None:
        plain = {"1": "L", "P": "RGB", "L": "L", "RGB": "RGB"}.get(form.mode)
        if plain is None or form.note:
            raise UnsupportedImage(
                f"is of mode {form.mode}{form.note}; allowed are gray (L) and RGB of 8 bits without"
                " transparency: type --data.mode=rgb or --data.mode=gray to convert all images"
            )
        return picture if picture.mode == plain else picture.convert(plain)
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = numpy.array(picture)
        if values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise UnsupportedImage("has pixels of 32 bits; allowed are 8 or 16: convert it first")
        key = picture.info.get("transparency")
        clear = values == key if isinstance(key, int) else None
        small = (values >> 8).astype(numpy.uint8)
        if clear is not None:
            small[clear] = 255  # transparent: white
        picture = Image.fromarray(small)
    elif picture.mode == "F":
        raise UnsupportedImage(
            "has pixels of 32-bit floats; allowed are 8 or 16 bits: convert it first"
        )
    elif picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        paper = Image.new("RGB", picture.size, "white")
        paper.paste(picture, mask=picture.getchannel("A"))
        picture = paper
    return picture if picture.mode == target else picture.convert(target)


def allocate(count: int, form: Form) -> Tensor:
    """An empty tensor, uint8 (count c y x), unless it is too large for memory."""
    shape = (count, CHANNELS[form.mode], form.size[1], form.size[0])
    if math.prod(shape) > LIMIT:
        raise UsageError(
            f"{count:,} images of {form} are {math.prod(shape) / 2**30:.0f} GiB, and a set is kept "
            f"in memory whole, up to {LIMIT / 2**30:.0f} GiB; make them smaller: type "
            "--data.resize=64"
        )
    return torch.empty(shape, dtype=torch.uint8)
