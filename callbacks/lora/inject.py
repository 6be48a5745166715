"""Put adapters into a module, switch them off, merge them: plain functions, no trainer.

adapt_module(net, targets=["query", "value"], rank=8)
with lora_disabled(net): reference = net(x)      # the model before fine-tuning, and no second copy
merge(net)                                       # plain layers again, W + s B A
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ravine.errors import UsageError

from ..transforms.layer_mixins import refuse_sharded, refuse_unlike, swap_back
from ..transforms.layer_selection import (
    Patterns,
    frozen_copies,
    half_changed,
    hits,
    listed,
    matching,
    nearest,
    trains,
    within,
)
from .attention import AttentionAdapter, leave_fast_path, take_fast_path
from .layers import Adapter, ConvAdapter, EmbeddingAdapter, LinearAdapter, adapt

SHOWN = 4  # layers in a message
RANK = 8  # where none is given: less in a layer that is thinner

KINDS: dict[type[nn.Module], type[Adapter]] = {
    nn.MultiheadAttention: AttentionAdapter,
    nn.Linear: LinearAdapter,
    nn.Conv2d: ConvAdapter,
    nn.Embedding: EmbeddingAdapter,
}


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have an adapter, by name; those inside torch's attention are its own."""
    inner = {m.out_proj for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: layer
        for name, layer in module.named_modules()
        if name and isinstance(layer, tuple(KINDS)) and layer not in inner
    }


def adapt_module(
    module: nn.Module,
    targets: Patterns,
    rank: int | None = None,
    alpha: float = 16.0,
    exclude: Patterns = (),
    ranks: Mapping[str, int] | None = None,
    split: Mapping[str, int] | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    train_also: Patterns = (),
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[str]:
    """Freeze the module, adapt the layers that match, and return their names; see `LoRA`.

    A module of which some adapted layers are frozen already is a frozen base with new parts: what
    trains in it and takes no adapter trains as before.
    """
    refuse_sharded(module, "LoRA")
    check_numbers(alpha, dropout)
    layers, ranks, split = adaptable(module), ranks or {}, split or {}
    names = _chosen(module, targets, exclude, layers)
    copies = frozen_copies(module)
    _refuse_half(names, copies)
    also = set(_owned(train_also, dict(module.named_parameters()))) if train_also else set()
    also |= set(fresh_parts(module, names, copies))
    for patterns, whose in ((list(ranks), "LoRA.ranks"), (list(split), "LoRA.split")):
        matching(patterns, names, whose)
    plan, thin = {}, {}
    for name in names:  # all is checked before anything changes
        own = next((r for pattern, r in ranks.items() if hits(pattern, name)), rank)
        parts = next((p for pattern, p in split.items() if hits(pattern, name)), 1)
        sizes = _refuse(name, layers[name], RANK if own is None else own, parts, dropout)
        if own is not None and not 1 <= own <= min(sizes):
            thin[name] = own, sizes
        plan[name] = min(RANK, *sizes) if own is None else own, parts
    _refuse_thin(thin)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in also)
    for name, (own, parts) in plan.items():
        scale = alpha / (math.sqrt(own) if rank_stabilized else own)
        mixin = next(KINDS[kind] for kind in KINDS if isinstance(layers[name], kind))
        adapt(layers[name], mixin, name, own, scale, parts, dropout, dtype, seed)
        cast(Adapter, layers[name]).lora_is_copy = any(within(name, copy) for copy in copies)
    leave_fast_path(module)
    return names


def fresh_parts(module: nn.Module, names: Sequence[str], copies: Mapping[str, str]) -> list[str]:
    """Trainable parameters outside the adapted layers `names`, if those belong to a frozen base."""
    based = any(
        not trains(module.get_submodule(name)) and not any(within(name, copy) for copy in copies)
        for name in names
    )
    return [
        name
        for name, parameter in module.named_parameters()
        if based and parameter.requires_grad and not any(within(name, layer) for layer in names)
    ]


def check_numbers(alpha: float, dropout: float) -> None:
    """Refuse a scale or a dropout at which adapters would have no say."""
    if not 0 < alpha < math.inf:
        raise UsageError(f"LoRA: alpha={alpha} is no scale; allowed: above 0; set e.g. 16")
    if not 0 <= dropout < 1:
        raise UsageError(f"LoRA: dropout={dropout} is outside [0, 1); set e.g. 0.05")


def _chosen(
    module: nn.Module, targets: Patterns, exclude: Patterns, layers: dict[str, nn.Module]
) -> list[str]:
    for pattern in listed(targets):
        for name, layer in module.named_modules():
            if not name or not hits(pattern, name) or any(hits(pattern, each) for each in layers):
                continue
            kind, kinds = type(layer).__name__, ", ".join(k.__name__ for k in KINDS)
            near = nearest(name, list(layers))
            if isinstance(layer, NonDynamicallyQuantizableLinear):
                near = [name.rpartition(".")[0]]  # the attention that reads its weight
            there = f"; nearest: {', '.join(near)}; type --trainer.callbacks.targets={near[0]}"
            raise UsageError(
                f"LoRA.targets: {pattern!r} hits {name}, a {kind}, which takes no adapter by "
                f"itself; allowed: {kinds}{there if layers else ', of which there is none here'}"
            )
    names = matching(targets, list(layers), "LoRA.targets")
    out = set(matching(exclude, names, "LoRA.exclude"))
    if out.issuperset(names):
        less = "exclude leaves no layer of targets; type a narrower exclude"
        raise UsageError(f"LoRA: {less if names else 'targets is empty; name the layers to adapt'}")
    return [name for name in names if name not in out]


