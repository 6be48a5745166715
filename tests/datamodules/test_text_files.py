"""Text files are listed and decoded; a binary file is refused by its name and format."""

from pathlib import Path

import pytest

from ravine.datamodules.text_files import list_files, read_text


def test_a_folder_with_a_file_that_is_not_text_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_text("text under a wrong name")
    (tmp_path / "c.md").write_text("RIFF and ID3 are words")
    files = list_files(tmp_path)
    assert [p.name for p in files] == ["a.txt", "b.png", "c.md"]
    assert "".join(read_text(files)).startswith("text\ntext under")
    for name, head, kind in (
        ("c.png", b"\x89PNG\r\n\x1a\n", "it is a PNG image; allowed: text files; use path='FILE'"),
        ("c.docx", b"PK\x03\x04", "it is a zip archive"),
        ("c", b"\x1f\x8b\x08", "it is a gzip; gunzip it;"),
    ):
        (tmp_path / name).write_bytes(head)
        with pytest.raises(ValueError, match=f"/{name} is not a text: {kind}"):
            list(read_text(list_files(tmp_path)))
        (tmp_path / name).unlink()
