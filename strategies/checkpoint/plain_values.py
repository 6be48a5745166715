"""Convert hyperparameters to plain types, which `torch.load(weights_only=True)` can read.

Path("data")             -> "data"
numpy.float64(0.1)       -> 0.1
IntEnum, StrEnum         -> int, str
a subclass of dict, list -> dict, list
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy
from torch import Tensor

# keys of a Lightning checkpoint
HYPERPARAMETER_KEYS = ("hyper_parameters", "datamodule_hyper_parameters")


def to_plain(value: Any) -> Any:
    """Convert a value to plain types if no information is lost; return other objects unchanged."""
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, str):  # of a subclass
        # not str(value): the text of an enum's member is its value, and not "Color.RED"
        return str.__str__(value)
    for plain_type in (bool, int, float, bytes):
        if isinstance(value, plain_type):  # of a subclass, such as an IntEnum
            return plain_type.__new__(plain_type, value)  # type: ignore[call-overload]
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    for plain_type in (list, tuple, set, frozenset):
        if isinstance(value, plain_type):
            items = [to_plain(item) for item in value]
            if plain_type is list:
                return items
            # a frozenset becomes a set, because torch.load(weights_only=True) rejects it
            return tuple(items) if plain_type is tuple else set(items)
    return value


def with_plain_hyperparameters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a shallow copy of a checkpoint with its hyperparameters in plain types."""
    return checkpoint | {
        key: to_plain(checkpoint[key]) for key in HYPERPARAMETER_KEYS if key in checkpoint
    }
