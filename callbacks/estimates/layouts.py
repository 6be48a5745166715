"""Memory and communication of one rank under each strategy, from the simulation of one process.

    P parameters   G gradients   S optimizer state   A activations   n data-parallel ranks

    ddp     P + G + S + A                              2 G
    zero1   P + (G + S) / n + A                        2 P
    zero2   P + (P + G + S) / n + A + buffers          P + G in each micro-batch
    zero3   (P + G + S) / n + two units + A + buffers  2 P + G in each micro-batch
    hsdp    zero3 over n / 2 ranks                     and 2 G / (n / 2) once a step
    tp, sp  split matrices / n, activations between them / n; sp: of a block / n     8 A of a block
    cp      as zero3, and A / n + buffers of the ring  4.5 A of a block
    ep      as zero3, and experts / n                  16 A of a block
    pp      blocks / n, micro-batches in flight        2 A of a boundary

The bytes sent are for n large; a ring sends (n - 1) / n of them. A is that of each moment of the
simulated step, so that the result is the peak of the sum. A shard of a parameter has
ceil(rows / n) rows, as in FSDP2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ravine.errors import UsageError
from ravine.strategies.context_parallel import BACKWARD_HEAD_GROUPS, FORWARD_HEAD_GROUPS
from ravine.strategies.device_mesh import MESH_AXES, resolve_degrees
from ravine.strategies.mesh_strategy import MeshStrategy
from ravine.strategies.presets import STRATEGY_PRESETS
from ravine.strategies.work_partition import assign_balanced

from .module_traits import ModuleTraits, describe_module
from .simulation import ParameterInfo, Simulation
from .tensor_tracker import CLASSES, Moment

__all__ = ["Layout", "LayoutCalculator", "ModuleTraits", "Ranks", "describe_module"]

BUCKET_BYTES = 25 * 2**20  # of gradients in DDP and ZeRO-1
# the order in which to try strategies (docs/parallelism.md)
ORDER = ("ddp", "zero1", "zero2", "zero3", "hsdp", "sp", "cp", "ep", "tp", "2d", "pp", "3d")
assert {*ORDER} == {"ddp", *STRATEGY_PRESETS}
DEFAULT_MICROBATCHES = 4  # of a pipeline
SCALED_CLASSES = ("activations", "temporary")  # in proportion to the micro-batch


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run: devices of a node, nodes, and the bytes/s that a rank sends.

    `local_bandwidth` is that within a node.
    """

    devices: int = 1
    num_nodes: int = 1
    bandwidth: float = 450e9
    link: str = "nvlink"
    local_bandwidth: float = 450e9

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class MeshPlan:
    """The axes of a strategy on the ranks of a run.

    Attributes:
        name: of the row.
        preset: the name to type.
        degrees: the size of each axis.
        overrides: arguments of the strategy to type beside the preset.
        zero_stage: 1, 2 or 3.
        sequence_parallel: whether activations are split along the sequence over `tp`.
        num_microbatches: of a pipeline.
    """

    name: str
    preset: str
    degrees: dict[str, int]
    overrides: dict[str, Any] = field(default_factory=dict)
    zero_stage: int = 3
    sequence_parallel: bool = False
    num_microbatches: int = DEFAULT_MICROBATCHES


def preset_plan(name: str, ranks: Ranks, num_experts: int = 0) -> MeshPlan:
    """Return the axes of a preset on these ranks.

    With several nodes `tp`, `sp` and `cp` stay within a node, and `pp` has a stage a node; the
    other ranks shard the parameters.

    Args:
        name: a key of STRATEGY_PRESETS.
        ranks: the ranks of the run.
        num_experts: of a mixture; `ep` is at most this number.

    Raises:
        UsageError: the axes do not divide the ranks.
    """
    arguments = STRATEGY_PRESETS[name][1]
    axes = {axis: size for axis, size in arguments.items() if axis in (*MESH_AXES, "ep")}
    overrides: dict[str, Any] = {}
    if ranks.num_nodes > 1 and name in ("tp", "sp", "cp", "pp"):
        axis = "tp" if name == "sp" else name
        overrides = {axis: ranks.num_nodes if name == "pp" else ranks.devices, "dp_shard": -1}
    if name == "ep" and num_experts and num_experts % ranks.size:
        overrides = {"ep": math.gcd(num_experts, ranks.size)}
    degrees = resolve_degrees({"dp_shard": -1} | axes | overrides, ranks.size)
    num_microbatches = max(DEFAULT_MICROBATCHES, degrees["pp"])
    if num_microbatches > DEFAULT_MICROBATCHES:  # at least one for each stage
        overrides |= {"num_microbatches": num_microbatches}
    return MeshPlan(
        name,
        name,
        degrees,
        overrides,
        int(arguments.get("zero_stage", 3)),
        bool(arguments.get("sequence_parallel", False)),
        num_microbatches,
    )


