"""Image file formats: idx (MNIST), CIFAR-10's binary records, and PNG, JPEG and others by Pillow.

An idx file begins with the bytes 0 0 8 and the number of dimensions, then the size of each
dimension in four bytes, then the bytes of the array.

Axes: n images, c channels, y rows, x columns.
"""

import gzip
import io
import math
import os
import tarfile
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from ravine.errors import UsageError

from .image_set import MAX_BYTES

ELEMENT_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
GZIP_ALLOWANCE = 2**29  # bytes; a gzip may decompress to this plus four times its size
IMAGE_SUFFIXES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp", ".tif", ".tiff"
}  # fmt: skip
# Pillow detects the format by content. Some of its other formats start programs (EPS: gs).
PILLOW_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 25_000_000  # per image: decoding and conversion take up to 13 bytes a pixel
MODE_CHANNELS = {"L": 1, "RGB": 3}
ColorMode = Literal["auto", "gray", "rgb"]
ImageSize = tuple[int, int]  # rows, columns


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
            # the first bytes of every gzip file
            is_gzipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzipped else path.open("rb") as file:
            array = _parse_idx(file, path, is_gzipped)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"{path} cannot be read: {error}", ["a complete idx file"], "download the file again"
        ) from None
    if allowed_dims and array.dim() not in allowed_dims:
        raise UsageError(
            f"{path} has {array.dim()} dimensions",
            [" or ".join(map(str, allowed_dims))],
            "download the file again",
        )
    return array


def _parse_idx(file: gzip.GzipFile | object, path: Path, is_gzipped: bool) -> Tensor:
    """Read the header and the bytes of an open idx file; return a uint8 tensor.

    The header: two zero bytes, the element type, the number of dimensions, and each dimension as
    four bytes, the highest first. Its sizes are checked before memory is allocated.

    Args:
        file: the open file, decompressed while it is read.
        path: its path, for the size and for errors.
        is_gzipped: whether the file on disk is compressed.
    """
    read_bytes, readinto = file.read, file.readinto  # type: ignore[attr-defined]
    header = read_bytes(4)
    num_dimensions = header[3] if len(header) == 4 else 0
    sizes = [int.from_bytes(read_bytes(4), "big") for _ in range(num_dimensions)]
    # ELEMENT_TYPES: names of the element types by their number in the header
    if header[:2] != b"\0\0" or not sizes or header[2] not in ELEMENT_TYPES:
        raise UsageError(
            f"{path} is not an idx file of bytes: it begins with {header.hex(' ') or 'no byte'}",
            ["00 00 08 and the number of dimensions"],
            "download the file again",
        )
    if header[2] != 8:  # 8: unsigned bytes
        raise UsageError(
            f"{path} holds {ELEMENT_TYPES[header[2]]}",
            ["an idx file of bytes from 0 to 255, which begins with 00 00 08"],
            "convert the file to bytes",
        )
    start, length = 4 + 4 * len(sizes), math.prod(sizes)  # bytes of the header, and after it
    dimensions, size = " x ".join(map(str, sizes)), path.stat().st_size
    # A small damaged file could otherwise ask for any amount of memory. Images seldom compress to
    # less than a quarter; the allowance is for those that do, such as blank ones.
    if is_gzipped and length > 4 * size + GZIP_ALLOWANCE:
        raise UsageError(
            f"the header of {path} states {dimensions} bytes, but the gzip file has {size:,}",
            [f"at most {GZIP_ALLOWANCE:,} bytes plus four times the size of the gzip file"],
            f"decompress the file first: gunzip '{path}'",
            flag=f"gunzip '{path}'",
        )
    if length > MAX_BYTES or (not is_gzipped and start + length != size):
        raise UsageError(
            f"{path} is not an idx file of bytes: it has {size:,} bytes, but a header of {start} "
            f"and {dimensions} are {start + length:,}",
            [f"at most {MAX_BYTES:,} bytes, as many as the header states"],
            "download the file again",
        )
    content, num_read = bytearray(length), 0
    view = memoryview(content)
    # readinto may return fewer bytes than asked for; 0 at the end of the file
    while num_read < length and (count := readinto(view[num_read:])):
        num_read += count
    if num_read < length or read_bytes(1):
        raise UsageError(
            f"{path} is not an idx file of bytes: it has "
            f"{'fewer' if num_read < length else 'more'} than the {dimensions} of its header",
            ["as many bytes as the header states"],
            "download the file again",
        )
    if not length:
        raise UsageError(
            f"{path} is empty: its header states {dimensions} bytes",
            ["one image or label, or more"],
            "download the file again",
        )
    return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)


