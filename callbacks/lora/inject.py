"""LoRA injection: add adapters to a module, disable them and merge them, without a trainer.

For example:

    inject_lora(net, targets=["query", "value"], rank=8)
    with lora_disabled(net): reference = net(x)      # the base model, without a second copy
    merge(net)                                       # plain layers with W + s B A
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ravine.errors import UsageError

from ..transforms.layer_mixins import check_not_sharded, check_plain_layer, remove_mixin
from ..transforms.layer_selection import (
    Patterns,
    as_list,
    closest_names,
    find_frozen_copies,
    find_partly_changed_copy,
    is_submodule_of,
    is_trainable,
    matches_pattern,
    select_names,
)
from .attention import AttentionAdapter, disable_fastpath, enable_fastpath
from .layers import Adapter, ConvAdapter, EmbeddingAdapter, LinearAdapter, add_adapter

MAX_LISTED = 4  # most layers in an error message
DEFAULT_RANK = 8  # default; lower in a layer whose smaller side is below 8

ADAPTER_TYPES: dict[type[nn.Module], type[Adapter]] = {
    nn.MultiheadAttention: AttentionAdapter,
    nn.Linear: LinearAdapter,
    nn.Conv2d: ConvAdapter,
    nn.Embedding: EmbeddingAdapter,
}


def find_adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the adaptable layers by name; the Linear in nn.MultiheadAttention is left out."""
    inner = {m.out_proj for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: layer
        for name, layer in module.named_modules()
        if name and isinstance(layer, tuple(ADAPTER_TYPES)) and layer not in inner
    }


def inject_lora(
    module: nn.Module,
    targets: Patterns,
    rank: int | None = None,
    alpha: float = 16.0,
    exclude: Patterns = (),
    ranks: Mapping[str, int] | None = None,
    num_blocks: Mapping[str, int] | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    train_also: Patterns = (),
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[str]:
    """Freeze the module, add adapters to the selected layers and return their names.

    If some selected layers are already frozen, the module is a frozen base with new layers. Its
    trainable parameters outside the adapted layers then stay trainable. All arguments are checked
    before the module is changed.

    Args:
        module: any module; it is changed.
        targets: globs of layer names, each of which must match.
        rank: None for DEFAULT_RANK, or the smaller side of a layer if that is less.
        alpha: the adapter's output is scaled by alpha / rank.
        exclude: layers of `targets` that get no adapter.
        ranks: ranks of some layers by pattern; the first match applies.
        num_blocks: number of maps stacked in one weight by pattern, such as {"qkv": 3}.
        dropout: dropout probability of the adapters' inputs.
        rank_stabilized: scale by alpha / √rank instead.
        train_also: layers or parameters that are trained without an adapter.
        dtype: dtype of the adapters' matmuls; None for that of the layer.
        seed: seed of A; each layer draws its own values from it.
    """
    check_not_sharded(module, "LoRA")  # raises for parameters that are DTensors
    check_alpha_and_dropout(alpha, dropout)
    layers = find_adaptable_layers(module)
    names = _select_layers(module, targets, exclude, layers)
    copies = find_frozen_copies(module)  # name of each frozen copy: name of the net it copies
    _check_copy_pairs(names, copies)
    trained_names = set(find_trained_params(module, names, copies))
    if train_also:
        trained_names |= set(_select_params(train_also, dict(module.named_parameters())))
    adapter_sizes = _choose_sizes(
        {name: layers[name] for name in names}, rank, ranks or {}, num_blocks or {}, dropout
    )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained_names)
    for name, (layer_rank, layer_blocks) in adapter_sizes.items():
        layer = layers[name]
        # the adapter class for the layer's type
        mixin = next(ADAPTER_TYPES[base] for base in ADAPTER_TYPES if isinstance(layer, base))
        add_adapter(
            layer,
            mixin,
            name,
            rank=layer_rank,
            scale=alpha / (math.sqrt(layer_rank) if rank_stabilized else layer_rank),
            num_blocks=layer_blocks,
            dropout=dropout,
            dtype=dtype,
            seed=seed,
        )
        cast(Adapter, layer).lora_is_copy = any(is_submodule_of(name, copy) for copy in copies)
    disable_fastpath(module)  # torch's fused attention would not call the adapted layers
    return names


