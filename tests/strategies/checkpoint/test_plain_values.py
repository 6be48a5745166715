"""Hyperparameters in plain types: equal to the given ones, and readable with weights_only=True."""

import io
from collections import OrderedDict
from enum import Enum, IntEnum, StrEnum
from pathlib import Path

import numpy
import pytest
import torch

from ravine.strategies.checkpoint.plain_values import to_plain, with_plain_hyperparameters


class Color(str, Enum):  # noqa: UP042 (its text differs from that of a StrEnum)
    RED = "red"


class Shape(StrEnum):
    ROUND = "round"


class Size(IntEnum):
    LARGE = 3


class Name(str):
    def __str__(self) -> str:
        return "another text"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Color.RED, "red"),
        (Shape.ROUND, "round"),
        (Size.LARGE, 3),
        (Name("own text"), "own text"),
        (Path("data"), "data"),
        (numpy.float64(0.1), 0.1),
        (True, True),
        (OrderedDict(a=(Color.RED, [Size.LARGE])), {"a": ("red", [3])}),
        (frozenset({Color.RED}), {"red"}),
    ],
)
def test_a_value_becomes_an_equal_plain_one_that_a_safe_load_reads(value, plain) -> None:
    result = to_plain(value)
    assert result == plain
    assert type(result) is type(plain)
    file = io.BytesIO()
    torch.save(with_plain_hyperparameters({"hyper_parameters": {"value": value}}), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["hyper_parameters"]["value"]
    assert loaded == plain
    assert type(loaded) is type(plain)
