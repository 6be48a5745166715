"""A named image dataset is found by its checksum and read from its files."""

import gzip
import os
from pathlib import Path

import numpy
import pytest

from ravine.datamodules.downloads import compute_checksum, find_local
from ravine.datamodules.image_datasets import IMAGE_DATASETS, read_named_dataset


def idx(array: numpy.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(numpy.uint8).tobytes()


def test_mnist_is_read_from_its_four_files_in_any_gzip(tmp_path: Path) -> None:
    images, labels = numpy.arange(20 * 6).reshape(20, 2, 3) % 256, numpy.arange(20) % 10
    paths = []
    for name, array in {"a": images, "b": labels, "c": images[::-1], "d": labels}.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(gzip.compress(idx(array), compresslevel=len(paths)))
    train, test = read_named_dataset("mnist", paths)
    assert train.images.shape == (20, 1, 2, 3)
    assert train.images[3, 0].tolist() == images[3].tolist()
    assert test.images[0, 0].tolist() == images[19].tolist()
    assert train.labels.tolist() == labels.tolist()


def test_a_gzipped_data_set_is_recognized_by_its_content(tmp_path: Path) -> None:
    source, path = IMAGE_DATASETS["mnist"][1], tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(b"other labels", 1))
    one = compute_checksum(path, source)
    path.write_bytes(gzip.compress(b"other labels", 9, mtime=1))
    assert compute_checksum(path, source) == one != source.sha256
    path.write_bytes(b"no gzip at all")
    assert compute_checksum(path, source) == "no gzip"
    path.write_bytes(gzip.compress(b"other labels")[:-9])
    (tmp_path / "mnist").mkdir()
    path.rename(tmp_path / source.path)
    with pytest.raises(
        ValueError, match=r"not the dataset 'mnist': it is not a complete gzip file;"
    ):
        find_local(source, str(tmp_path))


def test_the_checksums_known_are_of_different_files() -> None:
    known = [source for some in IMAGE_DATASETS.values() for source in some]
    assert len({source.sha256 for source in known}) == len(known) == 9
    assert all(len(bytes.fromhex(source.sha256)) == 32 for source in known)


@pytest.mark.skipif(not os.environ.get("DATA_ROOT"), reason="MNIST is not on this machine")
def test_the_real_mnist_is_found_unzipped_and_in_the_folders_of_torchvision(tmp_path: Path) -> None:
    (tmp_path / "a/MNIST/raw").mkdir(parents=True)
    (tmp_path / "b/mnist").mkdir(parents=True)
    source = IMAGE_DATASETS["mnist"][3]
    (real,) = Path(os.environ["DATA_ROOT"], "mnist").glob("t10k-labels*")
    (tmp_path / "a/MNIST/raw" / real.name).symlink_to(real)
    assert find_local(source, str(tmp_path / "a")).parent.name == "raw"
    (tmp_path / "b/mnist" / real.stem).write_bytes(gzip.decompress(real.read_bytes()))
    assert find_local(source, str(tmp_path / "b")).suffix == ""
    (tmp_path / "b/mnist" / real.stem).write_bytes(b"\0\0\x08\x01\0\0\0\x01\0")
    with pytest.raises(ValueError, match="is not the dataset 'mnist'"):
        find_local(source, str(tmp_path / "b"))
