"""Tensor parallelism: a net says how its matrices split, this file does it to any net.

    y = down(act(up(x)))     up split by rows of its weight ("colwise", each rank makes a part of
                             the hidden channels), down by columns ("rowwise"), one all-reduce

The net has a method `tp_plan() -> {glob of module names: style}`. Everything outside the plan stays
whole on every rank and sees the same numbers there.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,  # split the outputs
    "rowwise": RowwiseParallel,  # split the inputs, sum the outputs over ranks
}
SPLIT_AXIS = {"colwise": 0, "rowwise": 1}  # of a weight (out in)


def split_matrices(module: nn.Module, mesh: DeviceMesh) -> None:
    """Apply the plan of every net inside `module` over the one-dimensional `mesh`."""
    nets = [net for net in module.modules() if callable(getattr(net, "tp_plan", None))]
    if not nets:
        raise ValueError(
            f"tp={mesh.size()}: {type(module).__name__} has no tensor-parallel plan: give its net"
            " a method tp_plan() that returns, for example,"
            " {'blocks.*.mlp.up': 'colwise', 'blocks.*.mlp.down': 'rowwise'}; or type"
            " --trainer.strategy zero3, which needs none"
        )
    for net in nets:
        styles = _resolve(net, net.tp_plan())  # pyright: ignore[reportCallIssue]
        for name, style in styles.items():
            _check_split(net, name, style, mesh.size())
        parallelize_module(net, mesh, {name: STYLES[style]() for name, style in styles.items()})


def _resolve(net: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Globs to module names; a star stands for one part of a dotted name."""
    names = {name for name, _ in net.named_modules() if name}
    styles: dict[str, str] = {}
    for glob, style in plan.items():
        if style not in STYLES:
            raise ValueError(
                f"{type(net).__name__}.tp_plan: unknown style {style!r} of {glob!r}; allowed:"
                f" {', '.join(STYLES)}"
            )
        hits = [name for name in names if _matches(name, glob)]
        if not hits and not _left_out(net, names, glob):
            raise ValueError(
                f"{type(net).__name__}.tp_plan: {glob!r} matches no module; its modules are"
                f" {', '.join(sorted(names)[:12])}, ..."
            )
        styles.update(dict.fromkeys(hits, style))
    return styles


def _matches(name: str, glob: str) -> bool:
    parts, globs = name.split("."), glob.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _left_out(net: nn.Module, names: set[str], glob: str) -> bool:
    """Whether the glob names a part this net does without: an attribute that is None."""
    parent, _, leaf = glob.rpartition(".")
    owners = [net.get_submodule(name) for name in names if _matches(name, parent)]
    return any(getattr(owner, leaf, "missing") is None for owner in owners)


def _check_split(net: nn.Module, name: str, style: str, ranks: int) -> None:
    """Refuse what does not divide; where a parent says `head_width`, whole heads must."""
    weight = getattr(net.get_submodule(name), "weight", None)
    if weight is None or weight.ndim != 2:
        raise ValueError(
            f"{type(net).__name__}.tp_plan: {name!r} is a"
            f" {type(net.get_submodule(name)).__name__}; only matrices split"
        )
    head_width = getattr(net.get_submodule(name.rpartition(".")[0]), "head_width", None)
    parts = weight.shape[SPLIT_AXIS[style]] // (head_width or 1)
    if parts % ranks:
        allowed = [n for n in range(1, parts + 1) if parts % n == 0]
        nearest = min(allowed, key=lambda n: abs(n - ranks))
        raise ValueError(
            f"tp={ranks} does not divide the {parts} {'heads' if head_width else 'channels'} of"
            f" {name}; allowed: {', '.join(map(str, allowed[:8]))}; type"
            f" --trainer.strategy.tp={nearest}"
        )
