"""Image datamodule: batches (images, labels), gathered from one uint8 tensor on the device.

There are no DataLoader workers and no file reads per batch. All images are moved to the device once
as uint8; a batch is one gather and a conversion to float.

    byte p  ->  p / 127.5 - 1  in [-1, 1]  ->  round(127.5 (value + 1))  the same byte

Axes: b batch, n images, c channels, y rows, x columns.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ravine.errors import MissingFileError, RunError, UsageError, sort_by_similarity
from ravine.strategies.checkpoint.fingerprint import compute_fingerprint

from .base import BaseDataModule, check_fraction
from .downloads import download_if_missing, find_local, log_once
from .image_datasets import IMAGE_DATASETS, read_digits, read_named_dataset
from .image_folders import find_idx_files, read_idx_files, read_image_folder, read_images
from .image_formats import ColorMode
from .image_set import ImageSet, describe_classes, group_classes, parse_class_indices
from .loaders import EvalLoader, ResumableLoader, check_positive
from .samplers import EpochSampler, resolve_seed, seeded_generator

NAMED_DATASETS = ("digits", *IMAGE_DATASETS)
# Mirrored digits are not valid digits, and Fashion-MNIST's shoes all point the same way.
FLIPPABLE = ("cifar10",)
Split = Literal["train", "val", "test"]


def to_float(images: Tensor) -> Tensor:
    """Scale bytes of any shape to [-1, 1]: uint8 -> float32."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Scale floats of any shape from [-1, 1] to bytes with rounding: inverts `to_float`."""
    if (is_non_finite := ~images.isfinite()).any():
        raise UsageError(
            f"{is_non_finite.float().mean():.2%} of the pixels are not finite (NaN or infinite), "
            "so they are not an image",
            ["finite numbers"],
            "train with a lower learning rate, or add NaNGuard() to Trainer(callbacks=...)",
            flag="--trainer.callbacks+=NaNGuard",
        )
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class ImageDataModule(BaseDataModule):
    """Images as batches (images float32 (b c y x) in [-1, 1], labels int64 (b)).

        data = ImageDataModule("mnist", batch_size=128)
        Trainer(max_epochs=1).fit(ImageClassifier(), datamodule=data)

    After `setup` the attributes `num_classes`, `class_names`, `channels` and `image_size` (y, x)
    are set.
    """

    def __init__(
        self,
        source: str = "digits",
        batch_size: int = 128,
        root: str | None = None,
        flip: bool | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.2,
        seed: int | None = None,
        classes: Sequence[int | str] | str | None = None,
        class_groups: dict[str, str] | None = None,
        num_train_images: int | None = None,
        mode: ColorMode = "auto",
        resize: int | tuple[int, int] | None = None,
        predict_path: str | Path | None = None,
    ) -> None:
        """Check the arguments; files are read in `setup`.

        Args:
            source: digits (scikit-learn's, 8x8, needs no file), mnist, fashion, cifar10, or a
                custom folder: FOLDER/<class>/* of image files, the same in FOLDER/train and
                FOLDER/test, FOLDER/* of one class, or idx files as MNIST's.
            batch_size: images of one optimizer step, over all ranks and accumulated batches.
            root: the folder of datasets; by default the variable DATA_ROOT.
            flip: horizontal flip of random images, drawn per epoch with probability 1/2; by default
                only for cifar10.
            val_fraction: fraction of each training class held out for validation; 0 for no
                validation.
            test_fraction: fraction of each class held out for test, if the source has no test
                split.
            seed: seed of the order; by default that of seed_everything. The splits do not depend on
                it: a later `test` with another seed must not use training images.
            classes: indices or names of the classes to use; by default all. Their indices stay the
                same.
            class_groups: groups that replace the classes, by name: {"even": "0,2,4,6,8", "odd":
                "1,3,5,7,9"}. Images of classes in no group are not used.
            num_train_images: number of training images: the first ones of the source, in its order.
                Validation images are then drawn from the other ones. By default all.
            mode: color mode for folders: `auto` takes 8-bit gray or RGB as stored and rejects a
                mixture; `gray` and `rgb` convert, transparent pixels become white.
            resize: rows and columns, or one number for both; each image of a folder is scaled and
                center-cropped to it. By default all images must have one size.
            predict_path: image file, or folder with images at any depth, for `predict`; by default
                the test split is predicted.
        """
        super().__init__()
        check_positive("batch_size", batch_size)
        # raises an error for a number that is not between 0 and 1
        check_fraction("val_fraction", val_fraction, can_be_zero=True)
        check_fraction("test_fraction", test_fraction)
        if flip and source in NAMED_DATASETS and source not in FLIPPABLE:
            raise UsageError(
                f"flip=True is not valid for source={source!r}: its mirrored images are not "
                "valid samples",
                [*FLIPPABLE, "your own folders"],
                "use flip=False",
                flag="--data.flip=false",
            )
        self.source, self.batch_size, self.root, self.seed = source, batch_size, root, seed
        # FLIPPABLE: the named datasets whose mirrored images are valid samples
        self.flip = source in FLIPPABLE if flip is None else flip
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.classes = classes if classes is None or isinstance(classes, str) else list(classes)
        self.class_groups, self.num_train_images = class_groups, num_train_images
        if classes is not None and class_groups is not None:
            raise UsageError(
                f"ImageDataModule: classes={classes!r} selects classes, and class_groups replaces "
                "them",
                ["one of both"],
                "remove classes",
                flag="--data.classes=null",
            )
        if num_train_images is not None:
            check_positive("num_train_images", num_train_images)
        self.mode: ColorMode = mode
        self.resize, self.predict_path = _parse_resize(resize), predict_path
        if mode not in ("auto", "gray", "rgb"):
            raise UsageError(
                f"mode={mode!r} is not a color mode",
                ["auto", "gray", "rgb"],
                "use mode='rgb'",
                flag="--data.mode=rgb",
            )
        # with `predict_path` they have an effect on the images to predict
        if (
            source in NAMED_DATASETS
            and (mode != "auto" or resize is not None)
            and predict_path is None
        ):
            raise UsageError(
                f"mode={mode!r} and resize={resize} have no effect for source={source!r}: all "
                "its images have one size and mode",
                ["your own folders of images"],
                "remove mode and resize, or use source='FOLDER'",
                flag="--data.source=FOLDER",
            )
        # set by `setup`
        self.num_classes, self.channels, self.image_size = 0, 0, (0, 0)
        self.class_names: tuple[str, ...] = ()
        self._splits: dict[str, ImageSet] = {}
        self._predict_set: ImageSet | None = None  # images to predict, with labels -1
        self._download_errors: dict[str, str] = {}  # by path of the dataset's file

    def prepare_data(self) -> None:
        """Download missing files; Lightning calls this on local rank 0 only."""
        for source in IMAGE_DATASETS.get(self.source, ()):
            self._download_errors[source.path] = download_if_missing(self.source, source, self.root)

    def setup(self, stage: str) -> None:
        """Read the images, split them, and log the source, the shapes and the split sizes."""
        if not self._splits:
            self._load_splits()
        if stage == "predict" and self.predict_path is not None and self._predict_set is None:
            self._predict_set = self._load_predict_images(Path(self.predict_path).expanduser())
        if stage == "fit" and not len(self._splits["val"].labels):
            self.skip_validation(val_fraction=0.1)

    def _load_splits(self) -> None:
        """Read the images, split off test and val if the source lacks them, and log the result.

        Sets the splits, the classes, the shape of the images and `provenance`.
        """
        # images by split (train, maybe val and test), the path, and notes for the log
        loaded_splits, file, notes = self._load_source()
        train = loaded_splits["train"]
        if "test" not in loaded_splits:
            # the same fraction of each class; returns the rest and the part
            train, loaded_splits["test"] = stratified_split(train, self.test_fraction, "test")
        first_images = None
        if self.num_train_images is not None:
            first_images, train = split_first(train, self.num_train_images)
        if "val" not in loaded_splits:
            train, loaded_splits["val"] = stratified_split(train, self.val_fraction, "val")
        train = train if first_images is None else first_images
        splits = {"train": train, "val": loaded_splits["val"], "test": loaded_splits["test"]}
        # leaves out the classes that the argument `classes` does not name
        self._splits = {name: self._select_classes(image_set) for name, image_set in splits.items()}
        if self.class_groups is not None:
            # the labels become numbers of groups
            self._splits = {
                name: group_classes(image_set, self.class_groups)
                for name, image_set in self._splits.items()
            }
            train = self._splits["train"]
        self.class_names, self.num_classes = train.class_names, len(train.class_names)
        self.channels, self.image_size = train.images.shape[1], tuple(train.images.shape[2:])
        # a hash of all images and labels, for the run's records
        fingerprint = compute_fingerprint(
            tensor
            for image_set in self._splits.values()
            for tensor in (image_set.images, image_set.labels)
        )
        self.provenance = {
            "source": self.source,
            "file": file,
            "sha256": fingerprint,
            "class_names": list(self.class_names),
        }
        sizes = ", ".join(
            f"{len(image_set.labels):,} {split}" for split, image_set in self._splits.items()
        )
        description = (
            f"{self.image_size[0]}x{self.image_size[1]}x{self.channels}, {self.num_classes} "
        )
        description += "class" if self.num_classes == 1 else "classes"
        # prints one line, on rank 0 only
        log_once(
            f"data: {file or 'the digits of scikit-learn'}, {description} "
            f"({describe_classes(self.class_names)}); {sizes}"
        )
        for note in notes:
            log_once(f"data: {note}", is_warning=True)

    def _load_source(self) -> tuple[dict[str, ImageSet], str, list[str]]:
        """Read the images of `self.source`: a named dataset, idx files, or a folder of images.

        Returns:
            The images by split (train; val and test if the source has them), the path of the data
            ("" for the digits of scikit-learn), and notes for the log.
        """
        if self.source == "digits":
            return {"train": read_digits()}, "", []
        if self.source in IMAGE_DATASETS:
            # IMAGE_DATASETS: the files of a dataset by its name. `find_local` finds and verifies
            # one.
            files = [
                find_local(source, self.root, self._download_errors.get(source.path, ""))
                for source in IMAGE_DATASETS[self.source]
            ]
            # decodes the files: images and labels of both splits
            train, test = read_named_dataset(self.source, files)
            return {"train": train, "test": test}, str(files[0].parent), []
        folder = Path(self.source).expanduser()
        # paths of idx files (the format of MNIST), or None
        if idx_files := find_idx_files(folder):
            # with `predict_path` mode and resize have an effect on the images to predict
            if (self.mode != "auto" or self.resize) and self.predict_path is None:
                raise UsageError(
                    f"mode={self.mode!r} and resize={self.resize} have no effect for the idx "
                    f"files in {folder}",
                    ["folders of image files"],
                    "remove mode and resize",
                )
            splits, notes = read_idx_files(idx_files)
            return splits, str(folder), notes
        if not folder.is_dir():
            sources = sort_sources_by_similarity(self.source)
            raise MissingFileError(
                f"source={self.source!r} is neither a known dataset nor a folder",
                [*sources, "a folder of images or idx files"],
                f"use source={sources[0]!r}",
                flag=f"--data.source={sources[0]}",
            )
        splits, notes = read_image_folder(folder, self.mode, self.resize)
        # the folder has no split folders
        if "all" in splits:
            splits = {"train": splits["all"]}
        return splits, str(folder), notes

    def _load_predict_images(self, path: Path) -> ImageSet:
        """Read the images to predict; their shape must be that of the training images.

        Args:
            path: an image file, or a folder of images.

        Raises:
            UsageError: an image cannot be read or has another shape.
        """
        images, notes = read_images(path, self.mode, self.resize)
        actual_shape = tuple(images.images.shape[1:])  # (c, y, x)
        expected_shape = (self.channels, *self.image_size)
        if actual_shape != expected_shape:
            mode = "gray" if self.channels == 1 else "rgb"
            raise UsageError(
                f"{path} holds images of {actual_shape[1]}x{actual_shape[2]}x{actual_shape[0]} "
                "(rows, columns, channels), but the training images are "
                f"{expected_shape[1]}x{expected_shape[2]}x{expected_shape[0]}",
                ["images of the same size and mode as in training"],
                f"use mode={mode!r}, resize={expected_shape[1:]}",
                flag=f"--data.mode={mode} "
                f"'--data.resize=[{expected_shape[1]},{expected_shape[2]}]'",
            )
        # prints one line, on rank 0 only
        log_once(f"data: {path}, {len(images.files):,} images to predict")
        for note in notes:
            log_once(f"data: {note}", is_warning=True)
        return images

    def _select_classes(self, image_set: ImageSet) -> ImageSet:
        """Return the images of `classes`."""
        if self.classes is None:
            return image_set
        class_indices = parse_class_indices(
            self.classes, image_set.class_names, flag="--data.classes"
        )
        return image_set.select(torch.isin(image_set.labels, torch.tensor(class_indices)))

    def get_split(self, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Return all images of a split as bytes, uint8 (n c y x), with their labels, int64 (n)."""
        if not self._splits:
            raise RunError(
                "ImageDataModule has no images before setup()", hint="call setup('fit') first"
            )
        return self._splits[split].images, self._splits[split].labels

    def train_dataloader(self) -> ResumableLoader:
        """Return a loader that shuffles each epoch and skips its incomplete last batch."""
        images, labels = self._move_split_to_device("train")
        # the given seed, else that of seed_everything
        seed = resolve_seed(self.seed)
        mask_by_epoch: dict[int, Tensor] = {}  # of the current epoch only: bool (n), True: flipped

        def make_batch(items: Tensor) -> tuple[Tensor, Tensor]:
            # uint8 to floats from -1 to 1
            batch = to_float(images[items])  # (b c y x)
            if self.flip:
                # `loader`: the loader that is created below, and calls this function
                if loader.epoch not in mask_by_epoch:
                    # one draw for all samples, so that it does not depend on the batches
                    g = seeded_generator(seed, "flip", loader.epoch)
                    mask = torch.randint(2, (len(labels),), generator=g).bool()
                    mask_by_epoch.clear()
                    mask_by_epoch[loader.epoch] = mask.to(images.device)
                batch_mask = mask_by_epoch[loader.epoch][items][:, None, None, None]  # (b 1 1 1)
                batch = torch.where(batch_mask, batch.flip(-1), batch)
            return batch, labels[items]

        # a new order of all samples in each epoch, by the seed
        sampler = EpochSampler(seed, len(labels), device=images.device)
        loader = self.make_train_loader(sampler, make_batch, len(labels))
        return loader

    def val_dataloader(self) -> EvalLoader:
        """Return the loader of the images held out for validation."""
        return self._make_eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Return the loader of the test split."""
        return self._make_eval_loader("test")

    def predict_dataloader(self) -> EvalLoader:
        """Return a loader of `predict_path` or the test split: (images, labels, file names (b))."""
        if self._predict_set is not None:
            images, labels = self._predict_set.images, self._predict_set.labels
            files = self._predict_set.files
        else:
            images, labels = self._move_split_to_device("test")
            files = self._splits["test"].files or tuple(f"test {i}" for i in range(len(labels)))

        def make_batch(items: Tensor) -> tuple[Tensor, Tensor, list[str]]:
            names = [files[i] for i in items.tolist()]
            items = items.to(images.device)
            return to_float(images[items]), labels[items], names

        return self.make_eval_loader(make_batch, len(labels))

    def _make_eval_loader(self, split: Split) -> EvalLoader:
        images, labels = self._move_split_to_device(split)
        if not len(labels):
            raise UsageError(
                f"there are no images for {split}: val_fraction={self.val_fraction}",
                ["val_fraction above 0", "the test split"],
                "use val_fraction=0.05 in training, or trainer.test(...)",
                flag="lightning test, or lightning fit --data.val_fraction=0.05",
            )

        def make_batch(items: Tensor) -> tuple[Tensor, Tensor]:
            items = items.to(images.device)
            return to_float(images[items]), labels[items]

        return self.make_eval_loader(make_batch, len(labels))

    def _move_split_to_device(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = self.get_split(split)
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            moved_set = self._splits[split]._replace(
                images=images.to(device), labels=labels.to(device)
            )
            self._splits[split] = moved_set  # keep the moved tensors: one transfer per split
        return self._splits[split].images, self._splits[split].labels


def sort_sources_by_similarity(source: str) -> list[str]:
    """Return the named sources, the most similar to `source` first."""
    return sort_by_similarity(source.rpartition(os.sep)[2], NAMED_DATASETS)


def stratified_split(images: ImageSet, fraction: float, split: str) -> tuple[ImageSet, ImageSet]:
    """Split off the same fraction of each class; return the remaining and the selected images.

    The draw uses a fixed seed, so it is the same in every run.

    Args:
        images: the labeled images.
        fraction: the fraction of each class to select, at least one image; 0 selects none.
        split: name of the selected split (val or test), which also enters the seed.

    Raises:
        UsageError: no image of a class would remain.
    """
    is_selected = torch.zeros(len(images.labels), dtype=torch.bool)
    for class_index, name in enumerate(images.class_names):
        (class_positions,) = (images.labels == class_index).nonzero(as_tuple=True)
        count = max(1, round(fraction * len(class_positions))) if fraction else 0
        if count and count >= len(class_positions):
            raise UsageError(
                f"the class {name} has {len(class_positions)} "
                f"{'image' if len(class_positions) == 1 else 'images'}, and {count} of them for "
                f"{split} would leave none for training",
                ["3 or more images per class"],
                "add images to the class" + (", or use val_fraction=0" if split == "val" else ""),
                flag="--data.val_fraction=0" if split == "val" else "",
            )
        # `seeded_generator`: a generator whose seed is made from these values
        order = torch.randperm(
            len(class_positions), generator=seeded_generator(0, split, class_index)
        )
        # the first `count` of the shuffled images of this class
        is_selected[class_positions[order[:count]]] = True
    return images.select(~is_selected), images.select(is_selected)


def split_first(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """Return the first images, and the others; raise UsageError if a class has none of the first.

    Args:
        images: the labeled images.
        count: the number of first images.
    """
    total = len(images.labels)
    if count >= total:
        raise UsageError(
            f"num_train_images={count:,} leaves no other image of the {total:,}",
            [f"1 to {total - 1}"],
            "remove num_train_images to use all images",
            flag="--data.num_train_images=null",
        )
    is_first = torch.arange(total) < count
    first = images.select(is_first)
    if missing := first.empty_classes():
        raise UsageError(
            f"the first {count:,} images have none of the class {', '.join(missing)}",
            ["a source in random order, such as mnist", "more images"],
            "remove num_train_images to use all images",
            flag="--data.num_train_images=null",
        )
    return first, images.select(~is_first)


def _parse_resize(resize: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return (rows, columns), or None for no resizing."""
    if resize is None:
        return None
    rows_and_columns = (resize, resize) if isinstance(resize, int) else tuple(resize)
    if len(rows_and_columns) != 2 or not all(0 < side <= 2**12 for side in rows_and_columns):
        raise UsageError(
            f"resize={resize} is not a size of images",
            ["rows and columns from 1 to 4096"],
            "use resize=64 or resize=(48, 64)",
            flag="--data.resize=64, or '--data.resize=[48,64]'",
        )
    return rows_and_columns[0], rows_and_columns[1]
