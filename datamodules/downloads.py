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

NO_GZIP = "no gzip"
TIMEOUT = 10.0  # seconds of silence before a server is given up


class SourceMissing(MissingFileError):
    """A named set is nowhere; the text names the places looked at and the ways out."""


@dataclass(frozen=True)
class Source:
    """A file of public data, known by its checksum."""

    name: str
    path: str  # below DATA_ROOT, and below the cache folder
    sha256: str
    size: int  # bytes
    url: str
    member: str = ""  # the file's name, where the address gives a zip
    gzipped: bool = False  # checksum and size are of what is inside: mirrors wrap it differently
    own: str = "path=FILE"  # the flag that gives data of one's own
    embedded: str = "embedded"  # the source that needs no file
    also: tuple[str, ...] = ()  # other places below DATA_ROOT, where other programs keep it
    text: bool = False  # a text for language models
    title: str = ""  # what it is, in a list of texts


TABLE = (
    Source(
        name="shakespeare",
        path="shakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        size=1_115_394,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
        "input.txt",
        text=True,
        title="tiny Shakespeare, 1.1 MB of his plays",
    ),
    Source(
        name="sms",
        path="spam/SMSSpamCollection",
        sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        size=477_907,
        url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        member="SMSSpamCollection",
    ),
)
SOURCES = {source.name: source for source in TABLE}

# The texts that TextDataModule and PromptDataModule know by name. A new one is a row of TABLE with
# `text=True`, and its name here.
TextName = Literal["auto", "embedded", "shakespeare"]
TEXTS = {source.name: source for source in TABLE if source.text}


def choose(
    wanted: str, source: Source, root: str | None = None, tried: str = ""
) -> tuple[Path | None, str]:
    """The set's file, or None for the embedded default; and why the set could not be had.

    `wanted` is the set's name, or "auto" (embedded only if the set cannot be had), or "embedded".
    """
    if wanted not in (source.name, "auto", "embedded"):
        raise UsageError(
            f"source {wanted!r} is not one of {source.name}, auto, embedded; type "
            f"--data.source={source.name}, or --data.path=FILE for a file of your own"
        )
    if wanted == "embedded":
        return None, ""
    try:
        return locate(source, root, tried), ""
    except SourceMissing as error:
        if wanted == source.name:
            raise
        return None, str(error)


def text_source(wanted: TextName) -> Source:
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


def locate(source: Source, root: str | None = None, tried: str = "") -> Path:
    """Find a set on disk; `tried` is what `fetch` said, for the message if it is missing."""
    looked = []
    label, folder = ("--data.root", root) if root else ("DATA_ROOT", os.environ.get("DATA_ROOT"))
    if folder:
        for place in (source.path, *source.also):
            if (path := Path(folder).expanduser() / place).is_file():
                return _checked(path, source)
        looked.append(f"{Path(folder).expanduser() / source.path} ({label}: no such file)")
    else:
        looked.append("--data.root and DATA_ROOT (not set)")
    path = cache_folder() / source.path
    if path.is_file() and checksum(path, source) == source.sha256:
        return path
    looked.append(f"{path} (cache: {'damaged' if path.is_file() else 'no such file'})")
    looked.append(f"{source.url} ({tried or 'not tried: prepare_data() has not run'})")
    own = "a file" if source.own.endswith("FILE") else "images"
    raise SourceMissing(
        f"the data set {source.name!r} was not found; looked at: {'; '.join(looked)}; ways out: "
        f"run once with a network; or put the file at FOLDER/{source.path} and type "
        f"--data.root=FOLDER; or type --data.{source.own} for {own} of your own; "
        f"or --data.source={source.embedded}"
    )


def fetch(wanted: str, source: Source, root: str | None = None) -> str:
    """Download a set into the cache unless it is there already; in words why it failed, or ""."""
    try:
        if wanted in (source.name, "auto"):
            locate(source, root)
    except SourceMissing:
        try:
            content = _checked_content(_download(source), source)
            with whole(cache_folder() / source.path) as part:
                part.write_bytes(content)
        except (OSError, HTTPException, ValueError) as error:
            return f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
    except ValueError:  # a wrong file under DATA_ROOT: every rank will say so in its setup
        pass
    return ""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/ravine, by default ~/.cache/ravine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ravine"


def sha256(path: Path) -> str:
    """The checksum of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path, source: Source) -> str:
    """What the source's checksum is compared with; NO_GZIP where one should be."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if not source.gzipped or (not zipped and path.suffix != ".gz"):  # unzipped already
        return sha256(path)
    try:
        with gzip.open(path) as file:
            return hashlib.sha256(file.read(source.size + 1)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return NO_GZIP


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: what is written there replaces it, unless something fails.

    A file is so there whole or not at all, whenever the machine stops.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # two processes may race
    try:
        yield part
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)  # the new name itself
    finally:
        part.unlink(missing_ok=True)


def _flush(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@rank_zero_only
def announce(line: str, loud: bool = False) -> None:
    """Say once, on the first rank, which data are used."""
    style = "bold yellow" if loud else None
    get_console().print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _checked(path: Path, source: Source) -> Path:
    if (found := checksum(path, source)) != source.sha256:
        inside = " inside the gzip" if source.gzipped else ""
        own = source.own.replace("FILE", str(path)).replace("FOLDER", str(path.parent))
        why = f"its SHA-256{inside} is {found}, that of the set is {source.sha256}"
        raise UsageError(
            f"{path} is not the data set {source.name!r}: "
            f"{why if found != NO_GZIP else 'it is no whole gzip'}; if you changed the file, type "
            f"--data.{own}; if not, remove it and run again"
        )
    return path


def _opener() -> urllib.request.OpenerDirector:
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


def _download(source: Source) -> bytes:
    limit = 2 * source.size  # a server that sends more sends something else
    received = bytearray()
    with _opener().open(source.url, timeout=TIMEOUT) as response, Progress(transient=True) as bar:
        length = int(response.headers.get("Content-Length") or 0)
        task = bar.add_task(f"downloading {source.name}", total=length or None)
        while len(received) <= limit and (chunk := response.read(1 << 16)):
            received += chunk
            bar.update(task, completed=len(received))
    if len(received) > limit:
        raise UsageError(f"more than {limit:,} bytes arrived, the file has {source.size:,}")
    if len(received) < length:
        raise UsageError(f"only {len(received):,} of {length:,} bytes arrived")
    return bytes(received)


def _checked_content(content: bytes, source: Source) -> bytes:
    if source.member:
        try:
            with zipfile.ZipFile(io.BytesIO(content)).open(source.member) as member:
                content = member.read(source.size + 1)  # never more: a zip can unfold to anything
        except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
            raise UsageError(f"not a zip with the file {source.member}: {error}") from error
    inside = content
    if source.gzipped:
        try:
            inside = gzip.GzipFile(fileobj=io.BytesIO(content)).read(source.size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"not a gzip: {error}") from error
    if hashlib.sha256(inside).hexdigest() != source.sha256:
        raise UsageError(f"the {len(content):,} bytes that arrived do not have the SHA-256 known")
    return content
