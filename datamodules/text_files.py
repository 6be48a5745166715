"""File type detection by magic bytes: reject a binary file that is given in place of a text."""

from pathlib import Path

from ravine.errors import UsageError

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
