"""Image folder dataset as one uint8 tensor: FOLDER/<class>/**, or FOLDER/* without classes.

    FOLDER/cat/1.png  FOLDER/dog/more/2.jpg          classes cat and dog
    FOLDER/train/cat/1.png  FOLDER/test/cat/2.png    the same, split by the user
    FOLDER/1.png  FOLDER/2.webp                      one class: for models without labels

Class names that contain numbers are sorted by the numbers: 2 before 10. Every file below FOLDER is
read, or counted and reported.

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

from .image_set import MAX_BYTES, ImageSet

IMAGE_SUFFIXES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff"
}  # fmt: skip
# Pillow detects the format by content. Some of its other formats start programs (EPS: gs).
PILLOW_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 25_000_000  # per image: decoding and conversion take up to 13 bytes a pixel
MAX_SKIPPED_FILES = 100_000  # with more files that are not images, the path is assumed to be wrong
SPLIT_ALIASES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
MODE_CHANNELS = {"L": 1, "RGB": 3}

ColorMode = Literal["auto", "gray", "rgb"]
ImageSize = tuple[int, int]  # rows, columns


class SkippedFiles:
    """Counts the files below a folder that are not read, by type, with one example per type."""

    def __init__(self, root: Path) -> None:
        """Start empty; examples are named relative to `root`."""
        self.root = root
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, file_type: str, path: str) -> None:
        """Count one file."""
        self.counts[file_type] += 1
        self.examples.setdefault(file_type, printable(os.path.relpath(path, self.root)))
        if self.counts.total() > MAX_SKIPPED_FILES:
            raise UsageError(
                f"{self.root} holds more than {MAX_SKIPPED_FILES:,} files that are no images, e.g. "
                f"{self.examples[file_type]}; give the folder of the images alone: type "
                "--data.source=FOLDER"
            )

    def describe(self) -> str:
        """Return all counts in one line, "" if there are none."""
        descriptions = (
            f"{n:,} {file_type} ({self.examples[file_type]})"
            for file_type, n in self.counts.most_common()
        )
        return ", ".join(descriptions)


class ImageFormat(NamedTuple):
    """The stored format of an image: Pillow's mode and size, and a note on depth and alpha."""

    mode: str
    size: tuple[int, int]  # columns, rows
    note: str = ""

    def __str__(self) -> str:
        """Return e.g. "6x4 RGB, transparent"."""
        return f"{self.size[0]}x{self.size[1]} {self.mode}{self.note}"


class FolderContents(NamedTuple):
    """The images of a folder by split (all, or train, val, test), and notes for the log."""

    splits: dict[str, ImageSet]
    notes: list[str]


def read_image_folder(
    folder: Path, mode: ColorMode = "auto", resize: ImageSize | None = None
) -> FolderContents:
    """Read a folder of images.

    Args:
        folder: the folder, in one of the layouts listed at the top of this file.
        mode: `auto` takes 8-bit gray or RGB as stored and rejects a mixture. `gray` and `rgb`
            convert: transparent pixels are blended with white, 16-bit images keep the upper 8 bits.
        resize: rows and columns; every image is scaled and center-cropped to this size.

    Raises:
        UsageError: an image cannot be read or differs in size or mode, or a class has no image.
        MissingFileError: the folder has no image.
    """
    skipped = SkippedFiles(folder)
    subfolder_paths = list_subfolders(folder)
    _check_not_mixed(
        folder, subfolder_paths, top_level_images := find_images(folder, skipped, recursive=False)
    )
    if split_folders := _find_split_folders(subfolder_paths):
        files_by_split = {
            split: _images_by_class(path, folder.name, skipped)
            for split, path in split_folders.items()
        }
    else:
        files_by_split = {
            "all": _images_by_subfolder(subfolder_paths, skipped) or {folder.name: top_level_images}
        }
    if not any(paths for classes in files_by_split.values() for paths in classes.values()):
        raise MissingFileError(
            f"no image in {folder}: allowed are files {', '.join(sorted(IMAGE_SUFFIXES))}, in it "
            "or in "
            f"one folder a class{_describe_skipped(skipped)}; type --data.source=FOLDER"
        )
    names = tuple(next(iter(files_by_split.values())))
    for split, classes in files_by_split.items():
        if tuple(classes) != names and len(files_by_split) > 1:
            differing_classes = sorted(set(classes) ^ set(names))
            raise UsageError(
                f"{folder}: the classes of {split} and {next(iter(files_by_split))} differ: "
                f"{', '.join(differing_classes[:5])}; allowed are the same in each: type "
                f"--data.source={split_folders['train']}, or give each the same folders"
            )
    reader = ImageReader(mode, resize)
    sets = {}
    for split, classes in files_by_split.items():
        paths = [path for class_files in classes.values() for path in class_files]
        labels = torch.tensor(
            [k for k, class_files in enumerate(classes.values()) for _ in class_files]
        )
        if empty := [name for name, class_files in classes.items() if not class_files]:
            raise UsageError(
                f"{folder}: no image of class {', '.join(empty)}; give each class at least one, "
                f"or remove the class{_describe_skipped(skipped)}"
            )
        files = tuple(os.path.relpath(path, folder) for path in paths)
        sets[split] = ImageSet(reader.read_files(paths), labels, names, files)
    notes = reader.describe_changes()
    if skipped.counts:
        notes.insert(0, f"not read: {skipped.describe()}")
    return FolderContents(sets, notes)


