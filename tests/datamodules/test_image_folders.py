"""User images: every file is read or named, and no pixel or class is guessed."""

import gzip
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import pytest
import torch
from PIL import Image

from ravine.callbacks import OptimizerPlan, PredictionTable
from ravine.datamodules import ImageDataModule
from ravine.datamodules.image_folders import natural_sort_key, read_image_folder
from ravine.errors import UsageError
from ravine.lightning_modules import Diffusion, ImageClassifier

RANDOM = numpy.random.RandomState(0)
TINY: dict[str, Any] = {"base_channels": 8, "time_embed_dim": 16}


def photo(size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(RANDOM.randint(0, 256, (*size, 3), dtype=numpy.uint8))


def ready(source: Path, **arguments: Any) -> ImageDataModule:
    data = ImageDataModule(str(source), batch_size=2, **arguments)
    data.setup("fit")
    return data


def test_every_format_at_every_depth_is_read(tmp_path: Path) -> None:
    ends = ["png", "PNG", "jpg", "JPEG", "jfif", "jpe", "gif", "webp", "bmp", "tif", "TIFF"]
    for place, end in enumerate(ends):
        below = tmp_path / ("cat/" + "more/" * (place % 3) if place < 6 else "dog")
        below.mkdir(parents=True, exist_ok=True)
        form = {"jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF"}.get(end)
        photo().save(below / f"{place}.{end}", form)
    found = read_image_folder(tmp_path)
    assert found.notes == []
    assert len(found.splits["all"].labels) == len(ends)
    assert found.splits["all"].labels.bincount().tolist() == [6, 5]


def test_files_that_are_not_read_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name / "more").mkdir(parents=True)
        for i in range(3):
            photo().save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat/more/note.txt").touch()
    (tmp_path / "cat/photo.heic").touch()
    (tmp_path / "dog/photo.heic").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "dog/gone.png").symlink_to("/nowhere.png")
    (tmp_path / "dog/self.png").symlink_to("self.png")
    (tmp_path / "dog/round").symlink_to(tmp_path / "dog")
    os.mkfifo(tmp_path / "dog/pipe.png")
    data = ready(tmp_path)
    assert sum(len(data.get_split(part)[1]) for part in ("train", "val", "test")) == 6
    said = capsys.readouterr().out
    for words in ("2 broken link (dog/", "2 .heic (", "1 .txt (cat/more/note.txt)",
                  "1 no regular file (dog/pipe.png)"):  # fmt: skip
        assert words in said
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel/photo.heic").touch()
    with pytest.raises(ValueError, match=r"the class eel has no image; not read: .*3 \.heic"):
        ready(tmp_path)


def test_a_photo_is_rotated_by_its_exif_orientation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.new("RGB", (16, 8), "white")
    upright.paste("black", (0, 0, 16, 4))
    for place in range(4):
        upright.save(tmp_path / f"upright{place}.png")
    ways = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    for orientation, way in ways.items():
        exif = upright.getexif()
        exif[0x0112] = orientation
        for end in ("png", "webp", "tiff"):
            upright.transpose(way).save(
                tmp_path / f"{orientation}.{end}", exif=exif, **({"lossless": True} if end == "webp"
                                                                 else {})
            )  # fmt: skip
    images = read_image_folder(tmp_path).splits["all"].images
    assert len(images) == 13
    assert (images == images[0]).all()
    ready(tmp_path)
    assert "turned as their EXIF orientation says:" in capsys.readouterr().out


def test_names_that_end_in_numbers_are_sorted_by_the_numbers(tmp_path: Path) -> None:
    names = [str(i) for i in range(12)]
    for name in names:
        (tmp_path / name).mkdir()
        photo().save(tmp_path / name / "0.png")
    assert read_image_folder(tmp_path).splits["all"].class_names == tuple(names)
    words = ["img10", "img2", "10", "9", "b", "a1b2", "a1b10", "a", "01", "1"]
    assert sorted(words, key=natural_sort_key) == [
        "01", "1", "9", "10", "a", "a1b2", "a1b10", "b", "img2", "img10"
    ]  # fmt: skip


