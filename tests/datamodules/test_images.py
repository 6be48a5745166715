"""Images become batches in one exact way; an inconsistent set is refused by name."""

import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from ravine.datamodules import ImageDataModule, image_datasets
from ravine.datamodules.downloads import DatasetNotFound
from ravine.datamodules.image_folders import read_image_folder
from ravine.datamodules.image_set import ImageSet
from ravine.datamodules.images import stratified_split, to_float, to_uint8
from ravine.errors import UsageError


def ready(source: str | Path = "digits", **arguments) -> ImageDataModule:
    data = ImageDataModule(str(source), **arguments)
    data.setup("fit")
    return data


def folder(root: Path, sizes: dict[str, int], mode: str = "RGB", suffix: str = ".png") -> Path:
    """So many images of 6x4 pixels in each class, all different."""
    for k, (name, count) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (6, 4), (10 * k, i, 7)).convert(mode).save(
                root / name / f"{i}{suffix}"
            )
    return root


def test_every_byte_survives_the_conversion_to_float() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every)[[0, -1]].tolist() == [-1, 1]


def test_a_value_between_two_bytes_is_rounded_and_one_out_of_range_is_clamped() -> None:
    between = torch.tensor([-1.5, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 7.0])
    assert to_uint8(between).tolist() == [0, 1, 0, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"25\.00% of the pixels are not finite .*NaNGuard"):
        to_uint8(torch.tensor([0.0, bad, 1.0, 1.0]))


def test_a_batch_holds_float_images_and_labels() -> None:
    data = ready(batch_size=8, val_fraction=0.1)
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, (8, 8))
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((8, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((8,), torch.int64)
    stored, classes = data.get_split("train")
    for image, label in zip(to_uint8(images), labels, strict=True):
        (same,) = (stored == image).all(dim=(1, 2, 3)).nonzero(as_tuple=True)
        assert label in classes[same]


def test_the_splits_are_disjoint_complete_and_equal_for_every_seed() -> None:
    one, other = ready(seed=1), ready(seed=2)
    rows = {}
    for part in ("train", "val", "test"):
        images, labels = one.get_split(part)
        assert torch.equal(images, other.get_split(part)[0])
        assert labels.unique().tolist() == list(range(10))
        rows[part] = len(labels)
    assert sum(rows.values()) == 1797
    assert rows["test"] / 1797 == pytest.approx(0.2, abs=0.003)
    seen = torch.cat([one.get_split(part)[0].flatten(1) for part in rows])  # (n 64)
    assert len(seen.unique(dim=0)) == len(
        image_datasets.read_digits().images.flatten(1).unique(dim=0)
    )


def test_the_order_depends_on_the_seed() -> None:
    first, again, other = (
        next(iter(ready(batch_size=64, seed=seed).train_dataloader()))[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_each_subfolder_of_an_image_folder_is_a_class(mode: str, tmp_path: Path) -> None:
    found = read_image_folder(folder(tmp_path / "pets", {"cat": 2, "dog": 3}, mode)).splits["all"]
    assert found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.files == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png")
    assert found.images.shape == (5, len(mode), 4, 6)  # c y x
    expected = numpy.asarray(Image.open(tmp_path / "pets/dog/2.png")).reshape(4, 6, len(mode))
    assert numpy.array_equal(found.images[4].permute(1, 2, 0).numpy(), expected)


def test_a_folder_without_subfolders_is_one_class(tmp_path: Path) -> None:
    data = ready(folder(tmp_path, {"flat": 9}, suffix=".JPEG") / "flat", batch_size=4)
    assert (data.num_classes, data.class_names, data.channels) == (1, ("flat",), 3)


def spoil_size(root: Path) -> None:
    Image.new("RGB", (6, 5)).save(root / "dog/1.png")


def spoil_mode(root: Path) -> None:
    Image.new("L", (6, 4)).save(root / "dog/1.png")


def spoil_first(root: Path) -> None:
    Image.new("RGBA", (6, 4)).save(root / "cat/0.png")


def spoil_content(root: Path) -> None:
    path = root / "dog/1.png"
    path.write_bytes(path.read_bytes()[:45])


def spoil_extent(root: Path) -> None:
    """A few bytes that say they are 60,000 pixels wide and high."""
    path = root / "dog/1.png"
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + path.read_bytes()[24:29]
    check = zlib.crc32(head).to_bytes(4, "big")
    path.write_bytes(path.read_bytes()[:12] + head + check + path.read_bytes()[33:])


def spoil_class(root: Path) -> None:
    (root / "eel").mkdir()


def spoil_levels(root: Path) -> None:
    (root / "dog/1.png").rename(root / "1.png")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_size, r"dog/1\.png is 6x5 RGB, .*cat/0\.png is 6x4 RGB; .*; use resize=\(4, 6\)$"),
        (spoil_mode, r"dog/1\.png is 6x4 L, .*cat/0\.png is 6x4 RGB; .*; use mode='rgb'"),
        (spoil_first, r"cat/0\.png has the mode RGBA, transparent; .*; use mode='rgb' or"),
        (spoil_content, r"dog/1\.png cannot be read as an image: .*; remove the file"),
        (spoil_extent, r"dog/1\.png cannot be read as an image: Image size \(3600000000 pixels"),
        (spoil_class, r"the class eel has no image; allowed: at least one .*; add an image, or"),
        (spoil_levels, r"holds both images \(1\.png\) and folders \(cat\)"),
    ],
)
def test_an_inconsistent_image_folder_is_refused(spoil, text: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    spoil(root)
    with pytest.raises(ValueError, match=text):
        ready(root)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"has no image; .*; use source='FOLDER'"):
        ready(tmp_path)


def test_a_class_too_small_to_be_split_is_refused(tmp_path: Path) -> None:
    said = "class dog has 1 image, and 1 of them for"
    with pytest.raises(ValueError, match=f"{said} test would leave none .* 3 .* to the class$"):
        ready(folder(tmp_path / "one", {"cat": 9, "dog": 1}))
    two = folder(tmp_path / "two", {"cat": 9, "dog": 2})
    with pytest.raises(ValueError, match=r"dog has 1 image, .* for val .*, or use val_fraction=0$"):
        ready(two)
    assert ready(two, val_fraction=0, batch_size=2).get_split("train")[1].bincount()[1] == 1


def test_the_error_for_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'minst' is neither .* allowed: mnist, .*; use source='mnist'$"
    ):
        ready("minst")


