"""A data set by name is the right file or an error, wherever it is and however a download fails."""

import contextlib
import email.message
import gzip
import hashlib
import io
import os
import socket
import threading
import urllib.error
import urllib.request
import urllib.response
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ravine.datamodules import downloads
from ravine.datamodules.downloads import (
    DatasetNotFound,
    RemoteFile,
    download_if_missing,
    find_local,
    resolve_source,
)
from ravine.errors import UsageError

CONTENT = b"To be, or not to be\n" * 500
DATA_ROOT = os.environ.get("DATA_ROOT")  # before the fixture below takes it away
Serve = Callable[..., RemoteFile]


def zip_bytes(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def source(url: str, member: str = "") -> RemoteFile:
    checksum = hashlib.sha256(CONTENT).hexdigest()
    return RemoteFile("play", "plays/play.txt", checksum, len(CONTENT), url, member)


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No DATA_ROOT, an empty cache, and no way out but to this machine."""
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[Serve]:
    """``server(body, length=..., status=..., member=...)``: a source whose address gives that."""
    servers = []

    def start(
        body: bytes, length: int | None = None, status: int = 200, member: str = ""
    ) -> RemoteFile:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client may have had enough
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None: ...

        one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(one)
        return source(f"http://127.0.0.1:{one.server_port}/play", member)

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.fixture
def serve(server: Serve, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """The same for a client that also speaks http, which is enough inside one machine."""
    monkeypatch.setattr(downloads, "_make_https_opener", urllib.request.build_opener)
    return server


def left_behind(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_download_is_checked_and_kept(serve: Serve, tmp_path: Path) -> None:
    good = serve(CONTENT)
    assert download_if_missing("play", good) == ""
    path = find_local(good)
    assert path == tmp_path / "cache/ravine/plays/play.txt"
    assert path.read_bytes() == CONTENT
    assert left_behind(tmp_path) == ["play.txt"]
    assert (
        download_if_missing("play", source("https://nowhere.invalid")) == ""
    )  # no second download


def test_a_gzip_is_verified_by_its_content_and_kept_unchanged(serve: Serve) -> None:
    for level in (1, 9):  # mirrors wrap it differently
        body = gzip.compress(CONTENT, level)
        good = replace(serve(body), is_gzipped=True, path=f"plays/{level}.gz")
        assert download_if_missing("play", good) == ""
        assert find_local(good).read_bytes() == body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (CONTENT, "not a gzip file"),
        (gzip.compress(CONTENT, mtime=0)[:-20], "not a gzip file"),
        (gzip.compress(CONTENT[1:], mtime=0), "bytes that arrived have another SHA-256"),
        (
            gzip.compress(bytes(10**7), mtime=0),
            "bytes that arrived have another SHA-256",
        ),  # unfolds to far too much
    ],
    ids=["plain", "cut", "another", "bomb"],
)
def test_a_bad_gzip_leaves_no_file(serve: Serve, tmp_path: Path, body: bytes, reason: str) -> None:
    assert reason in download_if_missing("play", replace(serve(body), is_gzipped=True))
    assert left_behind(tmp_path) == []


def test_the_file_of_the_exact_name_is_extracted_from_a_zip(serve: Serve) -> None:
    body = zip_bytes(**{"../play": b"no", "readme": b"no", "play": CONTENT})
    good = serve(body, member="play")
    assert download_if_missing("play", good) == ""
    assert find_local(good).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"body": CONTENT[:4000], "length": len(CONTENT)}, "only 4,000 of 10,000 bytes arrived"),
        ({"body": CONTENT[:4000]}, "4,000 bytes that arrived have another SHA-256"),
        ({"body": CONTENT[:-1] + b"X"}, "10,000 bytes that arrived have another SHA-256"),
        ({"body": b""}, "0 bytes that arrived"),
        ({"body": CONTENT * 100}, "more than 20,000 bytes arrived; the file has 10,000"),
        ({"body": b"gone", "status": 404}, "HTTPError: Not Found"),
        ({"body": CONTENT, "member": "play"}, "not a zip archive with the file play"),
        (
            {"body": zip_bytes(other=CONTENT), "member": "play"},
            "not a zip archive with the file play",
        ),
        (
            {"body": zip_bytes(play=CONTENT)[:60], "member": "play"},
            "not a zip archive with the file play",
        ),
        (
            {"body": zip_bytes(play=bytes(10**7)), "member": "play"},
            "10,001 bytes that arrived have another",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_download_leaves_no_file(
    serve: Serve, tmp_path: Path, answer: dict, reason: str
) -> None:
    bad = serve(**answer)
    tried = download_if_missing("play", bad)
    assert reason in tried
    assert left_behind(tmp_path) == []
    with pytest.raises(DatasetNotFound) as error:
        find_local(bad, download_error=tried)
    assert f"{bad.url} ({tried})" in str(error.value)


def test_a_damaged_zip_leaves_no_file(serve: Serve, tmp_path: Path) -> None:
    body = bytearray(zip_bytes(play=os.urandom(5000)))
    body[2000] ^= 1
    assert "not a zip archive with the file play" in download_if_missing(
        "play", serve(bytes(body), member="play")
    )
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_no_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    def break_off(descriptor: int) -> None:
        raise stop

    good = serve(CONTENT)
    monkeypatch.setattr(os, "fsync", break_off)
    if isinstance(stop, OSError):
        assert "No space left on device" in download_if_missing("play", good)
    else:
        with pytest.raises(KeyboardInterrupt):
            download_if_missing("play", good)
    assert left_behind(tmp_path) == []


def test_a_server_that_stops_sending_ends_in_a_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_make_https_opener", urllib.request.build_opener)
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/play"
        assert "timed out" in download_if_missing("play", source(address))
    assert left_behind(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_replaced_by_a_good_one_only(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "cache/ravine/plays/play.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    bad = serve(b"worse")
    assert download_if_missing("play", bad)
    assert path.read_bytes() == b"damaged"  # nothing is overwritten by something bad
    with pytest.raises(DatasetNotFound, match="cache: damaged"):
        find_local(bad)
    good = serve(CONTENT)
    assert download_if_missing("play", good) == ""
    assert find_local(good).read_bytes() == CONTENT


def test_only_https_is_used(server: Serve, tmp_path: Path) -> None:
    assert download_if_missing("play", server(CONTENT)) == "URLError: unknown url type: http"
    assert left_behind(tmp_path) == []


def test_a_redirect_to_http_is_not_followed(server: Serve) -> None:
    plain = server(CONTENT)

    class Redirect(urllib.request.BaseHandler):
        handler_order = 100  # before the real one

        def https_open(self, request: urllib.request.Request) -> urllib.response.addinfourl:
            headers = email.message.Message()
            headers["Location"] = plain.url
            answer = urllib.response.addinfourl(io.BytesIO(), headers, request.full_url, 302)
            answer.msg = "Found"  # type: ignore[attr-defined]
            return answer

    opener = downloads._make_https_opener()
    opener.add_handler(Redirect())
    with pytest.raises(urllib.error.URLError, match="unknown url type: http"):
        opener.open("https://safe.invalid/play")


def test_data_root_comes_before_the_cache_and_the_argument_before_both(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = serve(CONTENT)
    download_if_missing("play", good)
    for folder in ("variable", "argument"):
        (tmp_path / folder / "plays").mkdir(parents=True)
        (tmp_path / folder / "plays/play.txt").write_bytes(CONTENT)
    assert find_local(good).is_relative_to(tmp_path / "cache")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "variable"))
    assert find_local(good).is_relative_to(tmp_path / "variable")
    assert find_local(good, root=str(tmp_path / "argument")).is_relative_to(tmp_path / "argument")
    (tmp_path / "variable/plays/play.txt").unlink()
    assert find_local(good).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("wanted", ["play", "auto"])
def test_another_file_in_data_root_is_not_used_as_the_data_set(wanted: str, tmp_path: Path) -> None:
    there = tmp_path / "plays/play.txt"
    there.parent.mkdir()
    there.write_bytes(CONTENT + b"edited")
    gone = source("https://nowhere.invalid/play")
    assert download_if_missing(wanted, gone, str(tmp_path)) == ""
    with pytest.raises(UsageError) as error:
        resolve_source(wanted, gone, str(tmp_path))
    for part in (f"{there} is not the dataset 'play'", gone.sha256, f"path='{there}'"):
        assert part in str(error.value)
    assert error.value.flag == f"--data.path={there}"
    assert there.read_bytes() == CONTENT + b"edited"


def test_one_message_names_the_searched_paths_and_the_alternatives(tmp_path: Path) -> None:
    gone = source("https://nowhere.invalid/play")
    with pytest.raises(DatasetNotFound) as error:
        resolve_source("play", gone, download_error="URLError: no network")
    assert str(error.value) == (
        "the dataset 'play' was not found; searched: root and DATA_ROOT (not set); "
        f"{tmp_path}/cache/ravine/plays/play.txt (cache: no such file); "
        "https://nowhere.invalid/play (URLError: no network); allowed: root='FOLDER' with the file "
        "FOLDER/plays/play.txt, path='FILE' with your own data, source='embedded'; "
        "run once with a network, or use source='embedded'"
    )
    flags = "--data.root=FOLDER, or --data.path=FILE, or --data.source=embedded"
    assert error.value.flag == flags


def test_auto_falls_back_with_a_reason_and_embedded_uses_no_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = source("https://nowhere.invalid/play")
    path, why = resolve_source("auto", gone, download_error="URLError: no network")
    assert path is None
    assert "URLError: no network" in why
    monkeypatch.setattr(downloads, "_make_https_opener", None)  # would fail if it were called
    assert download_if_missing("embedded", gone) == ""
    assert resolve_source("embedded", gone) == (None, "")


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'plya' is not a known dataset; allowed: play, auto, embedded"
    ):
        resolve_source("plya", source(""))


def test_urls_are_https_and_checksums_are_complete() -> None:
    for entry in downloads.REMOTE_FILES:
        assert entry.url.startswith("https://")
        assert len(bytes.fromhex(entry.sha256)) == 32


@pytest.mark.skipif(not DATA_ROOT, reason="the real sets are not on this machine")
def test_the_real_sets_have_the_size_and_checksum_of_the_table() -> None:
    there = [entry for entry in downloads.REMOTE_FILES if Path(DATA_ROOT, entry.path).is_file()]
    assert {"shakespeare", "sms"} <= {entry.name for entry in there}
    for entry in there:
        assert find_local(entry, DATA_ROOT).stat().st_size == entry.size