def read_images(
    path: Path, mode: ColorMode, resize: ImageSize | None
) -> tuple[ImageSet, list[str]]:
    """Read one image file or all images below a folder, with labels -1; also return log notes."""
    skipped = SkippedFiles(path)
    if path.is_file():
        files, root = [path], path.parent
    elif path.is_dir():
        files, root = find_images(path, skipped), path
    else:
        raise MissingFileError(f"no file or folder {path}; type --data.predict_path=FOLDER")
    if not files:
        raise MissingFileError(
            f"no image in {path}: allowed are files {', '.join(sorted(IMAGE_SUFFIXES))}"
            f"{_describe_skipped(skipped)}; type --data.predict_path=FOLDER"
        )
    files.sort(key=lambda file: natural_sort_key(str(file)))
    reader = ImageReader(mode, resize)
    names = tuple(os.path.relpath(file, root) for file in files)
    images = ImageSet(reader.read_files(files), torch.full((len(files),), -1), (), names)
    return images, (
        [f"not read: {skipped.describe()}"] if skipped.counts else []
    ) + reader.describe_changes()


def natural_sort_key(name: str) -> tuple[Any, ...]:
    """Return a sort key that compares digits as numbers: 2 before 10, img2 before img10."""
    segments = re.split(r"(\d+)", name)  # text and digits in turn
    return tuple(int(segment) if i % 2 else segment for i, segment in enumerate(segments)), name


def list_subfolders(folder: Path) -> list[Path]:
    """List the subfolders that are not hidden, in the order of `natural_sort_key`."""
    folders = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    return sorted(folders, key=lambda p: natural_sort_key(p.name))


def find_images(folder: Path, skipped: SkippedFiles, recursive: bool = True) -> list[Path]:
    """List the image files of a folder, also below it if `recursive`; folder links are followed."""
    images, pending, visited = [], [str(folder)], set()
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in visited:  # a cyclic link
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                match _entry_type(entry):
                    case "folder":
                        pending += [entry.path] if recursive else []
                    case "file" if (end := Path(entry.name).suffix.lower()) in IMAGE_SUFFIXES:
                        images.append(Path(entry.path))
                    case "file":
                        skipped.add(printable(end) or "without a suffix", entry.path)
                    case kind:
                        skipped.add(kind, entry.path)
    return sorted(images)


