"""Build the device mesh: the named axes of all processes and their sizes.

    pp            different layers                                       pipeline_parallel.py
    dp_replicate  different data, a replica of the groups below          parallel_module.py
    dp_shard      different data, a shard of each parameter              parallel_module.py
    cp            different tokens of the same sequences                 context_parallel.py
    tp            the same tokens, a shard of each matrix                tensor_parallel.py

The product of the sizes is the number of processes. `ep` is not an additional axis: the ranks of
`dp_shard`, in groups of `ep`, hold different experts (expert_parallel.py).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ravine.errors import UsageError

# from distant to adjacent ranks: tp needs the fastest links
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DP_AXIS, TP_AXIS = "data_parallel", "tensor_parallel"  # Lightning's names; user modules use them


def resolve_degrees(degrees: dict[str, int], world_size: int) -> dict[str, int]:
    """Return the size of each axis, with -1 resolved.

        resolve_degrees({"dp_shard": -1, "tp": 2}, world_size=8)  # dp_shard 4

    Args:
        degrees: sizes by axis, and `ep`, which divides dp_shard; -1: all remaining ranks.
        world_size: number of processes.

    Raises:
        UsageError: the sizes do not fit the number of processes; the error gives sizes that do.
    """
    # MESH_AXES: pp, dp_replicate, dp_shard, cp, tp; ep is a part of dp_shard
    axes = {axis: degrees.get(axis, 1) for axis in MESH_AXES}
    ep = degrees.get("ep", 1)
    # for the errors: the call as a user would write it
    non_default = {k: v for k, v in degrees.items() if v != 1 or k == "dp_shard"}
    call_text = f"MeshStrategy({', '.join(f'{axis}={size}' for axis, size in non_default.items())})"
    free_axes = [axis for axis, size in axes.items() if size == -1]
    if len(free_axes) > 1 or any(size < 1 and size != -1 for size in (*axes.values(), ep)):
        raise UsageError(
            f"{call_text}: a degree is less than 1, or more than one degree is -1",
            ["1 or more, and -1 for one degree: the remaining ranks"],
            "use MeshStrategy(dp_shard=-1, tp=1)",
            flag="--trainer.strategy.dp_shard=-1 --trainer.strategy.tp=1",
        )
    product = math.prod(size for axis, size in axes.items() if axis not in free_axes)
    if free_axes and world_size % product == 0:
        axes[free_axes[0]] = world_size // product
    elif product != world_size:
        raise UsageError(
            f"{call_text} needs {'a multiple of ' if free_axes else ''}{product} processes, and "
            f"there are {world_size} (devices x nodes)",
            hint=f"use Trainer(devices={product})",
            flag=f"--trainer.devices={product}",
        )
    ep = axes["dp_shard"] if ep == -1 else ep
    if axes["dp_shard"] % ep:
        divisors = [n for n in range(1, axes["dp_shard"] + 1) if axes["dp_shard"] % n == 0]
        raise UsageError(
            f"{call_text}: ep={ep} does not divide the {axes['dp_shard']} ranks of dp_shard",
            divisors,
            f"use MeshStrategy(ep={divisors[-1]})",
            flag=f"--trainer.strategy.ep={divisors[-1]}",
        )
    return {**axes, "ep": ep}


def validate_strategy_args(
    zero_stage: int,
    pipeline_schedule: str,
    allowed_schedules: list[str],
    num_microbatches: int,
    min_unit_bytes: int | None = None,
    gather_once: bool = False,
) -> None:
    """Raise UsageError for an invalid argument of MeshStrategy, when it is created.

    The arguments are those of MeshStrategy; `allowed_schedules` are the valid values of
    `pipeline_schedule`.
    """
    if zero_stage not in (1, 2, 3):
        raise UsageError(
            f"zero_stage is {zero_stage}",
            [1, 2, 3],
            "use zero_stage=3",
            flag="--trainer.strategy.zero_stage=3",
        )
    if pipeline_schedule not in allowed_schedules:
        raise UsageError(
            f"pipeline_schedule is {pipeline_schedule!r}",
            allowed_schedules,
            'use pipeline_schedule="1f1b"',
            flag="--trainer.strategy.pipeline_schedule=1f1b",
        )
    if num_microbatches < 1:
        raise UsageError(
            f"num_microbatches is {num_microbatches}",
            ["1 or more"],
            "use num_microbatches=4",
            flag="--trainer.strategy.num_microbatches=4",
        )
    is_int = isinstance(min_unit_bytes, int) and not isinstance(min_unit_bytes, bool)
    if min_unit_bytes is not None and not (is_int and min_unit_bytes >= 0):
        raise UsageError(
            f"min_unit_bytes is {min_unit_bytes!r}",
            ["a number of bytes, 0 or more"],
            "use min_unit_bytes=2**20",
            flag="--trainer.strategy.min_unit_bytes=1048576",
        )
    if zero_stage == 1 and (gather_once or min_unit_bytes is not None):
        name = "gather_once" if gather_once else "min_unit_bytes"
        raise UsageError(
            f"{name} has no effect with zero_stage=1, where every rank has full parameters",
            ["zero_stage=2 or 3"],
            f"use zero_stage=2, or remove {name}",
            flag="--trainer.strategy.zero_stage=2",
        )


def validate_module(module: Any, degrees: dict[str, int], sequence_parallel: bool) -> None:
    """Raise UsageError if a module does not support an argument of MeshStrategy.

    Args:
        module: the LightningModule; its attribute `unsupported_parallelism` names axes.
        degrees: the size of each axis.
        sequence_parallel: whether activations are split along the sequence.
    """
    if sequence_parallel and not module.automatic_optimization:
        raise UsageError(
            f"{type(module).__name__} steps its own optimizers (manual optimization), which "
            "sequence_parallel does not support",
            ["automatic optimization"],
            'use Trainer(strategy="tp")',
            flag="--trainer.strategy=tp",
        )
    # e.g. ("cp", "pp"): set by modules whose step cannot run with these axes
    for axis in getattr(module, "unsupported_parallelism", ()):
        if degrees[axis] > 1:
            raise UsageError(
                f"{axis}={degrees[axis]}: {type(module).__name__} does not support {axis}",
                ["zero1", "zero2", "zero3", "hsdp", "tp", "ddp"],
                'use Trainer(strategy="zero3")',
                flag="--trainer.strategy=zero3",
            )


def validate_combination(
    degrees: dict[str, int], sequence_parallel: bool, pipeline_schedule: str, num_microbatches: int
) -> None:
    """Raise UsageError for invalid combinations of arguments, before a process starts.

    The arguments are those of MeshStrategy, with the size of each axis resolved. The rules for
    micro-batches are those of torch's pipeline schedules.
    """
    num_stage_ranks = degrees["pp"]
    if sequence_parallel and degrees["tp"] == 1:
        raise UsageError(
            "sequence_parallel=True splits activations over the ranks of tp, and tp is 1",
            ["tp of 2 or more"],
            "use MeshStrategy(tp=2)",
            flag="--trainer.strategy.tp=2",
        )
    if sequence_parallel and num_stage_ranks > 1:
        raise UsageError(
            f"sequence_parallel=True is not supported with a pipeline (pp={num_stage_ranks})",
            [False],
            "use sequence_parallel=False",
            flag="--trainer.strategy.sequence_parallel=false",
        )
    # the interleaved schedule runs micro-batches in equal rounds of at least one for each rank
    num_rounds = max(1, num_microbatches // num_stage_ranks)
    # torch's 1f1b needs at least one micro-batch for each rank
    too_few = pipeline_schedule == "1f1b" and num_microbatches < num_stage_ranks
    if too_few or (pipeline_schedule == "interleaved" and num_microbatches % num_rounds):
        allowed = f"{num_stage_ranks} or more" if too_few else f"multiples of {num_stage_ranks}"
        raise UsageError(
            f"num_microbatches={num_microbatches} does not fit a pipeline of {num_stage_ranks} "
            f"ranks ({pipeline_schedule})",
            [allowed],
            f"use num_microbatches={num_stage_ranks * num_rounds}",
            flag=f"--trainer.strategy.num_microbatches={num_stage_ranks * num_rounds}",
        )


@dataclass
class MeshLayout:
    """The device meshes of a MeshStrategy, all of them submeshes of one world mesh."""

    degrees: dict[str, int]
    lightning_mesh: DeviceMesh  # (pp, data_parallel, cp, tensor_parallel); pp, cp if size > 1
    data_mesh: DeviceMesh  # ranks with different tokens: gradients and losses are averaged over it
    fsdp_mesh: DeviceMesh  # for fully_shard: one axis, or (replicas, shards)
    tp_mesh: DeviceMesh
    expert_mesh: DeviceMesh | None = None  # ranks that keep different experts
    expert_replica_mesh: DeviceMesh | None = None  # ranks that keep the same experts

    @property
    def batch_mesh(self) -> DeviceMesh:
        """Return the mesh of the ranks with different samples."""
        return self.lightning_mesh[DP_AXIS]

    @property
    def runs_in_pieces(self) -> bool:
        """Whether a net runs as pipeline stages, or as FSDP units that are gathered in turn."""
        return self.degrees["pp"] > 1 or self.data_mesh.size() > 1


def build_mesh(degrees: dict[str, int], zero_stage: int, device: torch.device) -> MeshLayout:
    """Build the meshes of all axes; every process calls it.

    The meshes for data and FSDP differ from Lightning's with HSDP, cp or ZeRO-1.

    Args:
        degrees: the size of each axis; their product is the number of processes.
        zero_stage: 1, 2 or 3; with 1 parameters are not sharded.
        device: its type determines the backend.
    """
    # MESH_AXES: pp, dp_replicate, dp_shard, cp, tp
    pp, num_replicas, num_shards, cp, tp = (degrees[axis] for axis in MESH_AXES)
    world_mesh = init_device_mesh(
        device.type, (pp * num_replicas * num_shards * cp * tp,), mesh_dim_names=("all",)
    )
    # Lightning requires the axes DP_AXIS and TP_AXIS, even of size 1
    lightning_sizes = {"pp": pp, DP_AXIS: num_replicas * num_shards, "cp": cp, TP_AXIS: tp}
    # _submesh: the same processes, arranged by these axes; the last axis varies fastest
    lightning_mesh = _submesh(
        world_mesh, {k: n for k, n in lightning_sizes.items() if n > 1 or k in (DP_AXIS, TP_AXIS)}
    )
    expert_mesh = expert_replica_mesh = None
    if (ep := degrees["ep"]) > 1:
        # consecutive ranks have different experts; "same" are ranks with the same experts
        submesh = _submesh(
            world_mesh,
            {"pp": pp, "same": num_replicas * num_shards // ep, "ep": ep, "cp": cp, TP_AXIS: tp},
        )
        expert_mesh = submesh["ep"]
        expert_replica_mesh = submesh["same", "cp"]._flatten("replicas")
    if zero_stage > 1 and num_replicas * cp == 1:  # the data ranks are the shard ranks
        data_mesh = fsdp_mesh = lightning_mesh[DP_AXIS]
        tp_mesh = lightning_mesh[TP_AXIS]
    else:
        if zero_stage == 1:  # every rank has full parameters (zero1.py)
            num_copies, num_shards = num_replicas * num_shards * cp, 1
        else:  # ranks of cp have different tokens, and shard parameters together with dp_shard
            num_copies, num_shards = num_replicas, num_shards * cp
        submesh = _submesh(
            # copies: ranks with equal shards, with ZeRO-1 with full parameters
            world_mesh,
            {"pp": pp, "copies": num_copies, "shards": num_shards, TP_AXIS: tp},
        )
        replicate_shard_mesh = submesh["copies", "shards"]
        fsdp_mesh = replicate_shard_mesh if num_copies > 1 else submesh["shards"]
        # one axis, over which gradients are averaged
        data_mesh = replicate_shard_mesh._flatten("data")
        tp_mesh = submesh[TP_AXIS]
    # tp_mesh and data_mesh are used for gradients, fsdp_mesh for shards
    return MeshLayout(
        degrees, lightning_mesh, data_mesh, fsdp_mesh, tp_mesh, expert_mesh, expert_replica_mesh
    )


def _submesh(world: DeviceMesh, sizes: dict[str, int]) -> DeviceMesh:
    """Return all processes as a mesh with these axes; their sizes multiply to the number."""
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes))
