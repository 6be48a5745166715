"""An image file is read without a change of its pixels, or refused by its name."""

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from ravine.datamodules.image_datasets import read_named_dataset
from ravine.datamodules.image_folders import read_image_folder
from ravine.datamodules.image_formats import ImageReader, read_cifar, read_idx
from ravine.errors import UsageError

RANDOM = numpy.random.RandomState(0)


def photo(size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(RANDOM.randint(0, 256, (*size, 3), dtype=numpy.uint8))


def idx(array: numpy.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(numpy.uint8).tobytes()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not an idx file of bytes: it begins with no byte; allowed: 00 00 08"),
        (b"\0\0\x0d\x01" + b"\0" * 8, "holds float32; allowed: an idx file of bytes"),
        (idx(numpy.zeros((2, 3)))[:-1], "it has 17 bytes, but a header of 12 and 2 x 3 are 18"),
        (idx(numpy.zeros((2, 3))) + b"x", "it has 19 bytes, but a header of 12 and 2 x 3 are 18"),
        (b"\0\0\x08\0", "is not an idx file of bytes: it begins with 00 00 08 00"),
        (b"\0\0\x08\x03", "it has 4 bytes, but a header of 16 and 0 x 0 x 0 are 16"),
        (idx(numpy.zeros((0, 4, 4))), "is empty: its header states 0 x 4 x 4 bytes"),
        (
            gzip.compress(idx(numpy.zeros((2, 3)))[:-1], mtime=0),
            "it has fewer than the 2 x 3 of its header",
        ),
        (
            gzip.compress(idx(numpy.zeros((2, 3))), mtime=0) + b"\n<x>",
            "cannot be read: Not a gzipped file",
        ),
        (
            gzip.compress(idx(numpy.zeros((2, 3))), mtime=0)[:-9],
            "cannot be read: Compressed file ended",
        ),
        (
            gzip.compress(b"\0\0\x08\x01\x7f\xff\xff\xff", mtime=0),
            "states 2147483647 bytes, but the gzip file has",
        ),
    ],
)
def test_a_file_that_is_not_idx_is_refused(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"/x ") as error:
        read_idx(tmp_path / "x")
    assert why in str(error.value)


def test_cifar_is_read_from_its_records_and_its_archive(tmp_path: Path) -> None:
    pixels = numpy.arange(10 * 3072).reshape(10, 3072) % 251
    records = numpy.concatenate([numpy.arange(10)[:, None], pixels], 1).astype(numpy.uint8)
    images, labels = read_cifar(records.tobytes(), "x")
    assert images.shape == (10, 3, 32, 32)
    assert images[2, 1, 0, 5] == pixels[2, 1024 + 5]  # the green plane stands after the red
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = records.nbytes
            archive.addfile(member, io.BytesIO(records.tobytes()))
    train, test = read_named_dataset("cifar10", [tmp_path / "c.tar.gz"])
    assert (len(train.images), len(test.images)) == (50, 10)
    assert torch.equal(train.images[40:], test.images)
    assert torch.equal(test.labels, labels)
    with pytest.raises(
        ValueError, match=r"3,072 bytes, which is not a multiple of the record size 3073"
    ):
        read_cifar(bytes(3072), "x")


def deep_png(channels: int, pixels: numpy.ndarray) -> bytes:
    """A PNG of 16 bits, gray or RGB, of pixels (y x c)."""
    kind = {1: 0, 3: 2}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


MIXED = {
    "gray": lambda p: photo().convert("L").save(p),
    "gray with alpha": lambda p: photo().convert("LA").save(p),
    "alpha": lambda p: photo().convert("RGBA").save(p),
    "a transparent color": lambda p: photo().save(p, transparency=(0, 0, 0)),
    "palette with a transparent color": lambda p: photo().convert("P").save(p, transparency=3),
    "1 bit": lambda p: photo().convert("1").save(p),
    "16-bit gray": lambda p: p.write_bytes(deep_png(1, RANDOM.randint(0, 65536, (8, 8, 1)))),
    "16-bit RGB": lambda p: p.write_bytes(deep_png(3, RANDOM.randint(0, 65536, (8, 8, 3)))),
    "CMYK": lambda p: photo().convert("CMYK").save(p, "TIFF"),
    "another size": lambda p: photo((9, 30)).save(p),
}