def configured_plan(strategy: Any, ranks: Ranks) -> MeshPlan | None:
    """Return the axes of a strategy object that is not equal to a preset; None for others.

    Raises:
        UsageError: the axes do not divide the ranks.
    """
    if not isinstance(strategy, MeshStrategy):
        return None
    degrees = resolve_degrees(strategy.degrees, ranks.size)
    axes = {axis: size for axis, size in degrees.items() if size > 1}
    name = " x ".join(f"{axis} {size}" for axis, size in axes.items()) or "mesh"
    plan = MeshPlan(
        name,
        "3d",
        degrees,
        dict(degrees),
        strategy.zero_stage,
        strategy.sequence_parallel,
        strategy.num_microbatches,
    )
    for preset in STRATEGY_PRESETS:
        try:
            known = preset_plan(preset, ranks)
        except UsageError:
            continue
        same = (known.degrees, known.zero_stage, known.sequence_parallel)
        if same == (plan.degrees, plan.zero_stage, plan.sequence_parallel):
            return replace(known, num_microbatches=plan.num_microbatches)
    typed = {"num_microbatches": strategy.num_microbatches} if degrees["pp"] > 1 else {}
    typed |= {"sequence_parallel": True} if strategy.sequence_parallel else {}
    typed |= {"zero_stage": strategy.zero_stage} if strategy.zero_stage != 3 else {}
    return replace(plan, overrides=plan.overrides | typed)


@dataclass
class Layout:
    """One row of the table: a strategy on the ranks of a run.

    Attributes:
        name: name of the strategy.
        classes: bytes per rank at the peak, by class.
        sent_bytes: bytes that a rank sends in an optimizer step.
        collectives: number of collectives of an optimizer step, by kind.
        exposed_s: seconds of messages that no computation hides.
        overlapped_s: seconds of messages that are sent during the passes.
        is_exact: whether shards are computed parameter by parameter; else activations are scaled.
        dp_size: data-parallel ranks, each with a batch of its own.
        rows: micro-batch of such a rank, in micro-batches of the simulation.
        compute_fraction: part of the FLOPs of a simulated micro-batch that a rank computes.
        plan: the axes; None for ddp and for one process.
        levels: bytes that are fixed, and bytes of SCALED_CLASSES, at the moments of the step of
            which no other one has more of both.
    """

    name: str
    classes: dict[str, float]
    sent_bytes: float = 0.0
    collectives: dict[str, int] = field(default_factory=dict)
    exposed_s: float = 0.0
    overlapped_s: float = 0.0
    is_exact: bool = True
    dp_size: int = 1
    rows: int = 1
    compute_fraction: float = 1.0
    plan: MeshPlan | None = None
    levels: list[tuple[float, float]] = field(default_factory=list)

    @property
    def peak_bytes(self) -> float:
        """Return the bytes of all classes at the peak."""
        return sum(self.classes.values())


def shard_bytes(parameter: ParameterInfo, num_ranks: int, num_bytes: int | None = None) -> int:
    """Return the bytes of the largest shard of a parameter, with ceil(rows / n) rows.

    Args:
        parameter: the whole parameter.
        num_ranks: the ranks over which it is divided along its first axis.
        num_bytes: bytes of a tensor of the same shape, such as a state; by default its own.
    """
    size = parameter.num_bytes if num_bytes is None else num_bytes
    if num_ranks == 1 or not parameter.shape or not parameter.numel:
        return size
    rows = parameter.shape[0]
    return size // rows * math.ceil(rows / num_ranks)


@dataclass
class _Stage:
    """The parameters and blocks of a pipeline stage; without a pipeline all of them."""

    names: set[str]
    num_blocks: int
    num_in_flight: int  # micro-batches whose activations it keeps
    has_end: bool  # whether it computes what follows the blocks


