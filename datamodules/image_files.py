"""Image files as one tensor of bytes: idx, CIFAR's binary form, folders of PNG and JPEG, digits.

Axes: n images, c channels, y rows, x columns.
"""

import gzip
import io
import math
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .sources import Source

MODES = {"L": 1, "RGB": 3}  # of Pillow, with their channels
SUFFIXES = {".png", ".jpg", ".jpeg"}
LIMIT = 2**34  # bytes: a set is kept whole in memory
IMAGE_SOURCE = partial(Source, own="source=FOLDER", embedded="digits")

# Mirrors of MNIST wrap it in different gzips, so it is known by what is inside; Fashion-MNIST has
# one canonical gzip, which is known as it is. Both: images and labels to train, then to test.
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
CHECKSUMS = {
    "mnist": (
        ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47_040_016),
        ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008),
        ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016),
        ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008),
    ),
    "fashion": (
        ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
        ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
        ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
        ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
    ),
}
MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
}
SOURCES: dict[str, tuple[Source, ...]] = {
    name: tuple(
        IMAGE_SOURCE(
            name=name,
            path=f"{name}/{file}-ubyte.gz",
            sha256=sha256,
            size=size,
            url=f"{MIRRORS[name]}{file}-ubyte.gz",
            gzipped=name == "mnist",
        )
        for file, (sha256, size) in zip(FILES, rows, strict=True)
    )
    for name, rows in CHECKSUMS.items()
} | {
    "cifar10": (
        IMAGE_SOURCE(
            name="cifar10",
            path="cifar10/cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            size=170_052_171,
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        ),
    )
}
NAMES = {
    "mnist": tuple("0123456789"),
    "digits": tuple("0123456789"),
    "fashion": ("T-shirt", "trouser", "pullover", "dress", "coat",
                "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer",
                "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip


class ImageSet(NamedTuple):
    """Images uint8 (n c y x), labels int64 (n), and the names of the classes."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def checked(self, name: str) -> "ImageSet":
        """Refuse labels without an image or without a class, and classes without an image."""
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{name} has {len(self.images):,} images and {len(self.labels):,} labels; they "
                "must be as many: fetch both files again"
            )
        check_labels(self.labels, len(self.names), name)
        counts = torch.bincount(self.labels, minlength=len(self.names))
        if empty := [self.names[k] for k in (counts == 0).nonzero()[:, 0].tolist()]:
            raise ValueError(
                f"{name}: no image of class {', '.join(empty)}; give each class at least one, or "
                "remove the class"
            )
        return self


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """Refuse labels (n) that are no class: a net may take one for a label that is not given."""
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: the label of image {place} is {int(labels[place])}; allowed are 0 to "
            f"{classes - 1}, the {classes} classes: mend the labels"
        )


def read_idx(content: bytes, name: str) -> Tensor:
    """The idx form of MNIST: 0 0 8 dimensions, their sizes in four bytes each, then the bytes."""
    rank = content[3] if len(content) > 3 else 0
    start = 4 + 4 * rank
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if content[:3] != b"\0\0\x08" or not rank or len(content) != start + math.prod(sizes):
        raise ValueError(
            f"{name} is not an idx file of bytes: it begins with {content[:4].hex(' ')} and has "
            f"{len(content):,} bytes; expected 00 00 08 0N and as many bytes as the N sizes after "
            "it say; fetch the file again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(sizes)


def read_cifar(content: bytes, name: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10's binary form: images (n 3 32 32) and labels (n), from records of 3,073 bytes."""
    record = 1 + 3 * 32 * 32  # a label, then the three planes
    if not content or len(content) % record:
        raise ValueError(
            f"{name} has {len(content):,} bytes, no whole number of records of {record}; fetch "
            "the file again"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_folder(folder: Path) -> ImageSet:
    """A user's own images: FOLDER/<class>/*.png, or FOLDER/*.png, which are of one class."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    flat = _pictures(folder)
    if classes and flat:
        raise ValueError(
            f"{folder} holds both images ({flat[0].name}) and folders ({classes[0].name}); allowed "
            "is one of the two: move the images into a folder of their class"
        )
    files = [_pictures(each) for each in classes] or [flat]
    names = tuple(each.name for each in classes) or (folder.name,)
    if not any(files):
        raise FileNotFoundError(
            f"no image in {folder}: allowed are files {', '.join(sorted(SUFFIXES))}, in it or in "
            "one folder a class; type --data.source=FOLDER"
        )
    labels = torch.tensor([k for k, paths in enumerate(files) for _ in paths])
    paths = [path for some in files for path in some]
    return ImageSet(_read_pictures(paths), labels, names).checked(str(folder))


def _pictures(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in SUFFIXES)


def _read_pictures(paths: list[Path]) -> Tensor:
    from PIL import Image

    images = torch.empty(0, dtype=torch.uint8)
    form = ("", (0, 0))
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                found = (picture.mode, picture.size)
                if not number:
                    form = found
                    images = _room(len(paths), path, *found)
                if found != form:
                    raise ValueError(
                        f"{path} is {_words(found)}, {paths[0]} is {_words(form)}; all images must "
                        "be of one size and mode: convert them, e.g. with ImageMagick: "
                        f"mogrify -resize {form[1][0]}x{form[1][1]}! -colorspace "
                        f"{'gray' if form[0] == 'L' else 'sRGB'} FILE"
                    )
                content = bytearray(picture.tobytes())
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is no image that can be read: {error}; remove it") from None
        flat = torch.frombuffer(content, dtype=torch.uint8)
        images[number] = flat.reshape(*images.shape[2:], images.shape[1]).permute(2, 0, 1)  # c y x
    return images


def _room(count: int, path: Path, mode: str, size: tuple[int, int]) -> Tensor:
    if mode not in MODES:
        raise ValueError(
            f"{path} is of mode {mode}; allowed are L (gray) and RGB: convert it, e.g. with "
            "ImageMagick: mogrify -alpha off -depth 8 -type TrueColor FILE"
        )
    shape = (count, MODES[mode], size[1], size[0])
    if math.prod(shape) > LIMIT:
        raise ValueError(
            f"{count:,} images of {_words((mode, size))} are {math.prod(shape) / 2**30:.0f} GiB, "
            f"and a set is kept in memory whole, up to {LIMIT / 2**30:.0f} GiB; make them smaller, "
            "e.g. with ImageMagick: mogrify -resize 64x64! FILE"
        )
    return torch.empty(shape, dtype=torch.uint8)


def _words(form: tuple[str, tuple[int, int]]) -> str:
    return f"{form[1][0]}x{form[1][1]} {form[0]}"


def read_digits() -> ImageSet:
    """The 1,797 digits of 8x8 pixels that scikit-learn ships, 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return ImageSet(images, torch.tensor(labels), NAMES["digits"])


def read_named(name: str, paths: list[Path]) -> tuple[ImageSet, ImageSet]:
    """The parts to train and to test of MNIST, Fashion-MNIST or CIFAR-10, from their files."""
    if name == "cifar10":
        parts = _cifar_parts(paths[0])
    else:
        arrays = [read_idx(_unzipped(path), str(path)) for path in paths]
        for path, array, rank in zip(paths, arrays, (3, 1, 3, 1), strict=True):
            if array.dim() != rank:
                raise ValueError(f"{path} has {array.dim()} dimensions, not {rank}; fetch it again")
        parts = [(arrays[i][:, None], arrays[i + 1].long()) for i in (0, 2)]  # (n 1 y x)
    train, test = (
        ImageSet(*part, NAMES[name]).checked(f"{paths[0].parent} ({side})")
        for part, side in zip(parts, ("train", "test"), strict=True)
    )
    return train, test


def _unzipped(path: Path) -> bytes:
    with gzip.open(path) as file:
        return file.read()


def _cifar_parts(path: Path) -> list[tuple[Tensor, Tensor]]:
    with tarfile.open(path, "r:gz") as archive:  # read in place: nothing is unpacked to disk
        members = {Path(m.name).name: m for m in archive if m.isfile()}
        wanted = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        if missing := [name for name in wanted if name not in members]:
            raise ValueError(f"{path} lacks {', '.join(missing)}; fetch the binary form again")
        read = [read_cifar((archive.extractfile(members[n]) or io.BytesIO()).read(), n)
                for n in wanted]  # fmt: skip
    images, labels = zip(*read[:5], strict=True)
    return [(torch.cat(images), torch.cat(labels)), read[5]]