@pytest.mark.parametrize("kind", MIXED)
def test_one_different_image_is_refused_with_a_hint_that_works(kind: str, tmp_path: Path) -> None:
    for i in range(3):
        photo().save(tmp_path / f"{i}.png")
    MIXED[kind](tmp_path / "1.png")
    fix = r"resize=\(8, 8\)" if kind == "another size" else "mode='rgb'"
    with pytest.raises(UsageError, match=rf"/1\.png (is|has) .*; use {fix}") as error:
        read_image_folder(tmp_path)
    flag = "'--data.resize=[8,8]'" if kind == "another size" else "--data.mode=rgb"
    assert error.value.flag.startswith(flag)
    for mode, channels in (("rgb", 3), ("gray", 1)):
        found = read_image_folder(tmp_path, mode, (8, 8)).splits["all"]
        assert found.images.shape == (3, channels, 8, 8)


def test_a_palette_and_one_bit_are_read_without_a_loss(tmp_path: Path) -> None:
    colors = photo().quantize(16)
    colors.save(tmp_path / "0.png")
    colors.convert("RGB").save(tmp_path / "1.png")
    images = read_image_folder(tmp_path).splits["all"].images
    assert torch.equal(images[0], images[1])
    (tmp_path / "bits").mkdir()
    photo().convert("1").save(tmp_path / "bits/0.png")
    found = read_image_folder(tmp_path / "bits").splits["all"].images
    assert found.shape == (1, 1, 8, 8)
    assert set(found.unique().tolist()) == {0, 255}


def test_conversion_keeps_the_upper_8_bits_and_shows_transparent_pixels_white(
    tmp_path: Path,
) -> None:
    deep = numpy.array([[[0], [255], [256], [65535]]])
    (tmp_path / "0.png").write_bytes(deep_png(1, deep))
    assert ImageReader("gray").read_files([tmp_path / "0.png"]).flatten().tolist() == [0, 0, 1, 255]
    (tmp_path / "1.png").write_bytes(deep_png(3, deep.repeat(3, 2)))
    assert ImageReader("rgb").read_files([tmp_path / "1.png"])[0, 2, 0].tolist() == [0, 0, 1, 255]
    clear = numpy.array([[[9, 9, 9, 0], [9, 9, 9, 255], [0, 0, 0, 128]]], dtype=numpy.uint8)
    Image.fromarray(clear).save(tmp_path / "2.png")
    assert ImageReader("rgb").read_files([tmp_path / "2.png"])[0, 0, 0].tolist() == [255, 9, 127]
    Image.fromarray(clear[..., :3]).save(tmp_path / "3.png", transparency=(9, 9, 9))
    assert ImageReader("gray").read_files([tmp_path / "3.png"])[0, 0, 0].tolist() == [255, 255, 0]


def test_of_several_frames_the_first_is_read_and_the_file_is_named(tmp_path: Path) -> None:
    frames = [photo() for _ in range(3)]
    for end in ("png", "tiff", "webp"):
        frames[0].save(
            tmp_path / f"0.{end}", save_all=True, append_images=frames[1:],
            **({"lossless": True} if end == "webp" else {}),
        )  # fmt: skip
    found = read_image_folder(tmp_path)
    first = torch.from_numpy(numpy.array(frames[0])).permute(2, 0, 1)
    assert (found.splits["all"].images == first).all()
    assert found.notes == ["only the first frame is read of 3 images (0.png)"]


def test_a_file_that_would_start_a_program_or_exhaust_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match=r"0\.png is not an image of a known format; allowed: PNG"):
        read_image_folder(tmp_path)
    Image.new("1", (6000, 6000)).save(tmp_path / "0.png")
    with pytest.raises(
        ValueError, match=r"0\.png has 6000x6000 pixels; allowed: at most 25,000,000"
    ):
        read_image_folder(tmp_path)