class LayoutCalculator:
    """Computes the layouts of a run from its simulation in one process.

    Args:
        simulation: of one rank, whose micro-batch is that of data parallelism over all ranks.
        traits: of the module.
        ranks: the ranks of the run.
        is_half: whether matrix products use 16 bits (mixed precision).
        divides_batch: whether the datamodule divides a batch over the data-parallel ranks. So ranks
            that share one model get a larger micro-batch.
        is_on_gpu: whether the tensors of data sets are not on the device.
        configured: axes of the run that no preset has.

    Attributes:
        reasons: by the name of a strategy that has no row, why.
        rejected: the strategies of these that the module or the data do not support.
    """

    def __init__(
        self,
        simulation: Simulation,
        traits: ModuleTraits,
        ranks: Ranks,
        is_half: bool,
        divides_batch: bool,
        is_on_gpu: bool = False,
        configured: MeshPlan | None = None,
    ) -> None:
        """Sum up the parameters."""
        # data sets stay in the memory of the host
        self.moments = [_without_data(m) if is_on_gpu else m for m in simulation.moments]
        self.simulation, self.traits, self.ranks = simulation, traits, ranks
        self.is_half, self.divides_batch = is_half, divides_batch
        self.configured = configured
        self.reasons: dict[str, str] = {}
        self.rejected: set[str] = set()
        self.parameters = simulation.parameters
        self.trainable = [p for p in self.parameters if p.is_trainable]
        self.param_bytes = sum(p.num_bytes for p in self.parameters)
        self.gradient_bytes = sum(p.num_bytes for p in self.trainable)

    def all_layouts(self) -> list[Layout]:
        """Return the layouts that are possible, in the order to try them; `reasons` has others."""
        if self.ranks.size == 1:
            return [self.single()]
        layouts = [self.ddp(), self.zero1()]
        plans = []
        for name in ORDER[2:]:
            try:
                plans.append(preset_plan(name, self.ranks, self.traits.num_experts))
            except UsageError as error:
                self.reasons[name] = error.problem
        if self.configured is not None and self.configured.name not in ORDER:
            plans.append(self.configured)
        for plan in plans:
            reason, equivalent = self.reason_against(plan), _equivalent(plan)
            if reason or equivalent:
                self.reasons[plan.name] = reason or equivalent
            else:
                layouts.append(self.mesh(plan))
            if reason:
                self.rejected.add(plan.name)
        return layouts

    def reason_against(self, plan: MeshPlan) -> str:
        """Return why the run cannot use these axes; "" if it can."""
        degrees, length = plan.degrees, self.simulation.length
        reason = self.traits.reason_against(degrees, plan.sequence_parallel)
        if reason or length is None:
            return reason
        for axis, divisor in (("tp", degrees["tp"]), ("cp", 2 * degrees["cp"])):
            is_split = degrees[axis] > 1 and (axis == "cp" or plan.sequence_parallel)
            if is_split and length % divisor:
                return f"{axis}={degrees[axis]} does not divide sequences of {length} tokens"
        return ""

    def peak(
        self, rescale: Callable[[Moment], dict[str, float]]
    ) -> tuple[dict[str, float], list[tuple[float, float]]]:
        """Return the classes of the highest moment, and the `levels` of a Layout.

        Args:
            rescale: returns the bytes of a rank by class at a moment of the simulation.
        """
        highest, pairs, peak = {}, [], -1.0
        for moment in self.moments:
            classes = rescale(moment)
            total = sum(classes.values())
            # the optimizer step does not depend on the micro-batch
            in_pass = moment.phase in ("forward", "backward")
            scaled = sum(classes[name] for name in SCALED_CLASSES) * in_pass
            pairs.append((total - scaled, scaled))
            if total > peak:
                highest, peak = classes, total
        levels: list[tuple[float, float]] = []
        for fixed, scaled in sorted(pairs, reverse=True):
            if not levels or scaled > levels[-1][1]:
                levels.append((fixed, scaled))
        return highest, levels

    def single(self) -> Layout:
        """One process, as simulated."""
        classes, levels = self.peak(_classes_of)
        return Layout("single", classes, levels=levels)

    def ddp(self) -> Layout:
        """Every rank has everything, and gradients stay in the buckets that are all-reduced."""
        n = self.ranks.size

        def rescale(moment: Moment) -> dict[str, float]:
            return _classes_of(moment) | {"gradients": self.gradient_bytes}

        num_buckets = 1 + math.ceil(max(0, self.gradient_bytes - 2**20) / BUCKET_BYTES)
        sent_bytes = 2 * self.gradient_bytes * (n - 1) / n
        classes, levels = self.peak(rescale)
        return Layout(
            "ddp",
            classes,
            sent_bytes,
            {"all_reduce": num_buckets},
            overlapped_s=sent_bytes / self.ranks.bandwidth,
            dp_size=n,
            levels=levels,
        )

    def zero1(self) -> Layout:
        """Each parameter has one owner, which alone keeps its gradient and optimizer state."""
        n = self.ranks.size
        owners = assign_balanced([p.numel for p in self.trainable], [0] * n)
        states, gradients = [0] * n, [0] * n
        for owner, parameter in zip(owners, self.trainable, strict=True):
            states[owner] += parameter.state_bytes
            gradients[owner] += parameter.num_bytes
        fraction = max(gradients) / max(1, self.gradient_bytes)
        accumulates = self.simulation.accumulate > 1

        def held_gradients(moment: Moment) -> float:
            """Return own gradients, those in buckets that are not full, and a message."""
            total = moment.of("gradients")
            if accumulates and moment.phase != "step":
                return total  # all gradients stay until the last micro-batch
            owned = total * fraction
            if moment.phase != "backward":
                return owned
            message = BUCKET_BYTES if total / n >= BUCKET_BYTES else 0
            return owned + min(total - owned, (n - 1) * BUCKET_BYTES) + message

        def rescale(moment: Moment) -> dict[str, float]:
            return _classes_of(moment) | {
                "gradients": held_gradients(moment),
                "optimizer state": max(states),
            }

        sent_bytes = 2 * self.gradient_bytes * (n - 1) / n
        num_messages = 2 * math.ceil(self.gradient_bytes / BUCKET_BYTES) * (n - 1)
        classes, levels = self.peak(rescale)
        return Layout(
            "zero1",
            classes,
            sent_bytes,
            {"send": num_messages},
            overlapped_s=sent_bytes / self.ranks.bandwidth,
            dp_size=n,
            plan=preset_plan("zero1", self.ranks),
            levels=levels,
        )

    def mesh(self, plan: MeshPlan) -> Layout:
        """Any axes of a MeshStrategy with ZeRO-2 or 3, at the stage that needs the most memory."""
        return max(
            (_MeshRank(self, plan, stage).layout() for stage in self._stages(plan)),
            key=lambda layout: layout.peak_bytes,
        )

    def _stages(self, plan: MeshPlan) -> list[_Stage]:
        """Return the first and the last stage of the pipeline."""
        names = {p.name for p in self.parameters}
        size, traits = plan.degrees["pp"], self.traits
        if size == 1:
            return [_Stage(names, traits.num_blocks, 1, has_end=True)]
        smaller, num_larger = divmod(traits.num_blocks, size)
        sizes = [smaller + (index < num_larger) for index in range(size)]
        other = names - set(traits.block_of) - traits.first - traits.last  # of the module itself
        stages = []
        for index, ends in ((0, traits.first), (size - 1, traits.last)):
            start = sum(sizes[:index])
            blocks = range(start, start + sizes[index])
            inside = {name for name, block in traits.block_of.items() if block in blocks}
            in_flight = min(size - index, plan.num_microbatches)
            stages.append(
                _Stage(inside | set(ends) | other, sizes[index], in_flight, index == size - 1)
            )
        return stages


