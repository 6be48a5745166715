"""A fingerprint is the SHA-256 of texts and of the values of tensors."""

import hashlib

import torch

from ravine.strategies.checkpoint.fingerprint import compute_fingerprint


def test_a_fingerprint_is_the_sha256_of_the_bytes_in_order() -> None:
    parts = ("name", torch.tensor([1, 2], dtype=torch.int16), torch.tensor(3, dtype=torch.uint8))
    expected = hashlib.sha256(b"name" + b"\1\0\2\0" + b"\3").hexdigest()
    assert compute_fingerprint(parts) == expected


def test_a_fingerprint_depends_on_the_values_and_not_on_the_layout_in_memory() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    transposed = matrix.T.contiguous().T
    assert not transposed.is_contiguous()
    assert compute_fingerprint([transposed]) == compute_fingerprint([matrix])
    assert compute_fingerprint([matrix.bfloat16()]) != compute_fingerprint([matrix])
    assert compute_fingerprint([-0.0 * matrix]) != compute_fingerprint([0.0 * matrix])
