"""Named image datasets as one uint8 tensor each: MNIST, Fashion-MNIST, CIFAR-10, digits.

Axes: n images, c channels, y rows, x columns.
"""

from functools import partial
from pathlib import Path

import torch

from .downloads import RemoteFile
from .image_formats import read_cifar_archive, read_idx
from .image_set import ImageSet

image_dataset_file = partial(RemoteFile, custom_data_argument="source", fallback_source="digits")

# Mirrors of MNIST compress it differently, so its checksums are of the decompressed files.
# Fashion-MNIST has one canonical gzip, so its checksums are of the gzip files.
# Order of both: training images, training labels, test images, test labels.
MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MNIST_CHECKSUMS = {
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
# below the root of torchvision's datasets
TORCHVISION_FOLDERS = {"mnist": "MNIST/raw", "fashion": "FashionMNIST/raw"}
MNIST_URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
}
IMAGE_DATASETS: dict[str, tuple[RemoteFile, ...]] = {
    name: tuple(
        image_dataset_file(
            name=name,
            path=f"{name}/{file}-ubyte.gz",
            sha256=sha256,
            size=size,
            url=f"{MNIST_URLS[name]}{file}-ubyte.gz",
            is_gzipped=name == "mnist",
            alternative_paths=tuple(
                f"{folder}/{file}-ubyte{end}"
                for folder in (name, TORCHVISION_FOLDERS[name])
                for end in (".gz", "")  # Fashion-MNIST: only the gzip, see above
                if end or name == "mnist"
            ),
        )
        for file, (sha256, size) in zip(MNIST_FILES, rows, strict=True)
    )
    for name, rows in MNIST_CHECKSUMS.items()
} | {
    "cifar10": (
        image_dataset_file(
            name="cifar10",
            path="cifar10/cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            size=170_052_171,
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        ),
    )
}
CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "digits": tuple("0123456789"),
    "fashion": ("T-shirt", "trouser", "pullover", "dress", "coat",
                "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer",
                "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip


def read_digits() -> ImageSet:
    """Return scikit-learn's 1,797 digits of 8x8 pixels, scaled from 0..16 to 0..255."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return ImageSet(images, torch.tensor(labels), CLASS_NAMES["digits"])


def read_named_dataset(name: str, paths: list[Path]) -> tuple[ImageSet, ImageSet]:
    """Read the training and test splits of MNIST, Fashion-MNIST or CIFAR-10 from their files."""
    if name == "cifar10":
        arrays_by_split = read_cifar_archive(paths[0])
    else:
        arrays = [read_idx(path, rank) for path, rank in zip(paths, (3, 1, 3, 1), strict=True)]
        arrays_by_split = [(arrays[i][:, None], arrays[i + 1].long()) for i in (0, 2)]  # (n 1 y x)
    train, test = (
        ImageSet(*split_arrays, CLASS_NAMES[name]).validated(f"{paths[0].parent} ({split})")
        for split_arrays, split in zip(arrays_by_split, ("train", "test"), strict=True)
    )
    return train, test
