"""Pieces of a small tokenizer: 256 bytes, and words with all their beginnings."""

# ruff: noqa: RUF001

JOINED = [
    "he", "ll", " t", " the", "  ", "    ", "\n\n", "o\n", ".<", "|>", ">T", "e.", "’s", "'s",
    "ёз", "天地", "，日", "。 ", "’", "12", " 3",
]  # fmt: skip


def pieces() -> list[bytes]:
    """256 bytes, and words with all their beginnings, so that pairs can make them."""
    found = [bytes([n]) for n in range(256)]
    for word in JOINED:
        raw = word.encode()
        found += [raw[:n] for n in range(2, len(raw) + 1) if raw[:n] not in found]
    return found
