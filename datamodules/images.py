"""Pictures and what they show, as batches (images, labels): one tensor of bytes on the device.

No worker and no file is between a picture and the net: a batch is one gather from bytes that were
moved to the device once, made floats there.

    byte p  ->  p / 127.5 - 1  in [-1, 1]  ->  round(127.5 (value + 1))  the same byte

Axes: b batch, n images, c channels, y rows, x columns.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor

from ravine.errors import MissingFileError, RunError, UsageError, sort_by_similarity

from .downloads import announce, fetch, locate
from .idx import find_idx, read_own_idx
from .image_folders import Mode, read_folder, read_images
from .image_formats import SOURCES, read_digits, read_named
from .image_set import ImageSet, class_numbers, describe_classes
from .loaders import EvalLoader, Order, Share, TrainLoader, check_positive, generator, global_seed

NAMED = ("digits", *SOURCES)
MIRRORED = ("cifar10",)  # a mirrored 3 is no digit, and Fashion-MNIST's shoes all point one way
Part = Literal["train", "val", "test"]


def to_float(images: Tensor) -> Tensor:
    """Bytes to [-1, 1], any shape: uint8 -> float32."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Back to bytes, any shape: rounded, not cut off, so that nothing is lost on the way."""
    if (wrong := ~images.isfinite()).any():
        raise UsageError(
            f"{wrong.float().mean():.2%} of the pixels are not finite (NaN, infinite): no picture "
            "can be made of them; train with a lower rate, or type --trainer.callbacks+=NaNGuard"
        )
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class ImageDataModule(L.LightningDataModule):
    """Images as batches (images float32 (b c y x) in [-1, 1], labels int64 (b)).

        data = ImageDataModule("mnist", batch_size=128)
        Trainer(max_epochs=1).fit(ImageClassifier(), datamodule=data)

    After `setup` it knows `num_classes`, `class_names`, `channels` and `size` (y, x).

    Args:
        source: digits (scikit-learn's, 8x8, needs no file), mnist, fashion, cifar10, or a folder
            of your own: FOLDER/<class>/* of image files, the same in FOLDER/train and FOLDER/test,
            FOLDER/* of one class, or the idx files of a set like MNIST.
        batch_size: images of one optimizer step, over all ranks and accumulated batches.
        root: the folder of data sets; by default the variable DATA_ROOT.
        flip: mirror each image in every other epoch, drawn by the seed; by default only cifar10.
        val_fraction: share of each training class kept for validation; 0 for no validation.
        test_fraction: share of each class kept to test, where the source has no test part.
        seed: of the order; by default that of seed_everything. The parts never depend on it, or a
            later `test` with another seed would test on images that were trained on.
        classes: numbers or names of the classes to use; by default all. They keep their numbers.
        mode: of a folder's images: `auto` takes 8-bit gray or RGB as stored and refuses a mixture;
            `gray` and `rgb` convert, transparent pixels become white.
        resize: rows and columns, or one number for both, to which each image of a folder is scaled
            and cropped at its center; by default all must be of one size.
        predict_path: image file, or folder with images at any depth, for `predict`; by default the
            test part is predicted.
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
        mode: Mode = "auto",
        resize: int | tuple[int, int] | None = None,
        predict_path: str | Path | None = None,
    ) -> None:
        """Check the sizes; files are looked at in `setup`."""
        super().__init__()
        check_positive("batch_size", batch_size)
        if not 0 <= val_fraction < 1 or not 0 < test_fraction < 1:
            raise UsageError(
                f"val_fraction is {val_fraction} and test_fraction {test_fraction}; allowed are "
                "numbers between 0 and 1: type --data.val_fraction=0.05 --data.test_fraction=0.2"
            )
        if flip and source in NAMED and source not in MIRRORED:
            raise UsageError(
                f"flip is true, and a mirrored image of {source} is none of its kind; allowed "
                f"are {', '.join(MIRRORED)} and folders of your own; type --data.flip=false"
            )
        self.source, self.batch_size, self.root, self.seed = source, batch_size, root, seed
        self.flip = source in MIRRORED if flip is None else flip
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.classes = classes if classes is None or isinstance(classes, str) else list(classes)
        self.mode: Mode = mode
        self.resize, self.predict_path = _sized(resize), predict_path
        if mode not in ("auto", "gray", "rgb"):
            raise UsageError(f"mode is {mode!r}; allowed are auto, gray, rgb: type --data.mode=rgb")
        if source in NAMED and (mode != "auto" or resize is not None) and predict_path is None:
            raise UsageError(
                f"mode is {mode} and resize {resize}, and the images of {source} are of one form; "
                "allowed are folders of your own: type --data.source=FOLDER, or leave both away"
            )
        self.resolved: dict[str, Any] = {}  # what was taken: source, file, sha256
        self.num_classes, self.channels, self.size = 0, 0, (0, 0)
        self.class_names: tuple[str, ...] = ()
        self._parts: dict[str, ImageSet] = {}
        self._new: ImageSet | None = None  # to predict, with labels of -1
        self._tried: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls this on one process only."""
        for source in SOURCES.get(self.source, ()):
            self._tried[source.path] = fetch(self.source, source, self.root)

    def setup(self, stage: str) -> None:
        """Read the images, split them, and say what was found."""
        if not self._parts:
            self._read_parts()
        if stage == "predict" and self.predict_path is not None and self._new is None:
            self._new = self._read_new(Path(self.predict_path).expanduser())
        if stage == "fit" and not len(self._parts["val"].labels) and self.trainer is not None:
            cast(Any, self.trainer).limit_val_batches = 0  # it would warn of an empty loader

    def _read_parts(self) -> None:
        sides, file, notes = self._read()
        train = sides["train"]
        if "test" not in sides:
            train, sides["test"] = held_out(train, self.test_fraction, "test")
        if "val" not in sides:
            train, sides["val"] = held_out(train, self.val_fraction, "val")
        parts = {"train": train, "val": sides["val"], "test": sides["test"]}
        self._parts = {name: self._chosen(part) for name, part in parts.items()}
        self.class_names, self.num_classes = train.names, len(train.names)
        self.channels, self.size = train.images.shape[1], tuple(train.images.shape[2:])
        digest = hashlib.sha256()
        for part in self._parts.values():
            for numbers in (part.images, part.labels):
                digest.update(cast(Any, numbers.contiguous().numpy()))
        self.resolved = {
            "source": self.source,
            "file": file,
            "sha256": digest.hexdigest(),
            "class_names": list(self.class_names),
        }
        sizes = ", ".join(f"{len(part.labels):,} {side}" for side, part in self._parts.items())
        form = f"{self.size[0]}x{self.size[1]}x{self.channels}, {self.num_classes} "
        form += "class" if self.num_classes == 1 else "classes"
        announce(
            f"data: {file or 'the digits of scikit-learn'}, {form} "
            f"({describe_classes(self.class_names)}); {sizes}"
        )
        for note in notes:
            announce(f"data: {note}", loud=True)

    def _read(self) -> tuple[dict[str, ImageSet], str, list[str]]:
        """The images by side (train, and val and test where the source has them), file, notes."""
        if self.source == "digits":
            return {"train": read_digits()}, "", []
        if self.source in SOURCES:
            files = [
                locate(source, self.root, self._tried.get(source.path, ""))
                for source in SOURCES[self.source]
            ]
            train, test = read_named(self.source, files)
            return {"train": train, "test": test}, str(files[0].parent), []
        folder = Path(self.source).expanduser()
        if found := find_idx(folder):
            if (self.mode != "auto" or self.resize) and self.predict_path is None:
                raise UsageError(
                    f"mode is {self.mode} and resize {self.resize}, and {folder} holds idx files, "
                    "which are read as they are; leave both away"
                )
            sides, notes = read_own_idx(found)
            return sides, str(folder), notes
        if not folder.is_dir():
            raise MissingFileError(
                f"source {self.source!r} is neither a known set nor a folder; allowed are "
                f"{', '.join(nearest(self.source))} or a folder of images or idx files; type "
                f"--data.source={nearest(self.source)[0]}"
            )
        sides, notes = read_folder(folder, self.mode, self.resize)
        if "all" in sides:
            sides = {"train": sides["all"]}
        return sides, str(folder), notes

    def _read_new(self, path: Path) -> ImageSet:
        """The images to predict, which must be of the form of those to train."""
        images, notes = read_images(path, self.mode, self.resize)
        found = (images.images.shape[1], *images.images.shape[2:])
        if found != (wanted := (self.channels, *self.size)):
            mode = "gray" if self.channels == 1 else "rgb"
            raise UsageError(
                f"{path} holds images of {found[1]}x{found[2]}x{found[0]} (rows, columns, channels)"
                f", those to train are {wanted[1]}x{wanted[2]}x{wanted[0]}; type --data.mode={mode}"
                f" --data.resize=[{wanted[1]},{wanted[2]}]"
            )
        announce(f"data: {path}, {len(images.files):,} images to predict")
        for note in notes:
            announce(f"data: {note}", loud=True)
        return images

    def _chosen(self, part: ImageSet) -> ImageSet:
        """The images of `classes`."""
        if self.classes is None:
            return part
        chosen = class_numbers(self.classes, part.names, "--data.classes")
        return part.take(torch.isin(part.labels, torch.tensor(chosen)))

    def pictures(self, part: Part = "train") -> tuple[Tensor, Tensor]:
        """All images of a part as bytes, uint8 (n c y x), with their labels, int64 (n)."""
        if not self._parts:
            raise RunError("ImageDataModule has no images yet: call setup() first")
        return self._parts[part].images, self._parts[part].labels

    def train_dataloader(self) -> TrainLoader:
        """Shuffled each epoch; what is left over from whole batches waits for another epoch."""
        images, labels = self._on_device("train")
        seed, trainer = global_seed(self.seed), cast(Any, self.trainer)
        mirrored: dict[int, Tensor] = {}  # by epoch

        def take(items: Tensor) -> tuple[Tensor, Tensor]:
            batch = to_float(images[items])  # (b c y x)
            if self.flip:
                if loader.epoch not in mirrored:
                    g = generator(seed, "flip", loader.epoch)
                    drawn = torch.randint(2, (len(labels),), generator=g).bool()
                    mirrored.clear()
                    mirrored[loader.epoch] = drawn.to(images.device)
                turn = mirrored[loader.epoch][items][:, None, None, None]
                batch = torch.where(turn, batch.flip(-1), batch)
            return batch, labels[items]

        loader = TrainLoader(
            Order(seed, len(labels), device=images.device),
            take,
            samples=len(labels),
            batch_size=self.batch_size,
            share=Share.of(trainer),
            repeat=bool(trainer and trainer.overfit_batches),
        )
        return loader

    def val_dataloader(self) -> EvalLoader:
        """The part of the training images that was kept back."""
        return self._eval("val")

    def test_dataloader(self) -> EvalLoader:
        """The part that was never trained on."""
        return self._eval("test")

    def predict_dataloader(self) -> EvalLoader:
        """Those of `predict_path`, or the test part: (images, labels, names of the files (b))."""
        if self._new is not None:
            images, labels, files = self._new.images, self._new.labels, self._new.files
        else:
            images, labels = self._on_device("test")
            files = self._parts["test"].files or tuple(f"test {i}" for i in range(len(labels)))

        def take(items: Tensor) -> tuple[Tensor, Tensor, list[str]]:
            names = [files[i] for i in items.tolist()]
            items = items.to(images.device)
            return to_float(images[items]), labels[items], names

        return EvalLoader(take, len(labels), self.batch_size, Share.of(self.trainer))

    def _eval(self, part: Part) -> EvalLoader:
        images, labels = self._on_device(part)
        if not len(labels):
            raise UsageError(
                f"there are no images for {part}: val_fraction is {self.val_fraction}; type "
                "lightning test for the test part, or train with --data.val_fraction=0.05"
            )

        def take(items: Tensor) -> tuple[Tensor, Tensor]:
            items = items.to(images.device)
            return to_float(images[items]), labels[items]

        return EvalLoader(take, len(labels), self.batch_size, Share.of(self.trainer))

    def _on_device(self, part: Part) -> tuple[Tensor, Tensor]:
        images, labels = self.pictures(part)
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            moved = self._parts[part]._replace(images=images.to(device), labels=labels.to(device))
            self._parts[part] = moved  # moved once
        return self._parts[part].images, self._parts[part].labels


