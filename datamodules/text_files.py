"""Text files: list those of a folder, reject binary files by their magic bytes, decode UTF-8.

A file is read in chunks, so that a text may be longer than the memory.
"""

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ravine.errors import MissingFileError, UsageError, suggest_names

CHUNK_BYTES = 1 << 24  # bytes per read
SIGNATURES = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"RIFF": "a WebP image, a sound or a film",
    b"%PDF-": "a PDF; pdftotext writes its text",
    b"PK\x03\x04": "a zip archive (.zip, .docx, .xlsx, .npz, or of torch.save); unzip it",
    b"\x1f\x8b": "a gzip; gunzip it",
    b"BZh": "a bzip2; bunzip2 it",
    b"\xfd7zXZ": "an xz; unxz it",
    b"(\xb5/\xfd": "a zstd archive; unzstd it",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\x7fELF": "a program",
    b"SQLite format 3": "a SQLite database",
    b"\x93NUMPY": "an array of NumPy",
    b"PAR1": "a Parquet table",
    b"OggS": "a sound",
    b"ID3": "a sound",
}
NUM_HEADER_BYTES = 512  # bytes that are checked
BINARY_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".webp", ".pdf", ".zip", ".docx", ".xlsx",
    ".npz", ".npy", ".pt", ".pth", ".ckpt", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".doc", ".xls",
    ".so", ".o", ".sqlite", ".db", ".parquet", ".ogg", ".mp3", ".wav",
}  # fmt: skip


def identify_binary(header: bytes) -> str:
    """Describe the binary format that starts with these bytes; "" if the file may be text.

    The description also names the tool that converts such a file to text, where there is one.
    """
    description = next(
        (
            description
            for signature, description in SIGNATURES.items()
            if header.startswith(signature)
        ),
        "",
    )
    has_control_bytes = any(
        byte < 9 for byte in header[:NUM_HEADER_BYTES]
    )  # a text may begin with the letters RIFF, so control bytes are needed as well
    return (
        description
        if has_control_bytes or not header[:4].isascii() or header.startswith(b"%PDF-")
        else ""
    )


def check_not_binary(path: Path, header: bytes, flag: str) -> None:
    """Raise an error if a file is of a known binary format.

    Args:
        path: the file.
        header: its first bytes.
        flag: the flag that gave the path, e.g. --data.path.

    Raises:
        UsageError: the file has a known binary format.
    """
    if description := identify_binary(header):
        raise UsageError(
            f"{path} is no text: it is {description}; give files of text: type {flag}=FILE"
        )


def list_files(path: Path, flag: str = "--data.path") -> list[Path]:
    """Return the file itself, or all files below a folder that are not hidden, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        siblings = [p.name for p in path.parent.glob("[!.]*")] if path.parent.is_dir() else []
        closest = suggest_names(path.name, siblings) or sorted(siblings)[:3]
        neighbours_hint = (
            f"nearest there: {', '.join(closest)}" if closest else "its folder is missing, too"
        )
        raise MissingFileError(f"no file or folder {path}; {neighbours_hint}; type {flag}=FILE")
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if not file.is_file():
                continue
            # fail before the listing is complete: a wrong folder may hold millions of files
            if file.suffix.lower() in BINARY_SUFFIXES:
                with file.open("rb") as opened:
                    check_not_binary(file, opened.read(NUM_HEADER_BYTES), flag)
            files.append(file)
    if not files:
        raise MissingFileError(f"the folder {path} holds no files; type {flag}=FOLDER")
    return sorted(files)


def read_text(files: Iterable[Path], flag: str = "--data.path") -> Iterator[str]:
    """Yield the text of the files in chunks, with a line break between two files."""
    for number, file in enumerate(files):
        if number:
            yield "\n"
        yield from _read_file(file, flag)


def _read_file(path: Path, flag: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # skips a byte order mark
    offset = 0  # position of the first byte not yet decoded
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            if not offset:
                check_not_binary(path, chunk, flag)
            if b"\0" in chunk:
                raise UsageError(
                    f"{path} is no text: byte 0x00 at position {file.tell() - len(chunk)} or "
                    "after; if it is UTF-16, type "
                    f"iconv -f utf-16 -t utf-8 '{path}' > text.txt and {flag}=text.txt"
                )
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                    f"{offset + error.start}; if it is Latin-1, type "
                    f"iconv -f latin1 -t utf-8 '{path}' > text.txt and {flag}=text.txt"
                ) from None
            offset = file.tell() - len(decoder.getstate()[0])
            if not chunk:
                return


def read_text_file(path: Path, flag: str, encoding: str) -> str:
    """Read and decode one file; the error message gives the position of an invalid byte."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; one file is read: type {flag}=FILE")
    (file,) = list_files(path, flag)
    content = file.read_bytes()
    check_not_binary(path, content, flag)
    codec = codecs.lookup(encoding).name
    is_multibyte = codec.startswith(("utf-16", "utf-32"))
    if not is_multibyte and (offset := content.find(b"\0")) >= 0:
        raise UsageError(
            f"{path} is no text: byte 0x00 at position {offset}; if it is UTF-16, type "
            "--data.encoding=utf-16"
        )
    try:
        return content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except UnicodeDecodeError as error:
        name = "UTF-8" if codec == "utf-8" else codec
        byte = error.object[error.start : error.start + 1].hex()
        raise UsageError(
            f"{path} is not {name}: byte 0x{byte} at position {error.start}; if it is Latin-1, "
            "type --data.encoding=latin-1"
        ) from None
