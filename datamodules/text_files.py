"""Text files: list those of a folder, reject binary files by their magic bytes, decode UTF-8.

A file is read in chunks, so that a text may be longer than the memory.
"""

import codecs
import os
import shlex
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
    matches = (d for signature, d in SIGNATURES.items() if header.startswith(signature))
    description = next(matches, "")
    # A text may begin with the letters of a signature, such as RIFF, so other bytes are needed too.
    has_control_bytes = any(byte < 9 for byte in header[:NUM_HEADER_BYTES])
    is_binary = has_control_bytes or not header[:4].isascii() or header.startswith(b"%PDF-")
    return description if is_binary else ""


def check_not_binary(path: Path, header: bytes, argument: str) -> None:
    """Raise an error if a file is of a known binary format.

    Args:
        path: the file.
        header: its first bytes.
        argument: the datamodule's argument that gave the path, e.g. path.

    Raises:
        UsageError: the file has a known binary format.
    """
    # a description of the format; empty if the file may be text
    if description := identify_binary(header):
        raise UsageError(
            f"{path} is not a text: it is {description}",
            ["text files"],
            f"use {argument}='FILE' with a text file",
            flag=f"--data.{argument}=FILE",
        )


def list_files(path: Path, argument: str = "path") -> list[Path]:
    """Return the file itself, or all files below a folder that are not hidden, sorted.

    Args:
        path: the file or folder.
        argument: the datamodule's argument that gave the path, for errors.

    Raises:
        MissingFileError: the path does not exist, or the folder holds no files.
        UsageError: a file has a known binary format.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        siblings = [p.name for p in path.parent.glob("[!.]*")] if path.parent.is_dir() else []
        similar = suggest_names(path.name, siblings)
        # another file of the folder is shown, but is not what the user meant
        suggested = str(path.with_name(similar[0])) if similar else "FILE"
        closest = similar or sorted(siblings)[:3]
        raise MissingFileError(
            f"the file or folder {path} does not exist",
            closest if path.parent.is_dir() else ["a path in a folder that exists"],
            f"use {argument}={suggested!r}",
            flag=shlex.quote(f"--data.{argument}={suggested}"),
            label="nearest" if closest else "allowed",
        )
    files = []
    for folder, subfolders, names in os.walk(path):
        # in place: os.walk then skips the hidden folders
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            if not file.is_file():
                continue
            # fail before the listing is complete: a wrong folder may hold millions of files.
            # Only suffixes of known binary formats, because opening every file takes time
            if file.suffix.lower() in BINARY_SUFFIXES:
                with file.open("rb") as opened:
                    check_not_binary(file, opened.read(NUM_HEADER_BYTES), argument)
            files.append(file)
    if not files:
        raise MissingFileError(
            f"the folder {path} holds no files",
            ["a folder with files that are not hidden"],
            f"use {argument}='FOLDER'",
            flag=f"--data.{argument}=FOLDER",
        )
    return sorted(files)


def read_text(files: Iterable[Path], argument: str = "path") -> Iterator[str]:
    """Yield the text of the files in chunks, with a line break between two files."""
    for number, file in enumerate(files):
        if number:
            yield "\n"
        yield from _read_file(file, argument)


def _read_file(path: Path, argument: str) -> Iterator[str]:
    """Yield the UTF-8 text of a file in chunks.

    Args:
        path: the file.
        argument: the datamodule's argument that gave the path, for errors.

    Raises:
        UsageError: the file is binary, or a byte is 0 or no UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # skips a byte order mark
    offset = 0  # position of the first byte not yet decoded
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            if not offset:
                # raises an error if these bytes begin a known binary format
                check_not_binary(path, chunk, argument)
            if b"\0" in chunk:
                # `_iconv`: the command that converts the file
                raise UsageError(
                    f"{path} is not a text: byte 0x00 at position {file.tell() - len(chunk)} or "
                    "after",
                    ["UTF-8"],
                    f"if the file is UTF-16, convert it: {_iconv(path, 'utf-16')}; then use "
                    f"{argument}='text.txt'",
                    flag=_iconv(path, "utf-16"),
                )
            try:
                # at the end (an empty chunk) an incomplete character is an error
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                    f"{offset + error.start}",
                    ["UTF-8"],
                    f"if the file is Latin-1, convert it: {_iconv(path, 'latin1')}; then use "
                    f"{argument}='text.txt'",
                    flag=_iconv(path, "latin1"),
                ) from None
            undecoded, _ = decoder.getstate()  # the start of a character at the end of the chunk
            offset = file.tell() - len(undecoded)
            if not chunk:
                return


def _iconv(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t utf-8 '{path}' > text.txt"


def read_text_file(path: Path, argument: str, encoding: str) -> str:
    """Read and decode one file.

    Args:
        path: the file.
        argument: the datamodule's argument that gave the path, for errors.
        encoding: an encoding of Python; a byte order mark of UTF-8 is skipped.

    Raises:
        UsageError: the path is a folder, or the file is binary or of another encoding; the message
            gives the position of the invalid byte.
    """
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder",
            ["one file"],
            f"use {argument}='FILE'",
            flag=f"--data.{argument}=FILE",
        )
    # one file, or the error for a missing one
    (file,) = list_files(path, argument)
    content = file.read_bytes()
    # raises an error if these bytes begin a known binary format
    check_not_binary(path, content, argument)
    codec = codecs.lookup(encoding).name
    is_multibyte = codec.startswith(("utf-16", "utf-32"))
    # in UTF-16 and UTF-32 a zero byte is a part of most characters
    if not is_multibyte and (offset := content.find(b"\0")) >= 0:
        raise UsageError(
            f"{path} is not a text: byte 0x00 at position {offset}",
            [f"text in the encoding {encoding}"],
            "use encoding='utf-16' if the file is UTF-16",
            flag="--data.encoding=utf-16",
        )
    try:
        return content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except UnicodeDecodeError as error:
        name = "UTF-8" if codec == "utf-8" else codec
        byte = error.object[error.start : error.start + 1].hex()
        raise UsageError(
            f"{path} is not {name}: byte 0x{byte} at position {error.start}",
            [f"text in the encoding {encoding}"],
            "use encoding='latin-1' if the file is Latin-1",
            flag="--data.encoding=latin-1",
        ) from None