def nearest(word: str) -> list[str]:
    """The named sources, the most similar first."""
    return sort_by_similarity(word.rpartition(os.sep)[2], NAMED)


def held_out(images: ImageSet, fraction: float, key: str) -> tuple[ImageSet, ImageSet]:
    """What remains, and the same fraction of each class, drawn alike in every run."""
    drawn = torch.zeros(len(images.labels), dtype=torch.bool)
    for k, name in enumerate(images.names):
        (places,) = (images.labels == k).nonzero(as_tuple=True)
        count = max(1, round(fraction * len(places))) if fraction else 0
        if count >= len(places):
            way = ", or type --data.val_fraction=0" if key == "val" else ""
            raise UsageError(
                f"class {name} has {len(places)} {'image' if len(places) == 1 else 'images'}, and "
                f"none would be left to train when {count} are kept for {key}; give it at least "
                f"3{way}"
            )
        order = torch.randperm(len(places), generator=generator(0, key, k))
        drawn[places[order[:count]]] = True
    return images.take(~drawn), images.take(drawn)


def _sized(resize: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Rows and columns."""
    if resize is None:
        return None
    both = (resize, resize) if isinstance(resize, int) else tuple(resize)
    if len(both) != 2 or not all(0 < side <= 2**12 for side in both):
        raise UsageError(
            f"resize is {resize}; allowed are rows and columns from 1 to 4096: type "
            "--data.resize=64 or --data.resize=[48,64]"
        )
    return both[0], both[1]