def _choose_sizes(
    layers: Mapping[str, nn.Module],
    rank: int | None,
    ranks: Mapping[str, int],
    num_blocks: Mapping[str, int],
    dropout: float,
) -> dict[str, tuple[int, int]]:
    """Return rank and number of blocks of the adapter for each layer, by layer name.

    Args:
        layers: the selected layers by name.
        rank: rank of layers without an entry in `ranks`; None for the default.
        ranks: ranks by pattern of layer names; the first match applies.
        num_blocks: number of blocks by pattern; 1 without a match.
        dropout: checked, because some layers do not support it.

    Raises:
        UsageError: a pattern matches nothing, a layer cannot be adapted, or a rank is too large.
    """
    # called only because it raises for a pattern that matches nothing
    select_names(list(ranks), list(layers), "LoRA.ranks")
    select_names(list(num_blocks), list(layers), "LoRA.num_blocks")
    adapter_sizes, bad_ranks = {}, {}
    for name, layer in layers.items():
        layer_rank = next((r for glob, r in ranks.items() if matches_pattern(glob, name)), rank)
        layer_blocks = next((n for glob, n in num_blocks.items() if matches_pattern(glob, name)), 1)
        # None: the default rank, reduced below to the smaller side of the layer
        checked_rank = DEFAULT_RANK if layer_rank is None else layer_rank
        in_and_out = _check_layer(name, layer, checked_rank, layer_blocks, dropout)
        if layer_rank is None:
            layer_rank = min(DEFAULT_RANK, *in_and_out)
        elif not 1 <= layer_rank <= min(in_and_out):
            bad_ranks[name] = layer_rank, in_and_out
        adapter_sizes[name] = layer_rank, layer_blocks
    _check_ranks(bad_ranks)
    return adapter_sizes


def find_trained_params(
    module: nn.Module, names: Sequence[str], copies: Mapping[str, str]
) -> list[str]:
    """Return the trainable parameters outside the layers `names`, if one of these is frozen.

    They stay trainable, because the module is then a frozen base with new layers. If all layers
    are trainable, the result is empty. Frozen copies do not count as a frozen base.

    Args:
        module: the module before its injection.
        names: names of the layers that get an adapter.
        copies: name of each frozen copy (a teacher) and of the submodule that it copies.
    """
    has_frozen_base = any(
        not is_trainable(module.get_submodule(name))
        and not any(is_submodule_of(name, copy) for copy in copies)
        for name in names
    )
    return [
        name
        for name, parameter in module.named_parameters()
        if has_frozen_base
        and parameter.requires_grad
        and not any(is_submodule_of(name, layer) for layer in names)
    ]


def check_alpha_and_dropout(alpha: float, dropout: float) -> None:
    """Raise UsageError unless alpha is positive and finite, and dropout is in [0, 1)."""
    if not 0 < alpha < math.inf:
        raise UsageError(
            f"LoRA: alpha={alpha} is not a positive number",
            ["above 0"],
            hint="use alpha=16",
            flag="--trainer.callbacks.LoRA.alpha=16",
        )
    if not 0 <= dropout < 1:
        raise UsageError(
            f"LoRA: dropout={dropout} is outside [0, 1)",
            ["0 or more, below 1"],
            hint="use dropout=0.05",
            flag="--trainer.callbacks.LoRA.dropout=0.05",
        )


def _select_layers(
    module: nn.Module, targets: Patterns, exclude: Patterns, layers: dict[str, nn.Module]
) -> list[str]:
    """Return the names of layers that match `targets` and not `exclude`.

    Args:
        module: the module of the layers.
        targets: globs of layer names, each of which must match.
        exclude: globs of layer names, each of which must match a selected layer.
        layers: the layers of the module that can have an adapter, by name.

    Raises:
        UsageError: a pattern matches no adaptable layer, or no layer remains.
    """
    for pattern in as_list(targets):
        _check_target_is_adaptable(module, pattern, layers)
    names = select_names(targets, list(layers), "LoRA.targets")
    excluded = set(select_names(exclude, names, "LoRA.exclude"))
    if excluded.issuperset(names):
        raise UsageError(
            f"LoRA: exclude={as_list(exclude)} excludes all layers of targets"
            if names
            else "LoRA: targets selects no layer",
            list(layers)[:MAX_LISTED],
            hint="use fewer patterns in exclude" if names else "use targets=None for the defaults",
            flag="" if names else "--trainer.callbacks.LoRA.targets=null",
            label="layers",
        )
    return [name for name in names if name not in excluded]


