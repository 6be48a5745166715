"""Tensor parallelism and sequence parallelism: split matrices by the plan of a net.

    y = down(act(up(x)))     up is split by rows of its weight ("colwise": each rank computes some
                             hidden channels), down by columns ("rowwise"), with one all-reduce

The net has a method `tensor_parallel_plan() -> {glob of module names: style}`. Modules outside the
plan are replicated, and compute the same values on every rank. With `sequence_parallel` the
residual stream between the split parts is sharded along time, so ranks do not repeat norms and
activations:

    scatter | norm  gather [up .. down] reduce-scatter  + | ... | gather, norm, head

The traffic is the same: an all-reduce is a reduce-scatter and an all-gather. Sequence parallelism
is used in training only, so generation and evaluation work with any length.
"""

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ravine.errors import UsageError

SPLIT_AXIS = {"colwise": 0, "rowwise": 1}  # of a weight (out in)
PLAN_STYLES = {
    "colwise": "split the outputs over ranks",
    "rowwise": "split the inputs over ranks, and sum the outputs",
    "shared": "replicate the input (b t d) of its split matrices, and sum its gradients once",
    "scatter": "with sequence_parallel, split the output (b t d) along t over ranks",
    "sequence": "with sequence_parallel, the input is split along t, so gradients are partial sums",
    "gather": "with sequence_parallel, gather the input (b t d) along t",
}
ALONG_TIME = Shard(1)


def apply_tensor_parallel(
    module: nn.Module, mesh: DeviceMesh, sequence_parallel: bool = False
) -> list[nn.Module]:
    """Split the matrices of every net inside `module` over ranks, by the plan of the net.

    Args:
        module: the LightningModule; a net is a submodule with `tensor_parallel_plan()`.
        mesh: the tp ranks (one axis).
        sequence_parallel: whether activations between split matrices are sharded along t.

    Returns:
        the modules whose gradients are partial sums, to be reduced over the mesh.

    Raises:
        UsageError: there is no plan, it splits no matrix, or sizes are not divisible.
    """
    nets = [net for net in module.modules() if callable(getattr(net, "tensor_parallel_plan", None))]
    if not nets:
        raise UsageError(
            f"tp={mesh.size()}: {type(module).__name__} has no tensor-parallel plan",
            ["a net whose tensor_parallel_plan() returns, say, {'mlp.up': 'colwise'}"],
            "use a strategy that needs no plan, such as zero3",
            flag="--trainer.strategy=zero3",
        )
    plans = [(net, net.tensor_parallel_plan()) for net in nets]  # pyright: ignore[reportCallIssue]
    # a plan has globs of names; the result has the name of each matching module
    styles_by_name = [_resolve_plan(net, plan) for net, plan in plans]  # of each net
    # SPLIT_AXIS: the styles that split a matrix, colwise and rowwise
    if not any(style in SPLIT_AXIS for styles in styles_by_name for style in styles.values()):
        raise UsageError(
            f"tp={mesh.size()}: {type(nets[0]).__name__}.tensor_parallel_plan splits no matrix of "
            "this net",
            ["plans with a module of style 'colwise' or 'rowwise'"],
            "use a strategy that needs no plan, such as zero3",
            flag="--trainer.strategy=zero3",
        )
    partial_sum_modules = []
    for (net, plan), styles in zip(plans, styles_by_name, strict=True):
        if sequence_parallel and not {"scatter", "gather"} <= set(plan.values()):
            raise UsageError(
                f"sequence_parallel: {type(net).__name__}.tensor_parallel_plan does not mark "
                "where the sequence"
                " is split and gathered",
                ["plans with a module of style 'scatter' and a later one of style 'gather'"],
                "use sequence_parallel=False",
                flag="--trainer.strategy=tp",
            )
        for name, style in styles.items():
            _parallelize_submodule(net, name, style, mesh, sequence_parallel)
            # "sequence": a replicated module, such as a norm, that gets the tokens of its rank only
            if sequence_parallel and style == "sequence":
                partial_sum_modules.append(net.get_submodule(name))
    return partial_sum_modules


class ParameterSplit(NamedTuple):
    """How a parameter is split: its axis, and into how many pieces at most (heads, channels)."""

    axis: int
    num_pieces: int