def test_the_folders_train_and_test_are_used_as_the_split(tmp_path: Path) -> None:
    for side, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / side / name).mkdir(parents=True)
            for i in range(count):
                photo().save(tmp_path / side / name / f"{i}.png")
    data = ready(tmp_path, val_fraction=0.2)
    assert data.class_names == ("cat", "dog")
    sizes = {part: len(data.get_split(part)[1]) for part in ("train", "val", "test")}
    assert sizes == {"train": 8, "val": 2, "test": 4}
    (tmp_path / "test/eel").mkdir()
    with pytest.raises(ValueError, match=r"the classes of test and train differ: eel; .*/train"):
        ready(tmp_path)
    (tmp_path / "bus").mkdir()  # so train is a class like others
    photo().save(tmp_path / "bus/0.png")
    assert read_image_folder(tmp_path).splits["all"].class_names == ("bus", "test", "train")


def pets(root: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 8) -> Path:
    """Gray squares: a class is as bright as its place in `names`."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 20 + 200 * place + i).save(root / name / f"{i}.png")
    return root


def trainer(**arguments: Any) -> L.Trainer:
    plan = OptimizerPlan(lambda p: torch.optim.AdamW(p, lr=0.01))
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, limit_val_batches=0,
        **{"callbacks": [plan], "max_steps": 2} | arguments,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", [lambda: Diffusion(class_conditional=True, **TINY), ImageClassifier]
)
def test_a_resume_with_other_classes_or_another_order_is_refused(kind: Any, tmp_path: Path) -> None:
    one = trainer()
    module = kind()
    one.fit(module, ready(pets(tmp_path / "pets")))
    one.save_checkpoint(tmp_path / "pets.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "pets.ckpt")
    assert loaded.class_names == ("cat", "dog")
    other = ready(pets(tmp_path / "farm", ("cow", "dog")))
    with pytest.raises(ValueError, match="cow"):
        trainer(max_steps=3).fit(kind(), other, ckpt_path=tmp_path / "pets.ckpt")
    turned = ready(tmp_path / "pets")
    turned.class_names = ("dog", "cat")
    with pytest.raises(ValueError, match=r"(?=.*0 dog, 1 cat)(?=.*0 cat, 1 dog)"):
        trainer(max_steps=3).fit(kind(), turned, ckpt_path=tmp_path / "pets.ckpt")
    if isinstance(loaded, Diffusion):
        by_name = loaded.generate(labels="dog,cat", num_samples=1, num_steps=1)
        by_number = loaded.generate(labels=[1, 0], num_samples=1, num_steps=1)
        assert torch.equal(by_name.images, by_number.images)
        assert by_name.row_names == ("dog", "cat")


def test_a_single_class_is_refused_for_classification(tmp_path: Path) -> None:
    for i in range(9):
        photo().save(tmp_path / f"{i}.png")
    data = ready(tmp_path)
    with pytest.raises(ValueError, match=r"needs two classes, but all images of .*; use"):
        trainer().fit(ImageClassifier(), data)
    with pytest.raises(ValueError, match=r"needs two classes, but .*; use class_conditional=False"):
        trainer().fit(Diffusion(class_conditional=True, **TINY), data)
    trainer().fit(Diffusion(**TINY), data)


def test_new_images_are_classified_and_listed_by_file_name(tmp_path: Path) -> None:
    source = pets(tmp_path / "pets")
    (tmp_path / "new/deep").mkdir(parents=True)
    Image.new("RGB", (20, 10), (225, 225, 225)).save(tmp_path / "new/2.jpg")
    Image.new("RGBA", (9, 9), (22, 22, 22, 255)).save(tmp_path / "new/deep/10.png")
    module, one = ImageClassifier("linear"), trainer(max_steps=60)
    one.fit(module, ready(source))
    table = PredictionTable()
    table.on_predict_end = lambda *args: None  # keep the rows
    new = {"mode": "gray", "resize": 8, "predict_path": str(tmp_path / "new")}
    data = ImageDataModule(str(source), **new)
    trainer(callbacks=[table]).predict(module, data)
    assert [(row["file"], row["class"], row["label"]) for row in table.rows] == [
        ("2.jpg", "dog", ""), ("deep/10.png", "cat", ""),
    ]  # fmt: skip
    plain = ImageDataModule(str(source))  # the held-out images, with the names of their files
    table.rows = []
    trainer(callbacks=[table]).predict(module, plain)
    assert {row["file"].partition("/")[0] for row in table.rows} == {"cat", "dog"}
    assert all(row["file"].startswith(row["label"]) for row in table.rows)
    said = r"images of 10x20x3 .*are 8x8x1; .*; use mode='gray', resize=\(8, 8\)$"
    (tmp_path / "new/deep/10.png").unlink()
    other = ImageDataModule(str(source), predict_path=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=said):
        trainer().predict(module, other)


def idx(array: numpy.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(numpy.uint8).tobytes()


def own_idx(
    root: Path, prefix: str = "", test: str = "t10k", first: int = 0, end: str = ".gz"
) -> Path:
    """A set of 40 and 20 images of 5x4 pixels, of 10 classes that are counted from `first`."""
    root.mkdir(parents=True, exist_ok=True)
    for side, count in (("train", 40), (test, 20)):
        arrays = {
            "images-idx3": RANDOM.randint(0, 256, (count, 5, 4)),
            "labels-idx1": first + numpy.arange(count) % 10,
        }
        for name, array in arrays.items():
            content = gzip.compress(idx(array)) if end else idx(array)
            (root / f"{prefix}{side}-{name}-ubyte{end}").write_bytes(content)
    return root


def test_a_user_data_set_in_the_format_of_mnist_is_read(tmp_path: Path) -> None:
    for root, source in {
        own_idx(tmp_path / "kmnist"): "kmnist",
        own_idx(tmp_path / "MNIST/raw", end=""): "MNIST",  # torchvision's folders
        own_idx(tmp_path / "emnist", "emnist-letters-", "test", first=1): "emnist",
    }.items():
        data = ready(tmp_path / source, val_fraction=0)
        assert (data.image_size, data.channels) == ((5, 4), 1), root
        assert [len(data.get_split(part)[1]) for part in ("train", "test")] == [40, 20]
        first = 1 if source == "emnist" else 0
        assert data.class_names == tuple(str(first + i) for i in range(10))
        assert data.get_split()[1].tolist() == [i % 10 for i in range(40)]
    own_idx(tmp_path / "emnist", "emnist-digits-", "test")
    with pytest.raises(ValueError, match=r"several idx datasets: emnist-digits, emnist-letters;"):
        ready(tmp_path / "emnist")
    assert ready(tmp_path / "emnist/emnist-digits").class_names[0] == "0"
    (tmp_path / "kmnist/train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"train-images.* has no labels, but another split has"):
        ready(tmp_path / "kmnist")
    (tmp_path / "kmnist/t10k-labels-idx1-ubyte.gz").unlink()
    assert ready(tmp_path / "kmnist").class_names == ("kmnist",)  # of one class


def test_a_changed_data_set_is_refused_by_its_name_and_read_as_the_hint_says(
    tmp_path: Path,
) -> None:
    own_idx(tmp_path / "fashion")
    with pytest.raises(UsageError, match=r"is not the dataset 'fashion'") as error:
        ImageDataModule("fashion", root=str(tmp_path)).setup("fit")
    data = ready(Path(error.value.flag.removeprefix("--data.source=")))
    assert len(data.get_split("test")[1]) == 20


def test_the_error_for_a_split_without_images_has_a_hint() -> None:
    data = ImageDataModule(val_fraction=0)
    data.setup("validate")
    with pytest.raises(ValueError, match=r"no images for val: .*; use val_fraction=0\.05"):
        data.val_dataloader()