def _check_target_is_adaptable(
    module: nn.Module, pattern: str, layers: dict[str, nn.Module]
) -> None:
    """Raise UsageError if a pattern matches only layers that cannot have an adapter.

    `layers` has those that can. A pattern that matches no layer at all is not refused here.
    """
    if any(matches_pattern(pattern, name) for name in layers):
        return
    for name, layer in module.named_modules():
        if not name or not matches_pattern(pattern, name):
            continue
        near = closest_names(name, list(layers))
        # torch's class of `out_proj` in nn.MultiheadAttention, which reads its weight directly
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            near = [name.rpartition(".")[0]]  # the attention layer that reads the weight
        types = ", ".join(layer_type.__name__ for layer_type in ADAPTER_TYPES)
        raise UsageError(
            f"LoRA: targets={pattern!r} matches {name}, a {type(layer).__name__}, which cannot "
            f"have an adapter (only {types})",
            near or ["none: the module has no such layer"],
            hint=f"use targets=[{near[0]!r}]"
            if near
            else "remove LoRA() from Trainer(callbacks=...)",
            flag=f"--trainer.callbacks.LoRA.targets={near[0]}" if near else "",
            label="nearest",
        )


def _select_params(patterns: Patterns, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters for `LoRA.train_also`, matched by their name or that of their layer.

    Raises:
        UsageError: a pattern matches nothing, or a parameter is quantized.
    """
    owners = {name: name.rpartition(".")[0] for name in parameters}  # name of the layer
    # raises for a pattern that matches nothing
    select_names(patterns, [*parameters, *owners.values()], "LoRA.train_also")
    names = []
    for name, owner in owners.items():
        if any(
            matches_pattern(pattern, name) or matches_pattern(pattern, owner)
            for pattern in as_list(patterns)
        ):
            if not parameters[name].is_floating_point():
                raise UsageError(
                    f"LoRA: train_also selects {owner}, which is quantized and cannot be trained",
                    hint=f"use Quantization(exclude=[{owner!r}])",
                )
            names.append(name)
    return names


def _check_copy_pairs(names: Sequence[str], copies: Mapping[str, str]) -> None:
    if (pair := find_partly_changed_copy(names, copies)) is not None:
        copy, original = pair
        raise UsageError(
            f"LoRA: {copy} is a frozen copy of {original}, and targets selects different layers in "
            "the two, so code that pairs their parameters (a momentum teacher) would fail",
            ["the same layers of both"],
            hint=f"use targets=['{original}.*', '{copy}.*']",
            flag=f"--trainer.callbacks.LoRA.targets=[{original}.*,{copy}.*]",
        )


def _check_ranks(bad_ranks: Mapping[str, tuple[int, tuple[int, int]]]) -> None:
    """Raise UsageError for explicit ranks that do not fit, with the names of these layers.

    Args:
        bad_ranks: by layer name, the rank, and input and output size of the layer's linear map.
    """
    if not bad_ranks:
        return
    listed = list(bad_ranks.items())[:MAX_LISTED]
    problems = [
        f"rank={rank} for {name} ({d_in} to {d_out})" for name, (rank, (d_in, d_out)) in listed
    ]
    valid_ranks = {name: min(max(rank, 1), *sizes) for name, (rank, sizes) in listed}
    flag_value = ", ".join(f"{name}: {rank}" for name, rank in valid_ranks.items())
    more = f" and {len(bad_ranks) - MAX_LISTED} more" if len(bad_ranks) > MAX_LISTED else ""
    raise UsageError(
        f"LoRA: a rank is not between 1 and the smaller side of its layer: {', '.join(problems)}"
        f"{more}",
        [f"1 to {min(sizes)} for {name}" for name, (_, sizes) in listed],
        hint=f"use ranks={valid_ranks}, or rank=None for {DEFAULT_RANK} or the smaller side",
        flag=f"--trainer.callbacks.LoRA.ranks='{{{flag_value}}}'",
    )


def _check_layer(
    name: str, layer: nn.Module, rank: int, num_blocks: int, dropout: float
) -> tuple[int, int]:
    """Check that a layer can have this adapter; return input and output size of its linear map.

    The sizes bound the rank. The map of a convolution acts on patches of one group; that of an
    embedding on one-hot rows; a Linear with several blocks counts the outputs of one.

    Raises:
        UsageError: layer, rank, number of blocks or dropout is not supported.
    """
    type_name = type(layer).__name__
    if isinstance(layer, Adapter):
        raise UsageError(
            f"LoRA: {name} already has an adapter",
            hint="use a new module, or call merge_lora first",
        )
    # the layer must compute like torch's class of its type, from a weight that it stores
    check_plain_layer(name, layer, next(k for k in ADAPTER_TYPES if isinstance(layer, k)), "LoRA")
    if num_blocks < 1 or type(rank) is not int:
        argument, value = ("num_blocks", num_blocks) if num_blocks < 1 else ("rank", rank)
        raise UsageError(
            f"LoRA: {argument}={value!r} is not valid for {name}",
            ["integers from 1"],
            hint=f"use {argument}=1",
        )
    if isinstance(layer, nn.MultiheadAttention):
        if not layer._qkv_same_embed_dim:  # torch then stores three weights instead of one
            raise UsageError(
                f"LoRA: {name} has keys or values of another width than its queries",
                ["attention with one width"],
                hint=f"use exclude=[{name!r}]",
                flag=f"--trainer.callbacks.LoRA.exclude={name}",
            )
        if dropout or num_blocks != 1:
            raise UsageError(
                f"LoRA: {name} is a {type_name}, whose adapter is added to its weights and already "
                f"splits q, k, v; dropout={dropout} and num_blocks={num_blocks} are not supported",
                ["dropout=0 and num_blocks=1"],
                hint="use dropout=0" if dropout else f"remove {name} from num_blocks",
                flag="--trainer.callbacks.LoRA.dropout=0" if dropout else "",
            )
        sizes = (layer.embed_dim, layer.embed_dim)
    elif isinstance(layer, nn.Conv2d):
        patch_size = layer.in_channels * math.prod(layer.kernel_size)
        sizes = (patch_size // layer.groups, layer.out_channels // layer.groups)
    elif isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            raise UsageError(
                f"LoRA: {name} rescales its rows (max_norm), so their change is not low-rank",
                ["an embedding without max_norm"],
                hint=f"use exclude=[{name!r}]",
                flag=f"--trainer.callbacks.LoRA.exclude={name}",
            )
        sizes = (layer.num_embeddings, layer.embedding_dim)
    else:
        linear = cast(nn.Linear, layer)
        sizes = (linear.in_features, linear.out_features // num_blocks)
        if linear.out_features % num_blocks:
            divisors = [n for n in range(1, 9) if linear.out_features % n == 0]
            raise UsageError(
                f"LoRA: num_blocks={num_blocks} does not divide the {linear.out_features} outputs "
                f"of {name}",
                [*divisors, "or another divisor"],
                hint=f"use num_blocks={{{name!r}: {divisors[-1]}}}",
            )
    if num_blocks != 1 and not isinstance(layer, nn.Linear):
        raise UsageError(
            f"LoRA: num_blocks={num_blocks} for {name}, a {type_name}, is not supported",
            ["Linear layers"],
            hint=f"remove {name} from num_blocks",
        )
    return sizes


def lora_layers(module: nn.Module) -> dict[str, Adapter]:
    """Return the adapted layers of a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Adapter)}


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the context: the module computes the base model.

    Parameters of `train_also` keep their trained values. Code that must not import callbacks calls
    `lora_disabled()` of the layers that have it.
    """
    with ExitStack() as stack:
        for layer in lora_layers(module).values():
            stack.enter_context(layer.lora_disabled())
        yield


@torch.no_grad()
def merge_lora(module: nn.Module) -> list[str]:
    """Add the adapter's change s B A to each weight, remove the adapters, return the layers' names.

    The sum is computed in float64. The layers get back their class and their state_dict keys. A
    weight tied to another layer is untied, because the weight of the other layer does not change. A
    quantized weight is dequantized.
    """
    check_not_sharded(module, "merge")
    num_owners: dict[int, int] = {}  # number of layers that have a parameter, by its id
    for submodule in module.modules():
        for parameter in submodule.parameters(recurse=False):
            num_owners[id(parameter)] = num_owners.get(id(parameter), 0) + 1
    layers = lora_layers(module)
    for layer in layers.values():
        # s B A by the name of the changed weight
        delta_weights = layer.lora_delta_weights()  # before its A and B are removed
        attributes = [name for name in layer.__dict__ if name.startswith("lora_")]
        for name in (*layer.lora_param_names, *attributes):
            delattr(layer, name)
        remove_mixin(layer)  # the layer gets back its own class
        dequantize = getattr(layer, "dequantize", None)
        if dequantize is not None:  # a layer of callbacks/quantization
            dequantize()
        for weight_name, delta in delta_weights.items():  # such as weight or out_proj.weight
            path, _, attribute = weight_name.rpartition(".")
            # `num_owners` tells whether the weight is tied, so that it must be copied first
            _add_delta(layer.get_submodule(path), attribute, delta, num_owners)
    enable_fastpath(module)  # torch's fused attention, which skips adapters
    return list(layers)


def _add_delta(owner: Any, name: str, delta: Tensor, num_owners: dict[int, int]) -> None:
    weight: nn.Parameter = getattr(owner, name)
    value = (weight.double() + delta).to(weight.dtype)
    if num_owners.get(id(weight), 1) > 1:  # tied to another layer, which keeps the old weight
        num_owners[id(weight)] -= 1
        setattr(owner, name, nn.Parameter(value, requires_grad=weight.requires_grad))
    else:
        weight.copy_(value)