def read_idx_images(path: Path) -> Tensor:
    """Read images, uint8 (n c y x); in four dimensions the channel axis is last or second."""
    array = read_idx(path, 3, 4)
    if array.dim() == 3:
        return array[:, None]
    if array.shape[3] in (1, 3):
        return array.permute(0, 3, 1, 2)
    if array.shape[1] in (1, 3):
        return array
    raise UsageError(
        f"{path} holds images of shape {tuple(array.shape[1:])}",
        ["1 or 3 channels"],
        "convert the images to gray or RGB",
    )


def read_cifar(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Parse CIFAR-10's binary records of 3,073 bytes: images (n 3 32 32) and labels (n)."""
    record = 1 + 3 * 32 * 32  # one label, then three color planes
    if not content or len(content) % record:
        raise UsageError(
            f"{name} has {len(content):,} bytes, which is not a multiple of the record size "
            f"{record}",
            ["CIFAR-10's binary records"],
            "download the file again",
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_cifar_archive(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Read the training and test splits of CIFAR-10's archive: images (n 3 32 32), labels (n)."""
    with tarfile.open(path, "r:gz") as archive:  # read in memory, without extracting to disk
        members = {Path(m.name).name: m for m in archive if m.isfile()}
        file_names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        if missing := [name for name in file_names if name not in members]:
            raise UsageError(
                f"{path} lacks {', '.join(missing)}",
                ["the binary version of CIFAR-10"],
                "download the file again",
            )
        batches = [read_cifar((archive.extractfile(members[n]) or io.BytesIO()).read(), n)
                for n in file_names]  # fmt: skip
    images, labels = zip(*batches[:5], strict=True)
    return [(torch.cat(images), torch.cat(labels)), batches[5]]


class ImageFormat(NamedTuple):
    """The stored format of an image: Pillow's mode and size, and a note on depth and alpha."""

    mode: str
    size: tuple[int, int]  # columns, rows
    note: str = ""

    def __str__(self) -> str:
        """Return e.g. "6x4 RGB, transparent"."""
        return f"{self.size[0]}x{self.size[1]} {self.mode}{self.note}"


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
        """Read the image files into one tensor, uint8 (n c y x).

        Raises:
            UsageError: a file cannot be read, or differs in size or mode from the first image that
                this reader has read (in any call).
        """
        images = torch.empty(0, dtype=torch.uint8)
        for number, path in enumerate(paths):
            # image_format: mode and size, in a form that can be compared and printed
            pixels, image_format = self._read_file(path)  # (y x) or (y x c)
            if self.first_image is None:
                self.first_image = path, image_format
            first_path, expected_format = self.first_image
            if image_format != expected_format:
                # which mode or size to convert all images to
                hint, flag = self._suggest_conversion(image_format, expected_format)
                raise UsageError(
                    f"{path} is {image_format}, but {first_path} is {expected_format}",
                    ["images of one size and mode"],
                    hint,
                    flag=flag,
                )
            if number == 0:
                # uint8 (n c y x), not initialized
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

    def _suggest_conversion(
        self, image_format: ImageFormat, expected_format: ImageFormat
    ) -> tuple[str, str]:
        """Return a hint and the flags of the arguments that convert all images to one format."""
        hints, flags = [], []
        if image_format.mode != expected_format.mode:
            hints.append("mode='rgb' (or mode='gray')")
            flags.append("--data.mode=rgb")
        if image_format.size != expected_format.size:
            columns, rows = expected_format.size
            hints.append(f"resize=({rows}, {columns})")
            flags.append(f"'--data.resize=[{rows},{columns}]'")  # a shell may expand brackets
        return f"use {' and '.join(hints)}", " ".join(flags)

    def _read_file(self, path: Path) -> tuple[Any, ImageFormat]:
        """Return the pixels, uint8 (y x) or (y x 3), and their format.

        Raises:
            UsageError: the file is no image, is damaged, or is of a format that is not supported.
        """
        if not path.is_file():  # opening a pipe would block
            raise UsageError(
                f"{path} is not a regular file", ["files and folders"], "remove it from the folder"
            )
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's warnings on readable files
                return self._decode(file, path)
        except UnsupportedImageError as error:
            raise UsageError(
                f"{path} {error.problem}", error.allowed, error.hint, flag=error.flag
            ) from None
        except Exception as error:  # Pillow's decoders raise nearly every type on damaged files
            reason = str(error) or type(error).__name__
            raise UsageError(
                f"{path} cannot be read as an image: {reason}",
                [*PILLOW_FORMATS],
                "remove the file, or replace it",
            ) from None

    def _decode(self, file: Any, path: Path) -> tuple[Any, ImageFormat]:
        """Decode, rotate, convert and resize one image.

        Images that are changed or read in part are counted in `self`, for the log.

        Args:
            file: the open file.
            path: its path; only its name is used, for the log.

        Returns:
            The pixels, uint8 (y x) or (y x 3), and their format.

        Raises:
            UnsupportedImageError: an unknown format, too many pixels, or a mode that `self.mode`
                excludes.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            picture: Any = Image.open(file, formats=PILLOW_FORMATS)
        except UnidentifiedImageError:
            raise UnsupportedImageError(
                "is not an image of a known format",
                [*PILLOW_FORMATS],
                "remove the file, or convert it",
            ) from None
        if self.resize and picture.format == "JPEG":
            picture.draft(None, (max(self.resize), max(self.resize)))  # decode at reduced size
        if math.prod(picture.size) > MAX_PIXELS:
            raise UnsupportedImageError(
                f"has {picture.size[0]}x{picture.size[1]} pixels",
                [f"at most {MAX_PIXELS:,} pixels per image"],
                "reduce the size of the image",
            )
        # A file of format MPO, of some cameras, holds a photo and its preview: the photo is read.
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            self.multi_frame_files.append(printable(path.name))
        # `_raw_mode`: the pixel layout in the file, such as RGB;16B, of which Pillow keeps 8 bits
        is_16_bit = picture.format in ("PNG", "TIFF") and "16" in _raw_mode(picture)
        picture.load()
        with suppress(Exception):  # an unreadable EXIF block counts as no orientation
            orientation = picture.getexif().get(0x0112, 1)  # EXIF tag; 1 is upright
            ImageOps.exif_transpose(picture, in_place=True)
            # 2 ... 8: mirrored or rotated
            self.num_rotated += orientation in range(2, 9)
        note = ", 16-bit" if is_16_bit else ""
        if picture.has_transparency_data:
            note += ", transparent"
        stored_format = ImageFormat(picture.mode, picture.size, note)
        # to L or RGB
        picture = convert_mode(picture, self.mode, stored_format)
        if self.resize:
            rows, columns = self.resize
            picture = ImageOps.fit(picture, (columns, rows), Image.Resampling.LANCZOS)
        return numpy.asarray(picture), ImageFormat(picture.mode, picture.size)


def _raw_mode(picture: Any) -> str:
    """Return the pixel layout in the file, e.g. RGB;16B, of which Pillow keeps 8 bits."""
    arguments = picture.tile[0].args if picture.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


class UnsupportedImageError(UsageError):
    """An image that is not accepted; the problem follows the file name."""


def convert_mode(picture: Any, mode: ColorMode, image_format: ImageFormat) -> Any:
    """Convert a loaded image to mode L or RGB; with `auto` only if no pixel value changes.

    Args:
        picture: a loaded `PIL.Image.Image`.
        mode: `gray` converts to L, `rgb` to RGB; transparent pixels are blended with white, and 16
            bits become the upper 8.
        image_format: the stored mode; its note is set for 16 bits or transparency.

    Raises:
        UnsupportedImageError: with `auto` a conversion would change values; else 32-bit pixels.
    """
    from PIL import Image

    target = {"gray": "L", "rgb": "RGB"}.get(mode)  # None with auto
    if target is None:
        # 1: black and white; P: a palette of colors; L: 8-bit gray
        lossless_mode = {"1": "L", "P": "RGB", "L": "L", "RGB": "RGB"}.get(image_format.mode)
        if lossless_mode is None or image_format.note:
            raise UnsupportedImageError(
                f"has the mode {image_format.mode}{image_format.note}",
                ["gray (L) and RGB of 8 bits without transparency"],
                "use mode='rgb' or mode='gray' to convert all images",
                flag="--data.mode=rgb, or --data.mode=gray",
            )
        return picture if picture.mode == lossless_mode else picture.convert(lossless_mode)
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):  # integers of 16 or 32 bits
        values = numpy.array(picture)
        if values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise UnsupportedImageError(
                "has pixels of 32 bits", ["8 bits", "16 bits"], "convert the image"
            )
        key = picture.info.get("transparency")  # the gray value that means transparent
        is_transparent = values == key if isinstance(key, int) else None
        values_8bit = (values >> 8).astype(numpy.uint8)
        if is_transparent is not None:
            values_8bit[is_transparent] = 255  # transparent: white
        picture = Image.fromarray(values_8bit)
    elif picture.mode == "F":
        raise UnsupportedImageError(
            "has pixels of 32-bit floats", ["8 bits", "16 bits"], "convert the image"
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
            f"{count:,} images of {image_format} take {math.prod(shape) / 2**30:.0f} GiB, and an "
            "image set is held in memory",
            [f"at most {MAX_BYTES / 2**30:.0f} GiB"],
            "use resize=64 for smaller images",
            flag="--data.resize=64",
        )
    return torch.empty(shape, dtype=torch.uint8)


def printable(name: str) -> str:
    """Return a file name as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