def _owned(patterns: Patterns, parameters: Mapping[str, Tensor]) -> list[str]:
    """Parameters by their own name or that of their layer."""
    owners = {name: name.rpartition(".")[0] for name in parameters}
    matching(patterns, [*parameters, *owners.values()], "LoRA.train_also")
    found = []
    for name, owner in owners.items():
        if any(hits(pattern, name) or hits(pattern, owner) for pattern in listed(patterns)):
            if not parameters[name].is_floating_point():
                raise UsageError(
                    f"LoRA.train_also: {owner} is quantized, and bits do not train; give "
                    f"Quantization exclude: [{owner}]"
                )
            found.append(name)
    return found


def _refuse_half(names: Sequence[str], copies: Mapping[str, str]) -> None:
    if (pair := half_changed(names, copies)) is not None:
        copy, original = pair
        raise UsageError(
            f"LoRA: {copy} is a frozen copy of {original}, and other layers of it would be adapted;"
            " code that pairs their parameters (a momentum teacher) would pair wrong ones; name "
            f"the layers of both: type --trainer.callbacks.targets=[{original}.*,{copy}.*]"
        )


def _refuse_thin(thin: Mapping[str, tuple[int, tuple[int, int]]]) -> None:
    """Refuse ranks that were typed and do not fit, naming the layers and no others."""
    if not thin:
        return
    said = [
        f"rank {rank} for {name}, a map from {sizes[0]} to {sizes[1]}; allowed: 1 to {min(sizes)}"
        for name, (rank, sizes) in thin.items()
    ]
    fits = {name: min(max(rank, 1), *sizes) for name, (rank, sizes) in thin.items()}
    typed = ", ".join(f"{name}: {rank}" for name, rank in list(fits.items())[:SHOWN])
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    raise UsageError(
        f"LoRA: {'; '.join(said[:SHOWN])}{more}; type --trainer.callbacks.ranks='{{{typed}}}', or "
        "leave rank out: 8, and less where a layer is thinner"
    )


def _refuse(name: str, layer: nn.Module, rank: int, parts: int, dropout: float) -> tuple[int, int]:
    """Raise if the layer can have no adapter; else the sizes of the map that it is."""
    kind = type(layer).__name__
    if isinstance(layer, Adapter):
        raise UsageError(f"LoRA: {name} has an adapter already; make a new module")
    refuse_unlike(name, layer, next(k for k in KINDS if isinstance(layer, k)), "LoRA")
    if parts < 1 or type(rank) is not int:
        wrong, key = ("split", parts) if parts < 1 else ("rank", rank)
        raise UsageError(f"LoRA: {wrong}={key!r} for {name}; allowed: whole numbers from 1")
    if isinstance(layer, nn.MultiheadAttention):
        if not layer._qkv_same_embed_dim:
            raise UsageError(
                f"LoRA: {name} has keys or values of another width than its queries; allowed: "
                "attention of one width; type --trainer.callbacks.exclude=" + name
            )
        if dropout or parts != 1:
            raise UsageError(
                f"LoRA: {name} is a {kind}, whose adapter is added to its weights: no dropout "
                "before it, and its q, k, v are split anyway; type --trainer.callbacks.dropout=0"
            )
        sizes = (layer.embed_dim, layer.embed_dim)
    elif isinstance(layer, nn.Conv2d):
        inner = layer.in_channels * math.prod(layer.kernel_size)
        sizes = (inner // layer.groups, layer.out_channels // layer.groups)
    elif isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise UsageError(
                f"LoRA: {name} rescales its rows (max_norm), so a change of them is not low-rank; "
                f"type --trainer.callbacks.exclude={name}"
            )
        sizes = (layer.num_embeddings, layer.embedding_dim)
    else:
        linear = cast(nn.Linear, layer)
        sizes = (linear.in_features, linear.out_features // parts)
        if linear.out_features % parts:
            raise UsageError(
                f"LoRA.split: {parts} parts do not divide the {linear.out_features} outputs of "
                f"{name}; type a divisor"
            )
    if parts != 1 and not isinstance(layer, nn.Linear):
        raise UsageError(f"LoRA.split: {name} is a {kind}; only a Linear holds several maps")
    return sizes


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """The adapted layers of a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Adapter)}


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Within it the module computes as before fine-tuning, if `train_also` was not used.

    Code that must not import callbacks sets `lora_enabled` on the layers that have it.
    """
    layers = list(adapters(module).values())
    before = [layer.lora_enabled for layer in layers]
    for layer in layers:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.lora_enabled = enabled


@torch.no_grad()
def merge(module: nn.Module) -> list[str]:
    """Add every adapter to its weight, in float64, and take it away; returns the layers' names.

    Class and keys are as before. A weight that another layer shares is untied: the other did not
    change. A quantized weight becomes a plain one.
    """
    refuse_sharded(module, "merge")
    owners: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = adapters(module)
    for layer in found.values():
        changes = layer.lora_changes()
        for name in layer.lora_names:
            delattr(layer, name)
        for name in [name for name in layer.__dict__ if name.startswith("lora_")]:
            delattr(layer, name)
        swap_back(layer)
        plain = getattr(layer, "dequantize", None)
        if plain is not None:  # callbacks/quantization
            plain()
        for name, change in changes.items():
            path, _, leaf = name.rpartition(".")
            _add(layer.get_submodule(path), leaf, change, owners)
    take_fast_path(module)
    return list(found)


def _add(owner: Any, name: str, change: Tensor, owners: dict[int, int]) -> None:
    weight: nn.Parameter = getattr(owner, name)
    value = (weight.double() + change).to(weight.dtype)
    if owners.get(id(weight), 1) > 1:
        owners[id(weight)] -= 1
        setattr(owner, name, nn.Parameter(value, requires_grad=weight.requires_grad))
    else:
        weight.copy_(value)