class _MeshRank:
    """A rank of a mesh: what it holds at each moment, and what it sends.

    Args:
        calculator: of the run.
        plan: the axes.
        stage: the pipeline stage of the rank.
    """

    def __init__(self, calculator: LayoutCalculator, plan: MeshPlan, stage: _Stage) -> None:
        """Sum up the shards of the stage."""
        self.run, self.plan, self.stage = calculator, plan, stage
        degrees = plan.degrees
        self.tp, self.cp, self.ep = degrees["tp"], degrees["cp"], degrees["ep"]
        self.pp, self.num_replicas = degrees["pp"], degrees["dp_replicate"]
        self.num_shards = degrees["dp_shard"] * self.cp
        self.dp_size = self.num_replicas * degrees["dp_shard"]
        self.is_sharded = self.num_shards * self.num_replicas > 1
        # ranks that share one model get a larger micro-batch
        self.rows = calculator.ranks.size // self.dp_size if calculator.divides_batch else 1
        self.parameters = [p for p in calculator.parameters if p.name in stage.names]
        self.trainable = [p for p in self.parameters if p.is_trainable]
        self.param_bytes = sum(map(self.shard_size, self.parameters))
        self.gradient_bytes = sum(map(self.shard_size, self.trainable))
        self.state_bytes = sum(
            self.shard_size(p, num_bytes) if shape == p.shape else num_bytes
            for p in self.trainable
            for shape, num_bytes in p.state
        )
        by_name = {p.name: p for p in self.parameters}
        units = (
            sum(self.gathered_size(by_name[name]) for name in names if name in by_name)
            for names in calculator.traits.units
        )
        self.unit_bytes = sorted(filter(None, units), reverse=True) if self.is_sharded else []

    def shard_size(self, parameter: ParameterInfo, num_bytes: int | None = None) -> int:
        """Return the bytes that this rank has of a parameter, or of a state of its shape."""
        size = parameter.num_bytes if num_bytes is None else num_bytes
        is_expert = self.ep > 1 and parameter.name in self.run.traits.experts
        num_shards = self.ep if is_expert else self.num_shards
        split = self.run.traits.splits.get(parameter.name)
        if self.tp == 1 or split is None:
            return shard_bytes(parameter, num_shards, size)
        shape = list(parameter.shape)
        shape[split.axis] //= self.tp
        local = replace(parameter, shape=tuple(shape))
        return shard_bytes(local, num_shards, size // self.tp)

    def gathered_size(self, parameter: ParameterInfo) -> int:
        """Return the bytes of a gathered parameter: in half precision unless it is a vector."""
        if self.ep > 1 and parameter.name in self.run.traits.experts:
            return 0
        is_cast = self.run.is_half and parameter.itemsize == 4 and len(parameter.shape) > 1
        size = parameter.num_bytes // 2 if is_cast else parameter.num_bytes
        return size // self.tp if parameter.name in self.run.traits.splits else size

    def activations(self, moment: Moment) -> float:
        """Return the bytes of activations at a moment of the simulated micro-batch."""
        total = moment.of("activations")
        # with sp all of a block is divided, and with tp what lies between split matrices
        unsplit = (moment.in_blocks - moment.split) / (
            self.tp if self.plan.sequence_parallel else 1
        )
        in_blocks = unsplit + moment.split / self.tp
        part_of_blocks = self.stage.num_blocks / max(1, self.run.traits.num_blocks)
        outside = (total - moment.in_blocks) * self.stage.has_end
        if self.pp == 1:
            part_of_blocks = 1.0
        kept = in_blocks * part_of_blocks + outside
        return kept * self.rows / self.cp * self.stage.num_in_flight / self._num_microbatches

    @property
    def _num_microbatches(self) -> int:
        return self.plan.num_microbatches if self.pp > 1 else 1

    def classes(self, moment: Moment) -> dict[str, float]:
        """Return the bytes of this rank at a moment of the simulated step, by class."""
        run = self.run
        in_pass = moment.phase in ("forward", "backward")
        in_backward = moment.phase == "backward"
        part_of_params = self.param_bytes / max(1, run.param_bytes)
        scale = self.rows / self.cp / self._num_microbatches
        gathered = sum(self.unit_bytes[: None if self.plan.zero_stage == 2 else 2])
        message = 2.0 * self.unit_bytes[0] if self.unit_bytes else 0.0
        gradients = moment.of("gradients") * self.gradient_bytes / max(1, run.gradient_bytes)
        if self.pp > 1:
            gradients = self.gradient_bytes  # from the first of its micro-batches on
            message += max((p.num_bytes for p in self.trainable), default=0)
        return _classes_of(moment) | {
            "parameters": self.param_bytes,
            "gradients": gradients,
            "optimizer state": self.state_bytes,
            "copies": moment.of("copies") * part_of_params,
            "weight casts": 0.0 if self.is_sharded else moment.of("weight casts") * part_of_params,
            "activations": self.activations(moment),
            "temporary": moment.of("temporary") * scale,
            "batch": moment.of("batch") * self.rows / self.cp,
            "gathered": gathered * in_pass,
            "communication": message * in_backward,
        }

    def layout(self) -> Layout:
        """Return the row of this rank."""
        run, plan = self.run, self.plan
        itemsize = 2 if run.is_half else 4
        accumulate, num_blocks = run.simulation.accumulate, max(1, self.stage.num_blocks)
        activation = run.simulation.units * self.rows / self.cp * self._width() * itemsize
        num_gathers = 1 if plan.zero_stage == 2 else 2
        n, count = self.num_shards, len(self.unit_bytes) * accumulate
        gathered = sum(self.unit_bytes)
        gradients = sum(p.num_bytes for p in self.trainable)
        # each axis: messages by kind, bytes that this rank sends, whether they leave the node
        collectives: dict[str, int] = {}
        overlapped = exposed = sent_bytes = 0.0
        if self.is_sharded:
            collectives |= {"all_gather": num_gathers * count, "reduce_scatter": count}
            sent_bytes = accumulate * (num_gathers * gathered + gradients / self.tp) * (n - 1) / n
            if self.num_replicas > 1:
                collectives["all_reduce"] = len(self.unit_bytes)
                replicas = self.num_replicas
                sent_bytes += 2 * gradients / self.tp / n * (replicas - 1) / replicas
            overlapped = sent_bytes / run.ranks.bandwidth
        if self.tp > 1:
            number = 4 * num_blocks * accumulate
            if plan.sequence_parallel:
                _add(collectives, all_gather=number + 2 * accumulate, reduce_scatter=number)
            else:
                _add(collectives, all_reduce=number)
            size = 8 * num_blocks * activation * (self.tp - 1) / self.tp * accumulate
            sent_bytes, exposed = sent_bytes + size, exposed + size / run.ranks.local_bandwidth
        if self.cp > 1:
            groups = BACKWARD_HEAD_GROUPS.get(self.cp, 4)
            number = num_blocks * (self.cp - 1) * (FORWARD_HEAD_GROUPS + 2 * groups)
            _add(collectives, send=number * accumulate)
            size = 4.5 * num_blocks * activation * (self.cp - 1) * accumulate
            sent_bytes += size
            overlapped += size / run.ranks.local_bandwidth
        if self.ep > 1:
            _add(collectives, all_to_all=4 * num_blocks * accumulate)
            size = 16 * num_blocks * activation * (self.ep - 1) / self.ep * accumulate
            sent_bytes, exposed = sent_bytes + size, exposed + size / run.ranks.bandwidth
        if self.pp > 1:
            _add(collectives, send=2 * plan.num_microbatches * accumulate)
            size = 2 * activation * accumulate
            sent_bytes, exposed = sent_bytes + size, exposed + size / run.ranks.bandwidth
        # a pipeline waits (p - 1) / m of the time
        waits = 1 + (self.pp - 1) / self._num_microbatches
        classes, levels = run.peak(self.classes)
        return Layout(
            plan.name,
            classes,
            sent_bytes,
            collectives,
            exposed,
            overlapped,
            is_exact=self.tp * self.cp * self.pp * self.ep == 1,
            dp_size=self.dp_size,
            rows=self.rows,
            compute_fraction=self.rows / (self.tp * self.cp * self.pp) * waits,
            plan=plan,
            levels=levels,
        )

    def _width(self) -> int:
        """Return the width of the activations between blocks."""
        shapes = {p.name: p.shape for p in self.parameters}
        splits = self.run.traits.splits
        matrices = [shapes[n] for n, split in splits.items() if split.axis == 0 and n in shapes]
        widths = [shape[1] for shape in matrices if len(shape) > 1]
        return widths[0] if widths else 1


def _equivalent(plan: MeshPlan) -> str:
    """Return which other row has the numbers of these axes; "" for axes with a row."""
    degrees = plan.degrees
    if degrees["dp_replicate"] > 1 and degrees["dp_shard"] * degrees["cp"] == 1:
        return "each replica is one rank, as with ddp"
    if plan.name == "2d" and degrees["dp_shard"] == 1:
        return "2 ranks: the same as tp"
    if plan.zero_stage == 1 and plan.name not in ORDER:
        return "zero_stage=1 together with other axes is not computed"
    return ""


def _add(counts: dict[str, int], **more: int) -> None:
    for kind, number in more.items():
        counts[kind] = counts.get(kind, 0) + number


def _without_data(moment: Moment) -> Moment:
    index = CLASSES.index("data")
    num_bytes = tuple(0 if i == index else n for i, n in enumerate(moment.num_bytes))
    return moment._replace(num_bytes=num_bytes)


def _classes_of(moment: Moment) -> dict[str, float]:
    return dict(zip(CLASSES, map(float, moment.num_bytes), strict=True))


def check_divisible(name: str, ranks: Ranks) -> None:
    """Raise UsageError if a preset's axes do not divide the ranks of the run."""
    if name in STRATEGY_PRESETS:
        _, arguments = STRATEGY_PRESETS[name]
        axes = {axis: size for axis, size in arguments.items() if axis in (*MESH_AXES, "ep")}
        resolve_degrees({"dp_shard": -1} | axes, ranks.size)
