"""Dataset download: find a named dataset on disk, or download it once and verify its SHA-256.

Search order: `root` or the variable DATA_ROOT, the cache folder, the canonical URL. A file is used
only if its SHA-256 matches. A task that can run without any file has an embedded default.
"""

import gzip
import hashlib
import io
import os
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal, get_args

from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.progress import Progress

from ravine.errors import MissingFileError, RunError, UsageError, suggest_names
from ravine.files import atomic_write, cache_folder, compute_sha256

NOT_GZIP = "no gzip"
TIMEOUT_S = 10.0  # seconds without data before the connection is closed


class DownloadError(RunError):
    """A download failed or is not the file of the dataset."""


class DatasetNotFound(MissingFileError):
    """A named dataset was not found; the message lists the searched paths and the alternatives."""


@dataclass(frozen=True)
class RemoteFile:
    """A public data file, identified by its SHA-256."""

    name: str
    path: str  # relative to DATA_ROOT and to the cache folder
    sha256: str
    size: int  # bytes
    url: str
    zip_member: str = ""  # name of the file inside the zip, if the URL is a zip
    # checksum and size are those of the decompressed content: mirrors compress it differently
    is_gzipped: bool = False
    custom_data_argument: Literal["path", "source"] = "path"  # a file or a folder of custom data
    fallback_source: str = "embedded"  # the source that needs no file
    alternative_paths: tuple[str, ...] = ()  # paths below DATA_ROOT that other programs use
    text: bool = False  # whether it is a text for language models
    title: str = ""  # description in a list of texts


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

# Named texts of TextDataModule and PromptDataModule. To add a text, add a row to REMOTE_FILES with
# `text=True`, and its name to TextName.
TextName = Literal["auto", "embedded", "shakespeare"]
TEXTS = {source.name: source for source in REMOTE_FILES if source.text}


def resolve_source(
    source_name: str, remote_file: RemoteFile, root: str | None = None, download_error: str = ""
) -> tuple[Path | None, str]:
    """Return the path of a dataset's file, or None for the embedded default and the reason for it.

    Args:
        source_name: the dataset's name; "auto", which is embedded only if the dataset is not found;
            or "embedded", the small data inside of the package.
        remote_file: the file of the dataset.
        root: the folder of datasets; by default the variable DATA_ROOT.
        download_error: the text returned by `download_if_missing`, for the error message.

    Raises:
        DatasetNotFound: the dataset was requested by its name and is not on disk.
    """
    if source_name not in (remote_file.name, "auto", "embedded"):
        raise UsageError(
            f"source={source_name!r} is not a known dataset",
            dict.fromkeys([remote_file.name, "auto", "embedded"]),
            f"use source={remote_file.name!r}, or path='FILE' for your own file",
            flag=f"--data.source={remote_file.name}, or --data.path=FILE",
        )
    if source_name == "embedded":
        return None, ""
    try:
        # the path of the file below `root` or in the cache, after a check of its SHA-256
        return find_local(remote_file, root, download_error), ""
    except DatasetNotFound as error:
        if source_name == remote_file.name:
            raise
        return None, str(error)


def resolve_file(
    path: str | Path | None,
    source_name: str,
    remote_file: RemoteFile,
    root: str | None = None,
    download_error: str = "",
) -> tuple[Path | None, str]:
    """Return `path` if it is given, or else the result of `resolve_source`."""
    if path is not None:
        return Path(path).expanduser(), ""
    return resolve_source(source_name, remote_file, root, download_error)


def text_source(wanted: TextName) -> RemoteFile:
    """Return the RemoteFile of a named text; for "auto" and "embedded" the first of the table."""
    if wanted in ("auto", "embedded"):
        return next(iter(TEXTS.values()))
    if wanted not in TEXTS:
        known = get_args(TextName)
        raise UsageError(
            f"source={wanted!r} is not a text that is known by name",
            dict.fromkeys([*suggest_names(wanted, known), *known]),
            "use path='FILE' for your own file",
            flag="--data.path=FILE",
        )
    return TEXTS[wanted]


def find_local(remote_file: RemoteFile, root: str | None = None, download_error: str = "") -> Path:
    """Find a dataset on disk and verify its checksum.

    Args:
        remote_file: the file of the dataset.
        root: the folder of datasets; by default the variable DATA_ROOT.
        download_error: the text returned by `download_if_missing`, for the error message.

    Raises:
        DatasetNotFound: neither `root` nor the cache folder holds the file.
        UsageError: the file below `root` has another checksum.
    """
    searched = []  # the places without the file, for the error
    label, folder = ("root", root) if root else ("DATA_ROOT", os.environ.get("DATA_ROOT"))
    if folder:
        for relative_path in (remote_file.path, *remote_file.alternative_paths):
            if (path := Path(folder).expanduser() / relative_path).is_file():
                # raises an error if the SHA-256 differs, because the user chose this folder
                return _verify_file(path, remote_file)
        searched.append(f"{Path(folder).expanduser() / remote_file.path} ({label}: no such file)")
    else:
        searched.append("root and DATA_ROOT (not set)")
    path = cache_folder() / remote_file.path
    # a damaged file of the cache is no error: it is downloaded again
    if path.is_file() and compute_checksum(path, remote_file) == remote_file.sha256:
        return path
    searched.append(f"{path} (cache: {'damaged' if path.is_file() else 'no such file'})")
    searched.append(
        f"{remote_file.url} ({download_error or 'not tried: prepare_data() has not run'})"
    )
    # for the advice: the argument that takes custom data, and a source that needs no file
    argument, fallback = remote_file.custom_data_argument, remote_file.fallback_source
    custom_path = "FILE" if argument == "path" else "FOLDER"
    raise DatasetNotFound(
        f"the dataset {remote_file.name!r} was not found; searched: {'; '.join(searched)}",
        [
            f"root='FOLDER' with the file FOLDER/{remote_file.path}",
            f"{argument}='{custom_path}' with your own data",
            f"source={fallback!r}",
        ],
        f"run once with a network, or use source={fallback!r}",
        flag=f"--data.root=FOLDER, or --data.{argument}={custom_path}, or --data.source={fallback}",
    )