def find_splits(module: nn.Module) -> tuple[dict[str, ParameterSplit], bool]:
    """Return how each parameter can be split, by the plans of the nets in a module.

    Returns:
        The splits by name of the parameter, without parameters that stay whole; and whether the
        plans also mark where sequences are split. Without a plan: no splits, and false.
    """
    splits: dict[str, ParameterSplit] = {}
    marks: set[str] = set()
    known = {name for name, _ in module.named_parameters()}
    for net_name, net in module.named_modules():
        if not callable(getattr(net, "tensor_parallel_plan", None)):
            continue
        plan = net.tensor_parallel_plan()  # pyright: ignore[reportCallIssue]
        marks |= set(plan.values())
        for name, style in _resolve_plan(net, plan).items():
            prefix = f"{net_name}.{name}" if net_name else name
            if style not in SPLIT_AXIS or f"{prefix}.weight" not in known:
                continue
            num_pieces = _num_pieces(net, name, style)
            splits[f"{prefix}.weight"] = ParameterSplit(SPLIT_AXIS[style], num_pieces)
            # the bias of "rowwise" is added once, after the sum
            if style == "colwise" and f"{prefix}.bias" in known:
                splits[f"{prefix}.bias"] = ParameterSplit(0, num_pieces)
    return splits, {"scatter", "gather"} <= marks


