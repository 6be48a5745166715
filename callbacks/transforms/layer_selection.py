"""Which layers a callback means: globs over dotted names, each of which must hit something.

query             every layer called so, at any depth      net.blocks.0.attention.query
blocks.*.mlp.*    a star stands for any text, dots too     net.blocks.1.mlp.down
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ravine.errors import UsageError, suggest_names

from ..optimizers.rules import kinds

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
            raise UsageError(
                f"{whose}: {pattern!r} matches nothing; nearest: {near}; "
                f"type --trainer.callbacks.{whose.rpartition('.')[2]}=NAME"
            )
    return [name for name in names if any(hits(pattern, name) for pattern in listed(patterns))]


def nearest(pattern: str, names: Sequence[str], count: int = 4) -> list[str]:
    """Names like the pattern: compared with all of a name and with its ends."""
    near = suggest_names(pattern, names, count, least=0, dotted=True)
    return near or ["nothing: there is no such layer"]


def hidden_layers(module: nn.Module) -> list[str]:
    """The layers with hidden matrices or convolutions: no embedding, and not the head."""
    wanted = ("hidden_matrix", "convolution")
    owners = [name.rpartition(".")[0] for name, kind in kinds(module).items() if kind in wanted]
    frozen = [name for name, layer in module.named_modules() if hasattr(layer, "dequantize")]
    return list(dict.fromkeys(owners + frozen))


def trains(module: nn.Module) -> bool:
    """Whether a parameter trains, or did before its layer was quantized."""
    return any(
        getattr(part, "trained", False)
        or any(p.requires_grad for p in part._parameters.values() if p is not None)
        for part in module.modules()
    )


def within(name: str, owner: str) -> bool:
    """Whether the layer `name` is the module `owner` or a part of it."""
    return name == owner or name.startswith(f"{owner}.")


def frozen_copies(module: nn.Module) -> dict[str, str]:
    """Submodules that do not train, by name, and the trainable ones that they are copies of.

    A momentum teacher or a reference: the same names and shapes of parameters, and the same values
    or at least two layers. Code may pair the two by `zip(a.parameters(), b.parameters())`.
    """
    frozen: dict[str, tuple[Any, nn.Module]] = {}
    learning: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, part in module.named_modules():
        form = tuple((n, _shape(p)) for n, p in part.named_parameters())
        if not name or not form:
            continue
        if trains(part):
            learning.setdefault(form, []).append((name, part))
        else:
            frozen[name] = form, part
    found: dict[str, str] = {}
    for name, (form, part) in frozen.items():
        if any(within(name, each) for each in found):
            continue
        layers = sum(
            1 for m in part.modules() if any(p is not None for p in m._parameters.values())
        )
        for other, original in learning.get(form, []):
            if layers > 1 or _equal(part, original):
                found[name] = other
                break
    return found


def half_changed(names: Sequence[str], copies: Mapping[str, str]) -> tuple[str, str] | None:
    """A copy and its original of which `names` hit different layers, if there is such a pair."""
    for copy, original in copies.items():
        pair = [{n[len(one) :] for n in names if within(n, one)} for one in (copy, original)]
        if pair[0] != pair[1]:
            return copy, original
    return None


def _shape(parameter: nn.Parameter) -> tuple[int, ...] | None:
    return None if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(not a.is_meta and not b.is_meta and _same(a, b) for a, b in pairs)


def _same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, UninitializedParameter) or isinstance(b, UninitializedParameter):
        return False
    return a.dtype == b.dtype and torch.equal(a, b)