def download_if_missing(source_name: str, remote_file: RemoteFile, root: str | None = None) -> str:
    """Download a dataset into the cache if it is missing; return the error as text, or "".

    Only local rank 0 calls this. The text becomes part of the error that every rank raises if its
    own search (`find_local`) fails.

    Args:
        source_name: the dataset's name, "auto" or "embedded", which needs no file.
        remote_file: the file of the dataset, with its URL and SHA-256.
        root: the folder of datasets; by default the variable DATA_ROOT.
    """
    try:
        if source_name in (remote_file.name, "auto"):
            find_local(remote_file, root)
    except DatasetNotFound:
        try:
            # the file extracted from the download; another SHA-256 is a DownloadError
            content = _verify_content(_download_bytes(remote_file), remote_file)
            # the file gets its name when it is complete
            with atomic_write(cache_folder() / remote_file.path) as file:
                file.write(content)
        except DownloadError as error:
            return str(error)
        except (OSError, HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
    except ValueError:  # a wrong file under DATA_ROOT: every rank raises the error in its setup
        pass
    return ""


def compute_checksum(path: Path, remote_file: RemoteFile) -> str:
    """Return the SHA-256 to compare with `remote_file.sha256`; NOT_GZIP if a gzip file is damaged.

    With `remote_file.is_gzipped` it is the SHA-256 of the decompressed content.
    """
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    if not remote_file.is_gzipped or (not is_gzipped and path.suffix != ".gz"):  # decompressed
        return compute_sha256(path)
    try:
        with gzip.open(path) as file:
            return hashlib.sha256(file.read(remote_file.size + 1)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return NOT_GZIP


@rank_zero_only
def log_once(line: str, is_warning: bool = False) -> None:
    """Print one line on rank 0, for example which data are used."""
    style = "bold yellow" if is_warning else None
    get_console().print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _verify_file(path: Path, remote_file: RemoteFile) -> Path:
    if (actual := compute_checksum(path, remote_file)) != remote_file.sha256:
        content = "the decompressed content" if remote_file.is_gzipped else "the file"
        reason = f"the SHA-256 of {content} is {actual}, not {remote_file.sha256}"
        argument = remote_file.custom_data_argument
        custom_path = path if argument == "path" else path.parent
        raise UsageError(
            f"{path} is not the dataset {remote_file.name!r}: "
            f"{reason if actual != NOT_GZIP else 'it is not a complete gzip file'}",
            ["the published file", f"your own data with {argument}='{custom_path}'"],
            "remove the file and run again",
            flag=f"--data.{argument}={custom_path}",
        )
    return path


def _make_https_opener() -> urllib.request.OpenerDirector:
    """Build a URL opener that accepts only https, also for redirects."""
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
    """Download the file of a dataset into memory, with a progress bar.

    Raises:
        DownloadError: far more bytes than the known size arrive, or fewer than the server states.
        OSError, HTTPException: the connection fails.
    """
    limit = 2 * remote_file.size  # a server that sends more sends another file
    received = bytearray()
    with (
        # an opener that accepts only https, also for redirects
        _make_https_opener().open(remote_file.url, timeout=TIMEOUT_S) as response,
        Progress(transient=True) as bar,
    ):
        length = int(response.headers.get("Content-Length") or 0)
        task = bar.add_task(f"downloading {remote_file.name}", total=length or None)
        while len(received) <= limit and (chunk := response.read(1 << 16)):
            received += chunk
            bar.update(task, completed=len(received))
    if len(received) > limit:
        raise DownloadError(f"more than {limit:,} bytes arrived; the file has {remote_file.size:,}")
    if len(received) < length:
        raise DownloadError(f"only {len(received):,} of {length:,} bytes arrived")
    return bytes(received)


def _verify_content(content: bytes, remote_file: RemoteFile) -> bytes:
    """Return the dataset's file from the downloaded bytes, after a check of its SHA-256.

    A member of a zip archive is extracted. A gzip file stays compressed, but the SHA-256 is that of
    its decompressed content.

    Args:
        content: the bytes as downloaded.
        remote_file: the expected file, with its SHA-256, size and compression.

    Raises:
        DownloadError: the archive is damaged, or the SHA-256 differs.
    """
    if remote_file.zip_member:
        try:
            with zipfile.ZipFile(io.BytesIO(content)).open(remote_file.zip_member) as member:
                # bounded, because a zip bomb may decompress to any size
                content = member.read(remote_file.size + 1)
        except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
            raise DownloadError(
                f"the download is not a zip archive with the file {remote_file.zip_member}: {error}"
            ) from error
    decompressed = content
    if remote_file.is_gzipped:
        try:
            # one byte more than expected is enough to see that the content is too long
            decompressed = gzip.GzipFile(fileobj=io.BytesIO(content)).read(remote_file.size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DownloadError(f"the download is not a gzip file: {error}") from error
    if hashlib.sha256(decompressed).hexdigest() != remote_file.sha256:
        raise DownloadError(f"the {len(content):,} bytes that arrived have another SHA-256")
    return content
