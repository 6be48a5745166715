"""Fingerprint of tensors: the SHA-256 of texts and of the values of tensors, in order."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def compute_fingerprint(content: Iterable[str | Tensor]) -> str:
    """Return the SHA-256 of texts (UTF-8) and of the bytes of tensors of any shape, in hex.

    Equal values of another dtype or shape may have equal bytes, so a caller adds these as a text:

        compute_fingerprint(item for name in weights for item in (name, weights[name]))
    """
    digest = hashlib.sha256()
    for item in content:
        if isinstance(item, str):
            digest.update(item.encode())
        else:
            values = item.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