def _num_pieces(net: nn.Module, name: str, style: str) -> int:
    """Return into how many pieces the weight of a module can be split: heads, or channels."""
    weight: Any = net.get_submodule(name).weight
    head_width = getattr(net.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    # SPLIT_AXIS: 0 for colwise and 1 for rowwise, of a weight (out in)
    return weight.shape[SPLIT_AXIS[style]] // (head_width or 1)


def _parallelize_submodule(
    net: nn.Module, name: str, style: str, mesh: DeviceMesh, sequence_parallel: bool
) -> None:
    """Split a module of a net over ranks, or hook its input or output, as its style requires.

    Args:
        net: the net.
        name: name of the module in the net.
        style: a key of PLAN_STYLES: "colwise" and "rowwise" split the matrix; "shared" replicates
            the input of several split matrices; "scatter", "sequence" and "gather" mark where the
            sequence is split, is in parts, and is full again.
        mesh: the tp ranks.
        sequence_parallel: whether activations between split matrices are sharded along t.
    """
    module = net.get_submodule(name)
    if style in SPLIT_AXIS:
        _check_divisible(net, name, style, mesh.size())
        # the output of "rowwise" is left a partial sum, which sum_output sums
        rowwise_style = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
        parallelize_module(module, mesh, ColwiseParallel() if style == "colwise" else rowwise_style)

    def is_sequence_sharded(x: Tensor) -> bool:
        """Whether activations (b t d) are sharded along t in this call of the module."""
        is_sharded = sequence_parallel and torch.is_grad_enabled() and module.training
        if is_sharded and style == "scatter" and x.shape[1] % mesh.size():
            length = x.shape[1] // mesh.size() * mesh.size() or mesh.size()
            raise UsageError(
                f"sequence_parallel: tp={mesh.size()} does not divide the {x.shape[1]} tokens of "
                "a sequence",
                [f"multiples of {mesh.size()}"],
                f"use sequences of {length} tokens",
                flag=f"--data.context_length={length}",
            )
        return is_sharded

    def redistribute(x: Tensor, current: Placement, new: Placement) -> DTensor:
        """Return x as a DTensor of placement `new`; `x` is the local part by `current`."""
        return DTensor.from_local(x, mesh, [current], run_check=False).redistribute(
            placements=[new]
        )

    # ALONG_TIME: sharded along t, the axis 1. The split matrices read one DTensor, whose backward
    # sums their gradients once.
    def replicate_input(x: Tensor) -> Tensor:
        current = ALONG_TIME if is_sequence_sharded(x) else Replicate()
        return redistribute(x, current, Replicate())

    def gather_input(x: Tensor) -> Tensor:
        return redistribute(x, ALONG_TIME, Replicate()).to_local() if is_sequence_sharded(x) else x

    def scatter_output(x: Tensor) -> Tensor:
        return redistribute(x, Replicate(), ALONG_TIME).to_local() if is_sequence_sharded(x) else x

    def sum_output(x: Any) -> Tensor:  # by a reduce-scatter along t, or an all-reduce
        new = ALONG_TIME if is_sequence_sharded(x) else Replicate()
        return x.redistribute(placements=[new]).to_local()

    # "colwise" and "sequence" need no hook
    change_input = {"shared": replicate_input, "gather": gather_input}.get(style)
    change_output = {"scatter": scatter_output, "rowwise": sum_output}.get(style)
    if change_input is not None:
        module.register_forward_pre_hook(lambda _, inputs: (change_input(inputs[0]), *inputs[1:]))
    if change_output is not None:
        module.register_forward_hook(lambda _, inputs, output: change_output(output))


def _resolve_plan(net: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Return the style of each module that a plan names; a later glob wins.

    Args:
        net: the net.
        plan: styles by glob; `*` matches within one part of a dotted name.

    Raises:
        UsageError: a style does not exist, or a glob matches no module.
    """
    # module order: all ranks must communicate in the same order
    names = [name for name, _ in net.named_modules() if name]
    styles: dict[str, str] = {}
    for glob, style in plan.items():
        if style not in PLAN_STYLES:
            raise UsageError(
                f"{type(net).__name__}.tensor_parallel_plan: the style {style!r} of {glob!r} does "
                "not exist",
                PLAN_STYLES,
                "correct the style in tensor_parallel_plan",
            )
        matching_names = [name for name in names if _matches_glob(name, glob)]
        # _is_absent: the glob names an optional submodule that is None in this net
        if not matching_names and not _is_absent(net, names, glob):
            raise UsageError(
                f"{type(net).__name__}.tensor_parallel_plan: {glob!r} matches no module",
                [*sorted(names)[:12], "..."],
                "correct the name in tensor_parallel_plan",
                label="modules",
            )
        styles.update(dict.fromkeys(matching_names, style))
    return styles


def _matches_glob(name: str, glob: str) -> bool:
    name_parts, globs = name.split("."), glob.split(".")
    return len(name_parts) == len(globs) and all(map(fnmatchcase, name_parts, globs))


def _is_absent(net: nn.Module, names: list[str], glob: str) -> bool:
    """Whether the glob names an optional submodule that is None in this net."""
    parent, _, leaf = glob.rpartition(".")
    owners = [net.get_submodule(name) for name in names if _matches_glob(name, parent)]
    owners = owners if parent else [net]
    return any(getattr(owner, leaf, "missing") is None for owner in owners)


def _check_divisible(net: nn.Module, name: str, style: str, num_ranks: int) -> None:
    """Raise UsageError if the weight of a module cannot be split over ranks.

    If the parent module has `head_dim`, each rank must get whole heads.

    Args:
        net: the net.
        name: name of the module in the net.
        style: "colwise" or "rowwise".
        num_ranks: number of tp ranks.
    """
    module = net.get_submodule(name)
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        raise UsageError(
            f"{type(net).__name__}.tensor_parallel_plan: {name!r} is a {type(module).__name__}, "
            "which has no matrix to split",
            ["modules with a matrix `weight`"],
            f"remove {name!r} from tensor_parallel_plan",
        )
    if "weight" not in module._parameters:  # the weight is quantized: stored as blocks of codes
        raise UsageError(
            f"tp={num_ranks}: the weight of {name} is quantized, and blocks of codes cannot be "
            "split",
            ["strategies that shard quantized weights, such as zero3"],
            'use Trainer(strategy="zero3")',
            flag="--trainer.strategy=zero3",
        )
    head_width = getattr(net.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    num_pieces = _num_pieces(net, name, style)
    if num_pieces % num_ranks:
        allowed = [n for n in range(1, num_pieces + 1) if num_pieces % n == 0]
        nearest = min(allowed, key=lambda n: abs(n - num_ranks))
        raise UsageError(
            f"tp={num_ranks} does not divide the {num_pieces} "
            f"{'heads' if head_width else 'channels'} of {name}",
            allowed[:8],
            f"use MeshStrategy(tp={nearest})",
            flag=f"--trainer.strategy.tp={nearest}",
        )
    for leaf, parameter in module.named_parameters(recurse=False):  # the bias, adapters
        if style == "colwise" and parameter.ndim and parameter.shape[0] % num_ranks:
            raise UsageError(
                f"tp={num_ranks} does not divide the {parameter.shape[0]} rows of {name}.{leaf}",
                [f"multiples of {num_ranks}"],
                f"use a multiple of {num_ranks}, for an adapter LoRA(rank={num_ranks})",
            )