def _entry_type(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        pass
    return "broken link" if entry.is_symlink() else "no regular file"


def _find_split_folders(subfolder_paths: list[Path]) -> dict[str, Path]:
    """Return the folders train, val and test if a folder holds two or three of them only."""
    split_folders = {
        SPLIT_ALIASES.get(path.name.lower(), path.name): path for path in subfolder_paths
    }
    is_complete = len(split_folders) == len(subfolder_paths) > 1 and set(split_folders) <= {
        "train",
        "val",
        "test",
    }
    return (
        {k: split_folders[k] for k in ("train", "val", "test") if k in split_folders}
        if is_complete
        else {}
    )


def _images_by_class(folder: Path, name: str, skipped: SkippedFiles) -> dict[str, list[Path]]:
    """Return the image files by class; a folder without subfolders has one class, `name`."""
    subfolder_paths = list_subfolders(folder)
    _check_not_mixed(
        folder, subfolder_paths, top_level_images := find_images(folder, skipped, recursive=False)
    )
    return _images_by_subfolder(subfolder_paths, skipped) or {name: top_level_images}


def _images_by_subfolder(
    subfolder_paths: list[Path], skipped: SkippedFiles
) -> dict[str, list[Path]]:
    for path in subfolder_paths:
        if path.name != printable(path.name):
            raise UsageError(
                f"the name of the folder {printable(str(path))} is not UTF-8; a class needs a name "
                "of text: rename the folder"
            )
    return {path.name: find_images(path, skipped) for path in subfolder_paths}


def _check_not_mixed(
    folder: Path, subfolder_paths: list[Path], top_level_images: list[Path]
) -> None:
    if subfolder_paths and top_level_images:
        raise UsageError(
            f"{folder} holds both images ({top_level_images[0].name}) and folders "
            f"({subfolder_paths[0].name}); allowed "
            "is one of the two: move the images into a folder of their class"
        )


def _describe_skipped(skipped: SkippedFiles) -> str:
    return f"; not read: {skipped.describe()}" if skipped.counts else ""


def printable(name: str) -> str:
    """Return a file name as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class ImageReader:
    """Reads image files of one size and mode, and counts the images that it changes."""

    def __init__(self, mode: ColorMode = "auto", resize: ImageSize | None = None) -> None:
        """Store the options; the first image sets the size and mode that all images must have."""
        self.mode: ColorMode = mode
        self.resize = resize
        self.first_image: tuple[Path, ImageFormat] | None = None
        self.multi_frame_files: list[str] = []  # names of the files with several frames
        self.num_rotated = 0

    def read_files(self, paths: list[Path]) -> Tensor:
        """Read the image files into one tensor, uint8 (n c y x)."""
        images = torch.empty(0, dtype=torch.uint8)
        for number, path in enumerate(paths):
            pixels, image_format = self._read_file(path)  # (y x) or (y x c)
            if self.first_image is None:
                self.first_image = path, image_format
            first_path, expected_format = self.first_image
            if (image_format.mode, image_format.size) != (
                expected_format.mode,
                expected_format.size,
            ):
                raise UsageError(
                    f"{path} is {image_format}, {first_path} is {expected_format}; all images "
                    "must be of one size and "
                    f"mode: type {self._suggest_flags(image_format, expected_format)}"
                )
            if not number:
                images = allocate_images(len(paths), image_format)
            destination = images[number].permute(1, 2, 0).numpy()  # (y x c), a view of `images`
            destination[...] = pixels.reshape(destination.shape)
        return images

    def describe_changes(self) -> list[str]:
        """Return notes on changed images for the log: applied EXIF rotations, dropped frames."""
        notes = []
        if self.num_rotated:
            notes.append(f"turned as their EXIF orientation says: {self.num_rotated:,} images")
        if self.multi_frame_files:
            count = len(self.multi_frame_files)
            notes.append(
                f"only the first frame is read of {count:,} images ({self.multi_frame_files[0]})"
            )
        return notes

    def _suggest_flags(self, image_format: ImageFormat, expected_format: ImageFormat) -> str:
        flags = []
        if image_format.mode != expected_format.mode:
            flags.append("--data.mode=rgb (or gray) to convert them")
        if image_format.size != expected_format.size:
            flags.append(
                f"--data.resize=[{expected_format.size[1]},{expected_format.size[0]}] (rows, "
                "columns)"
            )
        return " and ".join(flags)

    def _read_file(self, path: Path) -> tuple[Any, ImageFormat]:
        """Return the pixels, uint8 (y x) or (y x 3), and their format."""
        if not path.is_file():  # opening a pipe would block
            raise UsageError(f"{path} is no file; remove it")
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's warnings on readable files
                return self._decode(file, path)
        except UnsupportedImageError as error:
            raise UsageError(f"{path} {error}") from None
        except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
            reason = str(error) or type(error).__name__
            raise UsageError(f"{path} is no image that can be read: {reason}; remove it") from None

    def _decode(self, file: Any, path: Path) -> tuple[Any, ImageFormat]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            picture: Any = Image.open(file, formats=PILLOW_FORMATS)
        except UnidentifiedImageError:
            raise UsageError(f"it is none of {', '.join(PILLOW_FORMATS)}") from None
        if self.resize and picture.format == "JPEG":
            picture.draft(None, (max(self.resize), max(self.resize)))  # decode at reduced size
        if math.prod(picture.size) > MAX_PIXELS:
            raise UnsupportedImageError(
                f"is {picture.size[0]}x{picture.size[1]}; allowed are {MAX_PIXELS:,} pixels an "
                "image: "
                "make it smaller"
            )
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # photo, preview
            self.multi_frame_files.append(printable(path.name))
        is_16_bit = picture.format in ("PNG", "TIFF") and "16" in _raw_mode(picture)
        picture.load()
        with suppress(Exception):  # an unreadable EXIF block counts as no orientation
            orientation = picture.getexif().get(0x0112, 1)
            ImageOps.exif_transpose(picture, in_place=True)
            self.num_rotated += orientation in range(2, 9)
        image_format = ImageFormat(picture.mode, picture.size, f"{', 16-bit' if is_16_bit else ''}"
                    f"{', transparent' if picture.has_transparency_data else ''}")  # fmt: skip
        picture = convert_mode(picture, self.mode, image_format)
        if self.resize:
            rows, columns = self.resize
            picture = ImageOps.fit(picture, (columns, rows), Image.Resampling.LANCZOS)
        return numpy.asarray(picture), ImageFormat(picture.mode, picture.size)


def _raw_mode(picture: Any) -> str:
    """Return the pixel layout in the file, e.g. RGB;16B, of which Pillow keeps 8 bits."""
    arguments = picture.tile[0].args if picture.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


class UnsupportedImageError(ValueError):
    """An image that Pillow can read but that is not accepted; the message follows the file name."""


def convert_mode(picture: Any, mode: ColorMode, image_format: ImageFormat) -> Any:
    """Convert a loaded image to mode L or RGB; with `auto` only if no pixel value changes."""
    from PIL import Image

    target = {"gray": "L", "rgb": "RGB"}.get(mode)
    if target is None:
        lossless_mode = {"1": "L", "P": "RGB", "L": "L", "RGB": "RGB"}.get(image_format.mode)
        if lossless_mode is None or image_format.note:
            raise UnsupportedImageError(
                f"is of mode {image_format.mode}{image_format.note}; allowed are gray (L) and RGB "
                "of 8 bits without"
                " transparency: type --data.mode=rgb or --data.mode=gray to convert all images"
            )
        return picture if picture.mode == lossless_mode else picture.convert(lossless_mode)
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = numpy.array(picture)
        if values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise UnsupportedImageError(
                "has pixels of 32 bits; allowed are 8 or 16: convert it first"
            )
        key = picture.info.get("transparency")
        is_transparent = values == key if isinstance(key, int) else None
        values_8bit = (values >> 8).astype(numpy.uint8)
        if is_transparent is not None:
            values_8bit[is_transparent] = 255  # transparent: white
        picture = Image.fromarray(values_8bit)
    elif picture.mode == "F":
        raise UnsupportedImageError(
            "has pixels of 32-bit floats; allowed are 8 or 16 bits: convert it first"
        )
    elif picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        background = Image.new("RGB", picture.size, "white")
        background.paste(picture, mask=picture.getchannel("A"))
        picture = background
    return picture if picture.mode == target else picture.convert(target)


def allocate_images(count: int, image_format: ImageFormat) -> Tensor:
    """Allocate a tensor, uint8 (count c y x); raise an error if it is larger than MAX_BYTES."""
    shape = (count, MODE_CHANNELS[image_format.mode], image_format.size[1], image_format.size[0])
    if math.prod(shape) > MAX_BYTES:
        raise UsageError(
            f"{count:,} images of {image_format} are {math.prod(shape) / 2**30:.0f} GiB, and a "
            "set is kept "
            f"in memory whole, up to {MAX_BYTES / 2**30:.0f} GiB; make them smaller: type "
            "--data.resize=64"
        )
    return torch.empty(shape, dtype=torch.uint8)