def test_the_error_for_a_missing_data_set_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = r"root='FOLDER' with the file FOLDER/fashion/train-images-idx3-ubyte\.gz"
    with pytest.raises(DatasetNotFound, match=f"{place}, source='FOLDER' .* source='digits'$"):
        ready("fashion")


def test_flips_are_a_function_of_seed_epoch_and_image_and_never_of_digits(tmp_path: Path) -> None:
    for i in range(12):
        Image.linear_gradient("L").rotate(90).resize((8, 2)).point(lambda p, i=i: p // 2 + i).save(
            tmp_path / f"{i}.png"
        )
    loader = ready(tmp_path, flip=True, batch_size=4, val_fraction=0).train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in loader]))
    turned = []  # by what the image is: a mirrored one has the same mean
    for images in epochs:
        slope = (images[..., -1] - images[..., 0]).mean((1, 2))
        means = (images.mean((1, 2, 3)) * 1e4).round()
        turned.append(dict(zip(means.tolist(), (slope > 0).tolist(), strict=True)))
    assert len(turned[0]) == len(epochs[0])
    assert all(set(each.values()) == {True, False} for each in turned)
    assert torch.equal(epochs[0], epochs[2])
    assert any(turned[0][image] != turned[1][image] for image in turned[0].keys() & turned[1])
    with pytest.raises(ValueError, match="flip=True is not valid for source='mnist'"):
        ImageDataModule("mnist", flip=True)
    assert ImageDataModule("cifar10").flip
    assert not ImageDataModule("fashion").flip


def test_splits_of_each_class_have_the_given_fractions() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
    keep, kept = stratified_split(ImageSet(images, labels, ("a", "b")), 0.2, "test")
    assert kept.labels.tolist() == [0] * 6 + [1] * 2
    assert sorted(torch.cat((keep.images, kept.images)).flatten().tolist()) == list(range(40))


def test_selected_classes_keep_their_numbers_and_their_splits() -> None:
    whole, some = ImageDataModule("digits"), ImageDataModule("digits", classes=[5, 7])
    for data in (whole, some):
        data.setup("fit")
    for part in ("train", "val", "test"):
        images, labels = whole.get_split(part)
        keep = (labels == 5) | (labels == 7)
        assert torch.equal(some.get_split(part)[0], images[keep])
        assert set(some.get_split(part)[1].tolist()) == {5, 7}
    assert some.num_classes == 10
    with pytest.raises(
        ValueError, match=r"classes='10' is not in .*; allowed: 0 to 9; use classes='0-9'"
    ):
        ImageDataModule("digits", classes=[10]).setup("fit")


def test_groups_replace_the_classes_in_their_order() -> None:
    plain, grouped = ImageDataModule(), ImageDataModule(class_groups={"odd": "1,3,5", "0": "0,8-9"})
    for data in (plain, grouped):
        data.setup("fit")
    assert (grouped.class_names, grouped.num_classes) == (("odd", "0"), 2)
    for split in ("train", "val", "test"):
        images, labels = plain.get_split(split)
        group = torch.full((10,), -1)
        group[[1, 3, 5]], group[[0, 8, 9]] = 0, 1
        used = group[labels] >= 0
        assert torch.equal(grouped.get_split(split)[0], images[used])
        assert torch.equal(grouped.get_split(split)[1], group[labels][used])


def test_the_first_images_are_for_training_and_validation_takes_others() -> None:
    every = ImageDataModule(val_fraction=0.0)
    few = ImageDataModule(num_train_images=300, val_fraction=0.1)
    for data in (every, few):
        data.setup("fit")
    images, labels = every.get_split("train")
    assert torch.equal(few.get_split("train")[0], images[:300])
    assert torch.equal(few.get_split("train")[1], labels[:300])
    others = {image.numpy().tobytes() for image in images[300:]}
    held_out = [image.numpy().tobytes() for image in few.get_split("val")[0]]
    assert len(held_out) == pytest.approx(0.1 * (len(images) - 300), abs=10)
    assert set(held_out) <= others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_groups": {"a": "0-4", "b": "4-9"}}, "the class 4 is in b and in another group"),
        ({"class_groups": {"a": "0-9"}}, "has 1 group; allowed"),
        ({"class_groups": {"a": "0-4", "b": "11"}}, "b='11' is not in the classes"),
        ({"num_train_images": 5}, r"first 5 images have none of the class .*num_train_images to"),
        ({"num_train_images": 5000}, "num_train_images=5,000 leaves no other image of the 1,438"),
        ({"num_train_images": 0}, "num_train_images=0 is not a positive integer"),
        ({"classes": "1", "class_groups": {"a": "1"}}, "classes='1' selects classes"),
    ],
)
def test_groups_and_numbers_that_do_not_fit_are_refused(arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        ImageDataModule(**arguments).setup("fit")
