"""Layer selection by glob patterns over dotted module names; each pattern must match a layer.

query             every layer with this name, at any depth    net.blocks.0.attention.query
blocks.*.mlp.*    a star matches any text, including dots     net.blocks.1.mlp.down
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ravine.errors import UsageError, suggest_names

from ..optimizers.parameter_rules import classify_params

Patterns = str | Sequence[str]
LIST_KEYS = ("targets", "exclude", "train_also")  # arguments that are lists of patterns


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a pattern matches the full name, or the end of the name after a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def as_list(patterns: Patterns) -> list[str]:
    """Return one pattern or several patterns as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def select_names(patterns: Patterns, names: Sequence[str], argument: str) -> list[str]:
    """Return the names that match a pattern, in order; raise UsageError for an unused pattern.

    Args:
        patterns: globs.
        names: the existing names.
        argument: class and argument with the patterns, such as `LoRA.targets`, for the message.
    """
    for pattern in as_list(patterns):
        if not any(matches_pattern(pattern, name) for name in names):
            near = closest_names(pattern, names)  # the most similar names
            owner, _, key = argument.rpartition(".")  # LoRA, targets
            # LIST_KEYS: arguments whose value on the command line is a list of names
            raise UsageError(
                f"{argument}: {pattern!r} matches no layer",
                near,
                hint=f"use {near[0]!r} in {key}" if near else f"remove {key}",
                flag=f"--trainer.callbacks.{owner}.{key}={near[0]}"
                if near and key in LIST_KEYS
                else "",
                label="nearest",
            )
    return [
        name
        for name in names
        if any(matches_pattern(pattern, name) for pattern in as_list(patterns))
    ]


def closest_names(pattern: str, names: Sequence[str], count: int = 4) -> list[str]:
    """Return names similar to the pattern, compared with full names and with their ends."""
    return suggest_names(pattern, names, count, least=0, dotted=True)


def find_hidden_layers(module: nn.Module) -> list[str]:
    """Return the layers with hidden matrices or convolutions, without embeddings and head."""
    wanted = ("hidden_matrix", "convolution")
    owners = [
        name.rpartition(".")[0]
        for name, param_kind in classify_params(module).items()
        if param_kind in wanted
    ]
    frozen = [name for name, layer in module.named_modules() if hasattr(layer, "dequantize")]
    return list(dict.fromkeys(owners + frozen))


def is_trainable(module: nn.Module) -> bool:
    """Whether a parameter is trainable, or was so before its layer was quantized."""
    return any(
        getattr(submodule, "was_trainable", False)
        or any(p.requires_grad for p in submodule._parameters.values() if p is not None)
        for submodule in module.modules()
    )


def is_submodule_of(name: str, owner: str) -> bool:
    """Whether the layer `name` is the module `owner` or one of its submodules."""
    return name == owner or name.startswith(f"{owner}.")


def find_frozen_copies(module: nn.Module) -> dict[str, str]:
    """Return frozen submodules by name, with the trainable submodules that they are copies of.

    A copy, such as a momentum teacher or a reference, has equal names and shapes of parameters. It
    also has equal values or at least two layers. Code may pair the two by
    `zip(a.parameters(), b.parameters())`. Submodules of a copy are not listed.
    """
    # signature: names and shapes of all parameters; by it the trainable submodules are found
    frozen: dict[str, tuple[Any, nn.Module]] = {}
    trainable: dict[Any, list[tuple[str, nn.Module]]] = {}
    for name, submodule in module.named_modules():
        signature = tuple((n, _param_shape(p)) for n, p in submodule.named_parameters())
        if not name or not signature:  # the module itself, or no parameters
            continue
        if is_trainable(submodule):
            trainable.setdefault(signature, []).append((name, submodule))
        else:
            frozen[name] = signature, submodule
    copies: dict[str, str] = {}
    for name, (signature, submodule) in frozen.items():
        if any(is_submodule_of(name, copy_name) for copy_name in copies):
            continue
        # a single layer may have the shapes of another layer by chance, unlike several layers
        num_layers = sum(  # with parameters of their own
            any(p is not None for p in m._parameters.values()) for m in submodule.modules()
        )
        for original_name, original in trainable.get(signature, []):
            if num_layers > 1 or _has_equal_params(submodule, original):
                copies[name] = original_name
                break
    return copies


def find_partly_changed_copy(
    names: Sequence[str], copies: Mapping[str, str]
) -> tuple[str, str] | None:
    """Return a copy and its original in which `names` selects different layers, or None."""
    for copy, original in copies.items():
        pair = [
            {n[len(prefix) :] for n in names if is_submodule_of(n, prefix)}
            for prefix in (copy, original)
        ]
        if pair[0] != pair[1]:
            return copy, original
    return None


def _param_shape(parameter: nn.Parameter) -> tuple[int, ...] | None:
    return None if isinstance(parameter, UninitializedParameter) else tuple(parameter.shape)


def _has_equal_params(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(not a.is_meta and not b.is_meta and _equal_tensors(a, b) for a, b in pairs)


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, UninitializedParameter) or isinstance(b, UninitializedParameter):
        return False
    return a.dtype == b.dtype and torch.equal(a, b)
