"""What a file is, by its first bytes: what is known to be no text is refused under its name."""

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
HEAD = 512  # bytes that decide
SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".webp", ".pdf", ".zip", ".docx", ".xlsx",
    ".npz", ".npy", ".pt", ".pth", ".ckpt", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".doc", ".xls",
    ".so", ".o", ".sqlite", ".db", ".parquet", ".ogg", ".mp3", ".wav",
}  # fmt: skip


def kind_of(head: bytes) -> str:
    """What a file with these first bytes is, with what makes a text of it; "" if it may be text."""
    kind = next((kind for start, kind in SIGNATURES.items() if head.startswith(start)), "")
    controls = any(byte < 9 for byte in head[:HEAD])  # a text may begin with the letters RIFF
    return kind if controls or not head[:4].isascii() or head.startswith(b"%PDF-") else ""


def refuse_binary(path: Path, head: bytes, flag: str) -> None:
    """Refuse a file that is no text.

    Args:
        path: the file.
        head: its first bytes.
        flag: that gave it, e.g. --data.path.

    Raises:
        ValueError: the file is of a kind that is known.
    """
    if kind := kind_of(head):
        raise UsageError(f"{path} is no text: it is {kind}; give files of text: type {flag}=FILE")
