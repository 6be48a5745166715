"""Pieces of a small tokenizer: 256 bytes, and words with all their prefixes."""

# ruff: noqa: RUF001

from typing import Any

from ravine.datamodules import FileTokenizer

JOINED = [
    "he", "ll", " t", " the", "  ", "    ", "\n\n", "o\n", ".<", "|>", ">T", "e.", "’s", "'s",
    "ёз", "天地", "，日", "。 ", "’", "12", " 3",
]  # fmt: skip
END = "<|endoftext|>"
ALPHABET = [
    *"ab1'. ,\n\t-_<|>²½", "\x1c", "\x85", "\xa0", "\u3000", "’", "“", "。", "，", "天", "ё",
    "́", "😀", "'s", "the ", "  ", END, "<|end", "oftext|>", "\r\n", "٣", "ª", "〇", "〆",
]  # fmt: skip


def pieces() -> list[bytes]:
    """256 bytes, and words with all their beginnings, so that pairs can make them."""
    found = [bytes([n]) for n in range(256)]
    for word in JOINED:
        raw = word.encode()
        found += [raw[:n] for n in range(2, len(raw) + 1) if raw[:n] not in found]
    return found


def merges() -> list[tuple[bytes, bytes]]:
    """The pairs that make the words, in order."""
    return [(piece[:-1], piece[-1:]) for piece in pieces()[256:]]


def from_merges(**how: Any) -> FileTokenizer:
    """The tokenizer of these pieces, and one special token."""
    return FileTokenizer.from_merges(dict(enumerate(pieces())), merges(), [END], **how)
