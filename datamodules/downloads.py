"""Where data come from: a named set is looked for on disk, or fetched once and checked.

The order: `root` or the variable DATA_ROOT, the cache folder, the canonical address. A file counts
only with the right SHA-256. A task that can do without any file has an embedded default.
"""

import gzip
import hashlib
import io
import os
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal, get_args

from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.progress import Progress

from ravine.errors import MissingFileError, UsageError, suggest_names

NOT_GZIP = "no gzip"
TIMEOUT_S = 10.0  # seconds of silence before a server is given up


class DatasetNotFound(MissingFileError):
    """A named set is nowhere; the text names the places looked at and the ways out."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of public data, known by its checksum."""

    name: str
    path: str  # below DATA_ROOT, and below the cache folder
    sha256: str
    size: int  # bytes
    url: str
    zip_member: str = ""  # the file's name, where the address gives a zip
    is_gzipped: bool = False  # checksum and size are of what is inside: mirrors wrap it differently
    custom_data_flag: str = "path=FILE"  # the flag that gives data of one's own
    fallback_source: str = "embedded"  # the source that needs no file
    alternative_paths: tuple[
        str, ...
    ] = ()  # other places below DATA_ROOT, where other programs keep it
    text: bool = False  # a text for language models
    title: str = ""  # what it is, in a list of texts


REMOTE_FILES = (
    RemoteFile(
        name="shakespeare",
        path="shakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        "input.txt",
        text=True,
        title="tiny Shakespeare, 1.1 MB of his plays",
    ),
    RemoteFile(
        name="sms",
        path="spam/SMSSpamCollection",
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        size=477_907,
        url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        zip_member="SMSSpamCollection",
    ),
)
TEXT_DATASETS = {source.name: source for source in REMOTE_FILES}

# The texts that TextDataModule and PromptDataModule know by name. A new one is a row of TABLE with
# `text=True`, and its name here.
TextName = Literal["auto", "embedded", "shakespeare"]
TEXTS = {source.name: source for source in REMOTE_FILES if source.text}


def resolve_source(
    source_name: str, remote_file: RemoteFile, root: str | None = None, download_error: str = ""
) -> tuple[Path | None, str]:
    """The set's file, or None for the embedded default; and why the set could not be had.

    `source_name` is the set's name, or "auto" (embedded only if the set cannot be had), or
    "embedded".
    """
    if source_name not in (remote_file.name, "auto", "embedded"):
        raise UsageError(
            f"source {source_name!r} is not one of {remote_file.name}, auto, embedded; type "
            f"--data.source={remote_file.name}, or --data.path=FILE for a file of your own"
        )
    if source_name == "embedded":
        return None, ""
    try:
        return find_local(remote_file, root, download_error), ""
    except DatasetNotFound as error:
        if source_name == remote_file.name:
            raise
        return None, str(error)


def text_source(wanted: TextName) -> RemoteFile:
    """The text of this name; for "auto" and "embedded" the first one of the table."""
    if wanted in ("auto", "embedded"):
        return next(iter(TEXTS.values()))
    if wanted not in TEXTS:
        known = get_args(TextName)
        raise UsageError(
            f"source {wanted!r} is not a text that is known by name",
            dict.fromkeys([*suggest_names(wanted, known), *known]),
            "give the path of a file of your own",
            flag="--data.path=FILE",
        )
    return TEXTS[wanted]


def find_local(remote_file: RemoteFile, root: str | None = None, download_error: str = "") -> Path:
    """Find a set on disk; `download_error` is what `download_if_missing` said, for the message if
    it is missing.
    """
    searched = []
    label, folder = ("--data.root", root) if root else ("DATA_ROOT", os.environ.get("DATA_ROOT"))
    if folder:
        for relative_path in (remote_file.path, *remote_file.alternative_paths):
            if (path := Path(folder).expanduser() / relative_path).is_file():
                return _verify_file(path, remote_file)
        searched.append(f"{Path(folder).expanduser() / remote_file.path} ({label}: no such file)")
    else:
        searched.append("--data.root and DATA_ROOT (not set)")
    path = cache_folder() / remote_file.path
    if path.is_file() and compute_checksum(path, remote_file) == remote_file.sha256:
        return path
    searched.append(f"{path} (cache: {'damaged' if path.is_file() else 'no such file'})")
    searched.append(
        f"{remote_file.url} ({download_error or 'not tried: prepare_data() has not run'})"
    )
    custom_data = "a file" if remote_file.custom_data_flag.endswith("FILE") else "images"
    raise DatasetNotFound(
        f"the data set {remote_file.name!r} was not found; looked at: {'; '.join(searched)}; ways "
        "out: "
        f"run once with a network; or put the file at FOLDER/{remote_file.path} and type "
        f"--data.root=FOLDER; or type --data.{remote_file.custom_data_flag} for {custom_data} of "
        "your own; "
        f"or --data.source={remote_file.fallback_source}"
    )


