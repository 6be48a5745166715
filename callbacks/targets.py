"""Which layers a callback means: globs over dotted names, each of which must hit something.

query             every layer called so, at any depth      net.blocks.0.attention.query
blocks.*.mlp.*    a star stands for any text, dots too     net.blocks.1.mlp.down
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from .optimizers.rules import kinds

Patterns = str | Sequence[str]


def hits(pattern: str, name: str) -> bool:
    """Whether a pattern means a name: all of it, or its end after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def listed(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matching(patterns: Patterns, names: Sequence[str], whose: str) -> list[str]:
    """The names that at least one pattern hits, in their order; a pattern without any is an error.

    Args:
        patterns: globs.
        names: what there is.
        whose: the argument they come from, such as `LoRA.targets`.
    """
    for pattern in listed(patterns):
        if not any(hits(pattern, name) for name in names):
            near = ", ".join(nearest(pattern, names))
            raise ValueError(
                f"{whose}: {pattern!r} matches nothing; nearest: {near}; "
                f"type --trainer.callbacks.{whose.rpartition('.')[2]}=NAME"
            )
    return [name for name in names if any(hits(pattern, name) for pattern in listed(patterns))]


def nearest(pattern: str, names: Sequence[str], count: int = 4) -> list[str]:
    """Names like the pattern: compared with all of a name and with its ends."""

    def likeness(name: str) -> float:
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        return max(difflib.SequenceMatcher(None, pattern, end).ratio() for end in ends)

    best = sorted(names, key=likeness, reverse=True)[:count]
    return best or ["nothing: there is no such layer"]


def hidden_layers(module: nn.Module) -> list[str]:
    """The layers with hidden matrices or convolutions: no embedding, and not the head."""
    wanted = ("hidden_matrix", "convolution")
    owners = [name.rpartition(".")[0] for name, kind in kinds(module).items() if kind in wanted]
    frozen = [name for name, layer in module.named_modules() if hasattr(layer, "dequantize")]
    return list(dict.fromkeys(owners + frozen))
