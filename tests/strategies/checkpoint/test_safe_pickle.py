"""An untrusted pickle runs no code; time and memory are bounded by its size."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter, save

from ravine.strategies.checkpoint import safe_pickle, sharded, sharded_index
from ravine.strategies.checkpoint.atomic_io import (
    AtomicCheckpointIO,
    CheckpointError,
    find_damage,
    latest_valid_checkpoint,
)
from ravine.strategies.checkpoint.safe_pickle import GlobalName, UnsafePickle

WEIGHT = torch.arange(12.0).reshape(3, 4)


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


def call(module: str, name: str, argument: str) -> bytes:
    """A stream that calls module.name(argument): pickle follows the dots in a name."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


PAYLOADS = [
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "os.popen"),
    ("torch", "serialization.os.system"),
    ("torch", "hub.load"),
    ("torch", "load"),
    ("torch._utils", "sys.exit"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("os", "system"),
    ("builtins", "eval"),
    ("pathlib", "Path"),
]


def seal(folder: Path) -> None:
    """Write the manifest of a folder, as an attacker would after changing a file."""
    parts = [p for p in folder.iterdir() if p.name != sharded_index.MANIFEST_FILE]
    files = {p.name: [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in parts}
    (folder / sharded_index.MANIFEST_FILE).write_text(json.dumps({"format": 1, "files": files}))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A checkpoint in parts, as one rank writes it."""
    return write_parts(tmp_path / "parts.ckpt")


def write_parts(folder: Path) -> Path:
    tensors = {sharded_index.encode_path(("state_dict", "weight")): WEIGHT}
    with pytest.warns(UserWarning, match=r"torch.distributed is disabled"):
        save(tensors, storage_writer=FileSystemWriter(folder, thread_count=1), no_dist=True)
    torch.save({"state_dict": {}, "epoch": 3}, folder / sharded_index.META_FILE)
    seal(folder)
    return folder


def test_complete_shards_are_read(parts: Path) -> None:
    assert find_damage(parts) is None
    loaded = AtomicCheckpointIO().load_checkpoint(parts)
    assert torch.equal(loaded["state_dict"]["weight"], WEIGHT)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_shards_of_any_version_of_python_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, pathlib)
    monkeypatch.setattr(pathlib.PosixPath, "__module__", module)
    folder = write_parts(tmp_path / "parts.ckpt")
    assert module.encode() in (folder / sharded_index.INDEX_FILE).read_bytes()
    monkeypatch.undo()
    loaded = AtomicCheckpointIO().load_checkpoint(folder)
    assert torch.equal(loaded["state_dict"]["weight"], WEIGHT)


@pytest.mark.parametrize(("module", "name"), PAYLOADS)
def test_an_index_that_names_a_program_is_refused_and_nothing_runs(
    parts: Path, module: str, name: str
) -> None:
    mark = parts.parent / "mark"
    (parts / sharded_index.INDEX_FILE).write_bytes(call(module, name, f"touch {mark}"))
    seal(parts)
    for read in (
        sharded_index.iter_tensor_entries,
        sharded.load_full,
        AtomicCheckpointIO().load_checkpoint,
    ):
        with pytest.raises(CheckpointError, match=f"refers to {module}.{name}"):
            list(read(parts))
    assert not mark.exists()


def test_a_refusal_never_recommends_a_file_that_is_refused_too(parts: Path) -> None:
    (parts / sharded_index.INDEX_FILE).write_bytes(call(*PAYLOADS[0], "true"))
    seal(parts)
    bad = parts.with_name("bad.ckpt")
    bad.write_bytes(b"no checkpoint")
    assert latest_valid_checkpoint(parts.parent)[0] is None
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid: use another"):
        AtomicCheckpointIO().load_checkpoint(bad)


ALLOWED = {("torch", "Size"), ("collections", "OrderedDict")}


def allowed(name: GlobalName) -> bool:
    return (name.module, name.name) in ALLOWED


OPERATIONS = [getattr(pickle, name) for name in pickle.__all__ if name.isupper()]
OPERATIONS = [op for op in OPERATIONS if isinstance(op, bytes)]
PIECES = st.one_of(
    st.sampled_from(OPERATIONS),
    st.sampled_from([text("os"), text("system"), text("torch"), text("Size"), b"\x93", b"R", b"b"]),
    st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nSize\n", b"\x94", b"h\0"]),
    st.binary(max_size=4),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    pieces=st.lists(PIECES, max_size=40), protocol=st.sampled_from([b"", b"\x80\x02", b"\x80\x04"])
)
@example(pieces=[b"cos\nsystem\n", b"V", b"exit 3\n", b"\x85R."], protocol=b"")
@example(pieces=[b"r\xff\xff\xff\x7f"], protocol=b"\x80\x04N")  # memory for 2**31 memos
def test_no_stream_calls_or_imports_anything(pieces: list[bytes], protocol: bytes) -> None:
    called: list[str] = []

    def audit(name: str) -> Any:
        called.append(name)
        raise AssertionError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "system", audit)
        patch.setattr("builtins.__import__", lambda name, *args: audit(name))
        with contextlib.suppress(UnsafePickle):
            safe_pickle.load_plain(protocol + b"".join(pieces) + b".", allowed)
    assert called == []


def bomb(levels: int) -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value] * 9
    return value


def nested(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (pickle.dumps(bomb(9)), "unfolds to more than"),
        (nested(10_000), "nested deeper than 200 levels"),
        (b"\x80\x02]q\x00h\x00a.", "contains itself"),
        (b"\x80\x02}N" + b"\x85" * 50_000 + b"Ns.", "a key is a tuple"),
        (b"\x80\x02" + b"N0" * 3_000 + b"N.", "more than 4,000 operations"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "allocates a given number"),
        (b"\x80\x04" + pickle.BYTEARRAY8 + b"\xff" * 7 + b"\x0f.", "damaged"),
    ],
    ids=["bomb", "levels", "itself", "key", "operations", "bytearray", "announced"],
)
def test_a_stream_that_asks_for_too_much_is_refused(
    stream: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_pickle, "MAX_OPERATIONS", 4_000 if "operations" in why else 10**5)
    with pytest.raises(UnsafePickle, match=why):
        safe_pickle.load_plain(stream, lambda name: True)


def repacked(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with each record changed, its checksums right."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), change(entry.filename, old.read(entry)),
                         compression)  # fmt: skip
    with zipfile.ZipFile(content, "a") as new:
        for entry in new.infolist():
            entry.external_attr = 0
        new._didModify = True  # pyright: ignore[reportAttributeAccessIssue]
    path.write_bytes(content.getvalue())
    return path


def at(end: str, change: Any) -> Any:
    return lambda name, content: change(content) if name.endswith(end) else content


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (at("data.pkl", lambda c: c.replace(b"K\x0ct", b"M\xff\x7ft")), "larger than its record"),
        (at("data.pkl", lambda c: c.replace(b"K\x03K\x04\x86", b"K\x09K\x04\x86")), "beyond its"),
        (at("data.pkl", lambda c: nested(300)), "nested deeper"),
        (at("data.pkl", lambda c: pickle.dumps(bomb(9), 2)), "unfolds"),
    ],
    ids=["storage", "shape", "levels", "bomb"],
)
def test_a_pickle_that_does_not_fit_its_archive_is_refused(
    tmp_path: Path, change: Any, why: str
) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": WEIGHT.clone()}}, path)
    assert find_damage(repacked(path, lambda name, content: content)) is None
    assert why in str(find_damage(repacked(path, change)))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(10**6)}}, path)
    repacked(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: pytest.fail("unpacked"))
    assert "compressed" in str(find_damage(path))


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe.ckpt")
    assert "not a regular file" in str(find_damage(path))
    with pytest.raises(CheckpointError, match="not a regular file"):
        AtomicCheckpointIO().load_checkpoint(path)


def changed(folder: Path, old: bytes, new: bytes, count: int) -> None:
    index = folder / sharded_index.INDEX_FILE
    content = index.read_bytes()
    assert old in content
    index.write_bytes(content.replace(old, new, count))
    seal(folder)


@pytest.mark.parametrize(
    ("old", "new", "count", "why"),
    [
        (b"__0_0.distcp", b"../secret.pt", -1, "outside its file"),
        (b"K\x03K\x04", b"K\x7fK\x7f", -1, "larger than its file"),
        (b"K\x03K\x04", b"K\x7fK\x7f", 1, "chunks of a tensor do not make up the tensor"),
        (b"K\x03K\x04", b"K\x02K\x04", 1, "a chunk of a tensor is outside the tensor"),
        (b"float32", b"float99", -1, "refers to torch.float99"),
    ],
)
def test_an_index_that_does_not_match_its_shards_is_refused(
    parts: Path, old: bytes, new: bytes, count: int, why: str
) -> None:
    (parts.parent / "secret.pt").write_bytes(b"secret")
    changed(parts, old, new, count)
    with pytest.raises(CheckpointError, match=why):
        AtomicCheckpointIO().load_checkpoint(parts)


def test_a_shard_that_is_not_an_archive_is_refused_even_with_a_valid_checksum(parts: Path) -> None:
    part = parts / "__0_0.distcp"
    part.write_bytes(part.read_bytes().replace(b"PK\x01\x02", b"PK\x03\x02"))
    seal(parts)
    with pytest.raises(CheckpointError, match="do not match its index"):
        AtomicCheckpointIO().load_checkpoint(parts)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ""])
def test_a_manifest_names_files_of_its_folder_only(parts: Path, name: str) -> None:
    manifest = json.loads((parts / sharded_index.MANIFEST_FILE).read_text())
    manifest["files"][name] = [0, 0]
    (parts / sharded_index.MANIFEST_FILE).write_text(json.dumps(manifest))
    assert "outside the folder" in str(find_damage(parts))