def download_if_missing(source_name: str, remote_file: RemoteFile, root: str | None = None) -> str:
    """Download a set into the cache unless it is there already; in words why it failed, or ""."""
    try:
        if source_name in (remote_file.name, "auto"):
            find_local(remote_file, root)
    except DatasetNotFound:
        try:
            content = _verify_content(_download_bytes(remote_file), remote_file)
            with atomic_write(cache_folder() / remote_file.path) as temporary_path:
                temporary_path.write_bytes(content)
        except (OSError, HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
    except ValueError:  # a wrong file under DATA_ROOT: every rank will say so in its setup
        pass
    return ""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/ravine, by default ~/.cache/ravine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ravine"


def compute_sha256(path: Path) -> str:
    """The checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compute_checksum(path: Path, remote_file: RemoteFile) -> str:
    """What the source's checksum is compared with; NO_GZIP where one should be."""
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    if not remote_file.is_gzipped or (not is_gzipped and path.suffix != ".gz"):  # unzipped already
        return compute_sha256(path)
    try:
        with gzip.open(path) as file:
            return hashlib.sha256(file.read(remote_file.size + 1)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return NOT_GZIP


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: what is written there replaces it, unless something fails.

    A file is so there whole or not at all, whenever the machine stops.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}.part"
    )  # two processes may race
    try:
        yield temporary_path
        _fsync(temporary_path)
        os.replace(temporary_path, path)
        _fsync(path.parent)  # the new name itself
    finally:
        temporary_path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@rank_zero_only
def log_once(line: str, is_warning: bool = False) -> None:
    """Say once, on the first rank, which data are used."""
    style = "bold yellow" if is_warning else None
    get_console().print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _verify_file(path: Path, remote_file: RemoteFile) -> Path:
    if (actual := compute_checksum(path, remote_file)) != remote_file.sha256:
        inside = " inside the gzip" if remote_file.is_gzipped else ""
        custom_data_flag = remote_file.custom_data_flag.replace("FILE", str(path)).replace(
            "FOLDER", str(path.parent)
        )
        reason = f"its SHA-256{inside} is {actual}, that of the set is {remote_file.sha256}"
        raise UsageError(
            f"{path} is not the data set {remote_file.name!r}: "
            f"{reason if actual != NOT_GZIP else 'it is no whole gzip'}; if you changed the file, "
            "type "
            f"--data.{custom_data_flag}; if not, remove it and run again"
        )
    return path


def _make_https_opener() -> urllib.request.OpenerDirector:
    """A client that speaks https and nothing else, also where it is redirected."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _download_bytes(remote_file: RemoteFile) -> bytes:
    limit = 2 * remote_file.size  # a server that sends more sends something else
    received = bytearray()
    with (
        _make_https_opener().open(remote_file.url, timeout=TIMEOUT_S) as response,
        Progress(transient=True) as bar,
    ):
        length = int(response.headers.get("Content-Length") or 0)
        task = bar.add_task(f"downloading {remote_file.name}", total=length or None)
        while len(received) <= limit and (chunk := response.read(1 << 16)):
            received += chunk
            bar.update(task, completed=len(received))
    if len(received) > limit:
        raise UsageError(f"more than {limit:,} bytes arrived, the file has {remote_file.size:,}")
    if len(received) < length:
        raise UsageError(f"only {len(received):,} of {length:,} bytes arrived")
    return bytes(received)


def _verify_content(content: bytes, remote_file: RemoteFile) -> bytes:
    if remote_file.zip_member:
        try:
            with zipfile.ZipFile(io.BytesIO(content)).open(remote_file.zip_member) as member:
                content = member.read(
                    remote_file.size + 1
                )  # never more: a zip can unfold to anything
        except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
            raise UsageError(
                f"not a zip with the file {remote_file.zip_member}: {error}"
            ) from error
    decompressed = content
    if remote_file.is_gzipped:
        try:
            decompressed = gzip.GzipFile(fileobj=io.BytesIO(content)).read(remote_file.size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"not a gzip: {error}") from error
    if hashlib.sha256(decompressed).hexdigest() != remote_file.sha256:
        raise UsageError(f"the {len(content):,} bytes that arrived do not have the SHA-256 known")
    return content
