"""The mesh: every process has a place on a few named axes, and each axis has one meaning.

    pp            different layers                                       pipeline.py
    dp_replicate  different data, a whole copy of what the axes below share
    dp_shard      different data, a part of each parameter               parallelize.py
    cp            different tokens of the same sequences                 context.py
    tp            the same tokens, a part of each matrix                 tensor.py

Their product is the number of processes. `ep` is no axis of its own: the ranks of `dp_shard`, in
groups of `ep`, hold different experts (expert.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ravine.errors import UsageError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # far ranks first: tp wants the fastest links
DP, TP = "data_parallel", "tensor_parallel"  # Lightning's names, known to modules of others


def resolve(given: dict[str, int], world: int) -> dict[str, int]:
    """The size of each axis with -1 filled in, or an error that says what would fit.

    resolve({"dp_shard": -1, "tp": 2}, world=8)  # dp_shard 4
    """
    axes = {axis: given.get(axis, 1) for axis in AXES}
    ep = given.get("ep", 1)
    shown = {k: v for k, v in given.items() if v != 1 or k == "dp_shard"}
    asked = f"MeshStrategy({', '.join(f'{axis}={size}' for axis, size in shown.items())})"
    free = [axis for axis, size in axes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in (*axes.values(), ep)):
        raise UsageError(
            f"{asked}: a degree is 1 or more, and one may be -1 (what the others leave); type"
            " --trainer.strategy.dp_shard=-1 --trainer.strategy.tp=1"
        )
    product = 1
    for axis, size in axes.items():
        product *= 1 if axis in free else size
    if free and world % product == 0:
        axes[free[0]] = world // product
    elif product != world:
        raise UsageError(
            f"{asked} needs {'a multiple of ' if free else ''}{product} processes; there are"
            f" {world} (devices x nodes); type --trainer.devices={product}"
        )
    ep = axes["dp_shard"] if ep == -1 else ep
    if axes["dp_shard"] % ep:
        fitting = [n for n in range(1, axes["dp_shard"] + 1) if axes["dp_shard"] % n == 0]
        raise UsageError(
            f"{asked}: ep={ep} does not divide the {axes['dp_shard']} ranks of dp_shard; allowed:"
            f" {', '.join(map(str, fitting))}; type --trainer.strategy.ep={fitting[-1]}"
        )
    return {**axes, "ep": ep}


def check_choices(
    zero: int,
    schedule: str,
    schedules: list[str],
    microbatches: int,
    smallest_unit: int | None = None,
    gather_once: bool = False,
) -> None:
    """Refuse what no run could mean, when the strategy is made."""
    flag = "type --trainer.strategy"
    if zero not in (1, 2, 3):
        raise UsageError(f"zero is {zero}; allowed: 1, 2, 3; {flag}.zero=3")
    if schedule not in schedules:
        allowed = ", ".join(schedules)
        raise UsageError(f"schedule is {schedule!r}; allowed: {allowed}; {flag}.schedule=1f1b")
    if microbatches < 1:
        raise UsageError(
            f"microbatches is {microbatches}; allowed: 1 or more; {flag}.microbatches=4"
        )
    whole = isinstance(smallest_unit, int) and not isinstance(smallest_unit, bool)
    if smallest_unit is not None and not (whole and smallest_unit >= 0):
        raise UsageError(
            f"smallest_unit is {smallest_unit!r}; allowed: a number of bytes, 0 or more;"
            f" {flag}.smallest_unit=1048576"
        )
    if zero == 1 and (gather_once or smallest_unit is not None):
        name = "gather_once" if gather_once else "smallest_unit"
        raise UsageError(
            f"{name} has no effect with zero=1, where every rank has whole parameters; allowed"
            f" with zero=2 and 3; {flag}.zero=2, or leave {name} out"
        )


def check_module(module: Any, degrees: dict[str, int], sequence_parallel: bool) -> None:
    """Refuse axes along which a module says, by `whole_along`, or shows that it cannot be cut."""
    if sequence_parallel and not module.automatic_optimization:
        raise UsageError(
            f"{type(module).__name__} steps its own optimizers (manual optimization), which"
            " sequence_parallel cannot follow; type --trainer.strategy tp"
        )
    for axis in getattr(module, "whole_along", ()):
        if degrees[axis] > 1:
            raise UsageError(
                f"{axis}={degrees[axis]}: {type(module).__name__} cannot be cut along {axis};"
                " allowed: zero1, zero2, zero3, hsdp, tp, ddp; type --trainer.strategy zero3"
            )


def check_together(
    degrees: dict[str, int], sequence_parallel: bool, schedule: str, microbatches: int
) -> None:
    """Refuse what does not go together, before a process starts; the rest are torch's rules."""
    ranks = degrees["pp"]
    if sequence_parallel and degrees["tp"] == 1:
        raise UsageError(
            "sequence_parallel cuts along tp, and tp is 1; type --trainer.strategy.tp=2"
        )
    if sequence_parallel and ranks > 1:
        raise UsageError(
            "sequence_parallel does not go together with a pipeline yet; type"
            " --trainer.strategy.sequence_parallel=false"
        )
    rounds = max(1, microbatches // ranks)
    too_few = schedule == "1f1b" and microbatches < ranks
    if too_few or (schedule == "interleaved" and microbatches % rounds):
        allowed = f"{ranks} or more" if too_few else f"multiples of {ranks}"
        raise UsageError(
            f"microbatches={microbatches} for a pipeline of {ranks} ranks ({schedule}); allowed:"
            f" {allowed}; type --trainer.strategy.microbatches={ranks * rounds}"
        )


@dataclass
class Layout:
    """The meshes that the parts of a strategy need, all views of one."""

    degrees: dict[str, int]
    named: DeviceMesh  # (pp, data_parallel, cp, tensor_parallel), those that there are
    data: DeviceMesh  # ranks with different tokens: what gradients and losses are averaged over
    shard: DeviceMesh  # for fully_shard: one axis, or (replicas, shards)
    tp: DeviceMesh
    experts: DeviceMesh | None = None  # ranks that keep different experts
    replicas: DeviceMesh | None = None  # ranks that keep the same ones

    @property
    def batch(self) -> DeviceMesh:
        """Ranks with different samples."""
        return self.named[DP]

    @property
    def in_parts(self) -> bool:
        """Whether a net runs in parts: stages, or blocks that are gathered one by one."""
        return self.degrees["pp"] > 1 or self.data.size() > 1


def lay_out(degrees: dict[str, int], zero: int, device: torch.device) -> Layout:
    """Make the mesh, and a second view of it where replicas, shards and `cp` do not coincide."""
    pp, copies, shards, cp, tp = (degrees[axis] for axis in AXES)
    world = init_device_mesh(
        device.type, (pp * copies * shards * cp * tp,), mesh_dim_names=("all",)
    )
    samples = {"pp": pp, DP: copies * shards, "cp": cp, TP: tp}
    named = _view(world, {k: n for k, n in samples.items() if n > 1 or k in (DP, TP)})
    mixed: list[DeviceMesh] = []
    if (ep := degrees["ep"]) > 1:
        parts = _view(world, {"pp": pp, "same": copies * shards // ep, "ep": ep, "cp": cp, TP: tp})
        mixed = [parts["ep"], parts["same", "cp"]._flatten("replicas")]
    if zero > 1 and copies * cp == 1:
        return Layout(degrees, named, named[DP], named[DP], named[TP], *mixed)
    # with ZeRO-1 every rank has whole parameters (zero1.py): the axis of shards has one rank
    copies, shards = (copies * shards * cp, 1) if zero == 1 else (copies, shards * cp)
    parts = _view(world, {"pp": pp, "copies": copies, "shards": shards, TP: tp})
    both = parts["copies", "shards"]
    shard = both if copies > 1 else parts["shards"]
    return Layout(degrees, named, both._flatten("data"), shard, parts[TP], *mixed)


def _view(world: DeviceMesh, sizes: dict[str, int]) -> DeviceMesh:
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes))
