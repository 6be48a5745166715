"""A file is replaced in one step, or not at all."""

import hashlib
from pathlib import Path

import pytest

from ravine.files import atomic_write, compute_sha256


def test_an_atomic_write_that_fails_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "new folder/a"
    with atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"ne", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_an_atomic_write_by_name_keeps_what_another_function_wrote(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as file:
        Path(file.name).write_bytes(b"by name")
    assert (tmp_path / "a").read_bytes() == b"by name"


def test_the_temporary_file_of_a_killed_writer_is_removed_and_that_of_a_running_one_kept(
    tmp_path: Path,
) -> None:
    dead = tmp_path / f".tmp-{'0d' * 16}"
    dead.write_bytes(b"half")
    with atomic_write(tmp_path / "a") as outer:
        with atomic_write(tmp_path / "b") as inner:
            inner.write(b"b")
        assert not dead.exists()
        outer.write(b"a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_sha256_of_several_files_is_that_of_their_concatenation(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(bytes(3 << 20))
    expected = hashlib.sha256(b"one" + bytes(3 << 20)).hexdigest()
    assert compute_sha256(tmp_path / "a", tmp_path / "b") == expected
