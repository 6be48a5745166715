"""Image folder dataset as one uint8 tensor: FOLDER/<class>/**, FOLDER/* without classes, or idx.

    FOLDER/cat/1.png  FOLDER/dog/more/2.jpg          classes cat and dog
    FOLDER/train/cat/1.png  FOLDER/test/cat/2.png    the same, split by the user
    FOLDER/1.png  FOLDER/2.webp                      one class: for models without labels
    FOLDER/train-images-idx3-ubyte.gz  FOLDER/train-labels-idx1-ubyte.gz    t10k- or test-: test
    FOLDER/emnist-letters-train-images-idx3-ubyte    several idx datasets in one folder

Class names that contain numbers are sorted by the numbers: 2 before 10. Every file below FOLDER is
read, or counted and reported. Idx files (KMNIST, EMNIST, or your own) have their published names,
gzipped or not.

Axes: n images, c channels, y rows, x columns.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ravine.errors import MissingFileError, UsageError

from .image_formats import (
    IMAGE_SUFFIXES,
    ColorMode,
    ImageReader,
    ImageSize,
    printable,
    read_idx,
    read_idx_images,
)
from .image_set import ImageSet

MAX_SKIPPED_FILES = 100_000  # with more files that are not images, the path is assumed to be wrong
SPLIT_ALIASES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
IDX_FILE_PATTERN = re.compile(
    r"((?P<set>.+?)[-_.])?(?P<side>train|test|t10k|val|valid|validation)[-_.]"
    r"(?P<content>images|labels)[-_.]idx[0-9]([-_.][a-z0-9]+)?(\.gz)?",
    re.IGNORECASE,
)
IdxFiles = dict[tuple[str, str], Path]  # by (split, content)


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
                f"{self.root} holds more than {MAX_SKIPPED_FILES:,} files that are not images, "
                f"for example {self.examples[file_type]}",
                ["a folder that holds images only"],
                "use source='FOLDER' with the folder of the images",
                flag="--data.source=FOLDER",
            )

    def describe(self) -> str:
        """Return all counts in one line, "" if there are none."""
        descriptions = (
            f"{n:,} {file_type} ({self.examples[file_type]})"
            for file_type, n in self.counts.most_common()
        )
        return ", ".join(descriptions)


class FolderContents(NamedTuple):
    """The images of a folder by split (all, or train, val, test), and notes for the log."""

    splits: dict[str, ImageSet]
    notes: list[str]


def read_image_folder(
    folder: Path, mode: ColorMode = "auto", resize: ImageSize | None = None
) -> FolderContents:
    """Read a folder of images: split it, label the images by subfolder, and decode them.

    Args:
        folder: the folder, in one of the layouts listed at the top of this file: a subfolder per
            class, train/val/test with such subfolders, or images of one class.
        mode: `auto` takes 8-bit gray or RGB as stored and rejects a mixture. `gray` and `rgb`
            convert: transparent pixels are blended with white, 16-bit images keep the upper 8 bits.
        resize: rows and columns; every image is scaled and center-cropped to this size.

    Raises:
        UsageError: an image cannot be read or differs in size or mode, or a class has no image.
        MissingFileError: the folder has no image.
    """
    # counts files that are no images, for a note in the log
    skipped = SkippedFiles(folder)
    subfolder_paths = list_subfolders(folder)
    top_level_images = find_images(folder, skipped, recursive=False)
    # raises an error if images lie beside class folders, because their class is not clear
    _check_not_mixed(folder, subfolder_paths, top_level_images)
    files_by_split: dict[str, dict[str, list[Path]]]  # files by class name, for each split
    # the folders called train, val and test, by split; empty without them
    if split_folders := _find_split_folders(subfolder_paths):
        # each split folder has class folders, or images of one class with the name of `folder`
        files_by_split = {
            split: _images_by_class(path, folder.name, skipped)
            for split, path in split_folders.items()
        }
    else:
        files_by_class = _images_by_subfolder(subfolder_paths, skipped)
        files_by_split = {"all": files_by_class or {folder.name: top_level_images}}
    if not any(paths for classes in files_by_split.values() for paths in classes.values()):
        raise MissingFileError(
            f"{folder} has no image{_describe_skipped(skipped)}",
            [
                f"files {', '.join(sorted(IMAGE_SUFFIXES))}, in the folder or in one subfolder "
                "per class"
            ],
            "use source='FOLDER' with the folder of the images",
            flag="--data.source=FOLDER",
        )
    if split_folders:
        # raises an error if the splits differ in their classes or in the order of them
        _check_same_classes(folder, files_by_split, next(iter(split_folders.values())))
    class_names = tuple(next(iter(files_by_split.values())))
    # decodes the files; one reader for all splits, so that all images have the first one's size and
    # mode
    reader = ImageReader(mode, resize)
    sets = {}
    for split, classes in files_by_split.items():
        paths = [path for class_files in classes.values() for path in class_files]
        labels = torch.tensor(  # the index of its class for each path
            [k for k, class_files in enumerate(classes.values()) for _ in class_files]
        )
        if empty := [name for name, class_files in classes.items() if not class_files]:
            raise UsageError(
                f"{folder}: the class {', '.join(empty)} has no image{_describe_skipped(skipped)}",
                ["at least one image per class"],
                "add an image, or remove the subfolder",
            )
        files = tuple(os.path.relpath(path, folder) for path in paths)
        sets[split] = ImageSet(reader.read_files(paths), labels, class_names, files)
    # what was changed, such as images that were rotated, as lines for the log
    notes = reader.describe_changes()
    if skipped.counts:
        notes.insert(0, f"not read: {skipped.describe()}")
    return FolderContents(sets, notes)


def _check_same_classes(
    folder: Path, files_by_split: dict[str, dict[str, list[Path]]], first_folder: Path
) -> None:
    """Raise an error if the splits of a folder have different classes, or another order of them."""
    first_split, first_classes = next(iter(files_by_split.items()))
    for split, classes in files_by_split.items():
        if tuple(classes) != tuple(first_classes):
            differing_classes = sorted(set(classes) ^ set(first_classes))
            raise UsageError(
                f"{folder}: the classes of {split} and {first_split} differ: "
                f"{', '.join(differing_classes[:5])}",
                ["the same subfolders in each split"],
                f"give each split the same subfolders, or use source='{first_folder}'",
                flag=f"--data.source={first_folder}",
            )


def read_images(
    path: Path, mode: ColorMode, resize: ImageSize | None
) -> tuple[ImageSet, list[str]]:
    """Read one image file or all images below a folder, for prediction.

    Args:
        path: the file or the folder.
        mode: color mode, see `read_image_folder`.
        resize: rows and columns to which every image is scaled and center-cropped; None: unchanged.

    Returns:
        The images, with label -1 and no class names, and notes for the log.
    """
    # counts files that are no images, for a note in the log
    skipped = SkippedFiles(path)
    if path.is_file():
        files, root = [path], path.parent
    elif path.is_dir():
        files, root = find_images(path, skipped), path
    else:
        raise MissingFileError(
            f"predict_path={str(path)!r} does not exist",
            ["an image file, or a folder of images"],
            "use predict_path='FOLDER'",
            flag="--data.predict_path=FOLDER",
        )
    if not files:
        raise MissingFileError(
            f"{path} has no image{_describe_skipped(skipped)}",
            [f"files {', '.join(sorted(IMAGE_SUFFIXES))}"],
            "use predict_path='FOLDER'",
            flag="--data.predict_path=FOLDER",
        )
    # image2 before image10
    files.sort(key=lambda file: natural_sort_key(str(file)))
    # decodes the files; all must have one size and mode
    reader = ImageReader(mode, resize)
    names = tuple(os.path.relpath(file, root) for file in files)
    labels = torch.full((len(files),), -1)
    images = ImageSet(reader.read_files(files), labels, class_names=(), files=names)
    # what was changed, such as images that were rotated, as lines for the log
    notes = reader.describe_changes()
    if skipped.counts:
        notes.insert(0, f"not read: {skipped.describe()}")
    return images, notes


def natural_sort_key(name: str) -> tuple[Any, ...]:
    """Return a sort key that compares digits as numbers: 2 before 10, img2 before img10."""
    segments = re.split(r"(\d+)", name)  # text and digits in turn
    return tuple(int(segment) if i % 2 else segment for i, segment in enumerate(segments)), name


def list_subfolders(folder: Path) -> list[Path]:
    """List the subfolders that are not hidden, in the order of `natural_sort_key`."""
    folders = [p for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir()]
    return sorted(folders, key=lambda p: natural_sort_key(p.name))


def find_images(folder: Path, skipped: SkippedFiles, recursive: bool = True) -> list[Path]:
    """List the image files of a folder, also below it if `recursive`; folder links are followed.

    Other files are counted in `skipped`; hidden ones are not.

    Args:
        folder: the folder.
        skipped: collects the kinds of the files that are no images.
        recursive: whether folders below it are searched too.
    """
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
                # folder, file, or a description of another entry; links are followed
                match _entry_type(entry):
                    case "folder":
                        pending += [entry.path] if recursive else []
                    case "file" if (suffix := Path(entry.name).suffix.lower()) in IMAGE_SUFFIXES:
                        images.append(Path(entry.path))
                    case "file":
                        skipped.add(printable(suffix) or "without a suffix", entry.path)
                    case other_type:  # a broken link, a pipe, ...
                        skipped.add(other_type, entry.path)
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
                f"the name of the folder {printable(str(path))} is not UTF-8, and the folder "
                "names a class",
                ["a folder name in UTF-8"],
                "rename the folder",
            )
    return {path.name: find_images(path, skipped) for path in subfolder_paths}


def _check_not_mixed(
    folder: Path, subfolder_paths: list[Path], top_level_images: list[Path]
) -> None:
    if subfolder_paths and top_level_images:
        raise UsageError(
            f"{folder} holds both images ({top_level_images[0].name}) and folders "
            f"({subfolder_paths[0].name})",
            ["images only", "folders only"],
            "move the images into a folder of their class",
        )


def _describe_skipped(skipped: SkippedFiles) -> str:
    return f"; not read: {skipped.describe()}" if skipped.counts else ""


def find_idx_files(source: Path) -> IdxFiles | None:
    """Find the idx files of a path: a folder, a folder with a subfolder raw, or FOLDER/PREFIX.

    PREFIX is the start of the file names of one dataset, if the folder holds several.

    Returns:
        The paths by (split, "images" or "labels"), or None if there are none.

    Raises:
        UsageError: a folder holds several datasets.
    """
    if source.is_file() and (match := IDX_FILE_PATTERN.fullmatch(source.name)):
        # one of the files: use all files with its prefix, or the folder if it has none
        source = source.parent / (match["set"] or "")
    folders = [source, source / "raw"] if source.is_dir() else [source.parent]
    for folder in folders:
        # by prefix, which may be empty: the paths by (split, "images" or "labels")
        files_by_prefix = _group_by_set(folder)
        # `source` is FOLDER/PREFIX
        if not source.is_dir():
            files_by_prefix = {
                prefix: files for prefix, files in files_by_prefix.items() if prefix == source.name
            }
        if len(files_by_prefix) > 1:
            prefixes = sorted(files_by_prefix)
            names = ", ".join(prefix or "without a prefix" for prefix in prefixes)
            first = folder / next(prefix for prefix in prefixes if prefix)
            raise UsageError(
                f"{folder} holds several idx datasets: {names}",
                ["one dataset"],
                f"use source={str(first)!r}",
                flag=f"--data.source={first}",
            )
        if files_by_prefix:
            return next(iter(files_by_prefix.values()))
    return None


def _group_by_set(folder: Path) -> dict[str, IdxFiles]:
    sets: dict[str, IdxFiles] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = IDX_FILE_PATTERN.fullmatch(path.name)
        if match and path.is_file():
            split = SPLIT_ALIASES.get(match["side"].lower(), "test")  # t10k: test
            # torchvision keeps both x and x.gz; in sorted order x comes first and is used
            sets.setdefault(match["set"] or "", {}).setdefault(
                (split, match["content"].lower()), path
            )
    return sets


def read_idx_files(files: IdxFiles) -> tuple[dict[str, ImageSet], list[str]]:
    """Read a custom idx dataset by split (train, val, test); also return notes for the log.

    Without label files all images are of one class, named as their folder.

    Args:
        files: the paths by (split, "images" or "labels"); only the training images are required.

    Raises:
        UsageError: files are missing or damaged, or the splits differ in shape.
    """
    splits = [split for split in ("train", "val", "test") if (split, "images") in files]
    # raises an error for labels without images, or if there are no training images
    _check_idx_splits(files, splits)
    # uint8 (n c y x) by split
    images = {split: read_idx_images(files[split, "images"]) for split in splits}
    labelled_splits = [split for split in splits if (split, "labels") in files]
    if labelled_splits and labelled_splits != splits:
        split = next(split for split in splits if split not in labelled_splits)
        raise UsageError(
            f"{files[split, 'images']} has no labels, but another split has labels",
            ["labels for all splits", "labels for no split"],
            "add the labels",
        )
    shapes = {tuple(array.shape[1:]) for array in images.values()}
    if len(shapes) > 1:
        raise UsageError(
            f"the images of {' and '.join(splits)} have different shapes: {sorted(shapes)}",
            ["one shape for all splits"],
            "convert the images to one shape",
        )
    if labelled_splits:
        return _add_idx_labels(files, images)
    # one class with the name of the folder; no notes
    name = files["train", "images"].parent.name
    return {
        split: ImageSet(array, torch.zeros(len(array), dtype=torch.int64), (name,))
        for split, array in images.items()
    }, []


def _check_idx_splits(files: IdxFiles, splits: list[str]) -> None:
    """Raise an error for labels without images, or if there are no training images.

    Args:
        files: the paths by (split, "images" or "labels").
        splits: the splits with images.
    """
    # a path of a split without images can only be a file of labels
    if unpaired := [str(path) for (split, _), path in files.items() if split not in splits]:
        raise UsageError(
            f"{unpaired[0]} has no file of images in its folder",
            ["a file of images for each file of labels"],
            "put both files into one folder",
        )
    if "train" not in splits:
        path = next(iter(files.values()))
        raise UsageError(
            f"{path.parent} has no training images",
            ["train-images-idx3-ubyte, gzipped or not"],
            "add the file, or use source='FOLDER'",
            flag="--data.source=FOLDER",
        )


def _add_idx_labels(
    files: IdxFiles, images: dict[str, Tensor]
) -> tuple[dict[str, ImageSet], list[str]]:
    """Read the label files of all splits; return the labeled images by split, and log notes.

    The classes are the label values (0 to 255) that occur in any split, in ascending order.

    Args:
        files: the paths by (split, "images" or "labels").
        images: the images by split.
    """
    labels = {split: read_idx(files[split, "labels"], 1) for split in images}  # uint8 (n)
    for split in images:
        image_set = ImageSet(images[split], labels[split], ())
        # raises an error if there are more labels than images, or fewer
        image_set.check_counts(str(files[split, "images"]))
    counts = torch.stack(  # (split 256)
        [torch.bincount(split_labels, minlength=256) for split_labels in labels.values()]
    )
    used_labels = counts.sum(0).nonzero()[:, 0].to(torch.uint8)  # (num_classes)
    names = tuple(str(label) for label in used_labels.tolist())
    sets, notes = {}, []
    for split in images:
        # the position of each label in `used_labels`, which is sorted
        class_indices = torch.searchsorted(used_labels, labels[split])
        image_set = ImageSet(images[split], class_indices, names)
        if split == "train":
            # every class needs a training image; other splits may lack a class
            image_set.validated(str(files[split, "images"]))
        else:
            image_set.check_label_range(str(files[split, "images"]))
            if empty_classes := image_set.empty_classes():
                notes.append(f"no image of class {', '.join(empty_classes)} in {split}")
        sets[split] = image_set
    return sets, notes
